"""What Trainer, PEFT, `pipeline` and `torch.export` need of a detector, beyond what one file of ours promises."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForObjectDetection, Trainer, TrainingArguments, pipeline

from dit_detection import DiTDetectionImageProcessor, DiTDetectionModel, DiTForObjectDetection, collate_detection

# Newer names of the same came after the oldest transformers that we allow.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def examples(random_labels):
    """Eight annotated images, as the transform of a data set yields them."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.rand(3, 64, 64, generator=generator) * 2 - 1,
            "pixel_mask": torch.ones(64, 64, dtype=torch.int64),
            "labels": random_labels(1 + index % 3, seed=index, orig_size=torch.tensor([64, 64])),
        }
        for index in range(8)
    ]


@pytest.fixture
def train(examples, tmp_path):
    """Trains with transformers' own Trainer, plain SGD (Adam would hide a factor on the loss)."""

    def run(model, name="run", resume=None, **arguments):
        defaults = {
            "output_dir": str(tmp_path / name),
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "linear",
            "optim": "sgd",
            "optim_args": "momentum=0.9",
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "remove_unused_columns": False,
        }
        trainer = Trainer(
            model,
            TrainingArguments(**(defaults | arguments)),
            train_dataset=examples,
            data_collator=collate_detection,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal_weights(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 0, "atol": 0}))


# Trainer


def test_resuming_ends_where_an_uninterrupted_run_ends(tiny_model, train):
    whole = train(tiny_model(), save_strategy="steps", save_steps=2)
    # From other weights: one that the checkpoint's names miss would stay where it is, without a word.
    torch.manual_seed(1)
    other = DiTForObjectDetection(tiny_model().config)
    resumed = train(other, name="resumed", resume=f"{whole.args.output_dir}/checkpoint-2")
    assert resumed.state.global_step == 4
    assert_equal_weights(weights(resumed.model), weights(whole.model))
    assert [log.get("loss") for log in resumed.state.log_history] == [
        log.get("loss") for log in whole.state.log_history
    ]


def test_the_best_checkpoint_comes_back_whole(tiny_model, train, examples, tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=2,
        learning_rate=1.0,  # so that the second epoch ruins what the first one has left
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="epoch",  # the first of two is the best
        greater_is_better=False,
        eval_do_concat_batches=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    seen = []

    class Recorder(Trainer):
        def _save_checkpoint(self, *args, **kwargs):
            seen.append(weights(self.model))
            super()._save_checkpoint(*args, **kwargs)

    trainer = Recorder(
        tiny_model(),
        arguments,
        train_dataset=examples,
        eval_dataset=examples[:3],
        data_collator=collate_detection,
        compute_metrics=lambda predictions: {"epoch": float(len(seen))},
    )
    trainer.train()
    assert_equal_weights(weights(trainer.model), seen[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_trains_the_same(tiny_model, train, use_reentrant):
    plain = train(tiny_model(), max_steps=2)
    saving = train(
        tiny_model(),
        max_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    assert saving.model.model.backbone.layers[0].gradient_checkpointing
    assert_equal_weights(weights(saving.model), weights(plain.model), rtol=1e-5, atol=1e-6)


def test_accumulation_takes_the_mean_of_its_steps(tiny_model, examples, train):
    # Four times the same image: two steps of two have the gradient of one step of two.
    examples = [copy.deepcopy(examples[1]) for _ in range(4)]
    trained = []
    for accumulation in (1, 2):
        trainer = Trainer(
            tiny_model(),
            TrainingArguments(
                output_dir="unused",
                per_device_train_batch_size=2,
                gradient_accumulation_steps=accumulation,
                max_steps=1,
                learning_rate=1e-2,
                optim="sgd",
                max_grad_norm=0.0,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                remove_unused_columns=False,
            ),
            train_dataset=examples,
            data_collator=collate_detection,
        )
        trainer.train()
        trained.append(weights(trainer.model))
    assert_equal_weights(trained[1], trained[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16 weights", "bf16 autocast"])
@pytest.mark.parametrize(
    "overrides",
    [{}, {"matcher": "max_iou", "box_loss": "smooth_l1", "class_loss": "cross_entropy"}],
    ids=["atss", "max_iou"],
)
def test_trains_in_bfloat16_on_a_cpu(tiny_model, train, precision, overrides):
    reference = train(tiny_model(**overrides), max_steps=2)
    model = tiny_model(**overrides)
    if precision == "bf16 weights":
        trainer = train(model.to(torch.bfloat16), max_steps=2)
        assert all(tensor.dtype == torch.bfloat16 for tensor in model.state_dict().values())
    else:
        trainer = train(model, max_steps=2, bf16=True)
        assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    for ours, theirs in zip(trainer.state.log_history[:2], reference.state.log_history[:2], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)


# PEFT


def lora(model):
    """A LoRA on every linear layer, neck and head trained in full, with adapters that are no longer the identity."""
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["neck", "head"], init_lora_weights=False)
    torch.manual_seed(2)
    return get_peft_model(model, config)


def test_lora_on_all_linear_layers_starts_as_the_identity(tiny_model, examples):
    pixels = examples[0]["pixel_values"][None]
    expected = tiny_model()(pixels).logits
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear")).eval()
    adapted = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"qkv", "projection", "fc1", "fc2"}
    torch.testing.assert_close(model(pixels).logits, expected)


def test_lora_reloads_and_merges_to_the_same_detector(tiny_model, examples, tmp_path):
    batch = collate_detection(examples[:2])
    model = lora(tiny_model())
    loss = model(**batch).loss
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("head.modules_to_save" in name for name in trained)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad)
    model.eval()
    expected = model(batch["pixel_values"])
    assert not torch.allclose(expected.logits, tiny_model()(batch["pixel_values"]).logits)

    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    assert torch.equal(reloaded(batch["pixel_values"]).logits, expected.logits)

    merged = reloaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    merged = AutoModelForObjectDetection.from_pretrained(tmp_path / "merged").eval()
    outputs = merged(batch["pixel_values"])
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes, rtol=1e-4, atol=1e-4)


def test_native_adapters_save_and_load(tiny_model, examples, tmp_path):
    pixels = examples[0]["pixel_values"][None]
    model = tiny_model()
    base = model(pixels).logits
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=4, target_modules=["qkv", "fc1"], init_lora_weights=False))
    expected = model.eval()(pixels).logits
    assert not torch.allclose(expected, base)
    model.save_pretrained(tmp_path)
    again = tiny_model()
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(again.eval()(pixels).logits, expected)
    again.disable_adapters()
    torch.testing.assert_close(again(pixels).logits, base)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_lora_under_gradient_checkpointing_gives_equal_gradients(tiny_model, examples, use_reentrant):
    batch = collate_detection(examples[:2])
    gradients = []
    for checkpointing in (False, True):
        model = lora(tiny_model())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            # Reentrant checkpointing returns gradients only through inputs that require one.
            model.enable_input_require_grads()
        model.train()
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[1].values())
    assert any("layers.0" in name for name in gradients[1])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


