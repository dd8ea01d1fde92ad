"""How the rows of many files are dealt into windows: in each window every file at its share.

The order of training mixes 64 random places of a dataset at a time. Files read one after another would lie in different
places, and whole stretches of an epoch would lack a set. So files are read side by side. A *lane* is what is read at
one place: a file, or, of a set with many, some that follow one another. Every row has a place in its lane, from 0 to 1,
and the rows of all lanes come in the order of these places, as cards are dealt round a table. A window takes the next
rows: of each lane its share, give or take a row or two.

The smallest piece that is dealt is so a row: of a set of 0.2 % a window of 8,192 rows has 16 or 17, in one piece, since
within a window the lanes follow one another. What it costs: a piece of a file is one read, and a window has as many
more pieces as there are lanes; of tables each actor holds as many open. Hence the bound, MAX_LANES. One file alone is
one lane, read from its beginning to its end.

The bins of a window come in an order drawn by chance (`pack_window`, mixed): a block of the schedule is no window, and
in the order of making it would have twice of one set what it has of another.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

DEALING = 2
"""The way of dealing of this version, in a prepared dataset's record. 1, or none there: files one after another."""

MAX_LANES = 16
"""Lanes of all sets together; every set has one at least, so with more sets there are more."""

Record = dict[str, Any]


def dealing_of(record: Record) -> int:
    """How the rows of what has this record are dealt."""
    return int(record.get("dealing", 1))


def dealt_like(record: Record, begun: Record) -> Record:
    """A record of the same input, dealt as that of what was begun before: it ends as it was planned."""
    if dealing_of(begun) == dealing_of(record):
        return record
    others = {name: value for name, value in record.items() if name != "dealing"}
    return others | ({"dealing": begun["dealing"]} if "dealing" in begun else {})


def lanes_of(rows: Sequence[int], sets: Sequence[int], dealing: int) -> list[list[int]]:
    """The files of each lane, by their numbers, in order. rows: of each file; sets: its set's number, ascending."""
    if dealing == 1:
        return [list(range(len(rows)))]
    places = max(1, MAX_LANES // max(1, len(set(sets))))
    lanes: dict[tuple[int, int], list[int]] = {}
    for number in sorted(set(sets)):
        files = [file for file in range(len(rows)) if sets[file] == number and rows[file]]
        total, before = sum(rows[file] for file in files), 0
        for place, file in enumerate(files):
            # Few files: a lane each. Many: as many lanes of about equal length, by where the middle of a file lies.
            lane = place if len(files) <= places else places * (2 * before + rows[file]) // (2 * total)
            lanes.setdefault((number, lane), []).append(file)
            before += rows[file]
    return list(lanes.values())


def dealt(lane_rows: Sequence[int], window_rows: int) -> Iterator[list[int]]:
    """How many rows each window takes of each lane; every window but the last has window_rows in all.

    >>> list(dealt([6, 2, 1], 3))
    [[2, 1, 0], [3, 0, 0], [1, 1, 1]]
    """
    total = sum(lane_rows)
    ends = [*range(window_rows, total, window_rows), total] if total else []
    for before, after in pairwise([[0] * len(lane_rows), *(first_rows(lane_rows, end) for end in ends)]):
        yield [stop - start for start, stop in zip(before, after, strict=True)]


def first_rows(lane_rows: Sequence[int], count: int) -> list[int]:
    """How many of the first `count` rows of all lanes are of each.

    Row i of the n of lane k of m has its place at (i + (k + 1/2) / m) / n: of lanes as long as each other, one row of
    each comes in turn.
    """
    total, lanes = max(1, sum(lane_rows)), 2 * len(lane_rows)
    # Of each lane those with a place up to count / total: about as many as there shall be.
    taken = [
        (lanes * rows * count - (2 * lane + 1) * total) // (lanes * total) + 1 if rows else 0
        for lane, rows in enumerate(lane_rows)
    ]

    def place(lane: int, row: int) -> tuple[Fraction, int]:
        return Fraction(lanes * row + 2 * lane + 1, lane_rows[lane]), lane

    while sum(taken) > count:
        last = max((lane for lane, rows in enumerate(taken) if rows), key=lambda lane: place(lane, taken[lane] - 1))
        taken[last] -= 1
    while sum(taken) < count:
        following = min(
            (lane for lane, rows in enumerate(taken) if rows < lane_rows[lane]),
            key=lambda lane: place(lane, taken[lane]),
        )
        taken[following] += 1
    return taken
