import json
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from coco_folder import coco_content, write_coco
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dit_detection.data import json_lists, load_detection_dataset
from dit_detection.data.coco import FIELDS
from dit_detection.data.json_lists import PackedList, UnreadableJsonError, read_json_lists


@pytest.fixture
def tiny_pieces(monkeypatch):
    monkeypatch.setattr(json_lists, "CHUNK", 3)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(
    content=st.dictionaries(st.sampled_from("abc"), values | st.lists(values, max_size=5)),
    indent=st.sampled_from([None, 0, 2]),
    is_ascii=st.booleans(),
    chunk=st.integers(1, 8),
)
def test_any_json_is_read_as_json_reads_it(tmp_path_factory, content, indent, is_ascii, chunk) -> None:
    file = tmp_path_factory.getbasetemp() / "any.json"
    text = json.dumps(content, indent=indent, ensure_ascii=is_ascii)
    file.write_text(text, encoding="utf-8", errors="surrogatepass" if is_ascii else "replace", newline="")
    expected = json.loads(file.read_text(encoding="utf-8"))
    whole_chunk, json_lists.CHUNK = json_lists.CHUNK, chunk
    try:
        lists = read_json_lists(file, {"a": ("x",), "b": ("x",)})
    finally:
        json_lists.CHUNK = whole_chunk
    assert list(lists) == list(expected)
    for key, value in expected.items():
        if isinstance(value, list) and key != "c":
            kept = [
                {f: v for f, v in entry.items() if f == "x"} if isinstance(entry, dict) else entry for entry in value
            ]
            assert list(lists[key]) == kept
        else:
            assert lists[key] is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n ",
        "{",
        '{"a"',
        '{"a": ',
        '{"a": [1, 2',
        '{"a": [1,\n 2,]}',
        '{"a": [1 2]}',
        '{"a": [{"id": 1},\n{"id" 2}]}',
        '{"a": [{"name": "cut off here',
        '{"a": [],\n\n  b: 1}',
        '{"a": tru}',
        '{"a": "\\x"}',
        '{"a": []} more',
        '{"a": 1.}',
        '{"a": [12.5e]}',
        '{"a" [1]}',
        "nonsense",
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_broken_json_is_placed_as_json_places_it(tmp_path: Path, monkeypatch, text: str, chunk: int) -> None:
    monkeypatch.setattr(json_lists, "CHUNK", chunk)
    (tmp_path / "broken.json").write_text(text, newline="")
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(UnreadableJsonError) as error:
        read_json_lists(tmp_path / "broken.json", {"a": ("id",)})
    line, column = expected.value.lineno, expected.value.colno
    found = str(error.value)
    assert found.startswith("not valid JSON, perhaps cut off, at line ")
    # Since Python 3.13 json points at a comma too many, and not at what follows it.
    assert f"line {line}, column {column}: " in found or text.endswith(",]}")


@pytest.mark.parametrize(("text", "what"), [("[1]", "a list"), ('"a"', "a str"), ("null", "a NoneType")])
def test_json_of_another_type(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(UnreadableJsonError, match=f"holds {what}, not an object"):
        read_json_lists(tmp_path / "other.json", {})


def test_a_number_of_too_many_digits(tmp_path: Path) -> None:
    (tmp_path / "digits.json").write_text('{"a": ' + "9" * 5000 + "}")
    with pytest.raises(UnreadableJsonError, match="cannot be read: Exceeds the limit"):
        read_json_lists(tmp_path / "digits.json", {})


def test_packed_list() -> None:
    packed = PackedList()
    entries = [{"id": index, "bbox": [index / 3, None, "x", -(2**70)]} for index in range(3000)]
    for entry in entries:
        packed.append(entry)
    assert len(packed) == 3000
    assert list(packed) == list(packed) == entries
    assert not PackedList()


def test_the_order_of_the_lists_does_not_matter(tmp_path: Path, tiny_pieces) -> None:
    content = coco_content()
    expected = load_detection_dataset(write_coco(tmp_path / "a", content))["train"]
    for name, keys in (("b", sorted(content)), ("c", sorted(content, reverse=True))):
        found = load_detection_dataset(write_coco(tmp_path / name, {key: content[key] for key in keys}))["train"]
        assert list(found["objects"]) == list(expected["objects"])


def test_segmentations_are_not_kept(tmp_path: Path) -> None:
    content = coco_content()
    polygon = np.random.default_rng(0).uniform(0, 30, 200).tolist()
    crowd = {"counts": list(range(300)), "size": [30, 40]}
    content["annotations"] = [
        content["annotations"][index % 3] | {"id": index, "segmentation": crowd if index % 9 == 0 else [polygon]}
        for index in range(1500)
    ]
    file = write_coco(tmp_path, content) / "annotations_train.json"
    lists = read_json_lists(file, FIELDS)
    assert lists["annotations"] is not None
    assert not any("segmentation" in entry for entry in lists["annotations"])
    assert len(pickle.dumps(lists)) < 1500 * 110 < file.stat().st_size / 20
    assert len(load_detection_dataset(tmp_path)["train"][1]["objects"]["bbox"]) == 1000


def test_memory_does_not_follow_the_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(json_lists, "CHUNK", 2**14)
    entry = json.dumps({"id": 1, "segmentation": [[0.5] * 1000]})
    file = tmp_path / "long.json"
    file.write_text('{"annotations": [' + ",".join([entry] * 200) + "]}")
    tracemalloc.start()
    try:
        read_json_lists(file, FIELDS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert file.stat().st_size > 1e6
    assert peak < 2e5  # a piece of 16 kB, as bytes, as text, and joined to the piece before; one decoded entry


def write_coco_twentieth(folder: Path) -> None:
    """A twentieth of COCO: 5914 images, 43000 objects with 20 points each, 20 MB; two files behind all names."""
    generator = np.random.default_rng(0)
    (folder / "train2017").mkdir(parents=True)
    names = [f"{index:012d}.jpg" for index in range(5914)]
    for index, name in enumerate(names):
        if index < 2:
            Image.new("RGB", (640, 480), (index, 0, 0)).save(folder / "train2017" / name)
        else:
            (folder / "train2017" / name).hardlink_to(folder / "train2017" / names[index % 2])
    corners = generator.uniform(0, 300, (43000, 2)).round(2)
    polygons = (corners[:, None] + generator.uniform(0, 150, (43000, 20, 2))).round(2).reshape(43000, 1, 40)
    content = {
        "images": [
            {"id": 3 * index, "file_name": name, "width": 640, "height": 480} for index, name in enumerate(names)
        ],
        "annotations": [
            {
                "segmentation": polygons[index].tolist(),
                "image_id": 3 * (index % 5914),
                "bbox": [*corners[index].tolist(), 150, 150],
                "category_id": 1 + index % 80,
                "id": index,
            }
            for index in range(43000)
        ],
        "categories": [{"id": index, "name": f"class {index}"} for index in range(1, 81)],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(content))


PEAK = """
import resource, sys
from dit_detection.data import load_detection_dataset

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak()
rows = load_detection_dataset(sys.argv[1])["train"]
print(len(rows), peak() - before)
"""


@pytest.mark.slow
def test_memory_of_a_twentieth_of_coco(tmp_path: Path) -> None:
    write_coco_twentieth(tmp_path)
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    num_rows, mib = output.split()[-2:]
    assert int(num_rows) == 5914
    assert float(mib) < 100  # a file of this size that is parsed whole takes 140
