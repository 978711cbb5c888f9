import pytest
import tiny_training
import torch
from tiny_training import label_fields

from dit_detection import DetectionDataset
from dit_detection.data import draw_shapes_dataset
from dit_detection.training.frozen_dataset import FrozenDataset


@pytest.fixture(scope="module")
def dataset():
    return draw_shapes_dataset(20, 4, 12, image_size=(48, 64))


@pytest.fixture
def make_trainer(tiny_model, dataset, tmp_path):
    def make(more=None, **arguments):
        arguments = {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no"} | arguments
        model = tiny_model(**label_fields(dataset))
        return tiny_training.make_trainer(
            model, dataset, tmp_path, more, load_best_model_at_end=False, frozen_cache_dir=str(tmp_path), **arguments
        )

    return make


def count_images(trainer, **data):
    return sum(len(batch["labels"]) for batch in trainer.get_eval_dataloader(**data))


def test_persistent_workers_read_the_data_set_that_is_asked_for(make_trainer, dataset):
    trainer = make_trainer(dataloader_persistent_workers=True, dataloader_num_workers=1)
    test = DetectionDataset(dataset["test"], trainer.processing_class)
    assert count_images(trainer) == 4
    first = trainer.get_eval_dataloader()
    assert trainer.get_eval_dataloader() is first
    assert count_images(trainer, eval_dataset=test) == 12
    assert count_images(trainer) == 4
    trainer.eval_dataset = test
    assert count_images(trainer) == 12
    trainer.eval_dataset = {"many": test, "few": DetectionDataset(dataset["validation"], trainer.processing_class)}
    assert count_images(trainer, eval_dataset="few") == 4
    assert count_images(trainer, eval_dataset="many") == 12
    for loader in trainer._eval_dataloaders.values():
        loader.base_dataloader._iterator = (
            None  # ends its workers now, and not in another test, which would wait for them
        )


def test_evaluations_drop_no_image(make_trainer):
    trainer = make_trainer(dataloader_drop_last=True, per_device_eval_batch_size=3, per_device_train_batch_size=8)
    assert count_images(trainer) == 4
    assert len(trainer.get_train_dataloader()) == 2  # of 20 images
    assert trainer.args.dataloader_drop_last
    with pytest.raises(ValueError, match="20 images make no batch of 21"):
        make_trainer(dataloader_drop_last=True, per_device_train_batch_size=21).train()


@pytest.mark.slow
def test_data_sets_may_be_assigned_later(make_trainer, dataset):
    trainer = make_trainer(cache_frozen=True, repeat_factor_threshold=0.9)
    trainer.model.freeze_backbone()
    images = DetectionDataset(dataset["train"].select(range(6)), trainer.processing_class)
    seen = []
    trainer.train_dataset = images
    cached = trainer._without_frozen_part
    trainer._without_frozen_part = lambda *args: seen.append(cached(*args)) or seen[-1]
    trainer.train()
    assert isinstance(seen[0], FrozenDataset) and len(seen[0]) == 6
    # What was given is there again, and a training without the cache takes it.
    assert trainer.train_dataset is images
    sampler = trainer._get_train_sampler()
    assert set(sampler) == set(range(6)) and len(sampler) > 6


def test_a_second_training_trains_what_it_finds(make_trainer):
    trainer = make_trainer(cache_frozen=True)
    trainer.model.freeze_backbone()
    trainer.train()
    block = trainer.model.model.backbone.layers[0].mlp.fc1.weight
    before = block.detach().clone()
    trainer.model.requires_grad_(True)
    trainer.args.learning_rate, trainer.args.cache_frozen = 5e-4, False
    trainer.train()
    assert not torch.equal(block, before)
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert max(rates) == 5e-4 and len(rates) > 1


def test_an_optimizer_of_the_user_is_left_alone(make_trainer):
    given = make_trainer(more={"optimizer_cls_and_kwargs": (torch.optim.SGD, {"momentum": 0.5})})
    given.train()
    assert isinstance(given.optimizer.optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in given.optimizer.param_groups} == {0.5}
    model = given.model
    optimizer = torch.optim.SGD(model.head.parameters(), lr=1e-3)
    trainer = make_trainer(more={"optimizers": (optimizer, None)})
    for _ in range(2):
        trainer.train()
        assert trainer.optimizer.optimizer is optimizer


def test_streams_need_no_factors(make_trainer, dataset):
    trainer = make_trainer()
    trainer.args.repeat_factor_threshold = 0.5
    trainer.train_dataset = dataset["train"]
    with pytest.raises(ValueError, match=r"repeat_factor_threshold=0\.5 needs a DetectionDataset.* got Dataset"):
        trainer.train()
