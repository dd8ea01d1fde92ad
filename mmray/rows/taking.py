"""Says how often each row of a data set is taken, from the settings `repeat`, `max_rows` and `weight`.

The rows of a set are read in *passes*. A whole pass takes every row once; at most one pass, the last, takes only some.
`repeat: 2.5` is two whole passes and one of a half, `repeat: 0.1` one pass of a tenth. The passes of a set follow one
another, so two copies of a row lie as far apart as the set is long.

Drawn rows are spread evenly: of n rows, m are drawn by cutting the n into m stretches of equal length and drawing one
row of each. The number is exact, every part of a file has its share, and each row is a pure function of seed and place,
without a list of all rows: of a billion rows, any is known in microseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from mmray.errors import UserError
from mmray.rows.settings import DatasetSettings, DataSettings
from mmray.schedule.schedule import mix_many


@dataclass(frozen=True, slots=True)
class Drawn:
    """Some rows of a data set, in order.

    rows: the number of rows of the set.
    taken: the number of rows that are drawn.
    seed: the seed by which they are drawn; None for the first rows.
    """

    rows: int
    taken: int
    seed: int | None = None

    @property
    def is_unbroken(self) -> bool:
        """True if no row is left out between the first and the last."""
        return self.seed is None or self.taken == self.rows

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Returns the positions in the set of the drawn rows `start` to `stop` - 1, ascending, int64 [stop - start].

        >>> Drawn(rows=10, taken=5, seed=0).positions(0, 5)
        array([0, 3, 5, 6, 9])
        """
        if self.is_unbroken:
            return np.arange(start, stop, dtype=np.int64)
        numbers = range(start, stop + 1)
        edges = np.asarray([number * self.rows // self.taken for number in numbers], dtype=np.int64)
        draws = mix_many(np.arange(start, stop, dtype=np.uint64) ^ _mixed(self.seed or 0))
        return edges[:-1] + (draws % np.diff(edges).astype(np.uint64)).astype(np.int64)

    def before(self, position: int) -> int:
        """Returns how many drawn rows lie before a position in the set."""
        if self.is_unbroken:
            return min(position, self.taken)
        if position >= self.rows or not self.taken:
            return self.taken
        stretch = ((position + 1) * self.taken - 1) // self.rows
        return stretch + int(self.positions(stretch, stretch + 1)[0] < position)


@lru_cache
def _mixed(seed: int) -> np.uint64:
    return np.uint64(mix_many(mix_many(np.asarray([seed + 1], dtype=np.uint64)))[0])


@dataclass(frozen=True)
class Taking:
    """How often the rows of a data set are taken.

    rows: the number of rows of the set.
    taken: the number of rows that are taken, each as often as it is taken.
    seed: the seed of a pass that takes only some; None for the first rows.
    """

    rows: int
    taken: int
    seed: int | None = None

    @property
    def passes(self) -> tuple[Drawn, ...]:
        """The passes over the rows, in order."""
        whole, some = divmod(self.taken, self.rows) if self.rows else (0, 0)
        return (Drawn(self.rows, self.rows),) * whole + ((Drawn(self.rows, some, self.seed),) if some else ())

    @property
    def distinct(self) -> int:
        """The number of different rows that are taken."""
        return min(self.rows, self.taken)

    @property
    def left_out(self) -> int:
        """The number of rows that are never taken."""
        return self.rows - self.distinct

    @property
    def repeated(self) -> int:
        """The number of rows that are taken again, after the first time of each."""
        return self.taken - self.distinct

    def __str__(self) -> str:
        if self.repeated:
            return f"{self.taken:,} taken, {self.taken / self.rows:.3g} times each"
        return f"{self.taken:,} taken, {self.left_out:,} left out" if self.left_out else "all taken once"


def chooses_rows(dataset: DatasetSettings) -> bool:
    """Tells whether a data set says how many of its rows are taken."""
    return dataset.repeat is not None or dataset.max_rows is not None or dataset.weight is not None


def needs_tokens(datasets: Sequence[DatasetSettings], data: DataSettings) -> bool:
    """Tells whether the numbers of rows depend on the tokens of rows (`data.weigh_by: tokens`)."""
    return data.weigh_by == "tokens" and any(dataset.weight is not None for dataset in datasets)


def takings(
    datasets: Sequence[DatasetSettings], data: DataSettings, rows: Sequence[int], tokens_per_row: Sequence[float] = (),
    *, split: str = "train",
) -> list[Taking]:  # fmt: skip
    """Decides how often the rows of each data set are taken; [] where no set says anything of it.

    rows: the number of rows of each set.
    tokens_per_row: the mean number of tokens of a row of each set, needed where weights are of tokens.
    split: `train` or `eval`, for messages.

    Raises UserError for a set of which no row would be taken.
    """
    if not any(map(chooses_rows, datasets)):
        return []
    shares = _shares(datasets, data, tokens_per_row)
    decided = [
        _taking(dataset, number, count, data.seed, shares[number])
        for number, (dataset, count) in enumerate(zip(datasets, rows, strict=True))
    ]
    for number, (dataset, taking) in enumerate(zip(datasets, decided, strict=True)):
        said = ", ".join(f"{name}: {value}" for name, value in dataset.how_many_record().items())
        if taking.rows and not taking.taken:
            raise UserError(
                f"data.{split}[{number}]: {said} takes none of its {taking.rows:,} rows; raise it, or leave the set out"
            )
        if dataset.weight is not None and not taking.rows:
            raise UserError(f"data.{split}[{number}]: {said}, but its files hold no row; leave the set out")
    return decided


def taken_once(dataset: DatasetSettings, number: int, rows: int, seed: int) -> Taking:
    """Decides which rows of a data set are looked at once each: those that preparing takes; all of a set with a weight.

    number: the number of the set in its split; rows: the number of its rows; seed: `data.seed`.
    """
    taking = _taking(dataset, number, rows, seed, share=rows)
    return Taking(rows, taking.distinct, taking.seed)


def shares_of(count: int, sizes: Sequence[int], *, least: int = 0) -> list[int]:
    """Deals a number out in proportion to sizes: no share exceeds its size, and the largest remainders get one more.

    least: 1: every size above 0 gets at least one, from the largest shares or, where there are more of them than
    `count`, beyond it.

    >>> shares_of(5, [12, 100])
    [1, 4]
    """
    total = sum(sizes)
    if count >= total:
        return list(sizes)
    exact = [Fraction(count * size, total) for size in sizes]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: (shares[number] - exact[number], number))
    for number in by_remainder[: count - sum(shares)]:
        shares[number] += 1
    for number, size in enumerate(sizes):
        if shares[number] < min(least, size):
            largest = max(range(len(shares)), key=lambda number: shares[number])
            shares[largest] -= shares[largest] > 1
            shares[number] += 1
    return shares


def _taking(dataset: DatasetSettings, number: int, rows: int, seed: int, share: int) -> Taking:
    """Decides how often the rows of one data set are taken. share: the rows that it gives by its weight."""
    taken = rows
    if dataset.repeat is not None:
        taken = round(Fraction(str(dataset.repeat)) * rows)
    elif dataset.max_rows is not None:
        taken = min(dataset.max_rows, rows)
    elif dataset.weight is not None:
        taken = share
    return Taking(rows, taken, None if dataset.take == "first" else seed + (number << 32))


def _shares(
    datasets: Sequence[DatasetSettings], data: DataSettings, tokens_per_row: Sequence[float]
) -> list[int]:  # fmt: skip
    """Deals `data.rows` out by weight, to the row: the sets with the largest remainders get one more."""
    weights = [Fraction(str(dataset.weight or 0)) for dataset in datasets]
    if not data.rows or not any(weights):
        return [0] * len(datasets)
    if data.weigh_by == "tokens":
        weights = [weight / Fraction(tokens) for weight, tokens in zip(weights, tokens_per_row, strict=True)]
    total = sum(weights)
    exact = [data.rows * weight / total for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: (shares[number] - exact[number], number))
    for number in by_remainder[: data.rows - sum(shares)]:
        shares[number] += 1
    return shares
