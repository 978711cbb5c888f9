import io
import pickle

import numpy as np
import pytest
from predicted_images import SIZES, picture, write_finder_of_five
from transformers import pipeline

from dit_detection.inference.batch_predictor import BatchPredictor


@pytest.fixture(scope="module")
def checkpoint(finding_detector, tmp_path_factory):
    return write_finder_of_five(finding_detector, tmp_path_factory.mktemp("checkpoint"))


def test_arrays_that_are_no_images_say_so(checkpoint):
    predictor = BatchPredictor(str(checkpoint), device="cpu")
    image = np.full((20, 30, 3), 90, np.uint8)
    strange = [None, image.tolist(), image[:0], image[..., :1], image.astype(np.float32), image[..., 0].astype(int)]
    column = np.empty(len(strange) + 1, dtype=object)
    column[:] = [*strange, image]
    found = predictor({"image": column})
    for error in found["error"][:-1]:
        assert error.endswith("Give uint8 of shape (H, W, 3).")
    assert found["error"][-1] is None and len(found["boxes"][-1]) == len(predictor({"image": column[-1:]})["boxes"][0])
    assert all(len(boxes) == 0 for boxes in found["boxes"][:-1])


@pytest.fixture(scope="module")
def rows():
    pictures = [picture(seed, size) for seed, size in enumerate(SIZES)]
    encoded = []
    for image in pictures:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return pictures, encoded


def test_a_batch_of_encoded_images(checkpoint, rows):
    pictures, encoded = rows
    predictor = BatchPredictor(str(checkpoint), device="cpu")
    values = np.array([encoded[0], b"", encoded[1], b"none", None, *encoded[2:]], dtype=object)
    batch = {"path": np.arange(8), "bytes": values}
    found = pickle.loads(pickle.dumps(predictor))(batch)
    assert set(found) == {"path", "labels", "scores", "boxes", "error"}
    assert found["path"].tolist() == list(range(8))
    assert [error is None for error in found["error"]] == [True, False, True, False, False, True, True, True]
    detector = pipeline("object-detection", str(checkpoint))
    for index, image in zip((0, 2, 5, 6, 7), pictures, strict=True):
        expected = detector(image, threshold=0.3)
        assert found["labels"][index] == [item["label"] for item in expected]
        assert found["scores"][index] == pytest.approx([item["score"] for item in expected], abs=1e-5)
        for ours, theirs in zip(found["boxes"][index], expected, strict=True):
            assert ours == pytest.approx(list(theirs["box"].values()), abs=1)
    assert found["boxes"][1] == [] and "is empty" in found["error"][1]
    decoded = np.empty(5, dtype=object)
    decoded[:] = [np.asarray(image) for image in pictures]
    again = predictor({"image": decoded})
    assert [again["scores"][index] for index in range(5)] == [found["scores"][index] for index in (0, 2, 5, 6, 7)]
    assert predictor({"bytes": np.array([b"none"], dtype=object)})["scores"].tolist() == [[]]
    with pytest.raises(ValueError, match='"bytes" or "image", but has path'):
        predictor({"path": np.arange(2)})


def test_ray_data_maps_batches(checkpoint, rows, tmp_path):
    ray = pytest.importorskip("ray")
    for index, data in enumerate(rows[1]):
        (tmp_path / f"{index}.png").write_bytes(data)
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        found = (
            ray.data.read_binary_files(str(tmp_path), include_paths=True)
            .map_batches(
                BatchPredictor,
                fn_constructor_kwargs={"checkpoint": str(checkpoint), "device": "cpu"},
                batch_size=2,
                concurrency=1,
            )
            .take_all()
        )
    finally:
        ray.shutdown()
    found.sort(key=lambda row: row["path"])
    expected = BatchPredictor(str(checkpoint), device="cpu")({"bytes": np.array(rows[1], dtype=object)})
    assert [row["labels"] for row in found] == list(expected["labels"])
    assert np.concatenate([row["boxes"] for row in found]) == pytest.approx(
        np.concatenate(list(expected["boxes"])), abs=0.011
    )
