"""Deals the rows of many files into windows, so that each window holds every file's share.

The order of training mixes 64 random places of a dataset at a time. Files read one after another would lie in different
places, and whole stretches of an epoch would lack a data set. So files are read side by side, in *lanes*. A lane is one
file or, in a data set with many files, several files in sequence. Every row has a place in its lane, from 0 to 1, and
the rows of all lanes are taken in the order of these places, as cards are dealt round a table. A window takes the next
rows, which are the share of each lane, give or take a row or two.

The smallest unit that is dealt is therefore a row: from a data set of 0.2 % a window of 8,192 rows holds 16 or 17 rows,
in one piece, because within a window the lanes follow one another. The price: a piece of a file is one read, and a
window has as many more pieces as there are lanes; each actor holds as many tables open. MAX_LANES bounds that. A single
file is one lane, read from its beginning to its end.

The bins of a window are stored in random order (`pack_window`, mixed): a block of the schedule is not a window, and in
the order of packing a block could hold twice as much of one data set as of another.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

DEALING = 2
"""Version of dealing, kept in a prepared dataset's record. 1, or no entry there: files one after another."""

MAX_LANES = 16
"""Number of lanes over all data sets; every data set has at least one, so more data sets have more lanes."""

Record = dict[str, Any]


def dealing_of(record: Record) -> int:
    """Returns the version of dealing that a record names."""
    return int(record.get("dealing", 1))


def dealt_like(record: Record, begun: Record) -> Record:
    """Returns a record with the version of dealing of an unfinished prepare, which continues as it was planned.

    record: the record of the present job; begun: that of the unfinished prepare.
    """
    if dealing_of(begun) == dealing_of(record):
        return record
    others = {name: value for name, value in record.items() if name != "dealing"}
    return others | ({"dealing": begun["dealing"]} if "dealing" in begun else {})


def lanes_of(rows: Sequence[int], sets: Sequence[int], dealing: int) -> list[list[int]]:
    """Lists the files of each lane, by their numbers, in order.

    rows: the number of rows of each file.
    sets: the number of each file's data set, ascending.
    dealing: the version of dealing.
    """
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
    """Yields how many rows each window takes from each lane; every window except the last has window_rows rows.

    >>> list(dealt([6, 2, 1], 3))
    [[2, 1, 0], [3, 0, 0], [1, 1, 1]]
    """
    total = sum(lane_rows)
    ends = [*range(window_rows, total, window_rows), total] if total else []
    for before, after in pairwise([[0] * len(lane_rows), *(first_rows(lane_rows, end) for end in ends)]):
        yield [stop - start for start, stop in zip(before, after, strict=True)]


def first_rows(lane_rows: Sequence[int], count: int) -> list[int]:
    """Returns how many of the first `count` rows of all lanes belong to each lane.

    With m lanes, row i of lane k, which has n rows, has its place at (i + (k + 1/2) / m) / n. In lanes of equal length
    one row of each lane comes in turn.
    """
    total, lanes = max(1, sum(lane_rows)), 2 * len(lane_rows)
    # The rows of each lane with a place up to count / total: nearly the result.
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
