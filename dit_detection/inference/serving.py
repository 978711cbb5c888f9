"""A detector that many threads share: the images that wait at the same moment go through the model as one batch."""

import os
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from types import TracebackType
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..data.image_reading import MAX_PIXELS, read_image, to_rgb

NUM_READERS = min(4, os.cpu_count() or 1)  # threads; each holds one decoded image, so they bound the memory


class DetectorBusyError(RuntimeError):
    """As many images wait as may wait."""


class _Request(NamedTuple):
    future: "Future[dict[str, Tensor]]"
    inputs: dict[str, Tensor]  # of one image, on the CPU
    size: tuple[int, int]  # (height, width) of the image
    threshold: float


class BatchedDetector:
    """
    Detects in images that arrive one by one, from any number of threads.

    A few threads read and resize images, one runs the model on all that wait by then: nothing waits for a batch to
    fill. What an image is batched with changes its boxes by rounding errors of float alone. A request that fails is
    answered by its error and touches no other. Close it, or use it in a `with` statement: what was accepted is
    answered first.

    Args:
        model, image_processor: As `from_pretrained` gives them; the model on its device.
        max_batch_size (`int`): Images that go through the model at once.
        max_waiting (`int`): Images that may be on their way; more are refused.
        max_pixels (`int`): Largest width times height of an encoded image. One of 50 million takes about 0.5 GB for
            the moment of reading it, times the reading threads, at most 4.
    """

    def __init__(
        self,
        model: Any,
        image_processor: Any,
        max_batch_size: int = 8,
        max_waiting: int = 64,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.model = model.eval()
        self.image_processor = image_processor
        if max_batch_size < 1 or max_waiting < 1:
            raise ValueError(f"max_batch_size={max_batch_size} and max_waiting={max_waiting} must be 1 or more.")
        self.max_batch_size = max_batch_size
        self.max_waiting = max_waiting
        self.max_pixels = max_pixels
        self._slots = threading.BoundedSemaphore(max_waiting)
        self._readers = ThreadPoolExecutor(NUM_READERS, "dit-detection-read")
        # Short, so that readers stop when the model falls behind. `None` ends the thread that runs the model.
        self._prepared: queue.Queue[_Request | None] = queue.Queue(max_batch_size)
        self._runner = threading.Thread(target=self._run, name="dit-detection-run", daemon=True)
        self._runner.start()

    def __enter__(self) -> "BatchedDetector":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def submit(
        self, image: bytes | str | os.PathLike | Image.Image, threshold: float = 0.5
    ) -> "Future[dict[str, Tensor]]":
        """
        Ask for the objects of an image; returns at once.

        Args:
            image (`bytes`, path or `PIL.Image.Image`): Encoded, its file, or decoded and upright.
            threshold (`float`): Scores must be above it.

        Returns:
            `Future` of `scores` `(M,)`, `labels` `(M,)` and `boxes` `(M, 4)` (xyxy, pixels of the upright image), best
            first, on the CPU; or of the error, [`UnreadableImageError`] for what is no image.

        Raises:
            DetectorBusyError: `max_waiting` images are on their way.
            RuntimeError: The detector is closed.
        """
        if not self._slots.acquire(blocking=False):
            raise DetectorBusyError(f"{self.max_waiting} images are waiting already. Try again in a moment.")
        future: Future[dict[str, Tensor]] = Future()
        future.set_running_or_notify_cancel()  # what was accepted is answered, never cancelled
        future.add_done_callback(lambda _: self._slots.release())
        try:
            self._readers.submit(self._prepare, future, image, threshold)
        except RuntimeError as error:
            self._slots.release()
            raise RuntimeError("This detector is closed.") from error
        return future

    def close(self) -> None:
        """Accept no more images, answer those that were accepted, end the threads."""
        self._readers.shutdown(wait=True)
        if self._runner.is_alive():
            self._prepared.put(None)
            self._runner.join()

    def _prepare(self, future: "Future[dict[str, Tensor]]", image: Any, threshold: float) -> None:
        try:
            image = to_rgb(image) if isinstance(image, Image.Image) else read_image(image, self.max_pixels)
            inputs = dict(self.image_processor(image, return_tensors="pt"))
            self._prepared.put(_Request(future, inputs, (image.height, image.width), threshold))
        except Exception as error:
            future.set_exception(error)
            del future, image  # the error's traceback holds this frame: a circle, which would keep the image alive

    def _run(self) -> None:
        is_open = True
        while is_open:
            taken = [self._prepared.get()]
            while taken[-1] is not None and len(taken) < self.max_batch_size and not self._prepared.empty():
                taken.append(self._prepared.get())
            is_open = taken[-1] is not None
            requests = sorted((request for request in taken if request is not None), key=_canvas)
            # A processor without a fixed canvas gives tensors of many shapes.
            for _, batch in groupby(requests, key=_canvas):
                self._answer(list(batch))

    def _answer(self, batch: list[_Request]) -> None:
        results = None
        try:
            results = self._detect(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
        if results is None:
            # The fault may lie in one of them, or the memory is too small for so many. Not under `except`: there the
            # error still holds what filled the memory.
            for request in batch:
                self._answer([request])
            return
        for request, result in zip(batch, results, strict=True):
            request.future.set_result(result)

    @torch.inference_mode()
    def _detect(self, batch: list[_Request]) -> list[dict[str, Tensor]]:
        inputs = {
            name: torch.cat([request.inputs[name] for request in batch]).to(self.model.device)
            for name in batch[0].inputs
        }
        results = self.image_processor.post_process_object_detection(
            self.model(**inputs),
            threshold=min(request.threshold for request in batch),
            target_sizes=[request.size for request in batch],
        )
        # A box is never suppressed by one with a lower score, so the threshold can come after NMS.
        return [
            {name: values[result["scores"] > request.threshold].cpu() for name, values in result.items()}
            for request, result in zip(batch, results, strict=True)
        ]


def _canvas(request: _Request) -> tuple[int, ...]:
    return tuple(request.inputs["pixel_values"].shape)
