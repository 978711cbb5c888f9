import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from annotation_folders import OBJECTS, objects_of, write_labelme, write_text, write_voc, write_yolo
from coco_folder import write_coco, write_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from more_annotation_files import with_image_list, with_list, write_csv, write_jsonl

from dit_detection.data import (
    InvalidDatasetError,
    ProblemLog,
    class_names_of,
    load_detection_dataset,
    read_detection_dataset,
)
from dit_detection.data.problems import REMARKS

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["C", "Z"]), min_size=1)
QUIET = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def annotated(draw: st.DrawFn) -> dict[str, list[tuple[str, list[float]]]]:
    """Objects of the two images; coordinates are hundredths of a pixel, which every format can say."""
    classes = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))

    def box() -> list[float]:
        x, y = draw(st.integers(0, 3990)), draw(st.integers(0, 2990))
        w, h = draw(st.integers(10, 4000 - x)), draw(st.integers(10, 3000 - y))
        return [x / 100, y / 100, w / 100, h / 100]

    found = {
        name: [(draw(st.sampled_from(classes)), box()) for _ in range(draw(st.integers(0, 4)))] for name in OBJECTS
    }
    found["a.png"].append((classes[0], [1.5, 2, 3, 4]))  # or all could lie between 0 and 1, which is refused
    return found


@QUIET
@given(objects=annotated())
def test_random_annotations_read_back_from_every_format(tmp_path_factory: Any, objects: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("random")
    classes = sorted({label for found in objects.values() for label, _ in found})
    content = {
        "images": [{"id": index, "file_name": name, "width": 40, "height": 30} for index, name in enumerate(objects)],
        "categories": [{"id": 3 + label, "name": name} for label, name in enumerate(classes)],
        "annotations": [
            {"image_id": index, "category_id": 3 + classes.index(label), "bbox": box}
            for index, found in enumerate(objects.values())
            for label, box in found
        ],
    }
    for index, annotation in enumerate(content["annotations"]):
        annotation["id"] = index
    write_voc(folder / "voc", objects)
    write_labelme(folder / "labelme", objects)
    write_images(folder / "yolo" / "images")
    for name, found in objects.items():
        lines = [
            f"{classes.index(label)} {(x + w / 2) / 40:.8f} {(y + h / 2) / 30:.8f} {w / 40:.8f} {h / 30:.8f}"
            for label, (x, y, w, h) in found
        ]
        write_text(folder / "yolo" / "labels" / f"{Path(name).stem}.txt", "\n".join(lines))
    write_text(folder / "yolo" / "data.yaml", f"train: images\nnames: {json.dumps(classes, ensure_ascii=False)}\n")
    write_coco(folder / "coco", content)
    for source in (folder / name for name in ("coco", "voc", "labelme", "yolo")):
        dataset = load_detection_dataset(source, check_files=False)
        assert class_names_of(dataset) == classes
        found = objects_of(dataset["train"])
        assert list(found) == list(objects)
        for name, expected in objects.items():
            assert [label for label, _ in found[name]] == [label for label, _ in expected]
            for (_, box), (_, other) in zip(found[name], expected, strict=True):
                assert box == pytest.approx(other, abs=1e-9)


ANNOTATION_FILES = [
    (write_coco, "annotations_train.json"),
    (write_voc, "Annotations/b.xml"),
    (write_voc, "labelmap.txt"),
    (with_list, "ImageSets/Main/train.txt"),
    (write_yolo, "data.yaml"),
    (write_yolo, "labels/b.txt"),
    (with_image_list, "train.txt"),
    (write_labelme, "b.json"),
    (write_csv, "metadata.csv"),
    (write_jsonl, "metadata.jsonl"),
    (write_images, "metadata.parquet"),
]


@pytest.mark.parametrize(("write", "file"), ANNOTATION_FILES, ids=[name for _, name in ANNOTATION_FILES])
@QUIET
@given(data=st.data())
def test_garbage_raises_nothing_but_the_one_error(
    tmp_path: Path, write: Callable[[Path], Path], file: str, data: st.DataObject
) -> None:
    folder = write(tmp_path / "data") if not (tmp_path / "data").exists() else tmp_path / "data"
    path = folder / file
    sound = tmp_path / "sound"
    if not sound.exists():
        sound.write_bytes(path.read_bytes() if path.exists() else b"PAR1")
    content = sound.read_bytes()
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    text_like = st.text("0123456789.-+eE \n\r\t,:;[]{}\"'<>/&!*%#@abnaninftruefalsenull\\\0\u00e9\u2028", max_size=30)
    garbage = data.draw(st.one_of(st.binary(max_size=30), text_like.map(str.encode), st.just(b"")))
    path.write_bytes(content[:start] + garbage + content[stop:])
    problems = ProblemLog("error")
    dataset = read_detection_dataset(folder, problems, check_files=False)
    assert (dataset is None) == problems.fatal
    if any(kind not in REMARKS for kind in problems.counts):
        with pytest.raises(InvalidDatasetError):
            problems.finish()
