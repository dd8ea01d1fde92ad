"""Computes what the rows of a split are like: percentiles of lengths, capacities that hold them, odd pages.

The same facts are shown of a prepared dataset and, before there is one, of the sample of rows that a dry run encodes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmray.config.job import Job
from mmray.families import Family
from mmray.packing.settings import PackingSettings
from mmray.prepared import PreparedDataset
from mmray.prepared.estimate import Estimate
from mmray.prepared.row_measures import RowMeasures, measured_bins
from mmray.prepared.window import pack_by_bucket
from mmray.report.prepared import MOST_REJECTED_PARTS

PERCENTILES = (5, 25, 50, 75, 95, 99)
KEPT_SHARE = 0.99
"""Share of rows for which a capacity is suggested."""
FAR = 10
"""Factor from the median of its set from which on a page has far too much or too little text for its pixels."""
LEAST_PIXELS = 100
"""Pixels of a page for each token of text below which no print is legible: a token is about 4 letters of 5 x 5."""
LEAST_PAGES = 20
"""Least number of pages of a set with a median to compare with."""
FULL = 0.85
"""Fill from which on bins are full enough."""
GAIN = 0.03
"""Least gain in fill for which another setting is suggested."""
OVER_CAPACITY = {"too_long": "token_capacity", "too_many_visual_tokens": "visual_capacity"}
"""The reasons for which a row over a capacity is rejected, with the name of the capacity."""
MOST_PACKED = 8192
"""Most rows that are packed to try a setting."""


@dataclass(frozen=True)
class Percentiles:
    """The distribution of one measure in one set of rows. values: at PERCENTILES, then the largest."""

    row_set: str
    measure: str
    rows: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class CapacityFit:
    """How many rows fit a capacity.

    setting: its name in the job file; over: rows that do not fit; rows: all rows; keeps: the smallest capacity that
    holds KEPT_SHARE of the rows; unknown: rows that were rejected before they were compared with it.
    """

    setting: str
    capacity: int
    over: float
    rows: float
    keeps: int
    unknown: int = 0

    @property
    def text(self) -> str:
        """A line for people."""
        over = f"{self.over:,.0f} rows ({self.over / self.rows:.2%}) are" if self.over else "no row is"
        unknown = f" ({self.unknown:,} rows that are too long were not compared)" if self.unknown else ""
        return f"{over} over {self.setting} {self.capacity:,}; {self.keeps:,} would keep {KEPT_SHARE:.0%}{unknown}"


@dataclass(frozen=True)
class OddPages:
    """Pages whose text does not fit their pictures: why, how many of how many pages, and some of them.

    examples: a line for each of some pages; pictures: path or URI of the picture of each, "" where it has none.
    """

    kind: str
    count: int
    pages: int
    examples: tuple[str, ...]
    pictures: tuple[str, ...]


@dataclass(frozen=True)
class RowFacts:
    """Describes the rows of a split: their measures, how they fit the capacities, pages to look at."""

    percentiles: tuple[Percentiles, ...]
    fits: tuple[CapacityFit, ...]
    odd_pages: tuple[OddPages, ...]
    suggestion: str | None
    looked_at: str
    """How many of the rows were looked at."""

    @property
    def notes(self) -> list[str]:
        """Lines about the capacities, odd pages, and settings with which bins would be fuller."""
        lines = [fit.text for fit in self.fits]
        for odd in self.odd_pages:
            if odd.count:
                lines.append(f"{odd.count:,} of {odd.pages:,} rows with images have {odd.kind}:")
                lines += [f"  {example}" for example in odd.examples]
        return lines + ([self.suggestion] if self.suggestion else [])

    @classmethod
    def of_prepared(cls, prepared: PreparedDataset, family: Family) -> "RowFacts":
        """The facts of a prepared dataset. family: that of its processor."""
        record = prepared.manifest["record"]
        measures, facts = measured_bins(prepared, family), prepared.statistics
        kinds = {number: dataset["kind"] for number, dataset in enumerate(record["datasets"])}
        packing = PackingSettings.model_validate(record["packing"])
        too_large = rejected_needs(prepared)
        return cls._of(
            measures, {number: f"set {number} ({kind})" for number, kind in kinds.items()}, packing, family.sample_gap,
            weights=np.full(len(measures), facts["rows_packed"] / max(len(measures), 1)), too_large=too_large,
            too_long=facts["rejected_by_reason"].get("too_long", 0),
            looked_at=f"{len(measures):,} of {facts['rows_packed']:,} packed rows",
        )  # fmt: skip

    @classmethod
    def of_estimate(cls, guess: Estimate, job: Job, split: str, family: Family) -> "RowFacts":
        """The facts of the rows that an estimate encoded."""
        names = {number: f"set {number} ({dataset.kind})" for number, dataset in enumerate(job.data.splits[split])}
        return cls._of(
            guess.measures, names, job.packing, family.sample_gap, weights=guess.weights, too_large={},
            looked_at=f"{len(guess.measures):,} rows",
        )  # fmt: skip

    @classmethod
    def _of(
        cls, measures: RowMeasures, names: Mapping[int, str], packing: PackingSettings, sample_gap: int, *,
        weights: np.ndarray, too_large: Mapping[str, tuple[np.ndarray, np.ndarray]], looked_at: str, too_long: int = 0,
    ) -> "RowFacts":  # fmt: skip
        fits = []
        for setting, capacity, needs in (
            ("token_capacity", packing.token_capacity, measures.tokens),
            ("visual_capacity", packing.visual_capacity, measures.visual_tokens),
        ):
            more, more_weights = too_large.get(setting, (needs[:0], weights[:0]))
            needs, all_weights = np.concatenate([needs, more]), np.concatenate([weights, more_weights])
            if needs.any():
                of_setting = fit(f"packing.{setting}", capacity, needs, all_weights)
                fits.append(replace(of_setting, unknown=too_long if setting == "visual_capacity" else 0))
        return cls(
            tuple(percentiles(measures, names)), tuple(fits), tuple(odd_pages(measures)),
            suggestion(measures, packing, sample_gap), looked_at,
        )  # fmt: skip


def percentiles(measures: RowMeasures, set_names: Mapping[int, str]) -> list[Percentiles]:
    """The distributions of each measure in each set of rows. Pixels are those of a page, in rows with images."""
    table = []
    for number in np.unique(measures.sets).tolist():
        rows = measures.take(measures.sets == number)
        name = set_names.get(number, "all")
        for measure, values in (
            ("tokens", rows.tokens), ("text", rows.text_tokens), ("visual", rows.visual_tokens),
            ("pixels", (rows.pixels // np.maximum(rows.images, 1))[rows.images > 0]),
        ):  # fmt: skip
            if len(values):
                at = np.percentile(values, PERCENTILES, method="inverted_cdf").tolist()
                table.append(Percentiles(name, measure, len(values), (*map(int, at), int(values.max()))))
    return table


def fit(setting: str, capacity: int, needs: np.ndarray, weights: np.ndarray) -> CapacityFit:
    """How rows fit a capacity. needs: what each row takes, int64 [n]; weights: rows that each stands for, [n]."""
    order = np.argsort(needs, kind="stable")
    share = np.cumsum(weights[order]) / weights.sum()
    place = min(int(np.searchsorted(share, KEPT_SHARE - 1e-9)), len(needs) - 1)
    over = float(weights[needs > capacity].sum())
    return CapacityFit(setting, capacity, over, float(weights.sum()), int(needs[order][place]))


def odd_pages(measures: RowMeasures, most_examples: int = 3) -> list[OddPages]:
    """The pages with no text, with far too little, and with far too much of it for their pixels."""
    rows = measures.take(measures.images > 0)
    empty = rows.text_tokens == 0
    pixels_per_token = rows.pixels / np.maximum(rows.text_tokens, 1)
    median = np.full(len(rows), np.nan)
    for number in np.unique(rows.sets).tolist():
        pages = (rows.sets == number) & ~empty
        if pages.sum() >= LEAST_PAGES:
            median[pages] = np.median(pixels_per_token[pages])
    little = pixels_per_token > FAR * median
    much = (pixels_per_token < median / FAR) | ((pixels_per_token < LEAST_PIXELS) & ~empty)
    kinds = (
        ("no text", empty),
        (f"far too little text: under 1/{FAR} of the usual", little),
        (f"far too much text: {FAR} times the usual, or under {LEAST_PIXELS} pixels a token", much),
    )
    pages_of_kinds = []
    for kind, odd in kinds:
        shown = rows.take(np.flatnonzero(odd)[:most_examples])
        pages_of_kinds.append(
            OddPages(kind, int(odd.sum()), len(rows), tuple(_shown(shown)), tuple(shown.pictures.tolist()))
        )
    return pages_of_kinds


def _shown(rows: RowMeasures) -> list[str]:
    return [
        f"{rows.ids[row]}, {rows.sources[row]}: {rows.text_tokens[row]:,} tokens of text, {rows.pixels[row]:,} pixels"
        for row in range(len(rows))
    ]


def suggestion(measures: RowMeasures, packing: PackingSettings, sample_gap: int = 0) -> str | None:
    """Another packing setting with which bins are fuller; None where they are full enough, or none was found.

    The rows are packed anew with each of some settings, one after another.
    """
    fits = (measures.tokens <= packing.token_capacity) & (measures.visual_tokens <= packing.visual_capacity)
    rows = measures.take(np.flatnonzero(fits)[:MOST_PACKED])
    if packing.mode != "bins" or not len(rows):
        return None
    now = _fill(rows, packing, sample_gap)
    if now >= FULL:
        return None
    best, best_fill = None, now + GAIN
    for changes in _candidates(rows, packing):
        tried = _fill(rows, packing.model_copy(update=changes), sample_gap)
        if tried > best_fill:
            best, best_fill = changes, tried
        if tried >= FULL:
            break
    if best is None:
        return None
    settings = " and ".join(f"packing.{name}: {value:,}" for name, value in best.items())
    return f"bins are {now:.0%} full of tokens; with {settings} they would be {best_fill:.0%} full"


def _candidates(rows: RowMeasures, packing: PackingSettings) -> Sequence[dict[str, int]]:
    """Settings to try, from the one that costs least: what limits bins now is raised first."""
    tokens, visual = packing.token_capacity, packing.visual_capacity
    share = rows.visual_tokens.sum() / max(rows.tokens.sum(), 1)

    def fitting_visual(token_capacity: int) -> dict[str, int]:
        """A visual capacity an eighth over the data's own share, where the present one is below it."""
        wanted = -(-int(token_capacity * share * 9 / 8) // 64) * 64
        return {"visual_capacity": wanted} if wanted > visual else {}

    larger = [{"token_capacity": tokens * factor} | fitting_visual(tokens * factor) for factor in (2, 4)]
    return [changes for changes in (fitting_visual(tokens), *larger) if changes]


def _fill(rows: RowMeasures, packing: PackingSettings, sample_gap: int) -> float:
    bins = pack_by_bucket(rows.tokens, rows.visual_tokens, rows.buckets.tolist(), packing, sample_gap)
    return float(rows.tokens.sum()) / (len(bins) * packing.token_capacity)


def rejected_needs(prepared: PreparedDataset) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads from the messages of rejected rows how many tokens those over a capacity have.

    Returns, by the name of the capacity, the tokens of each row that was read, int64 [n], and the rows it stands for.
    """
    read: dict[str, list[int]] = {reason: [] for reason in OVER_CAPACITY}
    for number, part in enumerate(prepared.rejected_parts()):
        if number >= MOST_REJECTED_PARTS:
            break
        for reason, message in zip(part["reason"].to_pylist(), part["message"].to_pylist(), strict=True):
            if reason in read and (match := re.match(r"\d+", message)):
                read[reason].append(int(match[0]))
    counts = prepared.statistics["rejected_by_reason"]
    return {
        OVER_CAPACITY[reason]: (np.asarray(needs), np.full(len(needs), counts[reason] / len(needs)))
        for reason, needs in read.items() if needs
    }  # fmt: skip
