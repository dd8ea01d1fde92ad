"""Renders the page of a prepared dataset: the numbers of `prepared.py` in words and charts."""

from typing import Any

import numpy as np

from mmray.base.words import amount, counted, made_by
from mmray.config.job import Job
from mmray.display import charts
from mmray.display.charts import Axis, Plot, Series
from mmray.display.html import template
from mmray.errors import RowError, UserError
from mmray.families import Family
from mmray.images import load_image
from mmray.inspect.page import ShownBin, data_uri, shown_bin
from mmray.inspect.view import family_of_prepared, view_bin
from mmray.prepared import PreparedDataset
from mmray.report.prepared import (
    Distributions,
    StepSettings,
    bins_to_show,
    rejects,
    set_lines,
    step_balance,
)  # fmt: skip
from mmray.report.rows import PERCENTILES, RowFacts

MOST_SAMPLES = 4
"""Number of samples shown of each bin."""
PICTURE_PIXELS = 1_000_000
"""Pixels of all pictures of one bin: about 0.4 MB as JPEG."""
LENGTH_BARS = 32
THUMBNAIL_SIDE = 160
"""Longest side, in pixels, of the picture of a page whose text does not fit it."""


def prepared_page(
    prepared: PreparedDataset, processor: str | None = None, *, job: Job | None = None, trust_remote_code: bool = False
) -> str:
    """The report of a prepared dataset as one page of HTML.

    processor: folder or hub name; default: where it was when the dataset was prepared. Bins are shown only when the
    default can be loaded.
    job: the job whose steps the page shows; default: `StepSettings.of(None)`.

    Raises UserError for a `processor` that is not the dataset's, and for files that cannot be read.
    """
    distributions = Distributions.of(prepared)
    family, no_family = loaded_family(prepared, processor, trust_remote_code=trust_remote_code)
    bins, bins_note = _bins(prepared, distributions, family, no_family)
    balance, balance_note = _balance(prepared, StepSettings.of(job))
    refused = rejects(prepared)
    most = max(refused.counts.values(), default=1)
    return template("report_prepared.html.jinja").render(
        prepared=prepared,
        facts=_facts(prepared),
        figures=_figures(prepared),
        gauges=_gauges(prepared) if len(prepared) else [],
        fill_note=_fill_note(prepared),
        rows=None if family is None or not len(prepared) else RowFacts.of_prepared(prepared, family),
        percentiles=PERCENTILES,
        thumbnail=_thumbnail,
        sampled=_sampled(distributions),
        sets=set_lines(prepared),
        charts=_charts(prepared, distributions),
        buckets=_buckets(distributions),
        balance=balance,
        balance_note=balance_note,
        rejects=[
            {"reason": reason, "count": count, "share_of_most": count / most, "examples": refused.examples[reason]}
            for reason, count in refused.counts.items()
        ],
        rejects_note=_rejects_note(prepared),
        bins=bins,
        bins_note=bins_note,
        footer=made_by(),
    )


def _thumbnail(uri: str) -> str | None:
    """The small picture of a page as a data URI; None where it cannot be read."""
    try:
        page = load_image(uri)
    except (RowError, UserError, OSError):
        return None
    return data_uri(page, min(1.0, THUMBNAIL_SIDE / max(page.size)))


def _facts(prepared: PreparedDataset) -> list[tuple[str, str]]:
    record, tiling = prepared.manifest["record"], prepared.tiling
    packing = record["packing"]
    loss = record["loss"] if isinstance(record["loss"], str) else "roles"
    return [
        ("processor", record["processor"]["class"]),
        ("capacities", f"{packing['token_capacity']:,} tokens, {packing['visual_capacity']:,} visual tokens"),
        ("images", "tiled" if tiling.is_tiled else "whole"),
        ("loss", loss),
        ("prepared in", f"{prepared.manifest['seconds']:,.0f} s"),
        ("fingerprint", prepared.fingerprint),
    ]


def _figures(prepared: PreparedDataset) -> list[tuple[str, str]]:
    facts = prepared.statistics
    trained = facts["trained_tokens"] / max(facts["tokens"], 1)
    visual = facts["visual_tokens"] / max(facts["tokens"], 1)
    return [
        (amount(facts["rows_packed"]), f"of {facts['rows_read']:,} rows packed"),
        (amount(facts["rows_rejected"]), "rows rejected"),
        *([(amount(facts["rows_left_out"]), "rows left out")] if facts.get("rows_left_out") else []),
        *([(amount(facts["rows_repeated"]), "rows repeated")] if facts.get("rows_repeated") else []),
        (amount(facts["bins"]), "bins"),
        (amount(facts["tokens"]), "tokens"),
        (f"{visual:.0%}", f"of them of images: {amount(facts['visual_tokens'])}"),
        (f"{trained:.0%}", f"of them trained: {amount(facts['trained_tokens'])}"),
        (amount(facts["images"]), "images"),
    ]