# pipeline


@pytest.fixture(scope="module")
def images():
    """Pictures of several sizes and modes."""
    pixels = (torch.rand(90, 120, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    picture = Image.fromarray(pixels)
    return [
        picture,
        picture.resize((50, 140)),
        picture.convert("L"),
        picture.convert("LA"),
        picture.convert("RGBA"),
        picture.convert("P"),
    ]


def test_pipeline_gives_one_by_one_what_it_gives_in_batches(finding_detector, images):
    detector = pipeline("object-detection", str(finding_detector))
    single = [detector(image, threshold=0.3) for image in images]
    assert all(single)
    batched = detector(images, threshold=0.3, batch_size=4)
    for ours, theirs, image in zip(batched, single, images, strict=True):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert a["label"] == b["label"]
            assert a["box"] == pytest.approx(b["box"], abs=1)  # cut to whole pixels
            assert a["score"] == pytest.approx(b["score"], abs=1e-5)
            assert a["label"] in {"cat", "dog", "owl"}
            assert 0 <= a["box"]["xmin"] <= a["box"]["xmax"] <= image.width
            assert 0 <= a["box"]["ymin"] <= a["box"]["ymax"] <= image.height


def test_pipeline_threshold_cuts_the_same_list(finding_detector, images):
    detector = pipeline("object-detection", str(finding_detector))
    everything = detector(images[0], threshold=0.0)
    middle = everything[len(everything) // 2]["score"]
    assert detector(images[0], threshold=middle) == [found for found in everything if found["score"] > middle]
    assert detector(images[0], threshold=1.0) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pipeline_in_half_precision(finding_detector, images, dtype):
    detector = pipeline("object-detection", str(finding_detector), dtype=dtype)
    assert detector.model.dtype == dtype
    results = detector(images, threshold=0.3, batch_size=2)
    assert all(results)
    assert all(0.3 < found["score"] <= 1 for image in results for found in image)


def test_features_pipeline_takes_batches_apart(finding_detector, images):
    model = DiTDetectionModel.from_pretrained(finding_detector)
    processor = DiTDetectionImageProcessor.from_pretrained(finding_detector)
    features = pipeline("image-feature-extraction", model=model, image_processor=processor)
    batched = features(images[:3], batch_size=3, return_tensors=True)
    for image, found in zip(images, batched, strict=False):
        assert found.shape == (1, 16, 32)
        torch.testing.assert_close(found, features(image, return_tensors=True), rtol=1e-4, atol=1e-5)


# Loading, attention, export


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(finding_detector, examples, device_map):
    pixels = examples[0]["pixel_values"][None]
    expected = DiTForObjectDetection.from_pretrained(finding_detector)(pixels)
    model = DiTForObjectDetection.from_pretrained(finding_detector, device_map=device_map)
    torch.testing.assert_close(model(pixels.to(model.device)).logits.cpu(), expected.logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_may_be_chosen_at_load_and_later(finding_detector, examples, implementation):
    pixels = examples[0]["pixel_values"][None]
    other = {"eager": "sdpa", "sdpa": "eager"}[implementation]
    model = AutoModelForObjectDetection.from_pretrained(finding_detector, attn_implementation=implementation)
    assert model.model.backbone.layers[0].attention.config._attn_implementation == implementation
    before = model(pixels, output_attentions=implementation == "eager")
    assert bool(before.attentions) == (implementation == "eager")
    model.set_attn_implementation(other)
    assert model.model.backbone.layers[0].attention.config._attn_implementation == other
    torch.testing.assert_close(model(pixels).logits, before.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exports(tiny_model, dynamic):
    model = tiny_model(max_candidates=40)
    cell = torch.export.Dim("cell", min=2, max=64)
    column = torch.export.Dim("column", min=2, max=64)
    batch = torch.export.Dim("batch", min=1, max=8)
    shapes = {"pixel_values": {0: batch, 2: 32 * cell, 3: 32 * column}} if dynamic else None
    example = {"pixel_values": torch.rand(2, 3, 64, 96)}
    with torch.no_grad():
        program = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False).module()
        for size in [(2, 3, 64, 96), (1, 3, 128, 64)] if dynamic else [(2, 3, 64, 96)]:
            pixels = torch.rand(size)
            expected, outputs = model(pixels), program(pixel_values=pixels)
            torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes, rtol=1e-4, atol=1e-5)
