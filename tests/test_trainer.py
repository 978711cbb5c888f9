import logging

import pytest
import tiny_training
import torch
from tiny_training import label_fields
from torch import nn
from transformers import TrainerCallback

from dit_detection import (
    DetectionTrainer,
    DetectionTrainingArguments,
    DiTDetectionImageProcessor,
    DiTForObjectDetection,
    add_lora,
)
from dit_detection.data import draw_shapes_dataset
from dit_detection.training.trainer import PADDING, parameter_groups

NUM_IMAGES = 7
TIMES = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time"}


@pytest.fixture(scope="module")
def dataset():
    return draw_shapes_dataset(8, NUM_IMAGES, 0, image_size=(48, 64))


@pytest.fixture
def make_trainer(tiny_model, dataset, tmp_path):
    def make(**arguments):
        return tiny_training.make_trainer(tiny_model(**label_fields(dataset)), dataset, tmp_path, **arguments)

    return make


class Watch(TrainerCallback):
    """Looks at the model at the end of each epoch."""

    def __init__(self, look):
        self.look = look

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.look(model)


def class_fields(names):
    label2id = {name: label for label, name in enumerate(names)}
    return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": label2id}


def test_defaults_need_no_knowledge_of_the_trainer():
    arguments = DetectionTrainingArguments(output_dir="unused", use_cpu=True)
    assert arguments.remove_unused_columns is False
    assert arguments.metric_for_best_model == "map" and arguments.greater_is_better
    assert arguments.eval_strategy == arguments.save_strategy == "epoch"


@pytest.mark.parametrize(
    ("metric", "is_greater_better"), [("map", True), ("map_50", True), ("loss", False), ("eval_loss", False)]
)
def test_the_best_is_the_smallest_loss_or_the_largest_of_all_else(metric, is_greater_better):
    arguments = DetectionTrainingArguments(
        "unused", use_cpu=True, metric_for_best_model=metric, lr_scheduler_type="reduce_lr_on_plateau"
    )
    assert arguments.greater_is_better is is_greater_better
    assert arguments.lr_scheduler_kwargs["mode"] == ("max" if is_greater_better else "min")


def test_a_rising_map_is_no_plateau(make_trainer, monkeypatch):
    trainer = make_trainer(
        num_train_epochs=4, lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 0}
    )
    maps = iter([0.1, 0.2, 0.3, 0.2])
    monkeypatch.setattr(trainer, "compute_metrics", lambda prediction: {"map": next(maps)})
    trainer.train()
    # Logged before the evaluation of the epoch: that of the last one, which was worse, comes after.
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == [1e-4] * 4
    assert max(group["lr"] for group in trainer.optimizer.param_groups) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("option", "value"),
    [("label_smoothing_factor", 0.1), ("eval_do_concat_batches", False), ("prediction_loss_only", True)],
)
def test_options_that_cannot_work_are_refused_at_once(option, value):
    with pytest.raises(ValueError, match=f"{option}={value} does not go with detection"):
        DetectionTrainingArguments("unused", use_cpu=True, **{option: value})


@pytest.mark.parametrize("patience", [0, -1])
def test_patience_is_for_one_evaluation_at_least(patience):
    with pytest.raises(ValueError, match=f"early_stopping_patience={patience} must be 1 or more"):
        DetectionTrainingArguments("unused", use_cpu=True, early_stopping_patience=patience)


def test_rows_that_are_no_inputs_are_told_how_they_become_some(make_trainer, dataset):
    trainer = make_trainer()
    with pytest.raises(
        ValueError, match=r"has image, .*objects, but no pixel_values.*DetectionDataset\(rows, image_pro"
    ):
        trainer.evaluate(dataset["validation"])


def test_images_without_labels_cannot_be_measured(make_trainer):
    trainer = make_trainer()
    images = [{"pixel_values": torch.zeros(3, 64, 64), "pixel_mask": torch.ones(64, 64)}] * 2
    trainer.data_collator = lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with pytest.raises(ValueError, match="have no labels"):
        trainer.predict(images)


def test_learning_rates_by_hand(tiny_model):
    model = tiny_model()  # 2 blocks
    arguments = DetectionTrainingArguments(
        output_dir="unused", use_cpu=True, learning_rate=1e-3, backbone_learning_rate=1e-4, layer_decay=0.5
    )
    rates = {}
    for group in parameter_groups(model, arguments):
        for parameter in group["params"]:
            rates[parameter] = (group["lr"], group["weight_decay"])
    backbone = model.model.backbone
    # The deepest of two blocks learns at 1e-4, the first at half of it, the embedding at a quarter.
    assert rates[backbone.layers[1].mlp.fc1.weight] == (1e-4, 0.05)
    assert rates[backbone.layers[0].mlp.fc1.weight] == (5e-5, 0.05)
    assert rates[backbone.patch_embedding.projection.weight] == (2.5e-5, 0.05)
    assert rates[backbone.layers[0].norm1.weight] == (5e-5, 0.0)
    assert rates[backbone.layers[0].scale1.weight] == (5e-5, 0.0)
    assert rates[backbone.tap_norms[0].weight] == (1e-3, 0.0)
    assert rates[model.head.class_predictor.weight] == (1e-3, 0.05)
    assert rates[model.head.class_predictor.bias] == (1e-3, 0.0)
    assert len(rates) == len(list(model.parameters()))


