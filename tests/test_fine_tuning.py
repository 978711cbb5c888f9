import weakref
from collections import Counter

import pytest
import tiny_training
import torch
from tiny_training import label_fields
from torch import nn

from dit_detection import (
    DetectionTrainingArguments,
    DiTForObjectDetection,
    add_lora,
    config_space,
    hp_space,
)
from dit_detection.adapters import detector_of
from dit_detection.data import draw_shapes_dataset


@pytest.fixture(scope="module")
def dataset():
    return draw_shapes_dataset(4, 2, 0, image_size=(48, 64))


@pytest.fixture
def make_trainer(tiny_model, dataset, tmp_path):
    def make(model_init=None, **arguments):
        fields = label_fields(dataset)
        model = None if model_init else tiny_model(**fields)
        more = {"model_init": (lambda trial: model_init(trial, fields)) if model_init else None}
        return tiny_training.make_trainer(model, dataset, tmp_path, more, **arguments)

    return make


class Kept:
    """A tensor that autograd keeps for the backward pass, as long as it does."""

    def __init__(self, tensor):
        self.tensor = tensor


def step(model, labels):
    """One training step: loss, gradients, how often each block ran, bytes kept from forward for backward."""
    runs = Counter()
    layers = detector_of(model).model.backbone.layers
    hooks = [
        layer.norm1.register_forward_hook(lambda *_, index=index: runs.update([index]))
        for index, layer in enumerate(layers)
    ]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = weakref.WeakSet()

    def pack(tensor):
        one = Kept(tensor)
        kept.add(one)
        return one

    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        loss = model.train()(pixels, labels=labels).loss
    storages = {one.tensor.untyped_storage().data_ptr(): one.tensor.untyped_storage().nbytes() for one in kept}
    num_bytes = sum(size for address, size in storages.items() if address not in weights)
    loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return loss.detach(), gradients, [runs[index] for index in range(len(layers))], num_bytes


@pytest.mark.parametrize(("freeze", "lora"), [(0, False), (2, False), (4, False), (0, True), (2, True)])
def test_gradient_checkpointing(tiny_model, random_labels, freeze, lora):
    labels, results = [random_labels(3), random_labels(0)], []
    for checkpointing in (False, True):
        model = tiny_model(num_hidden_layers=4, out_indices=[0, 3])
        if freeze:
            model.freeze_backbone(freeze)
        if lora:
            model = add_lora(model, 2)
            torch.manual_seed(0)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            detector_of(model).gradient_checkpointing_enable()
        results.append(step(model, labels))
    (loss, gradients, runs, kept), (loss2, gradients2, runs2, kept2) = results
    assert torch.equal(loss, loss2) and gradients.keys() == gradients2.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients2[name], gradient, atol=1e-7, rtol=1e-5)
    assert len(gradients) == sum(parameter.requires_grad for parameter in model.parameters())
    # What is frozen runs once; what trains once more in the backward pass.
    assert runs == [1] * 4 and runs2 == [1] * freeze + [2] * (4 - freeze)
    if freeze < 4:
        assert kept2 < kept
    else:
        assert kept2 == kept


