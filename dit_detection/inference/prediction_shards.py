"""Predictions on disk as a long run writes them: whole files only, and a manifest of what they were made with."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .prediction_formats import Prediction

SCHEMA = pa.schema(
    {
        "file": pa.string(),
        "image_id": pa.int64(),
        "width": pa.int64(),
        "height": pa.int64(),
        "detections": pa.list_(
            pa.struct(
                {
                    "label": pa.string(),
                    "label_id": pa.int64(),
                    "score": pa.float64(),
                    "box_xyxy": pa.list_(pa.float64()),
                }
            )
        ),
        "error": pa.string(),
    }
)

# Settings that stand in the manifest as a digest, which says nothing to a reader.
DIGESTS = ("checkpoint", "list of images")
# What a run writes beside its manifest.
OUTPUTS = ("shards", "pictures", "predictions.json", "coco.json", "yolo")


class SettingsChangedError(ValueError):
    """A run would go on with predictions that were made otherwise."""


class PredictionShards:
    """
    The folder of a run: `shards/*.parquet` (each some images, in order), `manifest.json`, and what is made of them.

    A shard has its name only once it is whole, so a run that was killed at any moment goes on with the missing ones.
    Iterating gives all predictions in the order of their images, one at a time.

    Args:
        folder (`str` or `Path`): Seen by all processes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest_file = self.folder / "manifest.json"

    def start(self, settings: Mapping[str, Any]) -> None:
        """
        Note what the predictions depend on, or make sure that it is what an earlier run noted. One process calls it.

        Raises:
            SettingsChangedError: It is not; the message names what differs.
        """
        settings = json.loads(json.dumps(settings))
        manifest = self.manifest()
        before = manifest.get("settings")
        if before is None:
            strange = [name for name in OUTPUTS if (self.folder / name).exists()]
            if strange:
                raise SettingsChangedError(
                    f"{self.folder} holds {', '.join(strange)}, but no manifest.json that says how they were made. "
                    "Name another --output_dir, or move them away."
                    if not self.manifest_file.is_file()
                    else f"{self.manifest_file} is damaged. Begin anew with --overwrite, or name another --output_dir."
                )
        if before is not None:
            changes = [name for name, value in settings.items() if before.get(name) != value]
            if changes:
                told = "; ".join(_change(name, before.get(name), settings[name]) for name in changes)
                only_pictures = changes == ["pictures"]
                remedy = f"Ask for no pictures (--no_pictures). Or: {_REMEDY}" if only_pictures else _REMEDY
                raise SettingsChangedError(f"{self.folder} holds predictions made otherwise: {told}. {remedy}")
        (self.folder / "shards").mkdir(parents=True, exist_ok=True)
        for left_over in (self.folder / "shards").glob("*.unfinished-*"):
            left_over.unlink(missing_ok=True)
        if before is None:
            self._write_manifest({"settings": settings, "complete": False})
        elif before.get("pictures") and not settings.get("pictures") and not manifest.get("complete"):
            # Of the shards that this run makes there will be none.
            self._write_manifest(manifest | {"settings": before | {"pictures": False}})

    def manifest(self) -> dict[str, Any]:
        """What `manifest.json` says; empty without one, and if it is damaged."""
        if not self.manifest_file.is_file():
            return {}
        try:
            manifest: dict[str, Any] = json.loads(self.manifest_file.read_text(encoding="utf-8"))
            return manifest if isinstance(manifest.get("settings"), dict) else {}
        except (ValueError, AttributeError):
            return {}

    def names(self) -> list[str]:
        """Names of the shards that are whole, in the order of their images."""
        return sorted(path.stem for path in (self.folder / "shards").glob("*.parquet") if _is_whole(path))

    def write(self, name: str, predictions: Sequence[Prediction]) -> None:
        """Write a shard; of two processes that write the same one, the later wins."""
        target = self.folder / "shards" / f"{name}.parquet"
        unfinished = target.with_suffix(f".unfinished-{os.getpid()}")
        try:
            table = pa.Table.from_pylist([dict(prediction) for prediction in predictions], schema=SCHEMA)
            pq.write_table(table, unfinished, compression="zstd")
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)

    def __iter__(self) -> Iterator[Prediction]:
        for name in self.names():
            yield from self._read(name).to_pylist()

    def finish(self, num_images: int | None) -> dict[str, Any]:
        """
        Note that the run is complete; returns the manifest. One process calls it, when all have ended.

        Raises:
            OSError: Not all images came out.
        """
        manifest = self.manifest() | {"complete": True, "num_images": 0, "num_detections": 0, "num_unreadable": 0}
        for name in self.names():
            table = self._read(name, ["detections", "error"])
            manifest["num_images"] += len(table)
            manifest["num_detections"] += pc.sum(pc.list_value_length(table["detections"])).as_py() or 0
            manifest["num_unreadable"] += len(table) - table["error"].null_count
        if num_images is not None and manifest["num_images"] != num_images:
            raise OSError(
                f"{self.folder} holds {manifest['num_images']} of {num_images} images. Run the command again to make "
                "the others. With several machines --output_dir must be a folder that all of them see."
            )
        self._write_manifest(manifest | {"shards": self.names()})
        return manifest

    def remove(self) -> None:
        """Remove what an earlier run wrote, if a manifest says that there was one, and nothing else of the folder."""
        if not self.manifest_file.is_file():
            return
        for path in (self.folder / name for name in OUTPUTS):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.manifest_file.unlink()

    def _read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        path = self.folder / "shards" / f"{name}.parquet"
        try:
            return pq.read_table(path, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise OSError(f"{path} is damaged ({error}). Remove it and run the command again.") from error

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        unfinished = self.manifest_file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        unfinished.replace(self.manifest_file)


_REMEDY = "Name another --output_dir, or throw them away with --overwrite."


def _change(name: str, before: Any, now: Any) -> str:
    """In words, what is different about a setting."""
    if name in DIGESTS:
        return f"the {name} is another one"
    if isinstance(before, dict) and isinstance(now, dict):
        fields = sorted(field for field in before | now if before.get(field) != now.get(field))
        return "; ".join(_change(f"{name}.{field}", before.get(field), now.get(field)) for field in fields)
    return f"{name} was {json.dumps(before):.80} and is now {json.dumps(now):.80}"


def _is_whole(shard: Path) -> bool:
    try:
        pq.read_metadata(shard)  # stands at the end of the file
    except (OSError, pa.ArrowInvalid):
        return False
    return True
