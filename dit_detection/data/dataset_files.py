"""The files of a data set folder: texts, images by name, and which of them may be read."""

import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeGuard

from .annotations import Annotations
from .problems import InvalidDatasetError, ProblemLog, escape_name

# Of the formats that `image_reading.py` reads.
IMAGE_SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
}
IMAGE_FOLDERS = ("JPEGImages", "images", "img", "data")
UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")  # Label Studio puts one before the name of each uploaded file


def is_image(file: Path) -> bool:
    """Whether a name is one of an image; upper case as cameras write it, too."""
    return file.suffix.lower() in IMAGE_SUFFIXES


def list_files(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """
    The files with one of these suffixes, in any case, in and below a folder, in the order of their names. Names that
    begin with a dot, as of notebooks' checkpoints and macOS, are left out.

    Folders that are links are followed, each once, but not to where the walk comes anyway.
    """
    root = os.path.realpath(folder)
    followed: set[str] = set()

    def walk(place: str) -> Iterator[Path]:
        with os.scandir(place) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            if entry.name.startswith("."):
                continue
            if os.path.splitext(entry.name)[1].lower() in suffixes:
                yield Path(entry.path)
            elif entry.is_dir():
                if entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    if target in followed or _is_within(target, root) or _is_within(root, target):
                        continue
                    followed.add(target)
                yield from walk(entry.path)

    yield from walk(str(folder))


def is_name(value: object) -> TypeGuard[str]:
    """Whether a value of an annotation can be the name of a file or a class."""
    # json reads half a surrogate pair, which no file system and no Arrow column takes.
    return isinstance(value, str) and bool(value) and "\0" not in value and not re.search("[\ud800-\udfff]", value)


def leads_outside(name: str) -> bool:
    """Whether a file name is absolute, or leaves its folder at any point."""
    file = PurePosixPath(name.replace("\\", "/"))
    depth = 0
    for part in file.parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return True
    return file.is_absolute() or bool(PureWindowsPath(name).drive)


def read_text(file: Path) -> str:
    """
    The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        InvalidDatasetError: It cannot be read, or is in another encoding.
    """
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidDatasetError(f"{file} is not UTF-8 text ({error}): save it as UTF-8.") from error
    except OSError as error:
        raise InvalidDatasetError(f"{file} cannot be read: {error.strerror}.") from error


def find_class_list(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of these files that a folder has."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_class_list(folder: Path) -> list[str]:
    """The classes that a file in a folder lists, as of [`read_classes`]; empty if there is none."""
    file = find_class_list(folder, ("classes.txt", "labels.txt", "labelmap.txt"))
    return [] if file is None else read_classes(file)


def read_classes(file: Path) -> list[str]:
    """
    Classes, one a line.

    CVAT's `labelmap.txt` starts with a comment, has `name:color:parts:actions` in each line and a class "background".

    Raises:
        InvalidDatasetError: A line is no class, so that numbers would mean other classes than the user thinks; or
            [`check_class_names`] refuses them.
    """
    lines = [line.strip() for line in read_text(file).rstrip().splitlines()]
    if file.name == "labelmap.txt":
        lines = [line.partition(":")[0] for line in lines if line and not line.startswith("#")]
        lines = [line for line in lines if line != "background"]
    for number, line in enumerate(lines, start=1):
        if not line:
            raise InvalidDatasetError(f"{file}: line {number} is empty. Remove it, or write the class there.")
        if re.match(r"#+\s", line):  # "#1" may be a class
            what = f"line {number}, {line!r:.80}, reads as a comment, which a list of classes cannot have"
            raise InvalidDatasetError(f"{file}: {what}. Remove the line, or give the class another name.")
    check_class_names(lines, str(file))
    return lines


def check_class_names(names: Iterable[object], source: str) -> None:
    """
    Refuse a list of classes that does not tell them apart.

    Raises:
        InvalidDatasetError: A name is no text, is empty, or stands there twice.
    """
    seen: set[object] = set()
    for name in names:
        # Not its value: YAML's aliases can make a list that is endless when written out.
        if not is_name(name):
            shown = f"{name!r:.80}" if isinstance(name, str) else f"of type {type(name).__name__}"
            raise InvalidDatasetError(f"{source}: class {shown} is no name. Write text, in quotation marks.")
        if name in seen:
            raise InvalidDatasetError(f"{source}: class {name!r:.80} is there twice. Give each a name of its own.")
        seen.add(name)


class ImageFinder:
    """
    Finds images by name in some folders, listing each folder once.

    Args:
        folders (`Iterable[Path]`): Where to look, likeliest first.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = list(dict.fromkeys(folders))
        self._listings: dict[Path, dict[str, list[str]]] = {}

    def find(self, name: str) -> Path | None:
        """The path of this name in the first folder that has it, or one alike, which `settle_image_paths` takes."""
        if leads_outside(name) or not is_name(name):
            return None
        paths = [folder / name.replace("\\", "/") for folder in self.folders]
        exact = (path for path in paths if os.path.isfile(path))
        return next(exact, None) or next((path for path in paths if self.find_alike(path) is not None), None)

    def find_stem(self, stem: str) -> list[Path]:
        """The images of this name without suffix, in the first folder that has any, or any alike: as with `find`."""
        if leads_outside(stem):
            return []
        for path in (folder / stem for folder in self.folders):
            names = self._listing(path.parent).get(f"{_alike(path.name)}.*", [])
            exact = [name for name in names if Path(name).stem == path.name]
            if names:
                return [path.parent / name for name in exact or [f"{path.name}{Path(name).suffix}" for name in names]]
        return []

    def find_alike(self, path: Path) -> Path | None:
        """The only file in the same folder that differs in case, in the encoding of accents or in a prefix."""
        listing = self._listing(path.parent)
        for name in (path.name, UPLOAD_PREFIX.sub("", path.name)):
            found = listing.get(_alike(name), [])
            if len(found) == 1:
                return path.parent / found[0]
        return None

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        """Names in a folder by how they read; images also as "stem.*"."""
        if folder not in self._listings:
            listing: dict[str, list[str]] = {}
            try:
                names = sorted(os.listdir(folder))
            except (OSError, ValueError):
                names = []
            for name in names:
                listing.setdefault(_alike(name), []).append(name)
                if is_image(Path(name)):
                    listing.setdefault(f"{_alike(Path(name).stem)}.*", []).append(name)
            self._listings[folder] = listing
        return self._listings[folder]


def _alike(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def find_image_of(file: Path, names: Sequence[str], finders: dict[Path, ImageFinder]) -> Path | None:
    """
    The image that an annotation file is about: of its own name, or else of one that it gives.

    Looked for beside the file, and in the folders where tools put images, there and one folder up; with folders below
    one that is called annotations, in folders of the same names.

    Args:
        file (`Path`): The annotation file.
        names (`Sequence[str]`): File names without folders, likeliest first; they also choose among images that differ
            in their suffix alone.
        finders (`dict[Path, ImageFinder]`): By folder, those made so far; more are added.
    """
    place = next((parent for parent in file.parents if parent.name.lower() == "annotations"), file.parent)
    if place not in finders:
        beside, above = place.parent, place.parent.parent
        folders = [*(beside / name for name in IMAGE_FOLDERS), beside, *(above / name for name in IMAGE_FOLDERS)]
        finders[place] = ImageFinder([place, place / "images", *folders])
    finder = finders[place]
    for stem in dict.fromkeys((str(file.relative_to(place).with_suffix("")), file.stem)):
        found = finder.find_stem(stem)
        if found:
            return next((path for path in found if path.name in names), found[0])
    return next((path for path in map(finder.find, filter(None, names)) if path is not None), None)


def settle_image_paths(annotations: Annotations, root: Path) -> None:
    """
    Take the file that is meant where a name differs in case or in how accents are encoded, and mind symbolic links.

    An image that is a link must end within the data set, within its own folder, or in the cache of the Hub, where
    every file of a snapshot is a link. A folder that is a link is followed: large images are often kept elsewhere.

    Args:
        annotations (`Annotations`): Its image paths may be replaced; images that lead outside, and those whose names
            no Arrow column takes, are marked in it.
        root (`Path`): The folder of the data set.
    """
    paths = list(annotations.image_paths)
    listed = set(paths)
    real_root = os.path.realpath(root)
    allowed: dict[str, list[str]] = {}  # by folder of images, the places where its links may end
    finder = ImageFinder([])
    alike: dict[int, str] = {}  # by row, the file that may be meant
    links: list[int] = []  # rows
    for row, path in enumerate(paths):
        folder = os.path.dirname(path)
        if folder not in allowed:
            allowed[folder] = [real_root, os.path.realpath(folder), *_hub_cache(real_root)]
            if _is_within(folder, str(root)) and not _is_within(allowed[folder][1], real_root):
                what = f"{folder} is in truth {allowed[folder][1]}"
                annotations.problems.add("images outside the data set's folder", annotations.source, what)
        if not annotations.keep_image[row]:
            continue
        try:
            links += [row] if stat.S_ISLNK(os.lstat(path).st_mode) else []
        except (OSError, ValueError):
            found = finder.find_alike(Path(path))
            alike |= {row: str(found)} if found is not None else {}
    claims = Counter(alike.values())
    for row, file in alike.items():
        if file in listed or claims[file] > 1:
            annotations.drop_image(row, "missing image file", f"{file} is alike, and another entry means it, too")
        else:
            paths[row] = file
            annotations.report("file name differs from the annotation", f"{file} is taken", row)
            links += [row] if os.path.islink(file) else []
    for row in links:
        target = os.path.realpath(paths[row])
        if not any(_is_within(target, place) for place in allowed[os.path.dirname(paths[row])]):
            annotations.drop_image(row, "link leads outside the data set", f"it is a link to {target}")
    for row, path in enumerate(paths):
        paths[row] = escape_name(path)
        if paths[row] != path and annotations.keep_image[row]:
            annotations.drop_image(row, "file name that is not UTF-8", f"there is {paths[row]}")
    annotations.image_paths = paths


def report_unlisted_images(splits: Iterable[Annotations], problems: ProblemLog) -> None:
    """Note the images that lie beside those of the annotations, in no split."""
    listed: dict[str, set[str]] = {}
    for annotations in splits:
        for path in annotations.image_paths:
            listed.setdefault(os.path.dirname(path), set()).add(os.path.basename(path))
    for folder, names in listed.items():
        try:
            unlisted = sorted(set(map(escape_name, os.listdir(folder))) - names)
        except OSError:
            continue
        for name in unlisted:
            if is_image(Path(name)) and not name.startswith("."):
                path = os.path.join(folder, name)
                problems.add("image without annotations", path, "no split names it", path)


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _hub_cache(root: str) -> list[str]:
    """`blobs` of `models--owner--name/snapshots/<revision>`, where huggingface_hub keeps the files themselves."""
    snapshot = Path(root)
    return [str(snapshot.parent.parent / "blobs")] if snapshot.parent.name == "snapshots" else []