@pytest.mark.slow
def test_gradient_checkpointing_in_training(make_trainer):
    untested = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    trainers = [make_trainer(gradient_checkpointing=flag, **untested) for flag in (False, True)]
    losses = [trainer.train().training_loss for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert [trainer.model.model.backbone.layers[0].gradient_checkpointing for trainer in trainers] == [False, True]


def test_early_stopping(make_trainer, monkeypatch):
    trainer = make_trainer(num_train_epochs=9, early_stopping_patience=2, save_total_limit=1)
    maps = iter([0.1, 0.3, 0.2, 0.3, 0.5, 0.6])
    monkeypatch.setattr(trainer, "compute_metrics", lambda prediction: {"map": next(maps)})
    trainer.train()
    # The third and the fourth evaluation are not better than the second.
    assert trainer.state.epoch == 4
    assert trainer.state.best_metric == 0.3 and trainer.state.best_model_checkpoint.endswith("checkpoint-2")


def test_spaces_name_what_exists(tiny_config):
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        arguments = DetectionTrainingArguments(output_dir="unused", use_cpu=True, **hp_space(trial))
        assert 0 < arguments.learning_rate < 1e-2 and 0 < arguments.layer_decay <= 1
        config = tiny_config(**config_space(trial))
        assert config.matcher == trial.params["matcher"] and config.box_loss == trial.params["box_loss"]
    assert config_space(None) == {}


@pytest.mark.slow
def test_hyperparameter_search(make_trainer, tiny_config, monkeypatch):
    optuna = pytest.importorskip("optuna")
    made = []

    def model_init(trial, fields):
        config = tiny_config(**fields, **config_space(trial))
        made.append(config)
        return DiTForObjectDetection(config)

    trainer = make_trainer(model_init, save_strategy="no", load_best_model_at_end=False, ema_decay=0.9)
    scores = iter([0.2, 0.7, 0.4])
    monkeypatch.setattr(trainer, "compute_metrics", lambda prediction: {"map": next(scores), "map_50": 1.0})
    rates = []
    train = trainer._inner_training_loop
    monkeypatch.setattr(
        trainer,
        "_inner_training_loop",
        lambda **kwargs: (rates.append(trainer.args.learning_rate), train(**kwargs))[1],
    )
    best = trainer.hyperparameter_search(n_trials=3, sampler=optuna.samplers.RandomSampler(seed=0))
    # By mAP alone, the higher the better.
    assert best.run_id == "1" and best.objective == 0.7
    assert best.hyperparameters.keys() == {"learning_rate", "layer_decay", "weight_decay", "matcher", "box_loss"}
    assert len(set(rates)) == 3 and rates[1] == best.hyperparameters["learning_rate"]
    # The first is made before the search, without a trial.
    assert len(made) == 4 and made[2].matcher == best.hyperparameters["matcher"]


def quantized(library, bits, folder):
    if library == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["latent_encoder", "neck", "head"])
    else:
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        skipped = ["latent_encoder", "neck", "head"]
        precision = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        config = BitsAndBytesConfig(**precision, llm_int8_skip_modules=skipped)
    return DiTForObjectDetection.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


@pytest.mark.parametrize(
    ("library", "bits", "error"), [("torchao", 8, 0.02), ("bitsandbytes", 8, 0.02), ("bitsandbytes", 4, 0.2)]
)
def test_a_quantized_backbone(tiny_model, random_labels, tmp_path, library, bits, error):
    model = tiny_model(hidden_size=64, intermediate_size=128)
    model.save_pretrained(tmp_path)
    loaded = quantized(library, bits, tmp_path)
    plain = {name: type(module) for name, module in model.named_modules()}
    changed = {name for name, module in loaded.named_modules() if name in plain and type(module) is not plain[name]}
    weights = {
        name.removesuffix(".weight")
        for name, value in loaded.named_parameters()
        if type(value) not in (nn.Parameter, torch.Tensor)
    }
    linears = {
        f"model.backbone.layers.{index}.{name}"
        for index in range(2)
        for name in ("attention.qkv", "attention.projection", "mlp.fc1", "mlp.fc2")
    }
    assert changed | weights == linears
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1
    with torch.no_grad():
        expected, found = model.model(pixels).feature_maps, loaded.model(pixels).feature_maps
    assert 0 < (found - expected).std() / expected.std() < error

    # With LoRA on top it trains. (4-bit weights on a CPU do not any more after an evaluation, which packs them anew.)
    if bits == 4:
        loaded = quantized(library, bits, tmp_path)
    adapted = add_lora(loaded, 2).train()
    adapted(pixels, labels=[random_labels(3), random_labels(0)]).loss.backward()
    trained = {name: value.grad for name, value in adapted.named_parameters() if value.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in trained.values())
    assert not any("base_layer" in name for name in trained) and any("lora_B" in name for name in trained)
