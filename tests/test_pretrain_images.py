"""Images without annotations: which are taken, what is refused, and what the model is fed of them."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image

from dit_detection import InvalidDatasetError
from dit_detection.data import draw_shapes_dataset
from dit_detection.pretraining.image_sources import list_training_images
from dit_detection.pretraining.image_views import (
    CentreCrops,
    DecodedImages,
    FixedNoise,
    NoisedViews,
    RandomCrops,
)

MEMORY = 10**9


def save(path, size=(40, 30), mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode).save(path)
    return path


def listed(*sources):
    rows = list_training_images([str(source) for source in sources])
    return [image["path"] for image in rows["image"]]


# which images


def test_folders_are_searched_in_depth(tmp_path):
    expected = [save(tmp_path / name) for name in ("a.png", "b/c/d.JPG", "b/e.tif")]
    (tmp_path / "notes.json").write_text("[1, 2]")  # no annotations
    assert listed(tmp_path) == list(map(str, expected))
    assert listed(tmp_path / "b", tmp_path / "a.png") == [str(path) for path in (*expected[1:], expected[0])]


def test_folders_named_after_held_out_splits_are_left_out_aloud(tmp_path, caplog):
    kept = [save(tmp_path / "train" / "1.png"), save(tmp_path / "train2" / "x" / "2.png")]
    left = [save(tmp_path / "test" / "3.png"), save(tmp_path / "x" / "Val-2024" / "4.png")]
    with caplog.at_level(logging.WARNING):
        assert listed(tmp_path) == list(map(str, kept))
    assert "2 images are left out" in caplog.text
    assert listed(tmp_path / "test") == [str(left[0])]  # named itself
    kept[0].unlink(), kept[1].unlink()
    with pytest.raises(InvalidDatasetError, match="holds no images to train on"):
        listed(tmp_path)


def test_of_annotated_images_the_training_split_alone_is_read(tmp_path, caplog):
    names = {"train": ["a.png", "b.png"], "val": ["c.png"], "test": ["d.png"]}
    for split, files in names.items():
        images = [{"id": index, "file_name": file, "width": 40, "height": 30} for index, file in enumerate(files)]
        box = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 2, 10, 10], "area": 100, "iscrowd": 0}
        broken = {**box, "id": 2, "bbox": [1, 2, -10, 10]}  # no matter here
        content = {"images": images, "annotations": [box, broken], "categories": [{"id": 1, "name": "x"}]}
        (tmp_path / f"annotations_{split}.json").write_text(json.dumps(content))
        for file in files:
            save(tmp_path / "images" / file)
    save(tmp_path / "images" / "unlisted.png")
    with caplog.at_level(logging.INFO):
        paths = listed(tmp_path)
    assert [path.rpartition("/")[2] for path in paths] == ["a.png", "b.png"]
    assert "validation (1), test (1)" in caplog.text
    assert "1 images that no annotation names are left out" in caplog.text and "unlisted.png" in caplog.text
    (tmp_path / "annotations_train.json").unlink()
    with pytest.raises(InvalidDatasetError, match="has the splits validation, test: none"):
        listed(tmp_path)


VOC = """<annotation><size><width>40</width><height>30</height></size><object><name>cat</name>
<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object></annotation>"""


def test_images_that_no_annotation_names_are_trained_on_too(tmp_path, caplog):
    """Annotations are dear: of a folder often but a part has them."""
    names = ["JPEGImages/0.png", "JPEGImages/1.png", "JPEGImages/more/2.png"]
    named, *unnamed = [str(save(tmp_path / "voc" / name)) for name in names]
    held_out = save(tmp_path / "voc" / "JPEGImages" / "test" / "3.png")
    save(tmp_path / "voc" / "logo.png")
    (tmp_path / "voc" / "Annotations").mkdir()
    (tmp_path / "voc" / "Annotations" / "0.xml").write_text(VOC)
    with caplog.at_level(logging.INFO):
        assert listed(tmp_path / "voc") == [named, *unnamed]
    assert "2 images that no annotation names, as " in caplog.text
    assert f"2 images that no annotation names are left out, as {held_out}" in caplog.text

    content = {"images": [{"id": 1, "file_name": "b.png"}], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 10]}]
    files = [str(save(tmp_path / "coco" / name)) for name in ("a.png", "b.png", "c.png")]
    (tmp_path / "coco" / "all.json").write_text(json.dumps(content))
    assert listed(tmp_path / "coco") == [files[1], files[0], files[2]]
    assert listed(tmp_path / "coco" / "all.json") == [files[1]]  # a file says which


def test_the_folder_of_the_run_is_left_out_aloud(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    kept = [save(tmp_path / name) for name in ("a.png", "b/outputs/c.png")]
    save(tmp_path / "outputs" / "samples" / "step-1.png")
    (tmp_path / "link").symlink_to(tmp_path)
    for source, output_dir in ((".", "outputs"), (tmp_path / "link", tmp_path / "b" / ".." / "outputs")):
        rows = list_training_images([str(source)], leave_out=Path(output_dir))
        assert [Path(image["path"]).name for image in rows["image"]] == [path.name for path in kept]
    assert ".: the output_dir outputs in it is left out" in caplog.text
    (tmp_path / "data.yaml").write_text("train: .\nnames: [cat]\n")
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    rows = list_training_images([str(tmp_path)], leave_out=Path("outputs"))
    assert [Path(image["path"]).name for image in rows["image"]] == ["a.png", "c.png"]
    with pytest.raises(InvalidDatasetError, match=r"link is a folder of images.*Name another"):
        list_training_images([str(tmp_path)], leave_out=tmp_path / "link")


def test_of_data_sets_the_training_split_alone_is_read(tmp_path):
    shapes = draw_shapes_dataset(3, 2, 1, image_size=32)
    shapes.save_to_disk(tmp_path / "annotated")
    rows = list_training_images([str(tmp_path / "annotated")])
    expected = [image["bytes"] for image in shapes["train"].with_format("arrow")["image"].to_pylist()]
    assert rows.column_names == ["image"] and [image["bytes"] for image in rows["image"]] == expected

    plain = shapes["test"].select_columns("image")
    DatasetDict({"training": plain}).save_to_disk(tmp_path / "plain")
    assert len(list_training_images([str(tmp_path / "plain"), str(tmp_path / "annotated")])) == 4
    for splits in ({"test": plain}, {"a": plain, "b": plain}, {"train": plain, "training": plain}):
        DatasetDict(splits).save_to_disk(tmp_path / "_".join(splits))
        with pytest.raises(InvalidDatasetError, match="none, or more than one"):
            list_training_images([str(tmp_path / "_".join(splits))])


def test_what_cannot_be_a_source_is_refused(tmp_path):
    DatasetDict({"train": Dataset.from_dict({"picture": [1]})}).save_to_disk(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    for source, message in {
        "missing/folder/of/images": "There is no file or folder",
        str(tmp_path / "empty"): "holds no images",
        str(tmp_path / "other"): 'needs a column "image", but has picture',
    }.items():
        with pytest.raises(InvalidDatasetError, match=message):
            list_training_images([source])


# pixels


def decoded(paths, side=64, max_bytes=MEMORY):
    return DecodedImages(list_training_images(list(map(str, paths))), side, max_bytes)


def test_every_kind_of_image_becomes_8_bit_rgb(tmp_path):
    ramp = np.linspace(0, 65535, 40 * 30).reshape(30, 40)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "16bit.png")
    save(tmp_path / "grey.png", mode="L")
    save(tmp_path / "transparent.png", mode="RGBA")
    save(tmp_path / "palette.gif", mode="P")
    save(tmp_path / "pixel.png", size=(1, 1))
    save(tmp_path / "needle.png", size=(3000, 2))
    names = ("16bit.png", "grey.png", "transparent.png", "palette.gif", "pixel.png", "needle.png")
    images = decoded([tmp_path / name for name in names], side=32)
    assert all(images[i].dtype == np.uint8 and images[i].shape[2] == 3 for i in range(len(images)))
    assert abs(images[0][..., 0].astype(int) - ramp / 257).max() < 1  # 30 rows high: as it is
    assert images[4].shape == (1, 1, 3) and images[5].shape == (2, 3000, 3)
    assert images.num_small == len(names)
    for crops in (RandomCrops(images, range(6), 48, 0.25, seed=0), CentreCrops(images, range(6), 48)):
        for index in range(6):
            crop = crops.get(index, 0)
            assert crop.shape == (3, 48, 48) and crop.dtype == torch.uint8


def test_images_that_cannot_be_read_are_named_before_training(tmp_path):
    save(tmp_path / "good.png")
    whole = save(tmp_path / "cut.png", size=(400, 300)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(InvalidDatasetError) as error:
        decoded([tmp_path])
    text = str(error.value)
    assert text.startswith("3 of 4 images cannot be read")
    assert all(f"{tmp_path / name}: " in text for name in ("cut.png", "empty.jpg", "text.jpg"))
    assert "good.png" not in text


def test_an_image_that_is_lost_later_is_named_too(tmp_path):
    path = save(tmp_path / "1.png")
    save(tmp_path / "2.png", seed=1)
    images = decoded([tmp_path], max_bytes=0)
    path.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=rf"^{path}: "):
        images[0]
    path.unlink()
    with pytest.raises(ValueError, match=rf"^{path}: "):
        images[0]


def test_rows_without_an_image_are_told_by_their_number(tmp_path):
    content = {"bytes": save(tmp_path / "1.png").read_bytes(), "path": None}
    (tmp_path / "set").mkdir()
    rows = Dataset.from_dict({"image": [content, None]}, features=Features({"image": ImageFeature(decode=False)}))
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(InvalidDatasetError, match=r"1 of 2 images cannot be read.*\n  image 1: has no image"):
        decoded([tmp_path / "set"])


def test_of_an_image_that_comes_twice_one_is_taken(tmp_path, caplog):
    """Of two, one would be held out, and the other trained on."""
    for index in range(3):
        save(tmp_path / "a" / f"{index}.png", seed=index)
    save(tmp_path / "b" / "copy.png", seed=1)
    save(tmp_path / "b" / "new.png", seed=3)
    once = decoded([tmp_path / "a"])
    with caplog.at_level(logging.INFO):
        twice = decoded([tmp_path / "a", tmp_path / "b" / ".." / "a"])
        more = decoded([tmp_path / "b", tmp_path / "a"], max_bytes=0)
    assert len(twice) == 3 and twice.fingerprint == once.fingerprint
    assert "3 of 6 images are left out: each is there already" in caplog.text
    assert len(more) == 4
    for position, image in enumerate((once[1], None, once[0], once[2])):
        if image is not None:
            np.testing.assert_array_equal(more[position], image)


def test_memory_changes_nothing_but_where_pixels_come_from(tmp_path):
    for index in range(4):
        save(tmp_path / f"{index}.png", size=(200, 100), seed=index)
    kept, partly, none = (decoded([tmp_path], 50, size) for size in (MEMORY, 2 * 100 * 50 * 3, 0))
    assert [images.num_kept for images in (kept, partly, none)] == [4, 2, 0]
    for index in range(4):
        assert kept[index].shape == (50, 100, 3)  # no more than crops need
        np.testing.assert_array_equal(kept[index], partly[index])
        np.testing.assert_array_equal(kept[index], none[index])
    assert kept.fingerprint == none.fingerprint


def test_the_fingerprint_is_of_contents_alone(tmp_path):
    for folder in ("a", "b", "c"):
        for index in range(3):
            save(tmp_path / folder / f"{index}{folder}.png", seed=index + 10 * (folder == "c" and index == 2))
    a, b, c = (decoded([tmp_path / folder]).fingerprint for folder in ("a", "b", "c"))
    assert a == b != c


# views


@pytest.fixture(scope="module")
def gradient(tmp_path_factory):
    """An image whose red channel tells the column and whose green channel tells the row."""
    pixels = np.zeros((100, 200, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(200), np.arange(100)[:, None]
    path = tmp_path_factory.mktemp("gradient") / "gradient.png"
    Image.fromarray(pixels).save(path)
    return decoded([path], side=1000)


def test_random_crops_have_the_area_and_shape_that_they_are_to_have(gradient):
    crops = RandomCrops(gradient, [0] * 300, 16, crop_area=0.25, seed=0)
    areas, ratios, flips, lefts = [], [], 0, []
    for index in range(300):
        crop = crops.get(index, 0).double()
        # A pixel of the crop is as wide as 1/16 of it; its centres are half of that from the edges.
        width = (crop[0, 8, 15] - crop[0, 8, 0]).item() * 16 / 15
        height = (crop[1, 15, 8] - crop[1, 0, 8]).item() * 16 / 15
        flips += width < 0
        lefts.append(min(crop[0, 8, 0].item(), crop[0, 8, 15].item()))
        areas.append(abs(width) * height / 20000)
        ratios.append(abs(width) / height)
    assert 0.2 < min(areas) < 0.3 and max(areas) > 0.6
    assert min(ratios) > 0.7  # wide images are cut at the height, and then crops are wider
    assert 110 < flips < 190
    assert min(lefts) < 10 and max(lefts) > 80


def test_views_depend_on_seed_epoch_and_index_alone(gradient):
    dataset = NoisedViews(RandomCrops(gradient, [0, 0], 16, 0.25, seed=1), seed=1)
    entry = dataset[1]
    dataset.set_epoch(3)
    later = dataset[1]
    assert not torch.equal(entry["images"], later["images"])
    assert entry["time"] != later["time"] and entry["seed"] != later["seed"]
    assert dataset[0]["seed"] != later["seed"]
    dataset.set_epoch(0)
    again = dataset[1]
    assert all(torch.equal(entry[name], again[name]) for name in entry)
    other = NoisedViews(RandomCrops(gradient, [0, 0], 16, 0.25, seed=2), seed=2)[1]
    assert not any(torch.equal(entry[name], other[name]) for name in entry)


def test_times_are_uniform(gradient):
    dataset = NoisedViews(CentreCrops(gradient, [0] * 500, 4), seed=0)
    times = np.array([dataset[index]["time"].item() for index in range(500)])
    counts = np.histogram(times, bins=5, range=(0, 1))[0]
    assert counts.sum() == 500 and counts.min() > 70


def test_held_out_views_have_times_that_cover_the_schedule(gradient):
    dataset = FixedNoise(CentreCrops(gradient, [0, 0, 0], 16), seed=0)
    times = np.sort([dataset[index]["time"].item() for index in range(len(dataset))])
    assert len(dataset) == 128 and times.min() >= 0 and times.max() < 1
    assert np.diff([0, *times, 1]).max() < 0.02
    assert len({dataset[index]["seed"].item() for index in range(128)}) == 128
    middle = dataset[0]["images"][0, 8].double()
    assert middle.min() > 52 and middle.max() < 148  # the square in the middle of 200 x 100
    assert len(FixedNoise(CentreCrops(gradient, [0] * 200, 16), seed=0)) == 200
