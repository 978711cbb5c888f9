import io
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from transformers import pipeline

from dit_detection import DiTDetectionImageProcessor
from dit_detection.commands import serve
from dit_detection.data.image_reading import UnreadableImageError
from dit_detection.inference.serving import BatchedDetector, DetectorBusyError
from dit_detection.inference.serving_app import MAX_BYTES, make_app

THRESHOLD = 0.55  # a few scores per image are above it
SECONDS = 60  # that no answer takes; without a bound a lost request would hang the tests


@pytest.fixture(scope="module")
def model(tiny_model):
    model = tiny_model()
    with torch.no_grad():
        model.head.class_predictor.bias += 3  # or hardly a score were above the pipeline's threshold, 0.5
    return model


@pytest.fixture(scope="module")
def processor():
    return DiTDetectionImageProcessor(size=64)


def make_images(count, seed=0, largest=200):
    """Blocks of colour: noise would look the same everywhere once it is made small."""
    rng = np.random.default_rng(seed)
    for width, height in rng.integers(1, largest, (count, 2)):
        blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        yield blocks.resize((int(width), int(height)), Image.Resampling.NEAREST)


def encode(image, image_format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def detect_alone(model, processor, image, threshold=THRESHOLD):
    """What an image gives without any of the code that is tested here."""
    with torch.inference_mode():
        outputs = model(**processor(image, return_tensors="pt"))
    return processor.post_process_object_detection(outputs, threshold, [(image.height, image.width)])[0]


def assert_same(found, expected):
    assert set(found) == set(expected)
    assert torch.equal(found["labels"], expected["labels"])
    torch.testing.assert_close(found["scores"], expected["scores"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["boxes"], expected["boxes"], atol=1e-2, rtol=1e-4)


class HeldModel(torch.nn.Module):
    """A detector that waits until it is let go; keeps the sizes of its batches, and can fail."""

    def __init__(self, model, fails=lambda pixel_values: False):
        super().__init__()
        self.model = model
        self.device = model.device
        self.config = model.config
        self.go = threading.Event()
        self.started = threading.Event()
        self.batch_sizes = []
        self.fails = fails

    def forward(self, pixel_values, pixel_mask):
        self.started.set()
        assert self.go.wait(SECONDS)
        self.batch_sizes.append(len(pixel_values))
        if self.fails(pixel_values):
            raise MemoryError(f"no room for {len(pixel_values)}")
        return self.model(pixel_values=pixel_values, pixel_mask=pixel_mask)


def test_threads_get_what_each_image_gives_alone(model, processor):
    images = list(make_images(40))
    expected = [detect_alone(model, processor, image) for image in images]
    assert sum(len(found["scores"]) for found in expected) > 40
    with BatchedDetector(model, processor) as detector, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda image: detector.submit(encode(image), THRESHOLD).result(SECONDS), images))
    for ours, alone in zip(found, expected, strict=True):
        assert_same(ours, alone)


def test_what_waits_goes_through_the_model_together_each_with_its_own_threshold(model, processor):
    held = HeldModel(model)
    images = list(make_images(12, seed=1))
    thresholds = [0.05 + 0.07 * index for index in range(12)]
    with BatchedDetector(held, processor, max_batch_size=4) as detector:
        futures = [detector.submit(images[0], thresholds[0])]
        assert held.started.wait(SECONDS)
        futures += [detector.submit(image, at) for image, at in zip(images[1:], thresholds[1:], strict=True)]
        while detector._prepared.qsize() < 4:
            pass
        held.go.set()
        found = [future.result(SECONDS) for future in futures]
    assert held.batch_sizes[:2] == [1, 4] and max(held.batch_sizes) == 4 and sum(held.batch_sizes) == 12
    for ours, image, at in zip(found, images, thresholds, strict=True):
        assert_same(ours, detect_alone(model, processor, image, at))
    assert len({len(ours["scores"]) for ours in found}) > 3


