"""Estimates what preparing a split would make, from a sample of its rows.

Rows are counted, and some rows of each set are encoded as preparing does it. The encoded rows are repeated until there
are as many as rows were counted, and the windows of these are packed by the code that preparing uses; windows of the
same sets are packed once. So the estimate has the fill of full bins and of a window's last bins, and is wrong only as
far as the sample differs from the other rows: the sample is the beginnings of up to eight files of each set. It is at
most SAMPLE_ROWS rows, which take 1 to 2 s; counting the rows of many gigabytes takes up to 10 s.

Rows are encoded as if bins had room for any of them, and then compared with the capacities: so it is also known by how
much a row is too long.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from mmray.config.job import Job
from mmray.families import Family
from mmray.images import TilingPolicy
from mmray.loss.rules import IGNORE_INDEX
from mmray.loss.settings import allows_empty
from mmray.loss.sources import label_maker
from mmray.packing.equal_cost import pack_equal_cost, planned_bin_cost
from mmray.packing.settings import PackingSettings
from mmray.prepared.row_measures import RowMeasures, measured_samples
from mmray.prepared.sample_columns import NOTHING_TRAINED
from mmray.prepared.window import costed, pack_by_bucket
from mmray.rows.count import RowCount, count_rows
from mmray.rows.dealing import dealt, first_rows
from mmray.rows.encode import Encoder
from mmray.rows.files import SourceFile, first_piece, source_files
from mmray.rows.plan import Progress, no_progress
from mmray.rows.preflight import FIRST_ROWS, sample_labels
from mmray.rows.read import read_piece
from mmray.rows.sample import RejectedRow, Sample
from mmray.rows.settings import DatasetSettings
from mmray.rows.taking import Taking, takings
from mmray.schedule.loads import Loads

SAMPLE_ROWS = 512
"""Number of rows that are encoded of all sets of a split; at least FIRST_ROWS of each set."""
SAMPLE_FILES = 8
ANY_LENGTH = 1 << 40
"""A capacity that holds any row."""
COUNT_SECONDS = 10.0
MOST_KINDS = 8
"""Number of windows up to which each is packed by itself; of more windows, only one whole window is packed."""

Windows = Counter[tuple[tuple[int, int, int], ...]]
"""Number of windows of each kind. A kind is the rows of each set in it: (number of the set, first row, rows)."""


@dataclass(frozen=True)
class SetEstimate:
    """The estimate of one set of rows.

    sampled: rows that were encoded; good: those that preparing would pack; rejected: the others by reason; taking: how
    often the rows are taken, None where every row of every set is taken once; tokens, visual_tokens: of its packed
    rows; bins: number of bins with a sample of the set.
    """

    files: int
    rows: RowCount
    sampled: int
    good: int
    rejected: dict[str, int]
    taking: Taking | None = None
    tokens: int = 0
    visual_tokens: int = 0
    bins: int = 0

    @property
    def lost(self) -> float:
        """Rows of the set that preparing would reject."""
        rows = self.taking.distinct if self.taking else self.rows.rows
        return rows * (1 - self.good / self.sampled) if self.sampled else 0.0


@dataclass(frozen=True)
class Estimate:
    """The estimate of a split: the windows and bins that preparing would make."""

    sets: tuple[SetEstimate, ...]
    windows: int
    bins: int
    packed: int
    """Rows in bins."""
    tokens: int
    visual_tokens: int
    measures: RowMeasures
    """Measures of the encoded rows, those over a capacity too."""
    weights: np.ndarray
    """Rows that each encoded row stands for, float64."""

    @property
    def lost(self) -> float:
        """Rows that preparing would reject."""
        return sum(estimate.lost for estimate in self.sets)

    @property
    def rows(self) -> RowCount:
        return RowCount(
            sum(estimate.rows.rows for estimate in self.sets), all(estimate.rows.is_exact for estimate in self.sets)
        )

    @property
    def sampled(self) -> int:
        return sum(estimate.sampled for estimate in self.sets)


@dataclass(frozen=True)
class _Rows:
    """Encoded rows, one entry for each: the sample of one set, or the rows of a window.

    usable: bool, whether the row would be packed; lengths, visual, trained, visual_pairs: int64, its tokens, visual
    tokens, trained tokens and `Sample.visual_pairs`; buckets: its image shape; sets: the number of its set.
    """

    usable: np.ndarray
    lengths: np.ndarray
    visual: np.ndarray
    trained: np.ndarray
    visual_pairs: np.ndarray
    buckets: np.ndarray
    sets: np.ndarray

    @classmethod
    def none(cls, rows: int, number: int = 0) -> "_Rows":
        """Rows that are not usable, of set `number`."""

        def zeros() -> np.ndarray:
            return np.zeros(rows, dtype=np.int64)

        return cls(
            usable=np.zeros(rows, dtype=bool), lengths=zeros(), visual=zeros(), trained=zeros(), visual_pairs=zeros(),
            buckets=np.full(rows, "", dtype=object), sets=zeros() + number,
        )  # fmt: skip

    def take(self, numbers: np.ndarray) -> "_Rows":
        """The rows with these numbers."""
        return _Rows(**{field.name: getattr(self, field.name)[numbers] for field in fields(self)})

    def __len__(self) -> int:
        return len(self.usable)

    @property
    def loads(self) -> Loads:
        """The loads of the rows, as if each had its own bin."""
        return Loads(
            tokens=self.lengths, visual_tokens=self.visual, trained_tokens=self.trained,
            sample_pairs=self.lengths**2, visual_pairs=self.visual_pairs, bucket=self.buckets.astype(np.str_),
        )  # fmt: skip

    def repeated(self, first: int, rows: int) -> np.ndarray:
        """Numbers of the usable sampled rows that represent the rows `first` to `first + rows` - 1 of the set."""
        numbers = (first + np.arange(rows)) % len(self.usable)
        return numbers[self.usable[numbers]]


@dataclass(frozen=True)
class _Sampled:
    """The encoded sample of one set. rejected: rows that would not be packed, by reason; measures: of all rows that
    could be encoded."""

    rows: _Rows
    rejected: dict[str, int]
    measures: RowMeasures


def count_sets(
    datasets: Sequence[DatasetSettings], seconds: float = COUNT_SECONDS, on_progress: Progress = no_progress
) -> list[RowCount]:
    """Count the rows of each set of a split.

    seconds: time that it may take; on_progress: called with the numbers of files counted and of all files.

    Raises UserError for missing files.
    """
    sets, counts, before = _files_of_sets(datasets), list[RowCount](), 0
    num_files = sum(map(len, sets))

    def show(done: int, _: int) -> None:
        on_progress(before + done, num_files)

    for set_files in sets:
        counts.append(count_rows(set_files, seconds / len(sets), show))
        before += len(set_files)
    return counts


def _files_of_sets(datasets: Sequence[DatasetSettings]) -> list[list[SourceFile]]:
    files = source_files(datasets)
    return [[file for file in files if file.dataset == number] for number in range(len(datasets))]


def estimate_split(
    job: Job, split: str, family: Family, policy: TilingPolicy, *, counts: Sequence[RowCount] | None = None,
    seconds: float = COUNT_SECONDS, on_progress: Progress = no_progress,
) -> Estimate:  # fmt: skip
    """Estimate what preparing a split would make; duplicate ids are not considered.

    split: `train` or `eval`.
    policy: the tiling policy as resolved for the family.
    counts: the rows of each set, from `count_sets`; None: they are counted.
    seconds: time that counting rows may take.
    on_progress: called with the numbers of files whose rows are counted and of all files.

    Raises UserError for files that cannot be read.
    """
    datasets = job.data.splits[split]
    roomy = job.packing.model_copy(update={"token_capacity": ANY_LENGTH, "visual_capacity": ANY_LENGTH})
    encoder = Encoder(job.data.lenient, datasets, family, policy, roomy, loss=job.loss)
    files_of_sets = _files_of_sets(datasets)
    counts = count_sets(datasets, seconds, on_progress) if counts is None else counts
    wanted = max(FIRST_ROWS, SAMPLE_ROWS // len(files_of_sets))
    samples = [_sample(job, encoder, set_files, wanted) for set_files in files_of_sets]
    encoded = [sample.rows for sample in samples]
    means = [float(rows.lengths[rows.usable].mean()) if rows.usable.any() else 1.0 for rows in encoded]
    set_takings = takings(datasets, job.data, [count.rows for count in counts], means, split=split)
    taken = [taking.taken for taking in set_takings] or [count.rows for count in counts]
    windows = _windows(taken, job.packing.window_rows)
    pack, bins, packed, tokens, visual = _packer(job, family), 0, 0, 0, 0
    of_sets = [Counter[str]() for _ in samples]
    for kind, number in windows.items():
        window = _window_rows(encoded, kind)
        members = pack(window)
        bins, packed = bins + number * len(members), packed + number * len(window.lengths)
        tokens, visual = tokens + number * int(window.lengths.sum()), visual + number * int(window.visual.sum())
        for set_number, counted in _by_set(window, members).items():
            of_sets[set_number].update({name: number * count for name, count in counted.items()})
    sets = tuple(
        SetEstimate(
            len(set_files),
            count,
            len(sample.rows),
            int(sample.rows.usable.sum()),
            sample.rejected,
            set_takings[number] if set_takings else None,
            **of_sets[number],
        )
        for number, (set_files, count, sample) in enumerate(zip(files_of_sets, counts, samples, strict=True))
    )
    weights = [
        np.full(len(sample.measures), count / max(len(sample.rows), 1))
        for sample, count in zip(samples, taken, strict=True)
    ]
    return Estimate(
        sets, windows.total(), bins, packed, tokens, visual,
        measures=RowMeasures.joined([sample.measures for sample in samples]), weights=np.concatenate(weights),
    )  # fmt: skip


def _packer(job: Job, family: Family) -> Callable[[_Rows], list[list[int]]]:
    """The way in which preparing packs the rows of a window: by `packing.mode`."""
    costs = job.packing_costs

    def pack(rows: _Rows) -> list[list[int]]:
        if costs:
            samples = costed(rows.loads, job.packing, family.sample_gap, costs.sample_costs)
            return pack_equal_cost(samples, planned_bin_cost(samples))
        return pack_by_bucket(rows.lengths, rows.visual, rows.buckets.tolist(), job.packing, family.sample_gap)

    return pack


def _by_set(window: _Rows, bins: Sequence[Sequence[int]]) -> dict[int, dict[str, int]]:
    """Tokens, visual tokens and bins of each set in a window."""
    in_bins = [np.unique(window.sets[list(members)]) for members in bins]
    bins_of_sets = Counter(np.concatenate(in_bins).tolist() if in_bins else [])
    return {
        number: {
            "tokens": int(window.lengths[window.sets == number].sum()),
            "visual_tokens": int(window.visual[window.sets == number].sum()),
            "bins": count,
        }
        for number, count in bins_of_sets.items()
    }


def _sample(job: Job, encoder: Encoder, files: Sequence[SourceFile], wanted: int) -> _Sampled:
    """Encode about `wanted` rows of a set: the beginnings of its files, more of larger files."""
    ends = np.cumsum([file.size for file in files])
    places = (np.arange(SAMPLE_FILES) + 0.5) / SAMPLE_FILES * ends[-1]
    chosen = Counter(np.minimum(np.searchsorted(ends, places), len(files) - 1).tolist())
    pieces = [first_piece(files[number], -(-wanted * count // SAMPLE_FILES)) for number, count in chosen.items()]
    results = encoder.encode([row for piece in pieces for row in read_piece(piece)])
    encoded = {number: result for number, result in enumerate(results) if isinstance(result, Sample)}
    rejected = Counter(result.reason for result in results if isinstance(result, RejectedRow))
    labels = sample_labels(list(encoded.values()), label_maker(job.loss, encoder.family)) if encoded else []
    rows = _Rows.none(len(results), files[0].dataset)
    for (number, row), label_ids in zip(encoded.items(), labels, strict=True):
        rows.lengths[number], rows.visual[number] = len(row.input_ids), row.visual_tokens
        rows.trained[number], rows.visual_pairs[number] = (label_ids != IGNORE_INDEX).sum(), row.visual_pairs
        rows.buckets[number] = row.bucket
        is_trained = allows_empty(job.loss) or bool(rows.trained[number])
        if reason := _reason_to_reject(row, is_trained, job.packing):
            rejected[reason] += 1
        rows.usable[number] = reason is None
    return _Sampled(rows, rejected, measured_samples(list(encoded.values()), labels, encoder.family))


def _reason_to_reject(row: Sample, is_trained: bool, packing: PackingSettings) -> str | None:
    """The reason for which preparing rejects an encoded row, in the order in which it looks for reasons."""
    if len(row.input_ids) > packing.token_capacity:
        return "too_long"
    if row.visual_tokens > packing.visual_capacity:
        return "too_many_visual_tokens"
    return None if is_trained else NOTHING_TRAINED.reason


def _windows(rows_of_sets: Sequence[int], window_rows: int) -> Windows:
    """Count the windows of each kind. More than MOST_KINDS whole windows count as one kind: the number of a set's rows
    in them differs by one at most."""
    total = sum(rows_of_sets)
    whole = total // window_rows
    if whole <= MOST_KINDS:
        windows = list(dealt(rows_of_sets, window_rows))
        first = [[sum(column) for column in zip(*windows[:number])] for number in range(1, len(windows))]
        none = [0] * len(rows_of_sets)
        return Counter(_kind(start, rows) for start, rows in zip([none, *first], windows, strict=False))
    remaining_rows = [
        rows - taken for rows, taken in zip(rows_of_sets, first_rows(rows_of_sets, whole * window_rows), strict=True)
    ]
    none = [0] * len(remaining_rows)
    kinds = Counter({_kind(none, first_rows(rows_of_sets, window_rows)): whole})
    return kinds + Counter([_kind(none, remaining_rows)] if any(remaining_rows) else [])


def _kind(first: Sequence[int], rows: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    return tuple((number, start, count) for number, (start, count) in enumerate(zip(first, rows, strict=True)) if count)


def _window_rows(samples: Sequence[_Rows], kind: Sequence[tuple[int, int, int]]) -> _Rows:
    """The usable rows of a window."""
    parts = [samples[number].take(samples[number].repeated(*rows)) for number, *rows in kind if len(samples[number])]
    parts = parts or [_Rows.none(0)]
    return _Rows(**{
        field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(_Rows)
    })  # fmt: skip
