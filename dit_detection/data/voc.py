"""Pascal VOC: one XML per image, and lists of the images of each split."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from xml.etree.ElementTree import Element, ParseError

from defusedxml import ElementTree
from defusedxml.common import DefusedXmlException

from .annotations import Annotations, sort_classes
from .dataset_files import (
    IMAGE_SUFFIXES,
    ImageFinder,
    find_image_of,
    is_name,
    leads_outside,
    list_files,
    read_class_list,
    read_text,
)
from .layouts import SPLIT_WORDS, SPLITS, WHOLE, split_folders, split_of
from .problems import InvalidDatasetError, ProblemLog

SIDES = ("xmin", "ymin", "xmax", "ymax")


def find_voc(folder: Path) -> str | None:
    """The first XML of a folder of VOC annotations, in one of the places where `read_voc` looks."""
    return next(map(str, _find_files(folder)), None)


def read_voc(
    folder: Path, problems: ProblemLog, class_names: Sequence[str] | None = None, group_by: str | None = None
) -> dict[str, Annotations]:
    """
    Read `Annotations/*.xml` with the lists of `ImageSets/Main` (or of another folder in `ImageSets`, or `train.txt`,
    `val.txt`, … beside the annotations), or the XML files of the folders `train`, `valid` and `test`, or those of one
    folder, which become "train"; all at any depth.

    Images lie in `JPEGImages`, `images`, `img` or `data`, here or one folder up, or beside the XML; the XML's own name
    goes before its field "filename". Boxes are taken as (xmin, ymin) to (xmax, ymax), as labelImg, CVAT and Label
    Studio write them; in PASCAL VOC's own files pixels count from 1, and the last one belongs to the box. Objects
    marked as difficult are objects like all others. Images are numbered in the order of the list or of the names.

    Args:
        folder (`Path`): The data set.
        problems (`ProblemLog`): Where everything invalid is reported.
        class_names (`Sequence[str]`, *optional*): Ignored: the classes are those of `labelmap.txt`, `labels.txt` or
            `classes.txt`, or else all that occur, sorted.
        group_by (`str`, *optional*): Path of the XML element that names the image's group, as "source/database".

    Source: the VOC2012 development kit, http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf
    """
    if group_by is not None and not re.fullmatch(r"[\w.:-]+(/[\w.:-]+)*", group_by):
        what = 'of Pascal VOC it is the names of elements, as "source/database"'
        raise InvalidDatasetError(f"group_by is {group_by!r}, but {what}. Correct it.")
    listed = read_class_list(folder)
    labels = {name: label for label, name in enumerate(listed)}
    splits = {
        split: _read_split(f'{folder}, split "{split}"', files, labels, not listed, problems, group_by)
        for split, files in _find_splits(folder, problems).items()
    }
    sort_classes(splits.values(), labels, listed)
    return splits


def _annotation_folders(folder: Path) -> list[Path]:
    places = [place for place in (folder / "Annotations", folder / "annotations") if place.is_dir()]
    if len(places) == 2 and places[0].samefile(places[1]):  # on a file system that ignores case
        del places[1]
    labels = folder / "labels"  # of FiftyOne; of YOLO, too
    return [*places, labels] if labels.is_dir() and next(list_files(labels, (".xml",)), None) else places


def _find_files(folder: Path) -> Iterator[Path]:
    """The XML files of a data set, at any depth; if none lie at its top, those in folders of annotations or splits."""
    at_top = any(file.suffix.lower() == ".xml" and file.name[0] != "." for file in folder.iterdir())
    for place in [folder] if at_top else [*_annotation_folders(folder), *split_folders(folder)]:
        yield from list_files(place, (".xml",))


def _find_splits(folder: Path, problems: ProblemLog) -> dict[str, list[Path]]:
    """The XML files of each split, in order."""
    sets = folder / "ImageSets"
    lists = next(filter(None, map(_split_lists, [sets / "Main", sets, *sorted(sets.glob("*/"))])), {})
    files: dict[str, list[Path]] = {}
    if not lists:
        for file in _find_files(folder):
            split = next(filter(None, map(split_of, file.relative_to(folder).parts[:-1])), "train")
            files.setdefault(split, []).append(file)
    if list(files) == ["train"]:
        beside = _split_lists(folder)
        lists = beside if "train" in beside else {}
    if lists:
        places = (place for parent in (folder, *split_folders(folder)) for place in _annotation_folders(parent))
        return _follow_lists(lists, next(places, folder), problems)
    return {split: files[split] for split in SPLITS if split in files}


def _split_lists(folder: Path) -> dict[str, Path]:
    """`train.txt`, …, or `train_list.txt`, …, of a folder; lists of single classes, as `cat_train.txt`, are none."""
    lists = {file.stem.lower().removesuffix("_list"): file for file in sorted(folder.glob("*.txt"))}
    named = {SPLIT_WORDS[word]: file for word, file in lists.items() if word in SPLIT_WORDS}
    whole = next((lists[word] for word in WHOLE if word in lists), None)
    return named if "train" in named or whole is None else {"train": whole} | named


def _follow_lists(lists: dict[str, Path], annotations: Path, problems: ProblemLog) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for split in (split for split in SPLITS if split in lists):
        files[split] = []
        seen: set[Path] = set()
        for number, line in enumerate(read_text(lists[split]).splitlines(), start=1):
            name = line.strip().strip('"')
            if not name:
                continue
            meant = [annotations / f"{stem}.xml" for stem in _stems_of(name, annotations) if not leads_outside(stem)]
            file = next(filter(os.path.isfile, meant), None)
            if file is None:
                what = f"names {name!r:.80}, but there is no file {(meant or [annotations / f'{name}.xml'])[-1]}"
                problems.add("missing annotation file", f"{lists[split]}: line {number}", what)
            elif file not in seen:
                seen.add(file)
                files[split].append(file)
    listed = {file for paths in files.values() for file in paths}
    for file in list_files(annotations, (".xml",)):
        if file not in listed:
            what = f"no list in {next(iter(lists.values())).parent} names it"
            problems.add("annotation file in no split", str(file), what)
    return files


def _stems_of(line: str, annotations: Path) -> list[str]:
    """What a line of a list may name, likeliest first: itself, what is before a 0 or 1, the file of its last path."""
    stems, words = [line], line.rsplit(maxsplit=1)
    if len(words) == 2 and words[1] in ("-1", "0", "1"):
        stems.append(words[0])
    path = PurePosixPath(words[-1].replace("\\", "/"))
    if path.suffix.lower() in (".xml", *IMAGE_SUFFIXES):  # as "JPEGImages/a.png Annotations/a.xml" of PaddleDetection
        parts = path.with_suffix("").parts
        below = parts[parts.index(annotations.name) + 1 :] if annotations.name in parts else parts[-1:]
        stems += [str(path.with_suffix("")), "/".join(below)]
    return stems


def _read_split(
    source: str, files: list[Path], labels: dict[str, int], may_add: bool, problems: ProblemLog, group_by: str | None
) -> Annotations:
    """One split; classes that `labels` does not have are added to it in the order in which they occur, if they may."""
    annotations = Annotations(source, problems)
    paths: list[str] = []
    annotations.image_paths = paths
    finders: dict[Path, ImageFinder] = {}
    for file in files:
        root = _read_xml(file, problems)
        if root is None:
            continue
        row = len(paths)
        fields = [root.findtext(field, "").strip().replace("\\", "/") for field in ("filename", "path")]
        image = find_image_of(file, [name.rpartition("/")[2] for name in fields], finders)
        paths.append(str(image or file.with_suffix(".jpg")))
        if group_by is not None:
            annotations.groups.append(root.findtext(group_by))
        try:
            width, height = _size(root)
        except ValueError as error:
            annotations.add_image(row, file.name, None, None)
            annotations.drop_image(row, "unusable image entry", f'field "size" has {error}')
            continue
        annotations.add_image(row, file.name, width, height)
        if image is None:
            name = root.findtext("filename", "")
            what = f'there is no image "{file.stem}" with a known suffix, and no file {name!r:.80} (field "filename")'
            annotations.drop_image(row, "missing image file", what)
        else:
            _add_objects(annotations, row, root, labels, may_add)
    return annotations


def _read_xml(file: Path, problems: ProblemLog) -> Element | None:
    try:
        root = ElementTree.parse(file).getroot()
    except DefusedXmlException as error:
        what = f"declares entities, which attacks use and annotations do not need: {error}"
    except (ParseError, OSError, ValueError, LookupError) as error:
        what = f"cannot be read as XML: {error}"
    else:
        if root.tag == "annotation":
            return root
        what = f"has the root element <{root.tag:.40}>, not <annotation>"
    problems.add("unusable annotation file", str(file), what)
    return None


def _size(root: Element) -> tuple[int | None, int | None]:
    """Width and height; `None` where the file does not say, or says 0 as some tools do."""
    sizes: list[int | None] = []
    for field in ("width", "height"):
        text = root.findtext(f"size/{field}", "").strip()
        size = float(text or 0)
        if not 0 <= size < 2**31 or size != int(size):
            raise ValueError(f"{field} {text!r:.40}")
        sizes.append(int(size) or None)
    return sizes[0], sizes[1]


def _add_objects(annotations: Annotations, row: int, root: Element, labels: dict[str, int], may_add: bool) -> None:
    own_files = root.findtext("source/database", "").startswith("The VOC2")  # "The VOC2007 Database"
    # <part> has a box of its own, but is nested in its object.
    for object_id, element in enumerate(root.findall("object"), start=1):
        name = element.findtext("name", "").strip()
        texts = [element.findtext(f"bndbox/{side}", "").strip() for side in SIDES]
        try:
            xmin, ymin, xmax, ymax = map(float, texts)
        except ValueError:
            what = f'field "bndbox" of {name!r:.40} has {dict(zip(SIDES, texts, strict=True))!r:.120}'
            annotations.report("unusable object", what, row, object_id)
            continue
        if own_files:
            xmin, ymin = xmin - 1, ymin - 1
        bbox = [xmin, ymin, xmax - xmin, ymax - ymin]
        if may_add and is_name(name):
            labels.setdefault(name, len(labels))
        if name not in labels:
            what = f'field "name" is {name!r:.80}; there are {", ".join(labels) or "none"}'
            annotations.report("unknown category", f"{what:.200}", row, object_id, bbox)
            continue
        if element.findtext("difficult", "0").strip() == "1":
            annotations.report("difficult object", f"{name!r:.40} is marked as difficult", row, object_id, bbox)
        annotations.add_object(row, object_id, bbox, labels[name], rotation=_rotation(element))


def _rotation(element: Element) -> float:
    """Degrees by which CVAT says that a box is turned."""
    attributes = element.findall("attributes/attribute")
    texts = [attribute.findtext("value", "") for attribute in attributes if attribute.findtext("name") == "rotation"]
    try:
        return float(texts[0]) if texts else 0.0
    except ValueError:
        return 0.0