def test_one_bad_request_touches_no_other(model, processor, tmp_path):
    image = next(make_images(1, seed=2))
    encode_path = tmp_path / "image.jpg"
    image.save(encode_path, quality=95)
    good = encode(image)
    requests = [
        good,
        b"",
        good,
        b"no image at all",
        good[: len(good) // 2],
        encode_path,
        tmp_path / "missing.png",
        good,
    ]
    with BatchedDetector(model, processor, max_pixels=image.width * image.height) as detector:
        futures = [detector.submit(request, THRESHOLD) for request in requests]
        too_large = detector.submit(encode(Image.new("L", (image.width, image.height + 1))))
        for index in (0, 2, 7):
            assert_same(futures[index].result(SECONDS), detect_alone(model, processor, image))
        assert_same(futures[5].result(SECONDS), detect_alone(model, processor, Image.open(encode_path)))
        for index in (1, 3, 4, 6):
            with pytest.raises(UnreadableImageError):
                futures[index].result(SECONDS)
        with pytest.raises(UnreadableImageError, match=f"{image.height + 1} pixels, more than"):
            too_large.result(SECONDS)


def test_a_batch_that_fails_is_taken_apart(model, processor):
    # The model has no room for more than one, and not even for a grey image.
    held = HeldModel(model, fails=lambda pixels: len(pixels) > 1 or bool((pixels.abs() < 0.01).all()))
    images = [*make_images(3, seed=3), Image.new("RGB", (50, 50), (127, 128, 127))]
    with BatchedDetector(held, processor, max_batch_size=4) as detector:
        futures = [detector.submit(images[0])]
        assert held.started.wait(SECONDS)
        futures += [detector.submit(image) for image in images]
        while detector._prepared.qsize() < 4:
            pass
        held.go.set()
        for future, image in zip(futures[1:4], images, strict=False):
            assert_same(future.result(SECONDS), detect_alone(model, processor, image, 0.5))
        with pytest.raises(MemoryError, match="no room for 1"):
            futures[4].result(SECONDS)
        assert held.batch_sizes == [1, 4, 1, 1, 1, 1]
        assert_same(detector.submit(images[1]).result(SECONDS), detect_alone(model, processor, images[1], 0.5))


def test_images_of_many_canvases(model):
    """A processor whose canvas follows the image: what differs in shape cannot be one tensor."""
    processor = DiTDetectionImageProcessor(size={"shortest_edge": 48, "longest_edge": 96}, pad_size=None)
    images = [Image.new("RGB", size, "red") for size in ((60, 60), (60, 90), (90, 60), (60, 60), (120, 120), (60, 90))]
    with BatchedDetector(model, processor) as detector:
        futures = [detector.submit(image, 0.4) for image in images]
        for future, image in zip(futures, images, strict=True):
            assert_same(future.result(SECONDS), detect_alone(model, processor, image, 0.4))


def test_more_than_may_wait_is_refused_and_closing_answers_the_rest(model, processor):
    held = HeldModel(model)
    image = next(make_images(1, seed=4))
    detector = BatchedDetector(held, processor, max_waiting=3)
    futures = [detector.submit(image) for _ in range(3)]
    with pytest.raises(DetectorBusyError, match="3 images are waiting already"):
        detector.submit(image)
    held.go.set()
    assert_same(futures[0].result(SECONDS), detect_alone(model, processor, image, 0.5))
    with pytest.raises(UnreadableImageError):  # an error gives its place back, too
        detector.submit(b"").result(SECONDS)
    for _ in range(5):
        futures.append(detector.submit(image))
        futures[-1].result(SECONDS)
    held.go.clear()
    last = [detector.submit(image) for _ in range(3)]
    assert not last[0].cancel()
    threading.Timer(0.1, held.go.set).start()
    detector.close()
    assert all(future.done() for future in last)
    detector.close()
    with pytest.raises(RuntimeError, match="closed"):
        detector.submit(image)
    assert not detector._runner.is_alive()


def test_model_and_processor_are_shared_by_threads(model, processor):
    """Bare, without anything that puts the threads in a row: as `forward` and the processor promise."""
    images = list(make_images(12, seed=5))
    plain = DiTDetectionImageProcessor(size={"shortest_edge": 40, "longest_edge": 200}, do_pad=False)  # many grids
    calls = [(which, image) for image in images for which in (processor, plain)]
    expected = [detect_alone(model, which, image, 0.4) for which, image in calls]
    start = threading.Barrier(4)

    def detect_all(_):
        start.wait(SECONDS)
        return [detect_alone(model, which, image, 0.4) for which, image in calls]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(detect_all, range(4)):
            for ours, alone in zip(found, expected, strict=True):
                assert_same(ours, alone)


def test_positions_survive_another_thread_that_clears_them(model):
    class ClearedAtTheWorstMoment(dict):
        def __contains__(self, key):
            found = super().__contains__(key)
            self.clear()
            return found

        def get(self, key, default=None):
            found = super().get(key, default)
            self.clear()
            return found

    embedding = model.model.backbone.patch_embedding
    kept = embedding._positions
    embedding._positions = ClearedAtTheWorstMoment()
    try:
        like = torch.zeros(1)
        first = embedding.positions(3, 5, like)
        embedding._positions[(3, 5, like.device, like.dtype)] = first
        assert torch.equal(embedding.positions(3, 5, like), first)
    finally:
        embedding._positions = kept


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b""])
def test_weights_that_cannot_be_loaded_end_the_command_and_not_worker_after_worker(
    saved_detector, tmp_path, monkeypatch, damage
):
    folder = shutil.copytree(saved_detector, tmp_path / "detector")
    weights = folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    monkeypatch.setattr("uvicorn.run", lambda *args, **kwargs: pytest.fail("it was started"))
    with pytest.raises(SystemExit, match=r"dit-detect serve: .*detector cannot be loaded: "):
        serve.main([str(folder), "--workers", "2"])


