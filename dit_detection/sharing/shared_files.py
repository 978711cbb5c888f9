"""Which files of a detector's folder leave the machine, and which stay."""

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

CARD_NAME, CARD_DATA_NAME = "README.md", "model_card.json"
_PICTURES = {".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp"}
_PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}


def files_to_share(folder: str | Path, *, code: bool = True) -> list[Path]:
    """
    List the files of a detector's folder, or of an adapter's, that are for others; nothing else leaves the machine.

    These are the weights that `from_pretrained` reads (safetensors), the configuration of model and image processor,
    the code that their `auto_map` needs, the model card with its pictures, `model_card.json` and `*_results.json`.
    Checkpoints, pickles (`training_args.bin`), hidden files and links that lead out of the folder never are.

    Args:
        folder (`str` or `Path`): As `save_pretrained` or the trainer left it.
        code (`bool`): Whether the code that lies in the folder is among them.

    Returns:
        `list[Path]`: Each begins with `folder`; sorted.

    Raises:
        FileNotFoundError: If the folder, or a file that a detector needs, is missing.
        ValueError: If a file cannot be shared as it is: damaged weights, a link that leads out of the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    if is_adapter(folder):
        needed = [ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME]
        optional = [CONFIG_NAME, IMAGE_PROCESSOR_NAME]
        _check_weights(folder, ADAPTER_SAFE_WEIGHTS_NAME)
    else:
        needed = [CONFIG_NAME, *_weights(folder), IMAGE_PROCESSOR_NAME]
        optional = []
    if not (folder / needed[0]).is_file():
        raise FileNotFoundError(f"{folder} holds no {needed[0]}, so it is no detector; name the folder that has it.")
    if not is_adapter(folder) and not (folder / IMAGE_PROCESSOR_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {IMAGE_PROCESSOR_NAME}, without which no one can use the detector. Save the image "
            "processor there, too: image_processor.save_pretrained(...)."
        )
    if code:
        needed += own_code(folder) or []
    needed += [CARD_NAME, *_shown_pictures(folder)] if (folder / CARD_NAME).is_file() else []
    optional += [CARD_DATA_NAME, *(path.name for path in folder.glob("*_results.json"))]
    for name in needed:
        if not _is_inside(folder, name):
            raise ValueError(f"{folder / name} is a link that leads out of {folder}. Put the file itself there.")
    names = {*needed, *(name for name in optional if (folder / name).is_file() and _is_inside(folder, name))}
    return [folder / name for name in sorted(names)]


def files_left_behind(folder: str | Path, *, code: bool = True) -> dict[str, str]:
    """Name every other file and folder there, and why it stays."""
    folder = Path(folder)
    shared = files_to_share(folder, code=code)
    behind: list[Path] = []
    for path in sorted(set(folder.iterdir()) - set(shared)):
        # A folder of which only the pictures in the card are shared is told file by file.
        shares_some = any(path in other.parents for other in shared)
        behind += sorted(set(path.rglob("*")) - set(shared)) if shares_some else [path]
    return {path.relative_to(folder).as_posix(): _why_it_stays(folder, path, code) for path in behind}


def card_files(folder: str | Path) -> list[str]:
    """Names of the model card in `folder`, of its saved state and of the pictures that it shows, if there is one."""
    names = [name for name in (CARD_NAME, CARD_DATA_NAME) if (Path(folder) / name).is_file()]
    return [*names, *_shown_pictures(Path(folder))]


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds what peft trained on top of a detector, and not a detector."""
    is_adapter = (folder / ADAPTER_CONFIG_NAME).is_file()
    if is_adapter and (folder / SAFE_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{folder} holds a detector ({SAFE_WEIGHTS_NAME}) and an adapter ({ADAPTER_CONFIG_NAME}); transformers "
            "would take it for the adapter alone. Put each into a folder of its own."
        )
    return is_adapter


