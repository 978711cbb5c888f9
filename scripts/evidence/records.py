"""The file of finished runs: one JSON record per line, which nothing but a finished run adds."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .settings import Settings

Record = dict[str, Any]


class Records:
    """
    Finished runs, found by their settings.

    Invariant: a record is added in one piece when its run is finished. A kill loses the run that is going on, and no
    more.

    Args:
        path (`Path`): JSON lines; need not exist.

    Raises:
        ValueError: A line of the file is no record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, Record] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self._records.setdefault(_key(record["settings"]), record)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} line {number} is no record of a run ({error!r}). Delete the line: its run is then made "
                    "again."
                ) from error

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def find(self, settings: Settings) -> Record | None:
        """The record of the run of these settings, and of no others."""
        return self._records.get(_key(settings.to_json()))

    def add(self, record: Record) -> None:
        """
        Keep a finished run, on disk first.

        Raises:
            ValueError: It was kept before: a run is made once.
        """
        key = _key(record["settings"])
        if key in self._records:
            raise ValueError(f"{self.path} has a record of these settings already: {key}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._records[key] = record


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
