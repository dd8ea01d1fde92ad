"""What preparing a split would make, from a sample of its rows: for a plan, before anything is done.

Rows are counted, some of each set are encoded as preparing does it, and these are repeated until there are as many as
rows. Then the windows are packed by the same code; windows of the same sets are packed once. So the estimate has the
fill of whole bins and of a window's last ones, and errs only as far as the sample is unlike the rest: it is the
beginnings of up to eight files of a set. At most SAMPLE_ROWS rows: 1 to 2 s, and 10 s for counting many gigabytes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmray.config.job import Job
from mmray.families import Family
from mmray.images import TilingPolicy
from mmray.loss.labels import IGNORE_INDEX
from mmray.loss.settings import allows_empty
from mmray.loss.sources import label_maker
from mmray.prepared.window import pack_by_bucket
from mmray.rows.count import RowCount, count_rows
from mmray.rows.dealing import dealt, first_rows
from mmray.rows.encode import Encoder
from mmray.rows.files import SourceFile, first_piece, source_files
from mmray.rows.preflight import FIRST_ROWS, sample_labels
from mmray.rows.read import read_piece
from mmray.rows.sample import Sample

SAMPLE_ROWS = 512
"""Rows that are encoded, of all sets of a split together; of each set FIRST_ROWS at least."""
SAMPLE_FILES = 8
COUNT_SECONDS = 10.0
MOST_KINDS = 8
"""Windows that are packed one by one: with more, those of sets that are dealt alike are packed once."""

Windows = Counter[tuple[tuple[int, int, int], ...]]
"""How many windows there are of each kind; a kind is which rows it has of which set: number, first row, rows."""


@dataclass(frozen=True)
class SetEstimate:
    """One set of rows. sampled: rows that were encoded, good: those of them that preparing would pack."""

    files: int
    rows: RowCount
    sampled: int
    good: int


@dataclass(frozen=True)
class Estimate:
    """What would be made of a split."""

    sets: tuple[SetEstimate, ...]
    windows: int
    bins: int
    packed: int
    """Rows in bins."""
    tokens: int
    visual_tokens: int

    @property
    def rows(self) -> RowCount:
        return RowCount(sum(each.rows.rows for each in self.sets), all(each.rows.is_exact for each in self.sets))

    @property
    def sampled(self) -> int:
        return sum(each.sampled for each in self.sets)


@dataclass(frozen=True)
class _Sampled:
    """The sample of one set, a number for each row. usable: bool, the row would be packed; lengths, visual: int64, its
    tokens and visual tokens; buckets: its shape."""

    usable: np.ndarray
    lengths: np.ndarray
    visual: np.ndarray
    buckets: np.ndarray

    def repeated(self, first: int, rows: int) -> np.ndarray:
        """Which of the sample stand for so many rows of the set from the first on, the usable ones."""
        numbers = (first + np.arange(rows)) % len(self.usable)
        return numbers[self.usable[numbers]]


def estimate_split(
    job: Job, split: str, family: Family, policy: TilingPolicy, *, seconds: float = COUNT_SECONDS
) -> Estimate:
    """The estimate of `train` or `eval`. seconds: how long to count rows for; policy: as resolved for the family.

    Duplicate ids are not looked for. Raises UserError for files that cannot be read.
    """
    datasets = job.data.splits[split]
    encoder = Encoder(job.data.lenient, datasets, family, policy, job.packing, loss=job.loss)
    files = source_files(datasets)
    own = [[file for file in files if file.dataset == number] for number in range(len(datasets))]
    counts = [count_rows(each, seconds / len(own)) for each in own]
    wanted = max(FIRST_ROWS, SAMPLE_ROWS // len(own))
    samples = [_sample(job, encoder, each, wanted) for each in own]
    windows = _windows([count.rows for count in counts], job.packing.window_rows)
    bins, packed, tokens, visual = (0, 0, 0, 0)
    for kind, number in windows.items():
        lengths, visual_tokens, buckets = _window_rows(samples, kind)
        made = pack_by_bucket(lengths, visual_tokens, buckets, job.packing, family.sample_gap)
        bins, packed = bins + number * len(made), packed + number * len(lengths)
        tokens, visual = tokens + number * int(lengths.sum()), visual + number * int(visual_tokens.sum())
    sets = tuple(
        SetEstimate(len(each), count, len(sample.usable), int(sample.usable.sum()))
        for each, count, sample in zip(own, counts, samples, strict=True)
    )
    return Estimate(sets, windows.total(), bins, packed, tokens, visual)


def _sample(job: Job, encoder: Encoder, files: Sequence[SourceFile], wanted: int) -> _Sampled:
    """About `wanted` rows of a set: the beginnings of its files, of larger ones more."""
    ends = np.cumsum([file.size for file in files])
    places = (np.arange(SAMPLE_FILES) + 0.5) / SAMPLE_FILES * ends[-1]
    chosen = Counter(np.minimum(np.searchsorted(ends, places), len(files) - 1).tolist())
    pieces = [first_piece(files[number], -(-wanted * count // SAMPLE_FILES)) for number, count in chosen.items()]
    results = encoder.encode([row for piece in pieces for row in read_piece(piece)])
    good = {number: result for number, result in enumerate(results) if isinstance(result, Sample)}
    labels = sample_labels(list(good.values()), label_maker(job.loss, encoder.family)) if good else []
    sample = _Sampled(
        np.zeros(len(results), dtype=bool), np.zeros(len(results), dtype=np.int64),
        np.zeros(len(results), dtype=np.int64), np.full(len(results), "", dtype=object),
    )  # fmt: skip
    for (number, each), own in zip(good.items(), labels, strict=True):
        sample.usable[number] = allows_empty(job.loss) or (own != IGNORE_INDEX).any()
        sample.lengths[number], sample.visual[number] = len(each.input_ids), each.visual_tokens
        sample.buckets[number] = each.bucket
    return sample


def _windows(rows_of_sets: Sequence[int], window_rows: int) -> Windows:
    """The windows of sets that are dealt side by side. Where they are many, whole ones are taken to be alike: a set's
    rows in each differ by one."""
    total = sum(rows_of_sets)
    whole = total // window_rows
    if whole <= MOST_KINDS:
        windows = list(dealt(rows_of_sets, window_rows))
        first = [[sum(column) for column in zip(*windows[:number])] for number in range(1, len(windows))]
        none = [0] * len(rows_of_sets)
        return Counter(_kind(start, rows) for start, rows in zip([none, *first], windows, strict=False))
    rest = [
        rows - taken for rows, taken in zip(rows_of_sets, first_rows(rows_of_sets, whole * window_rows), strict=True)
    ]
    none = [0] * len(rest)
    kinds = Counter({_kind(none, first_rows(rows_of_sets, window_rows)): whole})
    return kinds + Counter([_kind(none, rest)] if any(rest) else [])


def _kind(first: Sequence[int], rows: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    return tuple((number, start, count) for number, (start, count) in enumerate(zip(first, rows, strict=True)) if count)


def _window_rows(
    samples: Sequence[_Sampled], kind: Sequence[tuple[int, int, int]]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Tokens, visual tokens and shapes of a window's rows."""
    parts = [
        (samples[number], samples[number].repeated(*rows)) for number, *rows in kind if len(samples[number].usable)
    ]
    lengths = [sample.lengths[chosen] for sample, chosen in parts]
    visual = [sample.visual[chosen] for sample, chosen in parts]
    buckets = [str(bucket) for sample, chosen in parts for bucket in sample.buckets[chosen]]
    empty = np.zeros(0, dtype=np.int64)
    return np.concatenate([empty, *lengths]), np.concatenate([empty, *visual]), buckets
