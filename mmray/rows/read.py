"""Rows of a piece, each with its place in the source; a row that cannot be read carries its error instead."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from mmray.errors import RowError, UserError
from mmray.images.source import one_line
from mmray.rows.files import Piece


@dataclass(frozen=True)
class RawRow:
    """One row as written. source: `file:line` (JSONL, lines from 1) or `file:row` (Parquet, rows from 0)."""

    source: str
    dataset: int
    value: dict[str, Any] | RowError


def read_piece(piece: Piece) -> Iterator[RawRow]:
    """The rows of a piece in order. Blank lines of JSONL are no rows."""
    return _read_parquet(piece) if piece.format == "parquet" else _read_jsonl(piece)


def _read_jsonl(piece: Piece) -> Iterator[RawRow]:
    with fsspec.open(piece.uri, "rb") as file:
        file.seek(piece.start)
        lines = file.read(piece.stop - piece.start).split(b"\n")
    for number, line in enumerate(lines[: piece.num_rows], start=piece.first_row + 1):
        if line.strip():
            yield RawRow(f"{piece.uri}:{number}", piece.dataset, _parse(line))


def _parse(line: bytes) -> dict[str, Any] | RowError:
    try:
        text = line.decode("utf-8-sig")  # some editors begin a file with a byte order mark
        value = json.loads(text)
    except UnicodeDecodeError as error:
        return RowError("not_utf8", f"byte {error.start} of the line is not UTF-8; save the file as UTF-8")
    except ValueError as error:
        return RowError("bad_json", f"the line is not JSON: {error}; it begins {text[:60]!r}")
    except RecursionError:
        return RowError("bad_json", "the line nests too deeply to be a row; write it flat")
    if not isinstance(value, dict):
        return RowError("bad_json", f"a row must be a JSON object, this line is a {type(value).__name__}")
    if half := _lone_surrogate(text, value):
        return RowError("not_utf8", f"the line holds {half!a}, half of a surrogate pair; write the whole character")
    return value


def _lone_surrogate(text: str, value: dict[str, Any]) -> str | None:
    """JSON may write half a character, as \\ud83d; no UTF-8 exists for it, so neither files nor tokenizers take it."""
    if "\\ud" not in text.lower():
        return None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return str(error.object[error.start])
    return None


def _read_parquet(piece: Piece) -> Iterator[RawRow]:
    with fsspec.open(piece.uri, "rb") as opened:
        file = pq.ParquetFile(opened)
        begin = 0
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            low, high = max(begin, piece.first_row), min(end, piece.first_row + piece.num_rows)
            if low < high:
                try:
                    table = file.read_row_group(group)
                except (OSError, pa.ArrowException) as error:
                    raise UserError(f"{piece.uri}: rows {begin} to {end - 1} cannot be read: {error}") from error
                for number, value in enumerate(_values(table.slice(low - begin, high - low)), start=low):
                    yield RawRow(f"{piece.uri}:{number}", piece.dataset, value)
            begin = end


def _values(table: pa.Table) -> list[dict[str, Any] | RowError]:
    """The rows as dictionaries; where one has a cell that Python cannot hold, its error."""
    try:
        return list(table.to_pylist())
    except ValueError:
        return [_value(table.slice(row, 1)) for row in range(table.num_rows)]


def _value(row: pa.Table) -> dict[str, Any] | RowError:
    try:
        (value,) = row.to_pylist()
    except UnicodeDecodeError as error:
        return RowError("not_utf8", f"a text of the row is not UTF-8 ({error.reason}); write the file as UTF-8")
    except ValueError as error:
        return RowError("wrong_type", f"a cell of the row cannot be read: {one_line(error)}; write it as another type")
    return value
