"""Charts: values at their places, spikes that stay visible, and shapes of bounded size."""

import re
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mmray.display import charts
from mmray.display.charts import COLUMNS, Axis, Series, exact, over_steps

FINITE = st.floats(-1e9, 1e9, allow_subnormal=False)


def points(path):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


def plot(values, steps=None, **options):
    values = np.asarray(values, dtype=float)
    steps = np.arange(1.0, len(values) + 1) if steps is None else np.asarray(steps, dtype=float)
    series = Series("loss", "tokens", steps, values)
    return over_steps("Loss", "", [series], first_step=int(steps[0]), last_step=int(steps[-1]), **options)


def value_at(plot, top, values, **options):
    """The value of a place from the top, by the axis that the plot's values have."""
    axis = Axis.around(np.asarray(values, dtype=float), **options)
    return axis.low + (1000 - top) / 1000 * (axis.high - axis.low)


def test_a_short_series_is_drawn_point_by_point():
    values = [3.0, 2.0, 2.5]
    (curve,) = plot(values).curves
    assert [x for x, _ in points(curve.line)] == [0, 500, 1000]
    assert [value_at(plot, top, values) for _, top in points(curve.line)] == pytest.approx(values, abs=1e-3)
    assert curve.band == ""


def test_what_is_not_finite_interrupts_the_line():
    (curve,) = plot([3.0, np.nan, 2.5, 2.0, np.inf]).curves
    assert [part.count("L") for part in curve.line.split("M")[1:]] == [0, 1]


def test_a_spike_of_one_step_in_a_hundred_thousand_stays_visible():
    values = np.ones(100_000) + np.linspace(0, 0.1, 100_000)
    values[71_234] = 9.5
    values[500] = np.nan
    chart = plot(values)
    (curve,) = chart.curves
    band = points(curve.band)
    assert len(band) <= 2 * COLUMNS
    left, top = min(band, key=lambda point: point[1])
    assert value_at(chart, top, values) == pytest.approx(9.5, abs=0.01)
    assert left == pytest.approx(712.3, abs=1000 / COLUMNS)
    assert any("9.5" in box.title for box in chart.hover)
    assert any("1 not finite" in box.title for box in chart.hover)
    assert len(chart.hover) <= COLUMNS


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2 * COLUMNS + 1, 50 * COLUMNS))
def test_the_band_reaches_from_the_smallest_to_the_largest_value(seed, count):
    values = np.random.default_rng(seed).standard_cauchy(count)
    (curve,) = plot(values).curves
    heights = [value_at(None, top, values) for _, top in points(curve.band)]
    room = (values.max() - values.min()) * 1e-3
    assert max(heights) == pytest.approx(values.max(), abs=room)
    assert min(heights) == pytest.approx(values.min(), abs=room)


@settings(deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=9))
def test_places_lie_in_the_plot_and_ticks_are_in_order(values):
    axis = Axis.around(np.asarray(values))
    places = axis.at(np.asarray(values))
    assert ((places >= -1e-6) & (places <= 1000 + 1e-6)).all()
    ticks = [tick.place for tick in axis.ticks]
    assert ticks == sorted(ticks)
    assert len(ticks) <= 9


def test_values_far_apart_have_a_logarithmic_axis():
    axis = Axis.around(np.asarray([0.2, 30.0]))
    assert (axis.log, axis.low, axis.high) == (True, 0.1, 100)
    assert [tick.text for tick in axis.ticks] == ["0.1", "1", "10", "100"]
    assert not Axis.around(np.asarray([0.2, 30.0]), zero=True).log
    assert not Axis.around(np.asarray([0.0, 30.0])).log


def test_no_values_are_no_error():
    chart = plot([np.nan, np.nan])
    assert chart.curves[0].line == ""
    assert [box.title for box in chart.hover] == ["step 1\nloss 1 not finite", "step 2\nloss 1 not finite"]
    assert over_steps("Loss", "", [Series("loss", "x", np.zeros(0), np.zeros(0))], last_step=1).curves == []


def test_texts_of_marks_never_stand_in_each_others_way():
    chart = plot([1.0] * 100, marks=[(10, "a"), (20, "b"), (60, "c"), (90, "")])
    assert [[mark.text for mark in row] for row in chart.flags] == [["a", "c"], ["b"]]
    assert len(chart.marks) == 4


def test_bars_of_a_histogram_tell_their_counts():
    counts, edges = np.histogram([1, 1, 2, 9], bins=4, range=(0, 10))
    chart = charts.histogram("Lengths", "", counts, edges, x_name="tokens", what="bin", colour="tokens")
    assert [box.title for box in chart.boxes] == ["0 to 2.5: 3 bins (75.0%)", "7.5 to 10: 1 bin (25.0%)"]
    assert chart.boxes[0].height == pytest.approx(3 * chart.boxes[1].height)
    assert (chart.boxes[1].left, chart.boxes[1].left + chart.boxes[1].width) == (750, 1000)


def test_a_heat_map_counts_pairs():
    chart = charts.heat_map("Fill", "", np.asarray([1, 1, 99]), np.asarray([1, 1, 49]), 100, 50, x_name="", what="bin")
    corner, opposite = chart.boxes
    assert corner.title.endswith(": 2 bins")
    assert (corner.left, round(corner.top + corner.height)) == (0, 1000)
    assert (round(opposite.left + opposite.width), opposite.top) == (1000, 0)
    assert opposite.strength < corner.strength == 1


@given(low=st.floats(-1e6, 1e9), width=st.floats(1e-4, 1e9), whole=st.booleans())
@example(low=999_800_000.0, width=799_999.0, whole=True)
def test_labels_of_equal_distances_tell_equal_distances(low, width, whole):
    if whole:
        low, width = round(low), round(width) + 1
    assume(width > 1e-5 * abs(low))
    ticks = Axis(low, low + width, whole=whole).ticks
    told = np.asarray([number(tick.text) for tick in ticks])
    true = low + np.asarray([tick.place for tick in ticks]) / 1000 * width
    assert np.allclose(told, true, rtol=0, atol=1e-6 * width + 1e-9 * abs(low))
    assert not whole or (told == told.round()).all()


def number(text):
    """The number that a label tells a reader: 1.0006G are a whole number, which 1.0006 * 1e9 is not."""
    text = text.replace("\N{MINUS SIGN}", "-")
    return float(Decimal(text.rstrip("kMGT")).scaleb({"k": 3, "M": 6, "G": 9, "T": 12}.get(text[-1], 0)))


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (11.2, 12.1, ["11.25", "11.50", "11.75", "12.00"]),
        (1.8301, 1.8312, ["1.8305", "1.8310"]),
        (0, 12_345, ["0", "5k", "10k"]),
        (0, 3e-5, ["0", "1e-05", "2e-05", "3e-05"]),
        (100_000, 100_003, ["100000", "100001", "100002", "100003"]),
    ],
)
def test_labels_are_as_exact_as_their_ticks(low, high, texts):
    assert [tick.text for tick in Axis(low, high).ticks] == texts


def test_numbers_in_words():
    assert [exact(value) for value in (1234567.0, 0.01234, None, float("inf"))] == [
        "1,234,567", "0.01234", "not finite", "not finite",
    ]  # fmt: skip
