"""What a notebook shows of the objects a person prints: right, escaped, small, and replaced while work goes on."""

import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from mmray.display import notebook
from mmray.display.html import InlinePage
from mmray.display.progress import ProgressBar
from mmray.inspect import show_bin
from mmray.prepared import Bin
from mmray.report import Run, live_run
from mmray.schedule.balance import BalanceSettings
from mmray.schedule.balanced import BalancedSchedule
from mmray.schedule.schedule import Schedule
from tests.mmray.html_page import Page
from tests.mmray.report.reported import HISTORY, HOSTILE, page_text, write_run

MOST_BYTES = 50_000


def shown(item):
    """A card as a page, and its lines: name -> text."""
    content = item._repr_html_()
    assert len(content.encode()) < MOST_BYTES
    assert "<script" not in content
    page = Page(content)
    order = [each for each in page.of("span") if each.is_in("facts") and not each.is_in("track") and each.text.strip()]
    texts = [each.text for each in order if "name" not in each.classes]
    return page, dict(zip([each.text for each in page.of("span", "name")], texts, strict=True))


def test_a_prepared_dataset(written):
    page, facts = shown(written)
    stats = written.statistics
    assert facts["rows"] == f"{stats['rows_packed']} packed of {stats['rows_read']} read"
    assert facts["rejected"] == "5 empty_text, 1 image_missing"
    assert facts["fill, tokens"] == f"{stats['token_fill']:.1%} of 300 a bin"
    assert facts["fingerprint"] == written.fingerprint
    bars = [each.attributes["style"] for each in page.of("span", "bar")]
    assert bars[0] == f"width: {stats['token_fill'] * 100:.2f}%"


def test_a_bin(written):
    number = next(each for each in range(len(written)) if len(written.bin(each).sample_ids) > 1)
    each = written.bin(number)
    page, facts = shown(each)
    assert facts["tokens"] == f"{len(each.input_ids):,}"
    assert facts["images"] == str(len(each.images))
    strip = [part for part in page.of("span") if part.is_in("strip")]
    assert len(strip) == len(each.sample_ids)
    widths = [float(part.attributes["style"].removeprefix("flex: ")) for part in strip]
    assert widths == pytest.approx((each.sample_lengths / len(each.input_ids)).tolist(), abs=1e-4)


def test_a_bin_of_very_many_samples_with_hostile_ids_is_small():
    lengths = np.full(5000, 2, dtype=np.int32)
    each = Bin(
        index=0, bucket=HOSTILE, visual_tokens=0, trained_tokens=10, input_ids=np.zeros(10_000, dtype=np.int32),
        sample_lengths=lengths, sample_ids=[HOSTILE * 100] * 5000, sample_sources=[""] * 5000,
        sample_rules=np.zeros(5000, dtype=np.int8), sample_sets=np.zeros(5000, dtype=np.int32),
        given_mask=np.zeros(0, dtype=bool), images=[],
    )  # fmt: skip
    page, _ = shown(each)
    assert page_text(HOSTILE) in [part.text.removeprefix("bucket ") for part in page.of("div", "where")]
    assert [part for part in page.of("span") if part.is_in("strip")][-1].attributes["title"].startswith("the other")


def test_schedules():
    order = Schedule(num_bins=100, global_batch_bins=16, seed=3, fingerprint=HOSTILE)
    page, facts = shown(order)
    assert facts["step 1"] == ", ".join(map(str, order.bins(1)[:12])) + ", …"
    assert page_text(HOSTILE) in page.of("div", "where")[0].text
    _, facts = shown(BalancedSchedule(order, BalanceSettings(group_bins=4).for_attention("sdpa")))
    assert facts["bins"] == "100, 16 of like cost a step, in groups of 4"


def test_a_run(tmp_path):
    page, facts = shown(Run(write_run(tmp_path / "run", 8, HISTORY)))
    assert facts == {"loss": "4, from 4.875", "evaluation loss": "5, from 5.5", "resumed": "at step 4"}
    assert [each.text for each in page.of("h3")] == ["Loss"]
    assert sum(each.text.startswith("step ") for each in page.of("title")) == 8
    assert shown(Run(write_run(tmp_path / "new", 0, HISTORY[:1])))[1] == {}
    long = Run(write_run(tmp_path / "long", 20_000, loss=lambda step: 50.0 if step == 777 else 2.0))
    assert any("50" in each.text for each in shown(long)[0].of("title"))


def test_a_page_in_a_notebook_is_a_frame_that_runs_nothing(written):
    (frame,) = Page(show_bin(written, 0)._repr_html_()).of("iframe")
    assert frame.attributes["sandbox"] is None  # the strictest: no scripts, no forms, no navigation
    assert Page(frame.attributes["srcdoc"]).pictures
    (frame,) = Page(InlinePage(f'<p title="{HOSTILE}">')._repr_html_()).of("iframe")
    assert frame.attributes["srcdoc"] == f'<p title="{HOSTILE}">'


@pytest.fixture
def displayed(monkeypatch):
    """What a notebook would show, state by state: as if this process were its kernel."""
    states = []

    def display(content, *, display_id):
        assert display_id
        states.append(content._repr_html_())
        return SimpleNamespace(update=lambda content: states.append(content._repr_html_()))

    fake = SimpleNamespace(
        get_ipython=lambda: SimpleNamespace(kernel=object()), display=SimpleNamespace(display=display)
    )
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "IPython.display", fake.display)
    return states


def test_a_run_is_shown_anew_while_it_goes_on(displayed, tmp_path, monkeypatch):
    seen = threading.Event()
    show = notebook.LiveOutput.replace
    monkeypatch.setattr(notebook.LiveOutput, "replace", lambda self, content: (show(self, content), seen.set()))
    monkeypatch.setattr(notebook, "UPDATE_SECONDS", 0.01)
    with live_run(tmp_path / "run"):
        assert seen.wait(60)
        write_run(tmp_path / "run", 8, HISTORY)
    assert "has not begun yet" in displayed[1]
    assert "Run: 8 steps, finished" in displayed[-1]


def test_progress_in_a_notebook_is_a_bar_that_moves(displayed, capsys):
    with ProgressBar("<b>", "rows") as bar:
        bar.update(1, 4)
        bar.update(4, 4, "<done>")
    assert displayed[-1].startswith('<progress max="1" value="1.0"></progress> &lt;b&gt;: 4/4 rows (100%)')
    assert displayed[-1].endswith("&lt;done&gt;")
    assert 'value="0.25"' in displayed[1]
    assert capsys.readouterr().err == ""


def test_outside_a_notebook_there_is_none():
    assert not notebook.in_notebook()
