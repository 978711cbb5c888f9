"""A detector behind HTTP: images in, boxes out, as Hugging Face's inference API has it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ..data.image_reading import UnreadableImageError
from .serving import BatchedDetector, DetectorBusyError

MAX_BYTES = 32 * 2**20  # of an upload; a photograph of 50 million pixels has about 20 MB
UPLOAD_SECONDS = 60


def make_app(detector: BatchedDetector) -> Starlette:
    """
    The web application around a detector, which it closes when it ends.

    `POST /` takes the bytes of an image and, in the URL, `threshold` (0.5 by default), and answers a list of `score`,
    `label` and `box`, whole pixels: what Hugging Face's inference API gives, so that `InferenceClient` can ask it.
    Whatever fails is answered `{"error": ...}`: 400 for what is no image or no threshold, 408 for an upload that takes
    more than `UPLOAD_SECONDS`, 413 for one of more than `MAX_BYTES`, 415 for JSON and forms, 503 for too many at once,
    500 for a fault of ours. (Connections beyond uvicorn's own limit get its 503, in plain text.) `GET /health` answers
    once the model is loaded.
    """
    id2label = detector.model.config.id2label

    async def detect(request: Request) -> JSONResponse:
        threshold = _threshold(request)
        image = await _body(request)
        try:
            found = await asyncio.wrap_future(detector.submit(image, threshold))
        except UnreadableImageError as error:
            raise HTTPException(400, f"The image {error}") from error
        except DetectorBusyError as error:
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from error
        scores, labels, boxes = (found[name].tolist() for name in ("scores", "labels", "boxes"))
        return JSONResponse(
            [
                {
                    "score": score,
                    "label": id2label[label],
                    "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), map(int, box), strict=True)),
                }
                for score, label, box in zip(scores, labels, boxes, strict=True)
            ]
        )

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(detector.close)

    return Starlette(
        routes=[Route("/", detect, methods=["POST"]), Route("/health", health)],
        exception_handlers={HTTPException: _answer_refusal, Exception: _answer_fault},
        lifespan=lifespan,
    )


def _threshold(request: Request) -> float:
    if request.headers.get("content-type", "").lower().startswith(("application/json", "multipart/")):
        raise HTTPException(415, "Send the image's bytes as the body, and the threshold in the URL: /?threshold=0.3.")
    text = request.query_params.get("threshold", "0.5")
    try:
        threshold = float(text)
    except ValueError:
        threshold = float("nan")
    if not 0 <= threshold <= 1:
        raise HTTPException(400, f"threshold={text[:20]!r} must be a number from 0 to 1.")
    return threshold


async def _body(request: Request) -> bytes:
    """The request's body. One that is too large is read to its end all the same: else the answer would be lost."""
    body = bytearray()
    num_bytes = 0

    async def receive() -> None:
        nonlocal num_bytes
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes <= MAX_BYTES:
                body.extend(chunk)

    try:
        await asyncio.wait_for(receive(), UPLOAD_SECONDS)
    except asyncio.TimeoutError as error:
        raise HTTPException(408, f"The image did not arrive within {UPLOAD_SECONDS} seconds.") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "The upload broke off.") from error
    if num_bytes > MAX_BYTES:
        raise HTTPException(413, f"The image has more than {MAX_BYTES:,} bytes. Make it smaller.")
    return bytes(body)


async def _answer_refusal(request: Request, error: Any) -> JSONResponse:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _answer_fault(request: Request, error: Exception) -> JSONResponse:
    # Starlette raises it again afterwards, for the server's log.
    return JSONResponse({"error": "The detector failed on this image. The server's log says why."}, 500)
