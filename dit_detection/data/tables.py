"""Rows of a table of annotations: CSV with a header, JSON lines or parquet."""

import codecs
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .dataset_files import read_text
from .problems import InvalidDatasetError, ProblemLog

FILE_COLUMNS = ("file_name", "filename", "image_path", "image_name", "image", "path", "file")

Row = dict[str, Any]  # values by column, and under "where" the words that name the row in messages


def csv_header(file: Path) -> set[str]:
    """The columns that the first line of a CSV file names, in lower case; empty if it cannot be read."""
    try:
        # What is not UTF-8, here or below, is for `read_table` to say.
        with file.open(encoding="utf-16" if _is_utf16(file) else "utf-8-sig", errors="replace", newline="") as stream:
            line = stream.readline(10_000)
            return {name.strip().lower() for name in next(csv.reader([line], delimiter=_delimiter(line)), [])}
    except (OSError, ValueError, csv.Error):
        return set()


def read_table(file: Path, problems: ProblemLog) -> Iterator[Row]:
    """
    The rows of a table.

    Args:
        file (`Path`): `.csv`, `.jsonl` or `.parquet`.
        problems (`ProblemLog`): Where rows that cannot be read are reported.

    Raises:
        InvalidDatasetError: The file cannot be read, or has no column for the name of the image.
    """
    if file.suffix.lower() == ".csv":
        yield from _read_csv(file)
    elif file.suffix.lower() == ".parquet":
        yield from _read_parquet(file)
    else:
        for number, line in enumerate(read_text(file).split("\n"), start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    problems.add("unusable metadata row", f"{file}: line {number}", f"not valid JSON: {error}")
                    continue
                if isinstance(row, dict):
                    yield row | {"where": f"{file}: line {number}"}
                else:
                    what = f"holds a {type(row).__name__}, not an object"
                    problems.add("unusable metadata row", f"{file}: line {number}", what)


def _read_csv(file: Path) -> Iterator[Row]:
    text = read_text(file)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_delimiter(text.partition("\n")[0]))
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        _check_columns(reader.fieldnames, file)
        for row in reader:
            if None in row or None in row.values():
                where = f"{file}: line {reader.line_num}"
                raise InvalidDatasetError(f"{where} has not as many fields as the header. Correct it.")
            yield row | {"where": f"{file}: line {reader.line_num}"}
    except csv.Error as error:
        raise InvalidDatasetError(f"{file} cannot be read as CSV: {error}. Correct it.") from error


def _read_parquet(file: Path) -> Iterator[Row]:
    try:
        rows = pq.read_table(file).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InvalidDatasetError(f"{file} cannot be read as parquet: {error}. Write it again.") from error
    for number, row in enumerate(rows):
        if number == 0:
            _check_columns(list(row), file)
        yield row | {"where": f"{file}: row {number}"}


def _check_columns(columns: list[str], file: Path) -> None:
    if not set(columns) & set(FILE_COLUMNS):
        raise InvalidDatasetError(
            f"{file}: no column names the image; the first row has {', '.join(columns)!r:.200}. Put a header first, "
            "as file_name,xmin,ymin,xmax,ymax,label."
        )


def _is_utf16(file: Path) -> bool:
    """Whether a file begins with the byte order mark of Excel's "Unicode text"."""
    with file.open("rb") as stream:
        return stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _delimiter(header: str) -> str:
    return max(",;\t", key=header.count)
