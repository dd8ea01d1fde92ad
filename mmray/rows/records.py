"""Finds where rows begin in text, and reads the rows of a part of it: JSON lines, a JSON array, CSV and TSV.

One pass finds the offset of every row; readers then take any range of rows. A JSON array need not be loaded whole, and
a CSV record need not end with its line: both are scanned block by block with the parsers of Python's library.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import numpy as np

from mmray.errors import RowError
from mmray.rows.json_rows import parse_row

READ_BYTES = 8 << 20
MAX_ROW_BYTES = 1 << 28
"""The most bytes of a row of an array or of CSV; a longer one is taken for a bracket or a quote that is never
closed."""

Item = TypeVar("Item")
Read = Callable[[int], bytes]
"""Reads the next bytes of a text, up to a number of them; none at the end."""

_BLANK = re.compile(r"[ \t\r\n]*")
_BLANK_BYTES = np.frombuffer(b" \t\r\n\v\f", dtype=np.uint8)
_SEPARATORS = re.compile(r"[ \t\r\n,]*")
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_decode = json.JSONDecoder(strict=False).raw_decode


class RecordScan:
    """Finds the starts of the rows of a text, block by block.

    header: the names of columns of CSV and TSV, known after the first block.
    end: where the last row ends, known after the last block.
    blank: the numbers of blank lines, which are no rows, ascending; complete after the last block.
    """

    def __init__(self, read: Read, format_: str) -> None:
        self.header: tuple[str, ...] = ()
        self.end = 0
        self.blank: list[int] = []
        self._read = read
        self._format = format_

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields the offsets of rows, ascending, int64; the last one may be `end`.

        Raises OSError for text that is not of the format.
        """
        if self._format == "json":
            return self._elements()
        return self._csv_records() if self._format in _DELIMITERS else self._lines()

    def _lines(self) -> Iterator[np.ndarray]:
        yield np.zeros(1, dtype=np.int64)
        lines, begin, is_blank = 0, 0, True  # of the line that is not ended: number, offset, whether blank so far
        while block := self._read(READ_BYTES):
            values = np.frombuffer(block, dtype=np.uint8)
            ends = np.flatnonzero(values == ord("\n"))
            if len(ends):
                if is_blank and not block[: ends[0]].strip():
                    self.blank.append(lines)
                # Of the lines within this block only those that begin with a blank can be blank.
                for number in np.flatnonzero(np.isin(values[ends[:-1] + 1], _BLANK_BYTES)).tolist():
                    if not block[ends[number] : ends[number + 1]].strip():
                        self.blank.append(lines + number + 1)
                lines, begin, is_blank = lines + len(ends), self.end + int(ends[-1]) + 1, True
            is_blank = is_blank and not block[ends[-1] if len(ends) else 0 :].strip()
            starts = ends + 1 + self.end
            self.end += len(block)
            yield starts
        if is_blank and self.end > begin:
            self.blank.append(lines)

    def _elements(self) -> Iterator[np.ndarray]:
        """Yields the offsets of a JSON array's elements. Bytes are read as Latin-1: structure is ASCII in UTF-8
        too."""
        text = _Buffer(self._read)
        text.skip("\xef\xbb\xbf")  # the mark of UTF-8, which some editors write
        text.expect("[", "an array")
        starts: list[int] = []
        is_first = True
        while text.peek() != "]":
            if not is_first:
                text.expect(",", "a comma or ] behind a row")
            text.peek()
            starts.append(text.offset)
            text.skip_value()
            self.end, is_first = text.offset, False
            if len(starts) >= 4096:
                yield np.asarray(starts, dtype=np.int64)
                starts = []
        text.expect("]", "the end of the array")
        if text.peek(at_end=True):
            raise OSError(f"more follows the JSON array, at byte {text.offset}; make it one array or JSON lines")
        yield np.asarray(starts, dtype=np.int64)

    def _csv_records(self) -> Iterator[np.ndarray]:
        csv.field_size_limit(MAX_ROW_BYTES)
        lines = _Lines(self._read)
        records = csv.reader(lines, delimiter=_DELIMITERS[self._format], strict=True)
        try:
            first = next(records, None)
        except csv.Error as error:
            raise OSError(f"the first line is not as CSV is ({error}); end lines with a line feed") from error
        self.header = _header(first, self._format)
        self.end = lines.offset
        starts: list[int] = []
        rows = 0
        while not lines.is_at_end:
            start, line = lines.offset, records.line_num
            try:
                if not next(records):
                    self.blank.append(rows + len(starts))
            except csv.Error as error:
                if records.line_num > line + 1:
                    raise OSError(f"from line {line + 1} on a quote is not closed as it should be ({error})") from error
            starts.append(start)
            self.end = lines.offset
            if len(starts) >= 4096:
                yield np.asarray(starts, dtype=np.int64)
                starts, rows = [], rows + len(starts)
        yield np.asarray(starts, dtype=np.int64)


def row_starts(scan: RecordScan, max_rows: int | None) -> np.ndarray:
    """Returns where each row starts, and the end: int64 [rows + 1]. max_rows: how many rows to find; None: all."""
    blocks, count = [np.zeros(0, dtype=np.int64)], 0
    for block in scan.blocks():
        blocks.append(block)
        count += len(block)
        if max_rows is not None and count > max_rows:
            break
    starts = np.concatenate(blocks)
    if max_rows is not None and count > max_rows:
        return starts[: max_rows + 1]
    return starts if len(starts) and starts[-1] == scan.end else np.append(starts, scan.end)


