"""Which COCO JSON files a folder holds, of which split, and where their images lie."""

import re
from pathlib import Path

from .problems import InvalidDatasetError, ProblemLog

SPLITS = ("train", "validation", "test")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
}
WHOLE = ("trainval", "default")  # of VOC, which train and val overlap; of CVAT, for images without a split


def split_of(name: str) -> str | None:
    """
    The split that a file, folder or split name speaks of, as in "instances_val2017", or `None`.

    Words are told apart by anything but letters; the last one that names a split counts.
    """
    return next((SPLIT_WORDS[word] for word in reversed(_words(name)) if word in SPLIT_WORDS), None)


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z]+", name.lower())


def split_folders(folder: Path) -> list[Path]:
    """The folders in a folder whose name speaks of a split."""
    return sorted(child for child in folder.iterdir() if child.is_dir() and split_of(child.name))


def find_coco_files(source: Path, problems: ProblemLog) -> dict[str, tuple[Path, list[Path]]]:
    """
    Find the COCO JSON of each split, as `annotations_train.json`, `annotations/instances_train2017.json` or
    `train/_annotations.coco.json`. A file whose name tells no split is "train" if no other claims it.

    Args:
        source (`Path`): A folder, or one JSON file, which is then the split "train".
        problems (`ProblemLog`): Where files that are in no split are reported.

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
    listed = list_json_files(source)
    has_coco = any(map(looks_like_coco, listed))
    for file in listed:
        if has_coco and split_of(file.stem) is not None and _is_other_json(file):  # as "train_config.json"
            problems.add("annotation file in no split", str(file), "it has neither images nor annotations")
            continue
        split = split_of(file.stem) or (split_of(file.parent.name) if file.parent != source else None)
        if split is None or file.stem.startswith("image_info"):  # of COCO's images without annotations
            unnamed.append(file)
        else:
            candidates.setdefault(split, []).append(file)
    if not candidates and unnamed:
        candidates = {"train": unnamed}
    elif unnamed:
        _place_unnamed(list(filter(looks_like_coco, unnamed)), candidates, problems)
    files = {split: _only(candidates[split], split) for split in SPLITS if split in candidates}
    return {split: (file, _image_folders(file, source)) for split, file in files.items()}


def list_json_files(folder: Path) -> list[Path]:
    """The JSON files in the places where COCO annotations may lie."""
    places = [folder, folder / "annotations", *split_folders(folder)]
    return [file for place in places for file in sorted(place.glob("[!.]*.json"))]


def looks_like_coco(file: Path) -> bool:
    """Whether a JSON has a key of COCO's at its begin or end; Label Studio's notes.json and others have not."""
    text = b"".join(ends_of(file))
    return b'"annotations"' in text or b'"images"' in text


def _is_other_json(file: Path) -> bool:
    """Whether a file is a whole JSON, but not COCO's; what is cut off, empty or a pointer may be meant to be."""
    begin, end = ends_of(file)
    is_whole = (begin.lstrip()[:1], end.rstrip()[-1:]) in ((b"{", b"}"), (b"[", b"]"))
    return is_whole and not looks_like_coco(file)


def ends_of(file: Path) -> tuple[bytes, bytes]:
    """The begin and the end of a file, 64 KiB of each; empty if it cannot be read."""
    try:
        with file.open("rb") as stream:
            begin = stream.read(2**16)
            stream.seek(max(0, file.stat().st_size - 2**16))
            return begin, stream.read(2**16)
    except OSError:
        return b"", b""


def _place_unnamed(unnamed: list[Path], candidates: dict[str, list[Path]], problems: ProblemLog) -> None:
    """Take files beside those of splits for "train" if none is; report what is left."""
    whole = [file for file in unnamed if set(_words(file.stem)) & set(WHOLE)]
    train = whole or [file for file in unnamed if not file.stem.startswith("image_info")]
    if train and "train" not in candidates:
        candidates["train"] = train
    for file in unnamed:
        if file not in candidates.get("train", []):
            problems.add("annotation file in no split", str(file), "files beside it name their splits")


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
        names = [word for word in re.split(r"[^a-zA-Z0-9]+", file.stem) if split_of(word) or word in WHOLE]
        names += [word for word, split in SPLIT_WORDS.items() if split == split_of(file.stem) and word not in names]
        named = [folder / name for name in names for folder in (base / "images", base)]
        named += [folder for folder in split_folders(base) if split_of(folder.name) == split_of(file.stem)]
        return [*named, base / "images", base / "data", base, file.parent]  # "data" is FiftyOne's
    folders = [file.parent, file.parent / "images", file.parent / "data"]
    return [*folders, root / "images" / file.parent.name, root / "images", root]