def own_code(folder: Path) -> list[str] | None:
    """
    Code files of the folder that the `auto_map` of its configurations needs, recursively.

    Returns:
        `list[str]` or `None`: `None` if the folder's code is not complete, or the `auto_map` names another repository.
    """
    names: set[str] = set()
    for config in (CONFIG_NAME, IMAGE_PROCESSOR_NAME):
        references = list(_references(read_json(folder / config).get("auto_map")))
        if (folder / config).is_file() and not references:
            return None
        for reference in references:
            module = folder / f"{reference.split('.')[0]}.py"
            if "--" in reference or not module.is_file():
                return None
            try:
                needed = [module, *map(Path, get_relative_import_files(module))]
            except FileNotFoundError:
                return None
            names |= {path.name for path in needed}
    return sorted(names) or None


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object; nothing of a file that is not there."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def _weights(folder: Path) -> list[str]:
    """The weights that `from_pretrained` takes from the folder: one file, or an index and its shards."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        _check_weights(folder, SAFE_WEIGHTS_NAME)
        return [SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no 'weight_map'. Save the model again.")
        shards = sorted({str(name) for name in weight_map.values()})
        for shard in shards:
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ValueError(f"{index} names {shard!r}, which is no safetensors file of this folder.")
            expected = {key for key, name in weight_map.items() if name == shard}
            missing = sorted(expected - _check_weights(folder, shard))
            if missing:
                raise ValueError(f"{folder / shard} lacks {missing[0]}, which {index.name} says is in it.")
        return [SAFE_WEIGHTS_INDEX_NAME, *shards]
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickled:
        raise ValueError(
            f"The weights in {folder} are pickled ({pickled[0]}); only safetensors are shared. Convert them: "
            f'python -c "from dit_detection import DiTForObjectDetection as D; '
            f"D.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    raise FileNotFoundError(f"{folder} holds no weights ({SAFE_WEIGHTS_NAME}); name the folder that has them.")


def _check_weights(folder: Path, name: str) -> set[str]:
    """Names of the tensors in a file whose header and length agree."""
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} lacks the weights {name}. Save the model again.")
    try:
        with safe_open(folder / name, framework="pt") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / name} cannot be read as safetensors: {error}. Save the model again.") from error


def _shown_pictures(folder: Path) -> list[str]:
    """Files that the model card shows, by their paths relative to the folder."""
    card = folder / CARD_NAME
    if not card.is_file():
        return []
    try:
        text = card.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{card} is not in UTF-8: {error}.") from error
    names = []
    for target in _picture_links(text):
        path = PurePosixPath(target)
        if path.is_absolute() or any(part.startswith(".") for part in path.parts) or not _is_inside(folder, target):
            problem = "leads out of the folder, or to a hidden file"
        elif path.suffix.lower() not in _PICTURES:
            problem = f"is no picture ({', '.join(sorted(_PICTURES))})"
        elif not (folder / target).is_file():
            problem = "is not there"
        else:
            names.append(str(path))
            continue
        raise ValueError(f"{card} shows {target!r}, which {problem}. Put the picture beside it, or mend the card.")
    return names


def _picture_links(text: str) -> Iterator[str]:
    """Targets of Markdown's and HTML's pictures, outside of code; no addresses of the web."""
    text = re.sub(r"^ {0,3}(```|~~~).*?^ {0,3}\1|`[^`\n]*`|<!--.*?-->", "", text, flags=re.MULTILINE | re.DOTALL)
    markdown = r"!\[[^\]]*\]\(\s*(?:<([^>\n]+)>|((?:[^\s()]|\([^\s()]*\))+))"
    html = r"<img\s[^>]*?src\s*=\s*[\"']([^\"']+)[\"']"
    for groups in re.findall(f"{markdown}|{html}", text, flags=re.IGNORECASE):
        target = "".join(groups)
        if not re.match(r"[a-z][a-z0-9+.-]*:|//|#", target, flags=re.IGNORECASE):
            yield unquote(re.split("[?#]", target)[0])


def _references(auto_map: Any) -> Iterator[str]:
    """`module.Class` of each entry; an image processor's may be several, one per backend."""
    if isinstance(auto_map, str):
        yield auto_map
    elif isinstance(auto_map, dict | list | tuple):
        for value in auto_map.values() if isinstance(auto_map, dict) else auto_map:
            yield from _references(value)


def _is_inside(folder: Path, name: str) -> bool:
    return (folder / name).resolve().is_relative_to(folder.resolve())


def _why_it_stays(folder: Path, path: Path, code: bool) -> str:
    if path.name.startswith("."):
        return "hidden"
    if not path.resolve().is_relative_to(folder.resolve()):
        return "a link that leads out of the folder"
    if path.name.startswith("checkpoint-"):
        return "a checkpoint of the training"
    if path.suffix in _PICKLES:
        return "pickled: loading it can run code"
    if path.suffix == ".py" and not code:
        return "code"
    return "not part of the detector"
