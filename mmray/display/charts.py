"""Computes charts as data: places and labels, which `templates/charts.html.jinja` draws as SVG and HTML.

matplotlib is not used: its pictures have one size and one palette. Here only the shapes are SVG, stretched to the
width of the page; lines keep their width and all text is HTML of the page, so a chart is as legible on a phone as on a
desk, dark or light, at about 5 kB. Places are thousandths of the plot's width and height, from the left and the top.

A long series is divided into `COLUMNS` stretches; each is drawn as its mean, inside a band from its smallest to its
largest value: a spike of one step in a hundred thousand stays visible.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, ScalarFormatter

from mmray.base.words import counted

COLUMNS = 240
"""Number of stretches that a longer series is drawn in; half of it is the most columns that show values on hover."""
MOST_LABEL = 7
"""Most characters of a label with a letter for its thousands; longer ones are written out."""
FLAG_ROOM = 350
"""Largest width of a mark's text, in thousandths of the plot, on a phone too."""
LOG_FROM, LOG_TO = 50, 1e12
"""Range of largest / smallest value in which positive values are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Tick:
    """A label on an axis or at a mark. place: in thousandths; text: the label."""

    place: float
    text: str


@dataclass(frozen=True)
class Axis:
    """A range of values, mapped to places from 0 to 1000. whole: label whole numbers only."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def at(self, values: np.ndarray) -> np.ndarray:
        """Places of values, float64 [n]."""
        low, high = self.low, self.high
        if self.log:
            low, high, values = math.log(low), math.log(high), np.log(values)
        return (values - low) / (high - low) * 1000

    @property
    def ticks(self) -> list[Tick]:
        """About four ticks at round values inside the range."""
        steps = [1, 2, 2.5, 5, 10]
        locator = LogLocator(numticks=5) if self.log else MaxNLocator(4, steps=steps, integer=self.whole, min_n_ticks=1)
        values = np.asarray(locator.tick_values(self.low, self.high))
        slack = 1e-9 * (self.high - self.low)
        values = values[(values >= self.low - slack) & (values <= self.high + slack)]
        return [Tick(place, text) for place, text in zip(self.at(values).tolist(), labels(values))]

    @classmethod
    def around(cls, *values: np.ndarray, zero: bool = False, log: bool | None = None) -> "Axis":
        """Make a range that holds all finite values with a little room.

        zero: begin at zero; log: logarithmic; None: decided by the values.
        """
        known = np.concatenate([np.asarray(array, dtype=np.float64).ravel() for array in values])
        known = known[np.isfinite(known)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        if log is None:
            log = low > 0 and LOG_FROM < high / low < LOG_TO and not zero
        if log:
            return cls(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-9), log=True)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(min(low, 0.0) if zero else low - room, high + room)


@dataclass(frozen=True)
class Curve:
    """A drawn series. colour: a CSS class of the page; line, band: SVG paths; dots: places of single points."""

    name: str
    colour: str
    line: str = ""
    band: str = ""
    dots: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Box:
    """A rectangle with its top left corner at (left, top). title: the text shown on hover; strength: its opacity."""

    left: float
    top: float
    width: float
    height: float
    title: str
    colour: str = ""
    strength: float = 1.0


@dataclass(frozen=True)
class Plot:
    """One chart. note: its message in words; x_name: the label of the x axis, with its unit."""

    title: str
    note: str
    x_name: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    marks: list[Tick] = field(default_factory=list)
    """Vertical lines with their labels; an empty label draws the line alone."""
    hover: list[Box] = field(default_factory=list)
    """Columns over the plot that show their values on hover."""

    @property
    def flags(self) -> list[list[Tick]]:
        """The labels of the marks in rows above one another, so that none covers another."""
        rows: list[list[Tick]] = []
        for mark in self.marks:
            if mark.text:
                row = next((row for row in rows if mark.place - row[-1].place >= FLAG_ROOM), None)
                if row is None:
                    rows.append([mark])
                else:
                    row.append(mark)
        return rows


