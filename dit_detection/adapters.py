"""LoRA with peft: small matrices beside the frozen weights of the backbone's blocks, and neck and head in full."""

import json
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoImageProcessor, AutoModelForObjectDetection
from transformers.utils import ADAPTER_CONFIG_NAME, IMAGE_PROCESSOR_NAME, find_adapter_config_file

from .model.configuration_dit_detection import DiTDetectionConfig
from .model.load_dit import refuse_revision
from .model.modeling_dit_detection import DiTForObjectDetection

if TYPE_CHECKING:
    from peft import PeftModel

# Folder beside an adapter that `dit-detect train` made, with the detector that it is for.
BASE = "base"
# The linear layers of a block: attention's, and the perceptron's.
_LINEARS = r"(attention\.(qkv|projection)|mlp\.(fc1|fc2))"


def add_lora(model: DiTForObjectDetection, r: int, *, alpha: int | None = None, dropout: float = 0.0) -> "PeftModel":
    """
    Put LoRA on attention and MLP of the backbone's blocks. Neck, head and the taps' norms are trained in full.

    Blocks that [`~DiTForObjectDetection.freeze_backbone`] froze get none, so what they compute can still be cached.
    All other weights of the backbone are frozen.

    Args:
        model ([`DiTForObjectDetection`]): Changed in place. `model.name_or_path` is what the adapter names as its
            base: a folder or Hub id that `from_pretrained` takes.
        r (`int`): Rank of the matrices.
        alpha (`int`, *optional*): The product of the two matrices counts `alpha / r` times; by default twice.
        dropout (`float`): Share of each adapted layer's inputs that the matrices do not see in training.

    Returns:
        `peft.PeftModel`: `save_pretrained` writes the adapter alone.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If `r` is no rank, or every block is frozen.

    Source: LoRA (arXiv 2106.09685).
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('LoRA takes peft: pip install "dit_detection[lora]"') from error

    if r < 1:
        raise ValueError(f"r={r} must be at least 1: it is the rank of LoRA's matrices.")
    backbone = model.model.backbone
    first, end = backbone.num_frozen_layers(), len(backbone.layers)
    if first == end:
        raise ValueError(f"LoRA adapts blocks that are not frozen, but all {end} are. Freeze fewer (--freeze_layers).")
    blocks = "|".join(str(index) for index in range(first, end))
    norms = [f"model.backbone.tap_norms.{index}" for index in range(len(backbone.tap_norms))]  # no list can be named
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=rf"model\.backbone\.layers\.({blocks})\.{_LINEARS}",
        modules_to_save=["neck", "head", *norms],
    )
    return get_peft_model(model, config)


def detector_of(model: nn.Module) -> DiTForObjectDetection:
    """The detector inside a `peft.PeftModel`; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


# Where to find files of the Hub.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


def is_adapter(source: str | Path, revision: str | None = None, **kwargs: Any) -> bool:
    """
    Whether a folder or Hub id holds an adapter of peft. What is neither is none: its loader says so.

    Args:
        source (`str` or `Path`), revision (`str`, *optional*): Folder or Hub id.
        kwargs: Of `from_pretrained`, `subfolder` and what says how to reach the Hub.
    """
    places = {name: kwargs[name] for name in (*HUB_OPTIONS, "subfolder") if name in kwargs}
    try:
        return find_adapter_config_file(source, revision=revision, **places) is not None
    except OSError:
        return False


def load_detector(source: str | Path, *, revision: str | None = None, **kwargs: Any) -> DiTForObjectDetection:
    """
    Load a detector; an adapter is merged into its base, and what comes back is a plain detector, as fast as one.

    Args:
        source (`str` or `Path`): Folder or Hub id of a detector, or of an adapter. Of an adapter that names a base
            called `base`, as `dit-detect train` writes it beside, that is the one beside it, wherever both are now.
        revision (`str`, *optional*): Of the Hub id. The base's is named by the adapter.
        kwargs: For `from_pretrained` of the detector or the base; of an adapter `subfolder` is its own.

    Raises:
        ImportError: If it is an adapter and peft is not installed.
        OSError: If it is neither, or an adapter's base cannot be found.
        ValueError: If it is a detector of another kind, or a folder of which a revision is wanted.
    """
    refuse_revision(source, revision)
    if not is_adapter(source, revision, **kwargs):
        return _load_base(source, revision, **kwargs)
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError(f'{source} is an adapter, which takes peft: pip install "dit_detection[lora]"') from error

    places = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    if subfolder := kwargs.pop("subfolder", ""):
        places["subfolder"] = subfolder
    config = PeftConfig.from_pretrained(str(source), revision=revision, **places)
    base = base_of(Path(source) / subfolder, config.base_model_name_or_path or "")
    try:
        model = _load_base(base, config.revision, **kwargs)
    except OSError as error:
        raise OSError(
            f"{source} is an adapter whose base {base!r} cannot be loaded: write its folder or Hub id into "
            f"base_model_name_or_path of {ADAPTER_CONFIG_NAME}. ({error})"
        ) from error
    return PeftModel.from_pretrained(model, str(source), revision=revision, **places).merge_and_unload().eval()


def load_image_processor(source: str | Path, **kwargs: Any) -> Any:
    """
    The image processor beside a detector or an adapter; of a folder in which peft left the adapter alone, that of its
    base.

    Args:
        source (`str` or `Path`): Folder or Hub id.
        kwargs: Of `from_pretrained`.

    Raises:
        OSError: If there is none.
    """
    adapter = Path(source, ADAPTER_CONFIG_NAME)
    if adapter.is_file() and not Path(source, IMAGE_PROCESSOR_NAME).is_file():
        config = json.loads(adapter.read_text(encoding="utf-8"))
        source = base_of(source, config.get("base_model_name_or_path") or "")
        kwargs["revision"] = config.get("revision")
    return AutoImageProcessor.from_pretrained(source, **kwargs)


def base_of(adapter: str | Path, named: str | None = None) -> str:
    """
    The detector that an adapter in a folder is for, as `from_pretrained` takes it.

    Args:
        adapter (`str` or `Path`): The folder.
        named (`str`, *optional*): What the adapter's configuration names; read from the folder by default.

    Raises:
        OSError: If none is named.
    """
    if named is None:
        config = json.loads((Path(adapter) / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
        named = config.get("base_model_name_or_path")
    if not named:
        raise OSError(f"{adapter}/{ADAPTER_CONFIG_NAME} names no base_model_name_or_path. Write the base's id there.")
    beside = Path(adapter) / BASE
    # It may have been written on Windows, whose paths know both strokes.
    return str(beside) if PureWindowsPath(named).name == BASE and beside.is_dir() else named


def _load_base(source: str | Path, revision: str | None, **kwargs: Any) -> DiTForObjectDetection:
    is_path = Path(source).is_absolute() or str(source).startswith(".") or str(source).count("/") > 1
    if is_path and not Path(source).exists():  # transformers would call it a malformed name of a repository
        raise OSError(f"There is no folder {source}. Check the path.")
    model = AutoModelForObjectDetection.from_pretrained(source, revision=revision, **kwargs)
    if model.config.model_type != DiTDetectionConfig.model_type:
        raise ValueError(
            f"{source} is a detector of type {model.config.model_type!r}, not {DiTDetectionConfig.model_type!r}. Name "
            "one that was trained with dit_detection."
        )
    return model