def _gauges(prepared: PreparedDataset) -> list[dict[str, Any]]:
    facts, packing = prepared.statistics, prepared.manifest["record"]["packing"]
    gauges = []
    for name, count, capacity, fill, colour in (
        ("tokens", facts["tokens"], packing["token_capacity"], facts["token_fill"], "tokens"),
        ("visual tokens", facts["visual_tokens"], packing["visual_capacity"], facts["visual_fill"], "visual"),
    ):
        best = min(1.0, count / max(facts["bins_at_least"] * capacity, 1))
        text = f"{count:,} of {facts['bins'] * capacity:,}; at the bound {best:.1%} (green line)"
        gauges.append({"name": name, "share": fill, "best": best, "text": text, "colour": colour})
    return gauges


def _fill_note(prepared: PreparedDataset) -> str:
    facts = prepared.statistics
    bins, least = facts["bins"], facts["bins_at_least"]
    if prepared.manifest["record"]["packing"]["mode"] == "none":
        return f"{counted(bins, 'bin')} of one sample each: packing.mode is none."
    if bins == least:
        return f"{counted(bins, 'bin')}: no packing has fewer."
    more = (bins - least) / max(least, 1)
    return (
        f"{bins:,} bins; whatever the packing, {least:,} are needed at least: {more:.1%} more than this bound, which "
        "packing may not reach."
    )


def _sampled(distributions: Distributions) -> str:
    read, whole = distributions.bins
    notes = []
    if read < whole:
        notes.append(f"Charts of bins are of {read:,} of {whole:,} bins, in evenly spaced files.")
    if distributions.column_bins < whole:
        notes.append(f"Lengths of samples and images per bin are of {distributions.column_bins:,} of {whole:,} bins.")
    return " ".join(notes)


def _charts(prepared: PreparedDataset, distributions: Distributions) -> list[Plot]:
    if distributions.loads is None:
        return []
    packing = prepared.manifest["record"]["packing"]
    tokens, visual = packing["token_capacity"], packing["visual_capacity"]
    return [
        _both_fills(distributions, tokens, visual),
        _bin_lengths(distributions, tokens),
        _sample_lengths(distributions),
        _images(distributions),
        *([_visual_lengths(distributions, visual)] if distributions.loads.visual_tokens.any() else []),
    ]


def _both_fills(distributions: Distributions, tokens: int, visual: int) -> Plot:
    loads = distributions.loads
    assert loads is not None
    full = loads.tokens >= 0.95 * tokens, loads.visual_tokens >= 0.95 * visual
    neither = ~(full[0] | full[1])
    note = (
        f"95 % full in tokens: {full[0].mean():.0%} of bins, in visual tokens: {full[1].mean():.0%}, "
        f"in neither: {neither.mean():.0%}. Darker: more bins."
    )
    return charts.heat_map(
        "Tokens and visual tokens of each bin", note, loads.tokens, loads.visual_tokens, tokens, visual,
        x_name="tokens → capacity; upwards: visual tokens", what="bin",
    )  # fmt: skip


def _bin_lengths(distributions: Distributions, capacity: int) -> Plot:
    assert distributions.loads is not None
    lengths = distributions.loads.tokens
    counts, edges = np.histogram(lengths, bins=LENGTH_BARS, range=(0, capacity))
    note = f"Median {np.median(lengths):,.0f}, shortest {lengths.min():,}, longest {lengths.max():,} of {capacity:,}."
    return charts.histogram(
        "Lengths of bins", note, counts, edges, x_name="tokens in a bin", what="bin", colour="tokens"
    )


def _visual_lengths(distributions: Distributions, capacity: int) -> Plot:
    assert distributions.loads is not None
    lengths = distributions.loads.visual_tokens
    counts, edges = np.histogram(lengths, bins=LENGTH_BARS, range=(0, capacity))
    note = (
        f"Median {np.median(lengths):,.0f}, most {lengths.max():,} of {capacity:,}; {(lengths == 0).mean():.0%} none."
    )
    return charts.histogram(
        "Visual tokens of bins", note, counts, edges, x_name="visual tokens in a bin", what="bin", colour="visual"
    )