def labels(values: np.ndarray) -> list[str]:
    """The labels of an axis with ticks at these values, float64 [n]: as exact as the ticks are, and alike.

    For example 11.25, 11.50, 11.75; 0, 2.5k, 5k; 0, 1e-05, 2e-05.
    """
    largest = float(np.abs(values).max(initial=0))
    if 0 < largest < 0.001:
        return [f"{value:g}" for value in values]
    thousands = [EngFormatter(sep="").format_data(value) for value in values.tolist()]
    if largest >= 1000 and max(map(len, thousands)) <= MOST_LABEL:
        return thousands
    if min(np.abs(values[values != 0]), default=1.0) * 50 < largest:  # a logarithmic axis
        return [f"{value:g}" for value in values]
    plain = ScalarFormatter(useOffset=False)
    plain.set_scientific(False)
    plain.create_dummy_axis()
    axis: Any = plain.axis
    axis.set_view_interval(values.min(initial=0), values.max(initial=0))
    return plain.format_ticks(values.tolist())


def exact(value: float | None) -> str:
    """Format a number for a hover text: 1,234,567 or 0.01234."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


@dataclass(frozen=True)
class Series:
    """Values over steps, float64 [n] each; unknown and infinite values are NaN.

    dots: draw points instead of a line, up to COLUMNS of them.
    """

    name: str
    colour: str
    steps: np.ndarray
    values: np.ndarray
    dots: bool = False


def over_steps(
    title: str, note: str, series: Sequence[Series], *, zero: bool = False, marks: Sequence[tuple[int, str]] = (),
    last_step: int, first_step: int = 1, x_name: str = "step",
) -> Plot:  # fmt: skip
    """Draw series over steps. marks: (step, label) of events."""
    x = Axis(first_step, max(last_step, first_step + 1), whole=True)
    y = Axis.around(*(curve_series.values for curve_series in series), zero=zero)
    drawn = [curve_series for curve_series in series if len(curve_series.values)]
    return _plot(
        title,
        note,
        x_name,
        x,
        y,
        curves=[_curve(curve_series, x, y) for curve_series in drawn],
        marks=[Tick(float(x.at(np.asarray(step)).clip(0, 1000)), text) for step, text in marks],
        hover=_hover(drawn, x, x_name),
    )


def _curve(series: Series, x: Axis, y: Axis) -> Curve:
    if series.dots and len(series.steps) <= COLUMNS:
        known = np.isfinite(series.values)
        dots = zip(x.at(series.steps[known]).tolist(), (1000 - y.at(series.values[known])).tolist())
        return Curve(series.name, series.colour, dots=tuple((round(left, 1), round(top, 1)) for left, top in dots))
    if len(series.steps) <= 2 * COLUMNS:
        return Curve(series.name, series.colour, line=_path(x.at(series.steps), 1000 - y.at(series.values)))
    steps, low, mean, high = _stretches(series)
    places = x.at(steps)
    return Curve(
        series.name,
        series.colour,
        line=_path(places, 1000 - y.at(mean)),
        band=_band(places, 1000 - y.at(high), 1000 - y.at(low)),
    )


def _stretches(series: Series) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Middle step, smallest, mean and largest value of each stretch with a finite value, float64 [n] each."""
    known = np.isfinite(series.values)
    steps, values = series.steps[known], series.values[known]
    stretch = np.floor((steps - steps[0]) * (COLUMNS / (steps[-1] - steps[0] + 1))).astype(np.int64)
    starts = np.flatnonzero(np.diff(stretch, prepend=-1))
    counts = np.diff(np.append(starts, len(steps)))
    return (
        np.add.reduceat(steps.astype(np.float64), starts) / counts,
        np.minimum.reduceat(values, starts),
        np.add.reduceat(values, starts) / counts,
        np.maximum.reduceat(values, starts),
    )


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """An SVG line through points, interrupted at unknown ones. A single point is a dot."""
    parts, pen = [], "M"
    for left, top in zip(x.tolist(), y.tolist()):
        if math.isfinite(top):
            parts.append(f"{pen}{left:.1f} {top:.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts) + ("h0" if len(parts) == 1 else "")


def _band(x: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> str:
    upper = [f"{left:.1f} {height:.1f}" for left, height in zip(x, top)]
    lower = [f"{left:.1f} {height:.1f}" for left, height in zip(x[::-1], bottom[::-1])]
    return f"M{'L'.join(upper + lower)}Z"


def _hover(series: Sequence[Series], x: Axis, x_name: str) -> list[Box]:
    """Make the columns over the plot; the hover text of each names its steps and the values of the series."""
    columns = int(min(COLUMNS // 2, x.high - x.low + 1))
    borders = np.linspace(x.low - 0.5, x.high + 0.5, columns + 1)
    boxes = []
    for left, right in pairwise(borders.tolist()):
        lines = [line for curve_series in series for line in _hover_lines(curve_series, left, right)]
        if lines:
            first, last = math.ceil(left), math.ceil(right) - 1
            steps = f"{x_name} {first:,}" + (f" to {last:,}" if last > first else "")
            edges = x.at(np.asarray([left, right])).clip(0, 1000)
            boxes.append(Box(float(edges[0]), 0, float(edges[1] - edges[0]), 1000, "\n".join([steps, *lines])))
    return boxes


def _hover_lines(series: Series, left: float, right: float) -> list[str]:
    first, stop = np.searchsorted(series.steps, [left, right])
    values = series.values[first:stop]
    if not len(values):
        return []
    known = values[np.isfinite(values)]
    lost = "" if len(known) == len(values) else f"{len(values) - len(known)} not finite"
    if not len(known):
        return [f"{series.name} {lost}"]
    text = f"{series.name} {exact(float(known.mean()))}"
    if len(known) > 1:
        text += f" ({exact(float(known.min()))} to {exact(float(known.max()))})"
    return [f"{text} {lost}".rstrip()]


def histogram(
    title: str, note: str, counts: np.ndarray, edges: np.ndarray, *, x_name: str, what: str, colour: str,
    axis: Axis | None = None,
) -> Plot:  # fmt: skip
    """Draw counts as bars between edges.

    axis: the x axis; default: linear over the edges; what: the counted thing, in the singular.
    """
    x = axis or Axis(float(edges[0]), float(edges[-1]))
    y = Axis(0, float(max(counts.max(initial=0), 1)) * 1.06)
    total = max(int(counts.sum()), 1)
    boxes = [
        Box(
            left, 1000 - height, right - left, height,
            f"{exact(low)} to {exact(high)}: {counted(count, what)} ({count / total:.1%})", colour,
        )
        for (left, right), (low, high), height, count in zip(
            pairwise(x.at(edges).tolist()), pairwise(edges.tolist()), y.at(counts).tolist(), counts.tolist()
        )
        if count
    ]  # fmt: skip
    return _plot(title, note, x_name, x, y, boxes=boxes)


def heat_map(
    title: str, note: str, x: np.ndarray, y: np.ndarray, x_max: float, y_max: float, *, x_name: str, what: str,
    cells: int = 24,
) -> Plot:  # fmt: skip
    """Draw how often pairs of values occur, darker for more; both axes begin at 0."""
    counts, x_edges, y_edges = np.histogram2d(x, y, bins=cells, range=[[0, x_max], [0, y_max]])
    across, up = Axis(0, x_max), Axis(0, y_max)
    side, most = 1000 / cells, counts.max(initial=1)
    boxes = [
        Box(
            round(i * side, 1), round(1000 - (j + 1) * side, 1), round(side, 1), round(side, 1),
            f"{exact(x_edges[i])} to {exact(x_edges[i + 1])} × {exact(y_edges[j])} to {exact(y_edges[j + 1])}: "
            f"{counted(int(counts[i, j]), what)}",
            "heat", round(0.15 + 0.85 * math.sqrt(counts[i, j] / most), 2),
        )
        for i, j in np.argwhere(counts)
    ]  # fmt: skip
    return _plot(title, note, x_name, across, up, boxes=boxes)


def _plot(title: str, note: str, x_name: str, x: Axis, y: Axis, **content: Any) -> Plot:
    """A plot with the ticks of its axes. content: what is drawn, as fields of Plot."""
    y_ticks = [Tick(1000 - tick.place, tick.text) for tick in y.ticks]
    return Plot(title=title, note=note, x_name=x_name, x_ticks=x.ticks, y_ticks=y_ticks, **content)