class _Buffer:
    """A text of which only the part being parsed is held in memory. offset: the offset of the next byte to parse."""

    def __init__(self, read: Read) -> None:
        self._read, self._text, self._at, self._dropped = read, "", 0, 0

    @property
    def offset(self) -> int:
        return self._dropped + self._at

    def _more(self) -> bool:
        left = len(self._text) - self._at
        if left > MAX_ROW_BYTES:
            raise OSError(f"the row at byte {self.offset} does not end within {MAX_ROW_BYTES} bytes")
        block = self._read(max(READ_BYTES, left))
        self._dropped += self._at
        self._text, self._at = self._text[self._at :] + block.decode("latin-1"), 0
        return bool(block)

    def peek(self, *, at_end: bool = False) -> str:
        """Returns the next character that is not blank. at_end: whether the text may end here, which returns ""."""
        while True:
            match = _BLANK.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                if at_end:
                    return ""
                raise OSError(f"the JSON array is cut off at byte {self.offset}; copy it anew")

    def skip(self, text: str) -> None:
        """Skips a text if it comes next."""
        self.peek()
        if self._text.startswith(text, self._at):
            self._at += len(text)

    def expect(self, char: str, what: str) -> None:
        if self.peek() != char:
            raise OSError(f"not JSON: {what} should stand at byte {self.offset}, not {self._text[self._at :][:20]!r}")
        self._at += 1

    def skip_value(self) -> None:
        while True:
            try:
                _, end = _decode(self._text, self._at)
            except RecursionError as error:
                raise OSError(f"the row at byte {self.offset} nests too deeply; write it flat") from error
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self._text) - 16 or error.msg.startswith("Unterminated string")
                if is_cut and self._more():
                    continue
                place = self._dropped + error.pos
                raise OSError(f"not JSON: {error.msg} at byte {place}; mend it, or write JSON lines") from error
            length = end - self._at
            if end < len(self._text) or not self._more():  # a number may go on in the next block
                self._at += length
                return


class _Lines:
    """Yields lines for `csv.reader`. offset: the offset behind the last line that it took."""

    def __init__(self, read: Read) -> None:
        self.offset = 0
        self._read = read
        self._lines: list[bytes] = []
        self._partial_line = b""
        self._fill()

    @property
    def is_at_end(self) -> bool:
        return not self._lines

    def _fill(self) -> None:
        while not self._lines and (block := self._read(READ_BYTES)):
            *lines, self._partial_line = (self._partial_line + block).split(b"\n")
            self._lines = [line + b"\n" for line in reversed(lines)]
        if not self._lines and self._partial_line:
            self._lines, self._partial_line = [self._partial_line], b""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if not self._lines:
            raise StopIteration
        line = self._lines.pop()
        self.offset += len(line)
        if not self._lines:
            self._fill()
        return line.decode("latin-1")


def _header(names: list[str] | None, format_: str) -> tuple[str, ...]:
    if not names:
        raise OSError("there is no line with the names of columns; write one first")
    header = tuple(name.encode("latin-1").decode("utf-8-sig", "replace").strip() for name in names)
    if len(set(header)) < len(header):
        raise OSError(f"two columns have one name in the first line, {', '.join(header):.200}; rename one")
    if len(header) == 1 and (marks := re.findall("[,;\t|]", header[0])):
        raise OSError(f"the first line is one column by {format_}, but holds {marks[0]!r}; separate as the format says")
    return header


# ---------------------------------------------------------------- rows


def records(
    data: bytes, format_: str, header: tuple[str, ...], chosen: Collection[int] | None = None
) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Yields (number in the part, row or the error that says why it is none) of a part of a text that begins and ends
    with a row. Blank lines are counted but are no rows.

    chosen: the rows to yield, counted from 0 without blank lines; None for all.
    """
    if format_ in _DELIMITERS:
        yield from _chosen(_csv_rows(data, _DELIMITERS[format_], header), chosen)
        return
    if format_ == "json":
        texts: Iterator[tuple[int, bytes]] = enumerate(_elements_of(data))
    else:
        texts = ((number, line) for number, line in enumerate(data.split(b"\n")) if line.strip())
    yield from ((number, parse_row(text)) for number, text in _chosen(texts, chosen))


def _chosen(items: Iterator[Item], chosen: Collection[int] | None) -> Iterator[Item]:
    return items if chosen is None else (item for number, item in enumerate(items) if number in chosen)


def _elements_of(data: bytes) -> Iterator[bytes]:
    text, at = data.decode("latin-1"), 0
    while at < len(text):
        _, end = _decode(text, at)
        yield data[at:end]
        match = _SEPARATORS.match(text, end)
        at = match.end() if match else end


def _csv_rows(data: bytes, delimiter: str, header: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = io.StringIO(data.decode("utf-8", "surrogateescape"), newline="\n")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number = 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield number, RowError("bad_csv", f"the line is not quoted as CSV is: {error}; double quotes in quotes")
        else:
            if cells is None:
                return
            if cells:
                yield number, _csv_row(cells, header)
        number += 1


def _csv_row(cells: list[str], header: tuple[str, ...]) -> dict[str, Any] | RowError:
    if len(cells) != len(header):
        return RowError(
            "bad_csv", f"the row has {len(cells)} cells and the first line {len(header)}; quote those with commas or "
            "line breaks in them"
        )  # fmt: skip
    if any("\udc80" <= char <= "\udcff" for cell in cells for char in cell if char > "\ud7ff"):
        return RowError("not_utf8", "a cell of the row is not UTF-8; save the file as UTF-8")
    return dict(zip(header, cells))