def _sample_lengths(distributions: Distributions) -> Plot:
    lengths = distributions.sample_lengths
    low, high = max(int(lengths.min()), 1), int(lengths.max())
    is_log = high / low > charts.LOG_FROM
    edges = np.geomspace(low, high + 1, LENGTH_BARS + 1) if is_log else np.linspace(low, high + 1, LENGTH_BARS + 1)
    counts, edges = np.histogram(lengths, bins=edges)
    note = f"Median {np.median(lengths):,.0f}, from {low:,} to {high:,}; on average {lengths.mean():,.0f}."
    return charts.histogram(
        "Lengths of samples", note, counts, edges, colour="tokens", what="sample",
        x_name="tokens in a sample" + (", logarithmic" if is_log else ""), axis=Axis(edges[0], edges[-1], log=is_log),
    )  # fmt: skip


def _images(distributions: Distributions) -> Plot:
    images = distributions.images
    most = int(images.max())
    width = max(1, -(-(most + 1) // LENGTH_BARS))
    edges = np.arange(0, most + 1 + width, width) - 0.5
    counts, edges = np.histogram(images, bins=edges)
    note = f"On average {images.mean():.1f}, most {most:,}; {(images == 0).mean():.0%} of bins have none."
    return charts.histogram(
        "Images per bin", note, counts, edges, x_name="images in a bin", what="bin", colour="visual"
    )


def _buckets(distributions: Distributions) -> list[dict[str, Any]]:
    if distributions.loads is None:
        return []
    names, counts = np.unique(distributions.loads.bucket, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    total, most = counts.sum(), counts.max()
    return [
        {"name": str(names[index]), "share_of_most": counts[index] / most,
         "text": f"{counted(counts[index], 'bin')}, {counts[index] / total:.0%}"}
        for index in order
    ]  # fmt: skip


def _balance(prepared: PreparedDataset, settings: StepSettings) -> tuple[Plot | None, str]:
    if not len(prepared):
        return None, ""
    times = step_balance(prepared, settings)
    steps = len(times.plain)
    if not steps:
        size = f"{settings.global_batch_bins:,} ({settings.source})"
        return None, f"An epoch of {counted(len(prepared), 'bin')} has no whole step of {size}."
    if settings.workers == 1:
        return None, f"One worker waits for no other ({settings.source})."
    size = f"{counted(settings.global_batch_bins, 'bin')} a step on {counted(settings.workers, 'worker')}"
    whole = counted(times.whole_steps, "step")
    shown = "" if steps == times.whole_steps else f"; the first {steps:,} of {whole} of an epoch"
    note = f"Cost of all bins of the slowest worker against equal work: 1 is best. {size}{shown} ({settings.source})."
    numbers = np.arange(1, steps + 1)
    plot = charts.over_steps(
        "Equal work for all workers", note,
        [
            Series(f"plain order {times.plain.mean():.2f}", "grey", numbers, times.plain),
            Series(f"balanced {times.balanced.mean():.2f}", "good", numbers, times.balanced),
        ],
        last_step=steps,
    )  # fmt: skip
    return plot, ""


def _rejects_note(prepared: PreparedDataset) -> str:
    facts = prepared.statistics
    taken = facts["rows_read"] - facts.get("rows_left_out", 0)
    share = facts["rows_rejected"] / max(taken, 1)
    return f"{facts['rows_rejected']:,} of {taken:,} rows ({share:.2%}), all in rejected.parquet."


def loaded_family(
    prepared: PreparedDataset, processor: str | None, *, trust_remote_code: bool
) -> tuple[Family | None, str]:
    """The family of a dataset's processor, or None and the reason. Arguments and errors as for `prepared_page`."""
    try:
        family = family_of_prepared(prepared, processor, trust_remote_code=trust_remote_code)
    except UserError as error:
        if processor is not None:
            raise
        return None, str(error)
    return family, "" if family else "the dataset does not name its processor; give it with --processor."


def _bins(
    prepared: PreparedDataset, distributions: Distributions, family: Family | None, no_family: str
) -> tuple[list[ShownBin], str]:
    """Bins for a person to look at, and a line about them, which says why when there are none."""
    numbers = bins_to_show(distributions, prepared)
    if not numbers:
        return [], ""
    if family is None:
        return [], f"Not shown: {no_family}"
    shown = [
        shown_bin(
            view_bin(prepared, number, family), prepared.tiling, most_samples=MOST_SAMPLES, most_pixels=PICTURE_PIXELS
        )
        for number in numbers
    ]
    return shown, "The bin of median length in each of the most frequent buckets, as training uses it."
