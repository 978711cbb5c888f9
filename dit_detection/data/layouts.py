"""Which COCO JSON files a folder holds, of which split, and where their images lie."""

import re
from pathlib import Path

from .problems import InvalidDatasetError

SPLITS = ("train", "validation", "test")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def split_of(name: str) -> str | None:
    """
    The split that a file, folder or split name speaks of, as in "instances_val2017", or `None`.

    Words are told apart by anything but letters; the last one that names a split counts.
    """
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), None)


def split_folders(folder: Path) -> list[Path]:
    """The folders in a folder whose name speaks of a split."""
    return sorted(child for child in folder.iterdir() if child.is_dir() and split_of(child.name))


def find_coco_files(source: Path) -> dict[str, tuple[Path, list[Path]]]:
    """
    Find the COCO JSON of each split, as `annotations_train.json`, `annotations/instances_train2017.json` or
    `train/_annotations.coco.json`.

    Args:
        source (`Path`): A folder, or one JSON file, which is then the split "train".

    Returns:
        `dict[str, tuple[Path, list[Path]]]`: By split the file and the folders where its images may lie, likeliest
        first; empty if the folder holds no JSON file.

    Raises:
        InvalidDatasetError: Several files claim one split.
    """
    if source.is_file():
        return {"train": (source, _image_folders(source, source.parent))}
    candidates: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for file in list_json_files(source):
        split = split_of(file.stem) or (split_of(file.parent.name) if file.parent != source else None)
        if split is None:
            unnamed.append(file)
        else:
            candidates.setdefault(split, []).append(file)
    if not candidates and unnamed:
        candidates = {"train": unnamed}
    files = {split: _only(candidates[split], split) for split in SPLITS if split in candidates}
    return {split: (file, _image_folders(file, source)) for split, file in files.items()}


def list_json_files(folder: Path) -> list[Path]:
    """The JSON files in the places where COCO annotations may lie."""
    places = [folder, folder / "annotations", *split_folders(folder)]
    return [file for place in places for file in sorted(place.glob("*.json"))]


def looks_like_coco(file: Path) -> bool:
    """Whether a JSON has a key of COCO's at its begin or end; Label Studio's notes.json and others have not."""
    try:
        with file.open("rb") as stream:
            head = stream.read(2**16)
            stream.seek(max(0, file.stat().st_size - 2**16))
            text = head + stream.read(2**16)
    except OSError:
        return False
    return b'"annotations"' in text or b'"images"' in text


def _only(files: list[Path], split: str) -> Path:
    """The one file of a split. COCO's own folder has captions and keypoints beside the instances."""
    instances = [file for file in files if file.stem.startswith("instances")]
    files = instances or list(filter(looks_like_coco, files)) or files
    if len(files) > 1:
        names = ", ".join([*map(str, files[:5]), *["…"] * (len(files) > 5)])
        if not any(map(looks_like_coco, files)):
            raise InvalidDatasetError(
                f"None of {len(files)} JSON files has the lists of COCO: {names}. Export one COCO JSON for each split."
            )
        raise InvalidDatasetError(
            f'Several files may be the split "{split}": {names}. Remove all but one, or name it.'
        )
    return files[0]


def _image_folders(file: Path, root: Path) -> list[Path]:
    if file.parent == root or file.parent.name == "annotations":
        base = file.parent.parent if file.parent.name == "annotations" else root
        # "train2017" of "instances_train2017", or the split's own name
        names = [word for word in re.split(r"[^a-zA-Z0-9]+", file.stem) if split_of(word)]
        names += [word for word, split in SPLIT_WORDS.items() if split == split_of(file.stem) and word not in names]
        named = [folder / name for name in names for folder in (base / "images", base)]
        return [*named, base / "images", base, file.parent]
    return [file.parent, file.parent / "images", root / "images" / file.parent.name, root / "images", root]
