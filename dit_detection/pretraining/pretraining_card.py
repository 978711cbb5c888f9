"""The model card of a pretrained Diffusion Transformer, from what happened in its training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..card.model_card_data import DetectionModelCardData
from ..card.model_card_text import code_block, escaped, linked
from ..visualize import plot_history

LOSS_PICTURE = "loss.png"
SAMPLES_PICTURE = "samples.png"

_LIBRARIES = ("torch", "transformers", "diffusers", "dit_detection")
_WHAT = {
    "sample": "the clean image, on a schedule of {steps} steps",
    "epsilon": "the noise, on a schedule of {steps} steps",
    "v_prediction": "v, on a schedule of {steps} steps",
    "flow": "the velocity of flow matching",
}


@dataclass(kw_only=True)
class PretrainingFacts:
    """
    What is known of a pretraining run.

    Args:
        name (`str`): Of the model.
        base_model (`str`, *optional*): Hub id or name of what it began from; `None` for random weights.
        objective (`str`): "sample", "epsilon", "v_prediction" or "flow".
        num_timesteps (`int`): Of the schedule.
        num_parameters (`int`), image_size (`int`): Of the transformer; pixels.
        sources (`Sequence[str]`): Names of the data sets.
        num_images (`int`), num_held_out (`int`): Trained on, and not trained on.
        fingerprint (`str`): Of all these images.
        command (`str`), seed (`int`), steps (`int`), batch_size (`int`), minutes (`float`): Of the run.
        hardware (`str`): What it ran on.
        losses (`Mapping[int, float]`): First and last held-out loss, by the step.
    """

    name: str
    base_model: str | None
    objective: str
    num_timesteps: int
    num_parameters: int
    image_size: int
    sources: Sequence[str]
    num_images: int
    num_held_out: int
    fingerprint: str
    command: str
    seed: int
    steps: int
    batch_size: int
    minutes: float
    hardware: str
    losses: Mapping[int, float]

    @property
    def license(self) -> str | None:
        """CC-BY-NC 4.0 if the weights come from the published DiT."""
        return DetectionModelCardData(
            model_name=self.name, config={"id2label": {}}, base_model=self.base_model
        ).license


def write_pretraining_card(
    folder: Path, facts: PretrainingFacts, log_history: Sequence[Mapping[str, Any]], samples: Path | None
) -> None:
    """
    Write `README.md` and its pictures beside the weights.

    Args:
        folder (`Path`): Of the pipeline.
        facts (`PretrainingFacts`): What the card says.
        log_history (`Sequence[Mapping]`): `trainer.state.log_history`, for the picture of the losses.
        samples (`Path`, *optional*): Picture of samples of the final weights.
    """
    plot_history(log_history).save(folder / LOSS_PICTURE)
    if samples is not None:
        (folder / SAMPLES_PICTURE).write_bytes(samples.read_bytes())
    data = ModelCardData(
        library_name="diffusers",
        tags=["dit", "diffusion", "pretraining", "dit-detection"],
        license=facts.license,
        base_model=facts.base_model,
    )
    content = f"---\n{data.to_yaml()}\n---\n\n{_text(facts, samples is not None)}"
    ModelCard(content).save(folder / "README.md")


def _text(facts: PretrainingFacts, has_samples: bool) -> str:
    begin = f"It went on from {linked(facts.base_model)}." if facts.base_model else "It began with random weights."
    rows = {
        "What it predicts": _WHAT[facts.objective].format(steps=facts.num_timesteps),
        "Condition": "none: every image had the null class",
        "Images": f"{facts.num_images} to train on, {facts.num_held_out} held out",
        "Sources": escaped(", ".join(facts.sources)),
        "Fingerprint of the images": f"`{facts.fingerprint}` (of the files of both)",
        "Size": f"{facts.num_parameters / 1e6:.1f} M parameters, {facts.image_size} x {facts.image_size} pixels",
        "Steps": f"{facts.steps} of {facts.batch_size} images",
        "Seed": str(facts.seed),
        "Duration": f"{facts.minutes:.1f} minutes on {facts.hardware}",
        "Held-out loss": ", ".join(f"{loss:.4f} after step {step}" for step, loss in facts.losses.items()),
        "Versions": ", ".join(f"{name} {version(name)}" for name in _LIBRARIES),
    }
    parts = [
        f"# {escaped(facts.name)}",
        f"A Diffusion Transformer (DiT), pretrained on images without annotations. {begin} It is meant as the start "
        "of an object detector:",
        code_block(f"dit-detect train --model {facts.name} --dataset path/to/annotated/images"),
        "## Training",
        "\n".join(f"- {name}: {value}" for name, value in rows.items() if value),
        code_block(facts.command),
        f"![Losses]({LOSS_PICTURE})",
    ]
    if has_samples:
        parts += [
            "## Samples",
            "Drawn from noise by the final weights, not selected.",
            f"![Samples]({SAMPLES_PICTURE})",
        ]
    if facts.license:
        parts += [
            "## Licence",
            f"The weights derive from {linked(facts.base_model)}, published under "
            "[CC-BY-NC 4.0](https://creativecommons.org/licenses/by-nc/4.0/): no commercial use.",
        ]
    return "\n\n".join(parts) + "\n"
