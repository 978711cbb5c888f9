from unittest.mock import patch

import pytest
import torch
from tiny_training import label_fields, make_trainer
from torch.utils.flop_counter import FlopCounterMode

from dit_detection import DetectionTrainingArguments, DiTDetectionImageProcessor, DiTForObjectDetection
from dit_detection.commands import dry_run
from dit_detection.commands.dry_run import describe_cost
from dit_detection.data import draw_shapes_dataset
from dit_detection.training.cost import measure_flops_per_second, training_cost

CANVAS = (64, 96)


def run_for_real(config, num_layers, batch_size):
    """FLOPs of the frozen part and of a step without it, with real tensors."""
    model = DiTForObjectDetection(config).train()
    model.freeze_backbone(num_layers)
    with FlopCounterMode(display=False) as frozen:
        encoded = model.model.encode_frozen(torch.zeros(batch_size, 3, *CANVAS))
    with FlopCounterMode(display=False) as trained:
        outputs = model(**encoded)
        (outputs.logits.sum() + outputs.pred_boxes.sum()).backward()
    return model, encoded, frozen.get_total_flops(), trained.get_total_flops()


@pytest.mark.parametrize("num_layers", [1, 2])
def test_operations_and_cache_are_those_of_the_real_run(tiny_config, num_layers):
    config = tiny_config()
    cost = training_cost(config, CANVAS, freeze_layers=num_layers, batch_size=2)
    model, encoded, frozen_flops, trained_flops = run_for_real(config, num_layers, 2)
    assert 2 * cost.frozen_flops == frozen_flops > 0
    assert 2 * cost.trained_flops == trained_flops > 0
    assert 2 * cost.cache_bytes == encoded["frozen_states"].nbytes
    parameters = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    assert cost.num_parameters == sum(count for count, _ in parameters)
    assert cost.num_trained == sum(count for count, trained in parameters if trained)


@pytest.mark.slow
def test_memory_grows_with_the_batch_and_shrinks_with_what_is_frozen(tiny_config):
    config = tiny_config(num_hidden_layers=4, out_indices=[3])

    def memory(freeze_layers, batch_size, **arguments):
        cost = training_cost(config, CANVAS, freeze_layers=freeze_layers, batch_size=batch_size, **arguments)
        return cost.memory_bytes

    everything = memory(None, 8)
    assert everything > memory(2, 8) > memory(-1, 8)
    assert everything > memory(None, 2)
    assert memory(None, 8, dtype=torch.bfloat16) < 0.8 * everything


def test_saved_activations_are_within_the_counted_peak(tiny_config):
    config = tiny_config()
    cost = training_cost(config, CANVAS, batch_size=4)
    model = DiTForObjectDetection(config).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.head(model.neck(model.model(torch.zeros(4, 3, *CANVAS)).feature_maps.unbind(1)))
    kept = 4 * cost.num_parameters + 8 * cost.num_trained
    assert sum(saved.values()) < cost.memory_bytes - kept < 2 * sum(saved.values()) + 4 * cost.num_trained


def test_nothing_frozen_has_no_cache(tiny_config):
    cost = training_cost(tiny_config(), CANVAS)
    assert cost.frozen_flops == cost.cache_bytes == 0
    assert cost.memory_bytes == pytest.approx(cost.cached_memory_bytes, rel=0.01)
    assert cost.num_trained == cost.num_parameters


SINGLY = {"per_device_train_batch_size": 1, "num_train_epochs": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"num_train_epochs": 4}, "2 per epoch, 8 in all"),
        ({"num_train_epochs": 4, "dataloader_drop_last": True}, "1 per epoch, 4 in all"),
        ({"max_steps": 5}, "2 per epoch, 5 in all"),
        ({**SINGLY, "gradient_accumulation_steps": 3}, "2 per epoch, 2 in all"),
        ({**SINGLY, "gradient_accumulation_steps": 3, "dataloader_drop_last": True}, "2 per epoch, 2 in all"),
    ],
)
def test_the_steps_are_those_of_the_run(tiny_model, tmp_path, arguments, steps):
    dataset = draw_shapes_dataset(4, 2, 0, image_size=64)
    model, image_processor = tiny_model(**label_fields(dataset)), DiTDetectionImageProcessor(size=64)
    arguments = {"per_device_train_batch_size": 3, **arguments}
    args = DetectionTrainingArguments(str(tmp_path), use_cpu=True, **arguments)
    args._n_gpu = 4  # of which training takes one
    assert steps in describe_cost(model, image_processor, dataset, args, 1)
    trainer = make_trainer(model, dataset, tmp_path, **arguments, eval_strategy="no", load_best_model_at_end=False)
    trainer.train()
    assert f"{trainer.state.global_step} in all" in steps


@pytest.mark.slow
def test_averages_take_memory(tiny_model, tmp_path):
    dataset = draw_shapes_dataset(4, 2, 0, image_size=64)
    model, image_processor = tiny_model(**label_fields(dataset)), DiTDetectionImageProcessor(size=64)
    told = []
    for ema_decay in (None, 0.9):
        args = DetectionTrainingArguments(str(tmp_path), use_cpu=True, ema_decay=ema_decay)
        with patch.object(dry_run, "size_text", lambda num_bytes: told.append(num_bytes) or ""):
            describe_cost(model, image_processor, dataset, args, 1)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert told[-1] - told[0] == 4 * trained


def test_a_device_has_some_speed():
    assert measure_flops_per_second(torch.device("cpu"), torch.float32, seconds=0.01) > 1e8