def test_frozen_parameters_are_not_optimised(tiny_model):
    model = tiny_model()
    model.freeze_backbone()
    groups = parameter_groups(model, DetectionTrainingArguments(output_dir="unused", use_cpu=True))
    optimised = {parameter for group in groups for parameter in group["params"]}
    assert optimised == {parameter for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("batch_size", [2, 3, 7, 16])
def test_evaluation_does_not_depend_on_the_batch_size(make_trainer, batch_size):
    one_by_one = make_trainer(per_device_eval_batch_size=1).evaluate()
    batched = make_trainer(per_device_eval_batch_size=batch_size).evaluate()
    for name in one_by_one.keys() - TIMES:
        assert batched[name] == pytest.approx(one_by_one[name], abs=1e-5), name
    assert one_by_one["eval_loss"] > 0


def test_a_perfect_detector_scores_one(make_trainer, dataset, monkeypatch):
    """The whole way back from tensors to original pixels, with the ground truth as the detections."""
    trainer = make_trainer(per_device_eval_batch_size=3)
    rows = iter(dataset["validation"])

    def perfect(outputs, threshold, target_sizes):
        results = []
        for _ in range(len(target_sizes)):
            objects = next(rows)["objects"]
            boxes = torch.tensor(objects["bbox"]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            labels = torch.tensor(objects["category"], dtype=torch.int64)
            results.append({"boxes": boxes, "labels": labels, "scores": torch.linspace(1, 0.5, len(labels))})
        return results

    monkeypatch.setattr(trainer.processing_class, "post_process_object_detection", perfect)
    metrics = trainer.evaluate()
    assert metrics["eval_map"] == pytest.approx(1.0)
    assert metrics["eval_mar_100"] == pytest.approx(1.0)


def test_what_is_gathered_is_rectangular_and_small(make_trainer):
    trainer = make_trainer()
    batch = next(iter(trainer.get_eval_dataloader()))
    loss, (detections, losses), (targets, image_ids) = trainer.prediction_step(trainer.model, batch, False)
    assert loss is None
    assert detections.shape == (NUM_IMAGES, trainer.processing_class.max_detections, 6)
    assert losses.shape == (NUM_IMAGES,) and image_ids.shape == (NUM_IMAGES, 1)
    most = max(len(labels["boxes"]) for labels in batch["labels"])
    assert targets.shape == (NUM_IMAGES, most, 7)
    for rows, labels in zip(targets, batch["labels"], strict=True):
        assert (rows[len(labels["boxes"]) :] == PADDING).all()


def test_trains_keeps_the_best_and_writes_its_card(make_trainer, tmp_path):
    trainer = make_trainer(num_train_epochs=2)
    before = trainer.model.head.class_predictor.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.head.class_predictor.weight)
    maps = [entry["eval_map"] for entry in trainer.state.log_history if "eval_map" in entry]
    assert len(maps) == 2 and trainer.state.best_metric == max(maps)
    trainer.card_facts = {"dataset_name": "shapes of the test"}
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "Diffusion" in card.split("---")[2].strip().splitlines()[0]
    assert "shapes of the test" in card


@pytest.mark.parametrize("metric", ["map", "eval_mar_100"])
def test_where_nothing_can_be_measured_training_ends_with_the_last_weights(make_trainer, monkeypatch, caplog, metric):
    trainer = make_trainer(num_train_epochs=3, early_stopping_patience=1, metric_for_best_model=metric)
    monkeypatch.setattr(trainer, "compute_metrics", lambda prediction: {metric.removeprefix("eval_"): -1.0})
    heads = []
    trainer.add_callback(Watch(lambda model: heads.append(model.head.class_predictor.weight.detach().clone())))
    trainer.train()
    assert trainer.state.epoch == 3 and trainer.state.best_model_checkpoint is None
    assert torch.equal(trainer.model.head.class_predictor.weight, heads[-1]) and not torch.equal(heads[0], heads[-1])
    assert caplog.text.count("training ends with the last weights") == 1


@pytest.mark.slow
def test_a_resumed_run_keeps_the_anchors_of_its_checkpoint(tiny_model, dataset, tmp_path, caplog):
    fields = label_fields(dataset)
    anchors = {"anchor_sizes": [[9.0], [21.0], [47.0]], "aspect_ratios": [0.8]}
    tiny_training.make_trainer(tiny_model(**fields, **anchors), dataset, tmp_path).train()
    others = {"anchor_sizes": [[10.0], [20.0], [40.0]], "aspect_ratios": [1.0]}
    other = tiny_model(**fields, **others)
    resumed = tiny_training.make_trainer(other, dataset, tmp_path, num_train_epochs=2)
    resumed.train(resume_from_checkpoint="last")
    assert {name: getattr(resumed.model.config, name) for name in anchors} == anchors
    assert other.config.strides == [8, 16, 32]
    assert "Training goes on with the anchors of" in caplog.text
    made = {"model_init": lambda: tiny_model(**fields, **others)}
    resumed = tiny_training.make_trainer(None, dataset, tmp_path, made, num_train_epochs=3)
    assert resumed.model.config.anchor_sizes != anchors["anchor_sizes"]
    resumed.train(resume_from_checkpoint="last")
    assert {name: getattr(resumed.model.config, name) for name in anchors} == anchors


def test_only_the_detector_of_a_checkpoint_goes_on_from_it(tiny_model, dataset, tmp_path):
    """Of others the weights may fit, and mean something else."""
    fields = label_fields(dataset)
    tiny_training.make_trainer(tiny_model(**fields, base_model="a"), dataset, tmp_path / "run").train()
    names = list(fields["id2label"].values())
    others = {
        "timestep 50 there, 700 here": {"timestep": 700},
        "base_model 'a' there, 'b' here": {"base_model": "b"},
        r"num_hidden_layers 2 there, 3 here; out_indices \[0, 1\] there": {"num_hidden_layers": 3},
        f"classes {', '.join(names)} there, {', '.join(names[::-1])} here": class_fields(names[::-1]),
        f"{names[-1]} there, {', '.join(names)}, new here": class_fields([*names, "new"]),
    }
    for message, changed in others.items():
        model = tiny_model(**(fields | {"base_model": "a"} | changed))
        resumed = tiny_training.make_trainer(model, dataset, tmp_path / "run", num_train_epochs=2)
        with pytest.raises(ValueError, match=f"checkpoint-2 is of another detector: .*{message}.* begin anew"):
            resumed.train(resume_from_checkpoint="last")


@pytest.mark.slow
def test_rates_are_those_of_the_checkpoint_and_it_says_so(make_trainer, caplog):
    make_trainer(weight_decay=0.25, layer_decay=1.0).train()
    again = {"num_train_epochs": 2, "layer_decay": 1.0}
    make_trainer(weight_decay=0.25, **again).train(resume_from_checkpoint="last")
    assert "asked for" not in caplog.text
    changed = make_trainer(weight_decay=0.5, learning_rate=1e-3, **(again | {"num_train_epochs": 3}))
    changed.train(resume_from_checkpoint="last")
    assert {group["weight_decay"] for group in changed.optimizer.param_groups} == {0.0, 0.25}
    assert "such as (0.0001, 0.25), and not with those that are asked for, (0.001, 0.5)" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint-6 is of other weights, .*number.*--freeze_layers, --l"):
        make_trainer(num_train_epochs=4).train(resume_from_checkpoint="last")


@pytest.mark.slow
def test_adapters_go_on_from_adapters_of_their_base(tiny_model, dataset, tmp_path):
    pytest.importorskip("peft")
    names = list(label_fields(dataset)["id2label"].values())
    for folder, order in (("base", names), ("other", names[::-1])):
        tiny_model(**class_fields(order)).save_pretrained(tmp_path / folder)

    def make(run, base, lora, epochs=2):
        model = DiTForObjectDetection.from_pretrained(tmp_path / base)
        model = add_lora(model, 2) if lora else model
        return tiny_training.make_trainer(model, dataset, tmp_path / run, num_train_epochs=epochs)

    make("adapter", "base", True, 1).train()
    make("detector", "base", False, 1).train()
    make("adapter", "base", True).train(resume_from_checkpoint="last")
    with pytest.raises(ValueError, match=f"is of another detector: classes {', '.join(names)} there"):
        make("adapter", "other", True).train(resume_from_checkpoint="last")
    with pytest.raises(ValueError, match=r"is of a detector, and what is to be trained is an adapter.*--lora_r"):
        make("detector", "base", True).train(resume_from_checkpoint="last")
    with pytest.raises(ValueError, match="is of an adapter, and what is to be trained is a detector"):
        make("adapter", "base", False).train(resume_from_checkpoint="last")


def test_one_process_takes_one_gpu(tiny_model, tmp_path, caplog):
    """`DataParallel`, which Trainer would take for several, cannot cut labels by images."""
    args = DetectionTrainingArguments(str(tmp_path), use_cpu=True, eval_strategy="no", load_best_model_at_end=False)
    assert args.n_gpu == 0
    args._n_gpu = 4  # as on a machine with four
    with caplog.at_level(logging.WARNING):
        trainer = DetectionTrainer(tiny_model(), args, processing_class=DiTDetectionImageProcessor(size=64))
    assert trainer.args.n_gpu == 1 and "accelerate launch --multi_gpu uses all" in caplog.text


def test_without_an_image_processor_the_error_says_what_it_is_for():
    with pytest.raises(ValueError, match="processing_class, the image processor"):
        DetectionTrainer(nn.Linear(1, 1))


def test_weights_that_train_are_not_float16(make_trainer):
    trainer = make_trainer()
    trainer.model.half()
    with pytest.raises(ValueError, match=r"dtype=torch\.float32"):
        trainer.train()
    trainer.model.head.float()
    trainer.model.freeze_backbone()
    with pytest.raises(ValueError, match=r"tap_norms\.0\.weight is float16"):
        trainer.train()
