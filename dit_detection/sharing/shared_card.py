"""The model card of a folder, made right for the repository that it goes to."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import ModelCard
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME
from yaml import YAMLError

from ..adapters import BASE, base_of
from ..card.model_card import DetectionModelCardData, create_model_card
from .shared_files import CARD_DATA_NAME, CARD_NAME, read_json


def card_changes(
    folder: Path, repo_id: str, *, code: bool, tags: Sequence[str], base_model: str | None
) -> dict[str, bytes]:
    """
    Give model card and saved state for the Hub, as far as they must differ from the files in the folder.

    A card is written if there is none. One that nobody edited is written again, with the repository's name in its
    examples. Of an edited one only the front matter is completed: `tags`, the licence that the weights have, and of an
    adapter its base, `base_model`.

    Returns:
        `dict[str, bytes]`: Content by file name; of `README.md` and `model_card.json`.

    Raises:
        ValueError: If the front matter cannot be read, or claims another licence than the weights have.
    """
    config = read_json(folder / CONFIG_NAME)
    if not config and (named := read_json(folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")):
        config = read_json(Path(base_of(folder, named)) / CONFIG_NAME)
    config = config or read_json(folder / BASE / CONFIG_NAME)
    known = DetectionModelCardData(
        model_name=repo_id.split("/")[-1],
        config={"id2label": {}, **config},
        base_model=config.get("base_model") or base_model,
    )
    path, has_card = folder / CARD_NAME, (folder / CARD_NAME).is_file()
    data = _saved_state(folder) if has_card else known
    if data is not None and known.id2label and data.id2label != known.id2label:
        raise ValueError(
            f"{folder / CARD_DATA_NAME} has other classes than {CONFIG_NAME}. If they were renamed, rename them "
            f"there, too; if it is of another detector, delete it and {CARD_NAME}."
        )
    if data is None:
        card = _read_card(path)
        before = card.data.to_dict()
    else:
        all_tags = list(dict.fromkeys([*data.tags, *tags]))
        data = replace(data, repo_id=repo_id, has_code=code, adapter_of=base_model, tags=all_tags)
        card, before = create_model_card(data), None
    if known.is_non_commercial:
        if card.data.get("license") not in (None, "cc-by-nc-4.0"):
            raise ValueError(
                f"{path} says 'license: {card.data.get('license')}', but the weights derive from the published DiT, "
                "which is under cc-by-nc-4.0. Write that."
            )
        card.data["license"] = "cc-by-nc-4.0"
    if tags:
        card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *tags]))
    if base_model is not None:
        card.data["library_name"], card.data["pipeline_tag"] = "peft", "object-detection"
        card.data["base_model"], card.data["base_model_relation"] = base_model, "adapter"
    changes = {} if card.data.to_dict() == before else {CARD_NAME: str(card).encode()}
    if data is not None and has_card:
        with TemporaryDirectory() as temporary:
            data.save(Path(temporary) / CARD_DATA_NAME)
            changes[CARD_DATA_NAME] = (Path(temporary) / CARD_DATA_NAME).read_bytes()
    files = {name: (folder / name).read_bytes() for name in changes if (folder / name).is_file()}
    return {name: content for name, content in changes.items() if content != files.get(name)}


def _saved_state(folder: Path) -> DetectionModelCardData | None:
    """What the folder's card was made from, unless somebody edited the card since."""
    if not (folder / CARD_DATA_NAME).is_file():
        return None
    data = DetectionModelCardData.load(folder / CARD_DATA_NAME)
    return data if str(create_model_card(data)) == (folder / CARD_NAME).read_text(encoding="utf-8") else None


def _read_card(path: Path) -> ModelCard:
    try:
        return ModelCard.load(path)
    except (ValueError, YAMLError) as error:
        raise ValueError(f"{path}: its front matter cannot be read: {error}") from error
