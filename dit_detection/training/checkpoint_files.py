"""Checkpoints on disk: written aside, listed with their hashes, and given their name once they are whole."""

import hashlib
import logging
import os
import re
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

# In a checkpoint, written last: `sha256sum --check SHA256SUMS` reads it, too.
CHECKSUMS = "SHA256SUMS"
# In the folder of a run: what is being written, or deleted.
UNFINISHED = "unfinished"


def publish_checkpoint(unfinished: Path) -> Path:
    """
    Give a checkpoint that is completely written its place, in the folder of the run.

    Its files are on the disk before it has its name there; what had the name before is deleted.

    Args:
        unfinished (`Path`): `RUN/unfinished/checkpoint-N`.

    Returns:
        `Path`: `RUN/checkpoint-N`.
    """
    run_dir = unfinished.parent.parent
    target = run_dir / unfinished.name
    files = sorted(path for path in unfinished.rglob("*") if path.is_file())
    sums = "".join(f"{_hash_of(path)}  {path.relative_to(unfinished).as_posix()}\n" for path in files)
    (unfinished / CHECKSUMS).write_text(sums, encoding="utf-8")
    for path in [*files, unfinished / CHECKSUMS]:
        _sync(path)
    _sync(unfinished)
    if target.exists():
        delete_checkpoint(target)
    unfinished.rename(target)
    _sync(run_dir)
    return target


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint; an interruption leaves no part of it under its name."""
    unfinished = checkpoint.parent / UNFINISHED
    unfinished.mkdir(exist_ok=True)
    shutil.rmtree(checkpoint.rename(unfinished / f"old-{checkpoint.name}"), ignore_errors=True)


def rotate_checkpoints(run_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """
    Delete the checkpoints that were written first, until `limit` are left; all, if it is `None` or 0.

    Args:
        run_dir (`Path`): Folder of the run.
        limit (`int`, *optional*): Checkpoints to keep.
        keep (`set[Path]`): Those that stay in any case, and count.
    """
    if not limit:
        return
    # By time and not by step: an earlier run in the same folder may have gone further.
    others = sorted(set(checkpoints_of(run_dir)) - keep, key=lambda checkpoint: checkpoint.stat().st_mtime)
    for checkpoint in others[: max(0, len(others) + len(keep) - limit)]:
        delete_checkpoint(checkpoint)


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, by their steps."""
    found = [path for path in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=_step_of)


def last_whole_checkpoint(run_dir: Path) -> Path | None:
    """
    The checkpoint with the most steps among those that training can go on from; says which it passes over.

    Returns:
        `Path`, or `None` if there are no checkpoints.

    Raises:
        ValueError: There are checkpoints, but none is whole.
    """
    checkpoints = checkpoints_of(run_dir)
    damages: list[str] = []
    for checkpoint in reversed(checkpoints):
        damage = damage_of(checkpoint)
        if damage is None:
            if damages:
                logger.warning("Not whole: %s. Training goes on from %s.", "; ".join(damages), checkpoint)
            return checkpoint
        damages.append(f"{checkpoint} ({damage})")
    if damages:
        raise ValueError(
            f"No checkpoint in {run_dir} is whole: {'; '.join(damages)}. Begin anew in another output_dir, or, if you "
            f"know that one is good, delete its {CHECKSUMS} and name its folder in resume_from_checkpoint."
        )
    return None


def damage_of(checkpoint: Path) -> str | None:
    """Why training cannot go on from a checkpoint; `None` if all that was written is there, unchanged, and enough."""
    if not (checkpoint / CHECKSUMS).is_file():
        return f"it has no {CHECKSUMS}, which is written last"
    lines = (checkpoint / CHECKSUMS).read_bytes().decode(errors="replace").splitlines()
    for line in lines:
        expected, _, name = line.partition("  ")
        path = checkpoint / name
        if not re.fullmatch("[0-9a-f]{64}", expected) or not name:
            return f"{CHECKSUMS} is damaged"
        if not path.is_file():
            return f"{name} is missing"
        try:
            if _hash_of(path) != expected:
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    if not lines:
        return f"{CHECKSUMS} is empty"
    return None if has_optimizer(checkpoint) else "it has no optimizer, as with save_only_model; --model takes weights"


def has_optimizer(checkpoint: Path) -> bool:
    """Whether training can go on from it, and not only begin with its weights."""
    # DeepSpeed has its optimizer in a folder of the step's name.
    return any(path.name.startswith(("optimizer", "global_step")) for path in checkpoint.glob("*"))


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # which cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
