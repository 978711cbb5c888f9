"""The server of `dit-detect serve` under load, from outside: other process, real sockets."""

import http.client
import io
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from huggingface_hub import InferenceClient, constants
from PIL import Image

from dit_detection import DiTDetectionImageProcessor

ROOT = Path(__file__).parent.parent
NUM_CLIENTS = 16
logger = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    model = tiny_model()
    with torch.no_grad():
        model.head.class_predictor.bias += 3  # or hardly a score were above 0.5
    model.save_pretrained(folder)
    DiTDetectionImageProcessor(size=64).save_pretrained(folder)
    return folder


@contextmanager
def serve(checkpoint, log, *options):
    """A running server: its process, and the port on which it listens."""
    command = [sys.executable, ROOT / "scripts" / "serve.py", checkpoint, "--port", "0", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + 300
        while True:
            running = re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text())
            if running and answers(int(running[1])):
                break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield process, int(running[1])
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def answers(port):
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def encode(image, image_format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def make_payloads(rng):
    """(how often in a thousand requests, body, status): all that a server sees."""
    payloads = []
    for index, (width, height) in enumerate(rng.integers(1, 900, (40, 2)).tolist()):
        blocks = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height), 0)
        image = blocks.convert(["RGB", "L", "P", "RGBA"][index % 4])
        payloads.append((18, encode(image, "JPEG" if image.mode in ("RGB", "L") and index % 3 else "PNG"), 200))
    photo = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((5000, 4000), 0)
    payloads.append((2, encode(photo, "JPEG"), 200))
    payloads.append((80, b"", 400))
    payloads += [(10, rng.bytes(int(size)), 400) for size in rng.integers(1, 30_000, 10)]
    payloads += [(5, body[: int(len(body) * rng.uniform(0.1, 0.7))], 400) for _, body, _ in payloads[:10]]
    payloads.append((30, encode(Image.new("1", (30_000, 30_000))), 400))  # 900 million pixels in 100 kB
    payloads.append((17, b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400))
    payloads.append((1, bytes(33 * 2**20), 413))
    return payloads


def ask(connection, body):
    connection.request("POST", "/", body)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def assert_right(answer, status, expected):
    assert answer[0] == status, answer
    if status != 200:
        assert set(answer[1]) == {"error"} and answer[1]["error"].startswith("The image ")
        return
    assert [found["label"] for found in answer[1]] == [found["label"] for found in expected]
    for ours, alone in zip(answer[1], expected, strict=True):
        assert ours["score"] == pytest.approx(alone["score"], abs=1e-4)
        assert ours["box"] == pytest.approx(alone["box"], abs=1)  # whole pixels


@pytest.mark.parametrize(
    "num_requests", [pytest.param(2000, marks=pytest.mark.slow), pytest.param(10_000, marks=pytest.mark.long)]
)
def test_every_request_is_answered_and_memory_stays_flat(checkpoint, tmp_path, monkeypatch, num_requests):
    payloads = make_payloads(np.random.default_rng(0))
    thousand = [index for index, (count, _, _) in enumerate(payloads) for _ in range(count)]
    assert len(thousand) == 1000
    with serve(checkpoint, tmp_path / "log") as (process, port):
        alone = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        expected = [ask(alone, body)[1] if status == 200 else None for _, body, status in payloads]
        assert sum(len(found) for found in expected if found) > 100
        # What the client of the Hugging Face Hub makes of it.
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        client = InferenceClient(model=f"http://127.0.0.1:{port}/?threshold=0.6")
        found = client.object_detection(payloads[0][1])
        assert [item.label for item in found] == [item["label"] for item in expected[0] if item["score"] > 0.6] != []

        def send(indices):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            for index in indices:
                _, body, status = payloads[index]
                assert_right(ask(connection, body), status, expected[index])
            return len(indices)

        answered, memory, started = 0, [], time.monotonic()
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            # The most that the server ever has to hold comes first; what follows must not add to it.
            photo = [status == 200 and count == 2 for count, _, status in payloads].index(True)
            list(pool.map(send, [[photo]] * NUM_CLIENTS))
            for round_ in range(num_requests // 1000):
                random.Random(round_).shuffle(thousand)
                answered += sum(pool.map(send, [thousand[part::NUM_CLIENTS] for part in range(NUM_CLIENTS)]))
                memory.append(psutil.Process(process.pid).memory_info().rss / 2**20)
        seconds = time.monotonic() - started
        cpu = sum(psutil.Process(process.pid).cpu_times()[:2])
        rounded = [round(mib) for mib in memory]
        logger.info("%d in %.0f s, CPU %.0f s; MiB after each 1000: %s", answered, seconds, cpu, rounded)
    assert answered == num_requests
    assert memory[-1] < 1.05 * memory[0], memory


def workers_of(process):
    found = set()
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.Error):  # it has just died
            if "spawn_main" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


@pytest.mark.long
def test_a_worker_that_dies_is_replaced(checkpoint, tmp_path):
    body = encode(Image.new("RGB", (100, 80), "red"))
    failures, answered, stop = [], [], threading.Event()
    with serve(checkpoint, tmp_path / "log", "--workers", "2") as (process, port):
        before = workers_of(process)
        assert len(before) == 2
        expected = ask(http.client.HTTPConnection("127.0.0.1", port, timeout=60), body)[1]

        def send():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            while not stop.is_set():
                try:
                    assert_right(ask(connection, body), 200, expected)
                    answered.append(time.monotonic())
                except (OSError, http.client.HTTPException) as error:  # the worker died: ask again, another answers
                    failures.append(error)
                    connection.close()

        with ThreadPoolExecutor(4) as pool:
            sending = [pool.submit(send) for _ in range(4)]
            try:
                time.sleep(1)
                os.kill(min(before), signal.SIGKILL)
                killed = time.monotonic()
                while len(workers_of(process) - {min(before)}) < 2:
                    assert time.monotonic() < killed + 300
                    time.sleep(0.1)
                time.sleep(1)
            finally:
                stop.set()  # or the threads would go on for ever
            for future in sending:
                future.result()
    assert len(failures) <= 4  # what was under way in the worker that died
    assert sum(when > killed for when in answered) > 20
    assert process.returncode in (0, -signal.SIGTERM)
