"""Long lists of a JSON file, read entry by entry: of a file of gigabytes, only what is needed stays in memory."""

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

CHUNK = 2**20  # characters
SPACE = re.compile(r"[ \t\n\r]*")  # what JSON means by it


class UnreadableJsonError(ValueError):
    """A file that is not a JSON object; the message continues a sentence that begins with the file's name."""


class PackedList:
    """
    A list of JSON values that is written once and read in order. It takes a tenth of the memory of a list: a box with
    its ids has 40 bytes.
    """

    def __init__(self) -> None:
        self._packed: list[bytes] = []
        self._open: list[Any] = []

    def __len__(self) -> int:
        return len(self._packed) * 1024 + len(self._open)

    def __iter__(self) -> Iterator[Any]:
        for packed in self._packed:
            yield from json.loads(zlib.decompress(packed))
        yield from self._open

    def append(self, value: Any) -> None:
        """Add a value at the end."""
        self._open.append(value)
        if len(self._open) == 1024:
            self._packed.append(zlib.compress(json.dumps(self._open).encode(), level=1))
            self._open = []


def read_json_lists(file: Path, fields: Mapping[str, Sequence[str]]) -> dict[str, PackedList | None]:
    """
    Read the lists of a JSON object.

    Args:
        file (`Path`): The file, UTF-8, with or without a byte order mark.
        fields (`Mapping[str, Sequence[str]]`): By key of a list, the fields that are kept of those of its entries that
            are objects. Entries of any other type are kept as they are.

    Returns:
        `dict[str, PackedList | None]`: The keys of the file in their order; `None` for what is no list or not named in
        `fields`.

    Raises:
        UnreadableJsonError: The file cannot be read, is not valid JSON or does not hold an object.
    """
    try:
        with file.open(encoding="utf-8-sig") as stream:
            return _read_object(_JsonText(stream), fields)
    except UnreadableJsonError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a number of 5000 digits
        raise UnreadableJsonError(f"cannot be read: {error}") from error


def _read_object(text: "_JsonText", fields: Mapping[str, Sequence[str]]) -> dict[str, PackedList | None]:
    if text.peek() != "{":
        kind = "list" if text.peek() == "[" else type(text.value()).__name__
        raise UnreadableJsonError(f"holds a {kind}, not an object")
    text.take("{")
    lists: dict[str, PackedList | None] = {}
    more = text.peek() != "}"
    while more:
        if text.peek() != '"':
            raise text.error("Expecting property name enclosed in double quotes")
        key = text.value()
        text.take(":")
        lists[key] = None
        if text.peek() == "[":
            entries = PackedList()
            for entry in _read_list(text):
                if key in fields:
                    is_object = isinstance(entry, dict)
                    entries.append({f: entry[f] for f in fields[key] if f in entry} if is_object else entry)
            lists[key] = entries if key in fields else None
        else:
            text.value()
        more = text.peek() == ","
        if more:
            text.take(",")
    text.take("}")
    if text.peek():
        raise text.error("Extra data")
    return lists


def _read_list(text: "_JsonText") -> Iterator[Any]:
    text.take("[")
    more = text.peek() != "]"
    while more:
        yield text.value()
        more = text.peek() == ","
        if more:
            text.take(",")
    text.take("]")


class _JsonText:
    """A JSON text that is read piece by piece; what has been taken is forgotten."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._decoder = json.JSONDecoder()
        self._text, self._position = "", 0
        self._line, self._column = 1, 1  # of the first character of the piece

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            space = SPACE.match(self._text, self._position)
            self._position = space.end() if space else self._position
            if self._position < len(self._text) or not self._read():
                return self._text[self._position : self._position + 1]

    def take(self, character: str) -> None:
        """Go past this character, which must be the next."""
        if self.peek() != character:
            raise self.error(f"Expecting {character!r} delimiter")
        self._position += 1

    def value(self) -> Any:
        """Take the next value, whole."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                # Perhaps the piece ends inside the value. Elsewhere it is wrong, whatever follows.
                at_end = len(self._text) - error.pos < 16 or error.msg.startswith("Unterminated string")
                if not (at_end and self._read()):
                    raise self.error(error.msg, error.pos) from None
            else:
                # Where a piece ends, a number may go on: 1|.5 or 1e-|5, of which the decoder takes the 1.
                if len(self._text) - end > 3 or not self._read():
                    self._position = end
                    return value

    def error(self, what: str, position: int | None = None) -> UnreadableJsonError:
        """That something is wrong at a position of the piece, or at the next character."""
        line, column = self._place(self._position if position is None else position)
        return UnreadableJsonError(f"not valid JSON, perhaps cut off, at line {line}, column {column}: {what}")

    def _place(self, position: int) -> tuple[int, int]:
        """Line and column in the file."""
        num_breaks = self._text.count("\n", 0, position)
        if not num_breaks:
            return self._line, self._column + position
        return self._line + num_breaks, position - self._text.rfind("\n", 0, position)

    def _read(self) -> bool:
        """Forget what was taken, and read on; whether there was more."""
        # Twice as much each time, so that a value of any length takes linear time.
        more = self._stream.read(max(CHUNK, len(self._text) - self._position))
        if more:
            self._line, self._column = self._place(self._position)
            self._text, self._position = self._text[self._position :] + more, 0
        return bool(more)