@pytest.fixture(scope="module")
def client(model, processor):
    detector = BatchedDetector(model, processor, max_pixels=100_000)
    with TestClient(make_app(detector), raise_server_exceptions=False) as client:
        yield client
    assert not detector._runner.is_alive()


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_the_answer_is_that_of_the_pipeline(client, model, processor, image_format):
    data = encode(next(make_images(1, seed=6)), image_format)
    expected = pipeline("object-detection", model=model, image_processor=processor)(
        Image.open(io.BytesIO(data)), threshold=THRESHOLD
    )
    answer = client.post("/", params={"threshold": THRESHOLD}, content=data)
    assert answer.status_code == 200 and len(expected) > 0
    assert [found["label"] for found in answer.json()] == [found["label"] for found in expected]
    for ours, theirs in zip(answer.json(), expected, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert ours["box"] == pytest.approx(theirs["box"], abs=1)  # whole pixels


def test_the_default_threshold_is_that_of_the_pipeline(client, model, processor):
    image = next(make_images(1, seed=7))
    expected = pipeline("object-detection", model=model, image_processor=processor)(image)
    assert len(client.post("/", content=encode(image)).json()) == len(expected)


GOOD = encode(Image.new("RGB", (20, 20), "blue"))
JPEG = encode(Image.effect_noise((60, 60), 90), "JPEG")


@pytest.mark.parametrize(
    ("request_of", "status", "message"),
    [
        ({"content": b""}, 400, "The image is empty"),
        ({"content": b"\x00" * 1000}, 400, "The image is no image of the formats"),
        ({"content": JPEG[: len(JPEG) // 2]}, 400, "The image cannot be read as an image"),
        ({"content": encode(Image.new("1", (1000, 101)))}, 400, "1000 x 101 pixels, more than the 100,000"),
        ({"content": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, 400, "The image is no image of"),
        ({"content": b"\xff" * (MAX_BYTES + 1)}, 413, f"more than {MAX_BYTES:,} bytes"),
        ({"content": GOOD, "params": {"threshold": "-0.1"}}, 400, "threshold='-0.1' must be a number from 0 to 1"),
        ({"content": GOOD, "params": {"threshold": "nan"}}, 400, "threshold='nan' must be a number"),
        ({"content": GOOD, "params": {"threshold": "0.3; rm"}}, 400, "threshold='0.3; rm' must be"),
        ({"content": GOOD, "params": {"threshold": "9" * 5000}}, 400, f"threshold='{'9' * 20}' must be"),
        ({"json": {"inputs": "aGVsbG8="}}, 415, "Send the image's bytes as the body"),
        ({"files": {"file": b"hello"}}, 415, "Send the image's bytes as the body"),
        ({"method": "GET"}, 405, "Method Not Allowed"),
        ({"url": "/../etc/passwd", "method": "GET"}, 404, "Not Found"),
    ],
)
def test_what_cannot_be_answered_is_told(client, request_of, status, message):
    answer = client.request(**({"method": "POST", "url": "/"} | request_of))
    assert answer.status_code == status
    assert set(answer.json()) == {"error"} and message in answer.json()["error"]
    assert client.get("/health").json() == {"status": "ok"}


def test_a_fault_of_the_model_and_too_many_at_once(model, processor):
    held = HeldModel(model, fails=lambda pixels: True)
    detector = BatchedDetector(held, processor, max_waiting=1)
    with TestClient(make_app(detector), raise_server_exceptions=False) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/", content=GOOD)
        assert held.started.wait(SECONDS)
        busy = client.post("/", content=GOOD)
        assert busy.status_code == 503 and busy.headers["Retry-After"] == "1"
        assert "1 images are waiting already" in busy.json()["error"]
        held.go.set()
        assert first.result(SECONDS).status_code == 500
        assert "the server's log" in first.result().json()["error"].lower()
