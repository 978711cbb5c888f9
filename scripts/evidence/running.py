"""Settings → a finished run: its images, its detector, its budget, its metrics."""

import datetime
import gc
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_detection import DiTForObjectDetection, id2label_of
from dit_detection.small_dit import size_of

from .arms import build_detector, fingerprint_of, train_detector
from .baselines import DFine, RetinaNet, make_baseline
from .evaluation import evaluate, predictor
from .images import draw_subset, load_splits, make_processor, training_images
from .machine import Machine, Spent, commit, versions
from .records import Record, Records
from .settings import ARMS, NETWORK, REFERENCE_ARM, Settings, settings_of
from .training import train_baseline

Detector = DiTForObjectDetection | RetinaNet | DFine


class Runner:
    """
    Makes runs, one after the other, on one machine.

    Args:
        data (`Path`): Folder of the data sets' folders.
        pretrained (`dict[tuple[str, str], Path]`): Folders of pretrained DiTs by kind (`"general"`, `"own"`) and data
            set.
        records ([`Records`]): Where the minutes of the reference are looked up.
        machine ([`Machine`], *optional*): By default this one.

    Raises:
        ValueError: A pretrained DiT is none, or of another size than `NETWORK`.
    """

    def __init__(
        self, data: Path, pretrained: dict[tuple[str, str], Path], records: Records, machine: Machine | None = None
    ) -> None:
        self.data, self.pretrained, self.records = data, pretrained, records
        self.machine = machine or Machine.here()
        self.weights = {key: fingerprint_of(folder) for key, folder in pretrained.items()}
        for folder in pretrained.values():
            if (size := size_of(folder)) != NETWORK:
                raise ValueError(
                    f"{folder} is {f'of the size {size!r}' if size else 'no small DiT of ours'}, but NETWORK in "
                    f"scripts/evidence/settings.py is {NETWORK!r}: all arms have its blocks. Change it there, and all "
                    "runs are new ones."
                )
        # The splits of the last data set, and the last detector that was trained: runs may differ after that alone.
        self._splits: tuple[str, Any] = ("", None)
        self._trained: tuple[Settings, Detector, Spent] | None = None

    def reference_budget(self, settings: Settings) -> float | None:
        """
        What the reference took for the cell of these settings on such a machine; `None` before it has run. On a CPU
        it is the processor's time: a machine that stood still gives nobody more of it.
        """
        cell = settings_of(REFERENCE_ARM, settings.dataset, settings.fraction, settings.seed)
        cell = replace(cell, passes=settings.passes, canvas=settings.canvas)
        record = self.records.find(cell)
        if record is None or record["hardware"] != self.machine.describe():
            return None
        return record["spent"][self.machine.clock]

    def is_ready(self, settings: Settings) -> bool:
        """Whether the run's budget is known."""
        return settings.budget == "passes" or self.reference_budget(settings) is not None

    def run(self, settings: Settings) -> Record:
        """Train and evaluate; the record is not kept yet."""
        splits = self._load(settings.dataset)
        if self._trained is None or self._trained[0] != settings.before_post():
            self._trained = None
            gc.collect()  # what was trained before must not be there beside the next
            with tempfile.TemporaryDirectory(prefix="experiments-") as folder:
                rows = draw_subset(splits["train"], settings.fraction, settings.seed)
                self._trained = (settings.before_post(), *self._train(settings, rows, Path(folder)))
        _, model, spent = self._trained
        rows, processor = splits[settings.split], make_processor(settings)
        model.eval()
        if isinstance(model, DiTForObjectDetection):
            predict = predictor(model, processor, settings.post)
        else:
            predict = model.predict
        metrics = evaluate(predict, rows, processor, self.machine.device)
        return {
            "settings": settings.to_json(),
            "metrics": {name: round(value, 5) for name, value in metrics.items()},
            "spent": spent.to_json(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "hardware": self.machine.describe(),
            "versions": versions(),
            "commit": commit(),
            "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }

    def _train(self, settings: Settings, rows: Any, folder: Path) -> tuple[Detector, Spent]:
        arm = ARMS[settings.arm]
        if arm.is_baseline:
            model = make_baseline(settings, len(id2label_of(rows)))
            minutes = self.reference_budget(settings) if settings.budget == "minutes" else None
            return model, train_baseline(model, training_images(rows, settings), settings, self.machine, minutes)
        pretrained = None if arm.pretrained is None else self.pretrained[arm.pretrained, settings.dataset]
        detector = build_detector(rows, settings, pretrained, folder)
        return detector, train_detector(detector, rows, settings, self.machine, folder)

    def _load(self, dataset: str) -> Any:
        if self._splits[0] != dataset:
            self._splits = (dataset, load_splits(self.data / dataset))
        return self._splits[1]
