"""A folder that runs the demo page as a Hugging Face Space."""

import shutil
from importlib import metadata
from pathlib import Path
from sys import version_info

from huggingface_hub import ModelCard, SpaceCardData
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME, cached_file

from ..adapters import is_adapter
from ..sharing.shared_files import CARD_NAME, files_to_share

_PACKAGE = "dit_detection"


def write_space(folder: str | Path, checkpoint: str, revision: str | None = None) -> list[Path]:
    """
    Write `app.py`, `requirements.txt`, `README.md` and this package's code; a local detector is copied, too.

    This package is on no index, so its source travels with the Space. A detector on the Hub is named, at the commit
    that `revision` stands for now, and stays where it is.

    Args:
        folder (`str` or `Path`): Is made; must be empty or not there.
        checkpoint (`str`): Folder or Hub id of the detector.
        revision (`str`, *optional*): Of the Hub id.

    Returns:
        `list[Path]`: All files that were written.

    Raises:
        FileExistsError: There is something in the folder.
        ValueError, OSError: The checkpoint is no detector that can be shared.
        PackageNotFoundError: This package is not installed, so nothing says what it needs.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty. Name a folder that is not there yet.")
    if is_adapter(checkpoint, revision):
        raise ValueError(f"{checkpoint} is an adapter. Merge it first: dit-detect convert {checkpoint} merged")
    config = AutoConfig.from_pretrained(checkpoint, revision=revision)
    if config.model_type != _PACKAGE:
        raise ValueError(f"{checkpoint} is a model of type {config.model_type!r}, not {_PACKAGE}.")
    is_local = Path(checkpoint).is_dir()
    model_files = files_to_share(checkpoint) if is_local else []
    requirements = _requirements()
    title = Path(checkpoint).resolve().name if is_local else checkpoint.split("/")[-1]
    card = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=metadata.version("gradio"),
        python_version=f"{version_info.major}.{version_info.minor}",
        app_file="app.py",
        models=None if is_local else [checkpoint],
        license=_license(checkpoint, revision),
        short_description="Object detection on a Diffusion Transformer (DiT)",
        pinned=False,
    )

    folder.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "small-dit")  # the page trains nothing
    shutil.copytree(Path(__file__).parents[1], folder / _PACKAGE, ignore=ignored)
    licence_text = metadata.distribution(_PACKAGE).read_text("licenses/LICENSE")
    if licence_text:
        (folder / _PACKAGE / "LICENSE").write_text(licence_text, encoding="utf-8")
    for source in model_files:
        target = folder / "model" / source.relative_to(checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    where = 'str(Path(__file__).parent / "model")' if is_local else repr(checkpoint)
    options = "" if is_local else f", revision={_commit(checkpoint, revision)!r}"
    (folder / "app.py").write_text(_app(where, options, title, is_local), encoding="utf-8")
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements), encoding="utf-8")
    (folder / "README.md").write_text(_readme(card, title, checkpoint, is_local), encoding="utf-8")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n", encoding="utf-8")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _requirements() -> list[str]:
    """What this package needs, at the bounds that it declares; the Space itself brings gradio."""
    return [line for line in metadata.requires(_PACKAGE) or [] if "extra ==" not in line]


def _commit(repo_id: str, revision: str | None) -> str:
    """The commit that a revision stands for: the cache names the folders of its snapshots so."""
    return Path(cached_file(repo_id, CONFIG_NAME, revision=revision)).parent.name


def _license(checkpoint: str, revision: str | None) -> str | None:
    """The licence that the detector's card names."""
    card = cached_file(checkpoint, CARD_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if card is None else ModelCard.load(card, ignore_metadata_errors=True).data.license


def _app(where: str, options: str, title: str, is_local: bool) -> str:
    path_import = "from pathlib import Path\n\n" if is_local else ""
    return (
        f'"""The page on which the detector can be tried; {_PACKAGE}/ beside it is the library."""\n\n'
        f"{path_import}from {_PACKAGE}.demo.page import launch, load_page\n\n"
        f"launch(load_page({where}{options}, title={title!r}))\n"
    )


def _readme(card: SpaceCardData, title: str, checkpoint: str, is_local: bool) -> str:
    model = "in `model/`" if is_local else f"[{checkpoint}](https://huggingface.co/{checkpoint})"
    return (
        f"---\n{card.to_yaml()}\n---\n\n# {title}\n\n"
        f"Try an object detector on your own images. The detector is {model}; `{_PACKAGE}/` is the library that runs "
        "it (Apache-2.0).\n"
    )
