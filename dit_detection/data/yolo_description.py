"""The file that describes a YOLO data set: `data.yaml` (Ultralytics, Roboflow) or `obj.data` (Darknet, CVAT)."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .dataset_files import IMAGE_SUFFIXES, check_class_names, is_name, list_files, read_classes, read_text
from .layouts import SPLIT_WORDS
from .problems import InvalidDatasetError, ProblemLog

CLASSES_OR_SPLIT = re.compile(r"^[\"']?(names|train)[\"']?\s*:", re.MULTILINE | re.IGNORECASE)
KEYS = ("path", "names", "nc", "classes", "backup", "download", "yaml_file")  # what others than splits there are


@dataclass
class Places:
    """
    Where the images of a split are.

    Args:
        folders (`list[Path]`): Folders of images, at any depth.
        lists (`list[Path]`): Text files with the path of an image in each line.
        root (`Path`, *optional*): The folder that no image may leave.
    """

    folders: list[Path] = field(default_factory=list)
    lists: list[Path] = field(default_factory=list)
    root: Path | None = None

    def images(self) -> list[Path]:
        """The images, folders sorted, lists in their order."""
        found = [file for folder in self.folders for file in list_files(folder, IMAGE_SUFFIXES)]
        for file in self.lists:
            lines = [line.strip().replace("\\", "/") for line in read_text(file).splitlines()]
            bases = [file.parent, self.root or file.parent]
            for number, line in enumerate(lines, start=1):
                if line and not is_name(line):
                    raise InvalidDatasetError(f"{file}: line {number} is no file name: {line!r:.80}. Correct it.")
            found += [_resolve(line, bases, self.root, file) for line in lines if line]
        return list(dict.fromkeys(found))


def find_description(folder: Path) -> Path | None:
    """
    The description in a folder, if there is one.

    Raises:
        InvalidDatasetError: There are several.
    """
    for name in ("data.yaml", "data.yml", "obj.data"):
        if (folder / name).is_file():
            return folder / name
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in (".yaml", ".yml", ".data")]
    files = [file for file in files if file.suffix == ".data" or CLASSES_OR_SPLIT.search(_glance(file))]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InvalidDatasetError(f"{folder} has several descriptions: {names}. Name the one that is meant.")
    return files[0] if files else None


def read_description(file: Path, root: Path | None, problems: ProblemLog) -> tuple[list[str], dict[str, Places]]:
    """
    Read `data.yaml` or `obj.data`.

    Args:
        file (`Path`): The description.
        root (`Path`, *optional*): The folder that no path may leave; what leads out of it is looked for in it.
        problems (`ProblemLog`): Where a split without any place is noted.

    Returns:
        `tuple[list[str], dict[str, Places]]`: Names of the classes, empty if there are none, and the images by split.

    Raises:
        InvalidDatasetError: It cannot be used.
    """
    content = _read_darknet(file) if file.suffix.lower() == ".data" else _load_yaml(file)
    base = content.get("path") or "."
    if not is_name(base):
        raise InvalidDatasetError(f'{file}: key "path" is {_short(base)}, not text. Write the folder of the images.')
    bases = [file.parent / base, file.parent]
    names = _read_names(content, file, bases, root)
    splits: dict[str, Places] = {}
    for word, value in content.items():
        split = SPLIT_WORDS.get(word.lower()) if isinstance(word, str) else None  # CVAT has "Train" and "Validation"
        if split is None:
            if word not in KEYS and is_name(value) and _leads_to_images(value, bases):
                what = f'key "{word}" is {value!r:.80}, but names no split. Call it train, val or test'
                problems.add("split without images", str(file), what)
            continue
        entries = value if isinstance(value, list) else [value] if value else []
        for entry in entries:
            if not is_name(entry):
                raise InvalidDatasetError(f'{file}: key "{word}" has {_short(entry)}, not text. Write a path.')
            path = _resolve(entry.replace("\\", "/"), bases, root, file)
            places = splits.setdefault(split, Places(root=root))
            if os.path.isdir(path):
                places.folders.append(path)
            elif os.path.isfile(path):
                places.lists.append(path)
            else:
                problems.add("split without images", str(file), f'key "{word}" is {entry!r:.80}; there is no {path}')
    splits = {split: places for split, places in splits.items() if places.folders or places.lists}
    if not splits:
        found = ", ".join(f"{word}: {_short(content[word])}" for word in content if str(word).lower() in SPLIT_WORDS)
        raise InvalidDatasetError(
            f"{file} names no images that are there ({found or 'it has none of the keys train, val, test'}). "
            "Write folders or lists of images, relative to the file."
        )
    return names, splits


def _leads_to_images(entry: str, bases: Iterable[Path]) -> bool:
    """Whether an entry that is of no split is a folder or a list all the same."""
    paths = [base / entry for base in bases]
    return any(path.is_dir() or (path.suffix == ".txt" and path.is_file()) for path in paths)


def _glance(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return stream.read(100_000).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _load_yaml(file: Path) -> dict[Any, Any]:
    text = read_text(file)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        what = " ".join(str(error).split())
        raise InvalidDatasetError(f"{file} cannot be read as plain YAML: {what:.300}. Correct it.") from error
    if not isinstance(content, dict):
        raise InvalidDatasetError(f"{file} holds {_short(content)}, not keys with values. Write train, val and names.")
    if "kpt_shape" in content:
        raise InvalidDatasetError(f"{file} describes poses (kpt_shape), not boxes. Export the boxes alone.")
    return content


def _read_darknet(file: Path) -> dict[str, Any]:
    pairs = [line.partition("=") for line in read_text(file).splitlines() if "=" in line]
    return {key.strip(): value.strip() for key, _, value in pairs}


def _read_names(content: dict[Any, Any], file: Path, bases: list[Path], root: Path | None) -> list[str]:
    names = content.get("names")
    if is_name(names):  # Darknet has them in a file of their own
        names = read_classes(_resolve(names, bases, root, file))
    elif isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise InvalidDatasetError(f'{file}: key "names" must count its classes from 0 without gaps.')
        names = [names[label] for label in range(len(names))]
    elif names is not None and not isinstance(names, list):
        raise InvalidDatasetError(f'{file}: key "names" is {_short(names)}, not a list of classes.')
    names = [str(name) if type(name) in (int, float) else name for name in names or []]
    check_class_names(names, f'{file}, key "names"')
    count = content.get("nc", len(names))
    if names and str(count) != str(len(names)):
        raise InvalidDatasetError(f'{file}: key "nc" is {_short(count)}, but "names" has {len(names)}. Correct one.')
    return names


def _resolve(entry: str, bases: Iterable[Path], root: Path | None, file: Path) -> Path:
    """
    The path that an entry means: as it is written, or without the `../` and `data/` that tools put before it, since
    they expect the description, or the training, one folder away.

    Raises:
        InvalidDatasetError: It leads out of the root.
    """
    paths = [Path(os.path.normpath(base / variant)) for variant in _variants(entry) for base in bases]
    inside = [path for path in paths if root is None or path.is_relative_to(os.path.normpath(root))]
    if not inside:
        raise InvalidDatasetError(
            f"{file}: {entry!r:.300} leads out of the data set's folder {root}. Write paths relative to the file, or "
            "pass the description itself in place of the folder, if you trust it."
        )
    return next((path for path in inside if os.path.exists(path)), inside[0])


def _variants(entry: str) -> Iterator[str]:
    yield entry
    for prefix in ("../", "data/"):
        if entry.startswith(prefix):
            yield re.sub(f"^({re.escape(prefix)})+", "", entry)


def _short(value: object) -> str:
    """A value for a message. YAML's aliases can make a container that is endless when written out."""
    return f"{value!r:.80}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
