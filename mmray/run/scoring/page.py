"""The page of an evaluation: its metrics, and rows with their picture, reference and prediction side by side."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from rapidfuzz.distance import Levenshtein

from mmray.base.visible import visible
from mmray.base.words import made_by
from mmray.display.charts import Plot, histogram
from mmray.display.html import template
from mmray.run.scoring.metrics import Normalisation
from mmray.run.scoring.results import RowResult, ShownRows

MOST_LETTERS = 6_000
"""Letters of a text that the page shows."""

MOST_BAD_ROWS = 50

NAMES = {
    "cer": "CER", "wer": "WER", "normalised_edit_distance": "edit distance", "exact_match": "exact",
    "length_ratio": "length ratio",
}  # fmt: skip


@dataclass(frozen=True)
class ShownText:
    """A row of the page: its facts in words, its picture as a data URI, both texts as HTML with differences marked."""

    id: str
    facts: str
    picture: str
    reference: Markup
    prediction: Markup


def evaluation_page(values: Mapping[str, Any], results: Sequence[RowResult], shown: ShownRows, *, title: str) -> str:
    """The page as HTML that needs nothing else. values: the content of metrics.json."""
    groups = [("Worst rows", shown.worst), ("Median rows", shown.median), ("Best rows", shown.best)]
    normalisation = Normalisation.model_validate(values["normalisation"])
    return template("evaluation.html.jinja").render(
        title=title,
        values=values,
        facts=_facts(values),
        figures=_figures(values["all"]),
        charts=_charts(results),
        tables=[
            _table(name, values[key]) for name, key in (
                ("Sets", "by_set"), ("Source files", "by_file"), ("Shape buckets", "by_bucket"),
            )
        ],
        groups=[
            (name, [shown_text(results[place], normalisation) for place in places]) for name, places in groups if places
        ],
        bad_rows=values["bad_rows"]["rows"][:MOST_BAD_ROWS],
        footer=made_by(),
    )  # fmt: skip


def shown_text(result: RowResult, normalisation: Normalisation) -> ShownText:
    """A result as the page shows it."""
    reference, prediction = (result.reference or "")[:MOST_LETTERS], (result.prediction or "")[:MOST_LETTERS]
    facts = [f"CER {_number(result.cer)}", f"set {result.set}", result.bucket]
    if not result.stopped:
        facts.append("did not end by itself")
    picture = f"data:image/jpeg;base64,{base64.b64encode(result.picture).decode()}" if result.picture else ""
    return ShownText(result.id, ", ".join(facts), picture, *marked(reference, prediction, normalisation))


def marked(reference: str, prediction: str, normalisation: Normalisation) -> tuple[Markup, Markup]:
    """Both texts as HTML, with what is missing from the prediction and what is wrong in it marked.

    Differences that do not count, by the normalisation, are not marked.
    """
    sides: tuple[list[Markup], list[Markup]] = ([], [])
    for operation in Levenshtein.opcodes(reference, prediction):
        pieces = (
            reference[operation.src_start : operation.src_end], prediction[operation.dest_start : operation.dest_end],
        )  # fmt: skip
        counts = operation.tag != "equal" and _differ(*pieces, normalisation)
        for side, piece, name in zip(sides, pieces, ("missing", "extra")):
            text = Markup(escape(visible(piece)))
            side.append(Markup(f'<mark class="{name}">{text}</mark>') if counts and piece else text)
    return Markup("").join(sides[0]), Markup("").join(sides[1])


def _differ(reference: str, prediction: str, normalisation: Normalisation) -> bool:
    if normalisation.white_space == "collapse" and reference and prediction:
        reference, prediction = f"x{reference}x", f"x{prediction}x"  # white space at the ends counts inside a text
    return normalisation.of(reference) != normalisation.of(prediction)


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [("model", str(values["model"]))]
    if values.get("step") is not None:
        facts.append(("step", f"{values['step']:,}"))
    facts.append(("rows", f"{values['all']['rows']:,}"))
    facts.append(("bad rows", f"{values['bad_rows']['count']:,}"))
    counted = [f"{name.replace('_', ' ')} {value}" for name, value in values["normalisation"].items() if value]
    facts.append(("compared with", ", ".join(counted) or "no normalisation"))
    return facts


def _figures(whole: Mapping[str, Any]) -> list[tuple[str, str]]:
    figures = [(_number(whole[name]), text) for name, text in NAMES.items() if whole[name] is not None]
    if whole["loss"] is not None:
        figures += [(f"{whole['loss']:.4g}", "loss"), (f"{whole['perplexity']:.4g}", "perplexity")]
    if whole["not_stopped"]:
        figures.append((f"{whole['not_stopped']:,}", "texts that did not end by themselves"))
    return figures


def _charts(results: Sequence[RowResult]) -> list[Plot]:
    """The distribution of CER over rows; values above 2 are drawn at 2."""
    rates = np.asarray([result.cer for result in results if result.cer is not None], dtype=np.float64)
    if not len(rates):
        return []
    top = min(2.0, max(1.0, float(rates.max())))
    counts, edges = np.histogram(rates.clip(max=top), bins=np.linspace(0, top, 41))
    above = f" {int((rates > top).sum()):,} above {top:g} are in the last bar." if (rates > top).any() else ""
    note = f"Median {np.median(rates):.3g}, mean {rates.mean():.3g}.{above}"
    return [histogram("CER of texts", note, counts, edges, x_name="character error rate", what="text", colour="tokens")]


def _table(name: str, groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    def rows() -> Iterator[dict[str, Any]]:
        for group, facts in groups.items():
            numbers = [_number(facts[key]) for key in NAMES]
            yield {"name": group, "rows": facts["rows"], "loss": _number(facts["loss"]), "numbers": numbers}

    return {"name": name, "columns": list(NAMES.values()), "rows": list(rows())}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
