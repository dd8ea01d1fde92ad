"""The pages of a prepared dataset and of a run: their numbers are the data's, what the data says is text and nothing
more, and they need nothing else."""

import json
import re
from dataclasses import replace

import fsspec
import numpy as np
import pytest
import yaml

from mmray.config.job import load_job
from mmray.config.resources import ResourceSettings
from mmray.errors import UserError
from mmray.prepared import PreparedDataset
from mmray.report import Run, prepared_page, run_page, run_table
from mmray.report import prepared as facts
from mmray.report.prepared import Distributions, StepSettings, step_balance
from mmray.run.place import CURSOR_FILE
from mmray.run.skipped import SKIPPED_FILE
from mmray.schedule.balanced import BalancedSchedule
from mmray.schedule.cursor import Cursor
from mmray.schedule.schedule import Schedule
from tests.mmray.config.test_docs_jobs import LEAST
from tests.mmray.html_page import Page, assert_needs_nothing
from tests.mmray.preparing import Preparation, write_rows
from tests.mmray.report.reported import HISTORY, HOSTILE, packing, page_text, write_run


@pytest.fixture(scope="session")
def page(written):
    return Page(prepared_page(written))


def words(page):
    """All text of a page, blanks collapsed."""
    return " ".join(" ".join(each.text for each in page.elements if each.tag != "style").split())


def boxes(page, title):
    """Titles of the bars of one chart."""
    (head,) = [each for each in page.of("h3") if each.text == title]
    (chart,) = [each for each in head.parents if "chart" in each.classes]
    return [each.text for each in page.of("title") if any(parent is chart for parent in each.parents)]


def counted(titles):
    """Sum of the counts that bars tell."""
    return sum(int(re.search(r": ([\d,]+) ", title)[1].replace(",", "")) for title in titles)


# ---- A prepared dataset ----


def test_figures_and_fill_are_those_of_the_manifest(page, written):
    stats, text = written.statistics, words(page)
    figures = {span.text: b.text for span, b in zip(figure_parts(page, "span"), figure_parts(page, "b"), strict=True)}
    assert figures["of 55 rows packed"] == str(stats["rows_packed"]) == "49"
    assert figures["rows rejected"] == str(stats["rows_rejected"]) == "6"
    assert figures["bins"] == str(stats["bins"]) == str(len(written))
    assert figures["images"] == str(stats["images"]) == "40"
    assert f"{stats['tokens']:,} of {stats['bins'] * 300:,}" in text
    best = stats["tokens"] / (stats["bins_at_least"] * 300)
    assert f"at the bound {best:.1%}" in text
    gauges = [each.text for each in page.of("b") if each.is_in("gauge-head")]
    assert gauges == [f"{stats['token_fill']:.1%}", f"{stats['visual_fill']:.1%}"]


def test_rows_are_described_with_their_odd_pages(page, written):
    """Of 40 pages of 0 to 39 words, one has none, and one a twentieth of the median."""
    (head,) = [each for each in page.of("h2") if each.text == "What the rows are like"]
    (section,) = [each for each in head.parents if each.tag == "section"]
    cells = [each.text for each in page.of("td") if any(parent is section for parent in each.parents)]
    lengths = [length for number in range(len(written)) for length in written.bin(number).sample_lengths.tolist()]
    assert "set 0 (pretrain), 40 rows" in cells
    assert "set 1 (chat), 9 rows" in cells
    assert f"{max(lengths):,}" in cells
    lines = [" ".join(each.text.split()) for each in page.of("li") if any(parent is section for parent in each.parents)]
    assert any(line.startswith("no row is over packing.token_capacity 300; ") for line in lines)
    assert any(line.startswith("1 of 40 rows with images have no text") for line in lines)
    assert any(line.startswith("1 of 40 rows with images have far too little text") for line in lines), lines
    odd = [each.text.split(",")[0] for each in page.of("span") if each.is_in("odd")]
    assert odd == ["page 0", "page 1"]
    assert len([each for each in page.of("img") if each.is_in("odd")]) == 2


def figure_parts(page, tag):
    return [each for each in page.of(tag) if each.is_in("figures")]


def test_charts_count_every_bin_sample_and_image(page, written):
    bins = [written.bin(number) for number in range(len(written))]
    assert counted(boxes(page, "Lengths of bins")) == len(bins)
    assert counted(boxes(page, "Tokens and visual tokens of each bin")) == len(bins)
    assert counted(boxes(page, "Images per bin")) == len(bins)
    assert counted(boxes(page, "Visual tokens of bins")) == len(bins)
    assert counted(boxes(page, "Lengths of samples")) == sum(len(each.sample_lengths) for each in bins)
    lengths = [len(each.input_ids) for each in bins]
    assert f"Median {np.median(lengths):,.0f}, shortest {min(lengths)}, longest {max(lengths)} of 300." in words(page)
    assert f"On average {np.mean([len(each.images) for each in bins]):.1f}," in words(page)
    for bucket in {each.bucket for each in bins}:
        count = sum(each.bucket == bucket for each in bins)
        assert f"{count:,} bins, {count / len(bins):.0%}" in words(page)


def test_rejected_rows_stand_with_their_reasons_and_examples(page, written):
    reasons = [each.text for each in page.of("b") if each.parents[-1].tag == "summary"]
    assert reasons == ["empty_text", "image_missing"]
    assert [each.text for each in page.of("dt")] == [page_text(f"{HOSTILE}{number}") for number in range(3)] + [
        page_text(HOSTILE)
    ]
    rejected = written.rejected().to_pylist()
    shown = [each.text for each in page.of("dd")]
    for row in rejected[:3] + rejected[-1:]:
        assert page_text(row["message"]) in shown
        assert page_text(row["source"]) in shown


def test_bins_are_shown_with_tiles_and_masks(page, written):
    shown = page.of("details", "bin")
    buckets = {written.bin(number).bucket for number in range(len(written))}
    assert len(shown) == min(len(buckets), facts.SHOWN_BINS)
    assert len(page.pictures) >= 2
    # Beside the tiles there are the pages whose text does not fit them, small.
    assert {picture.size for picture in page.pictures} == {(56, 56), (124, 160), (160, 124)}
    assert any("word" in each.text for each in page.of("span", "trained"))
    assert page.of("span", "run")


def test_hostile_text_stays_text_and_the_page_needs_nothing(page, written):
    assert_needs_nothing(page)
    assert "<script>alert" not in page.html
    assert "\x1b" not in page.html
    assert "49 &lt;" not in words(page)  # {{ 7*7 }} is no template
    assert {each.attributes["src"][:23] for each in page.of("img")} == {"data:image/jpeg;base64,"}
    assert len(page.html) < 1_000_000


def test_the_balance_of_steps_is_that_of_the_orders(written):
    settings = StepSettings.of(None)
    found = step_balance(written, settings)
    assert found.whole_steps == len(found.plain) == len(written) // 8
    plain = Schedule(len(written), 8, 0, written.fingerprint)
    for order, ratios in (
        (plain, found.plain),
        (BalancedSchedule(plain, settings.balance).bound_to(written.loads), found.balanced),
    ):
        for step, ratio in enumerate(ratios):
            costs = settings.balance.costs(written.loads(np.asarray(order.bins(step))))
            assert ratio == pytest.approx(costs.max() / costs.mean())
    assert found.balanced.mean() <= found.plain.mean() + 1e-9


def test_several_bins_of_a_worker_count_by_their_sum(written):
    settings = replace(StepSettings.of(None), workers=2)
    shown = step_balance(written, settings)
    plain = Schedule(len(written), 8, 0, written.fingerprint)
    balanced = BalancedSchedule(plain, settings.balance).bound_to(written.loads)
    for order, ratios in ((plain, shown.plain), (balanced, shown.balanced)):
        for step, ratio in enumerate(ratios):
            bins = [np.ravel(order.rank_bins(step, rank, 2)) for rank in range(2)]
            sums = [settings.balance.costs(written.loads(numbers.astype(int))).sum() for numbers in bins]
            assert ratio == pytest.approx(max(sums) / np.mean(sums))
    assert shown.balanced.mean() < shown.plain.mean()


def test_a_job_says_whose_steps(written, tmp_path):
    content = yaml.safe_load(LEAST) | {"resources": {"workers": 2}}
    content["training"]["global_batch_bins"] = 4
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))
    job = load_job(tmp_path / "job.yaml")
    text = words(Page(prepared_page(written, job=job)))
    assert f"4 bins a step on 2 workers (job {job.name})" in text
    assert StepSettings.of(job.model_copy(update={"resources": ResourceSettings(workers=(2, 6))})).workers == 6
    one = job.model_copy(update={"resources": job.resources.model_copy(update={"workers": 1})})
    assert "One worker waits for no other" in words(Page(prepared_page(written, job=one)))


def test_of_many_files_some_are_read_and_the_page_says_so(written, monkeypatch):
    monkeypatch.setattr(facts, "MOST_FOOTERS", 2)
    monkeypatch.setattr(facts, "MOST_FILES", 1)
    found = Distributions.of(written)
    first, *_, last = written.files.values()
    assert found.bins == (len(first) + len(last), len(written))
    assert found.loads.tokens.tolist() == [len(written.bin(each).input_ids) for each in (*first, *last)]
    page = Page(prepared_page(written))
    assert f"of {len(first) + len(last)} of {len(written)} bins, in evenly spaced files" in words(page)
    assert counted(boxes(page, "Images per bin")) == len(first)
    assert len(page.of("details", "bin")) >= 1


def test_a_dataset_by_its_address(written):
    files = fsspec.filesystem("memory")
    files.put(written.path, "/report-prepared", recursive=True)
    there, here = (Page(prepared_page(PreparedDataset(path))) for path in ("memory://report-prepared", written.path))
    assert words(there).replace("memory://report-prepared", written.path)[:-30] == words(here)[:-30]


def test_a_dataset_without_bins_images_or_rejects(processors, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"id": "a", "text": "hello there"}])
    text_only = Preparation(processors["qwen2_vl"], {"files": (rows,), "kind": "pretrain"}, packing=packing())
    page = Page(prepared_page(text_only.write(tmp_path / "text")))
    assert "None: every row that was taken is in a bin." in words(page)
    assert "An epoch of 1 bin has no whole step of 8" in words(page)
    assert "Not shown: the dataset does not name its processor" in words(page)
    nothing = Preparation(
        processors["qwen2_vl"], {"files": (rows,), "kind": "pretrain"}, packing=packing(token_capacity=1),
        max_rejected_share=1,
    )  # fmt: skip
    page = Page(prepared_page(nothing.write(tmp_path / "nothing")))
    assert "Every row was rejected" in words(page)
    assert page.of("figure") == []
    assert [each.text for each in page.of("dt")] == ["a"]


def test_a_processor_that_went_away_leaves_bins_out_and_a_wrong_one_is_an_error(written, tmp_path, processor_folders):
    manifest = json.loads((tmp_path.__class__(written.path) / "manifest.json").read_text())
    moved = PreparedDataset(written.path)
    moved.manifest = manifest | {"processor_source": str(tmp_path / "gone")}
    page = Page(prepared_page(moved))
    assert "say where it is now: --processor" in words(page)
    assert page.of("details", "bin") == []
    with pytest.raises(UserError, match="is not the processor"):
        prepared_page(moved, str(processor_folders["smolvlm"]))
    assert Page(prepared_page(moved, str(processor_folders["qwen2_vl"]))).of("details", "bin")


# ---- A run ----


def hover(page, title):
    return [text for text in boxes(page, title) if text.startswith("step")]


def test_a_run_is_told_step_by_step(tmp_path):
    folder = write_run(tmp_path / "run", 8, HISTORY, "first\n" + HOSTILE + "\n", skipped_samples=lambda step: step == 3)
    run = Run(folder)
    page = Page(run_page(run))
    figures = {span.text: b.text for span, b in zip(figure_parts(page, "span"), figure_parts(page, "b"), strict=True)}
    assert figures == {
        "steps": "8", "loss, from 4.875": "4", "evaluation loss, from 5.5": "5", "tokens": "8,000",
        "tokens a second of stepping": "2,000", "of the time waiting for data": "33.3%", "resume": "1",
    }  # fmt: skip
    assert hover(page, "Loss")[3] == "step 4\ntraining 4.5\nevaluation 5.5"
    assert hover(page, "Workers") == [f"step {step}\nworkers {2 if step <= 4 else 3}" for step in range(1, 9)]
    assert hover(page, "Tokens per second")[0] == "step 1\ntokens per second 2,000"
    assert hover(page, "Checkpoints") == ["step 4\nseconds 1.25", "step 8\nseconds 0.75"]
    assert hover(page, "Skipped samples")[2] == "step 3\nsamples 1"
    assert [each.text for each in page.of("h3")] == [
        "Loss", "Learning rate", "Gradient norm", "Tokens per second", "Waiting for data", "Workers", "Checkpoints",
        "Skipped samples",
    ]  # fmt: skip
    events = [each.text for each in page.of("td", "event")]
    assert events == ["start", "preemption", "damaged checkpoint", "resume", "finish"]
    assert "nodes a, b" in words(page)
    assert "attention text packed, vision sdpa" in words(page)
    assert page.of("b")[0].text == "finished"
    assert page_text(HOSTILE) in page.of("pre")[0].text
    assert [each.text for each in page.of("span") if each.is_in("flags")] == ["damaged, resumed", "preempted"]
    assert_needs_nothing(page)
    assert "<script>alert" not in page.html


def test_what_steps_measure_is_drawn_where_it_is_known(tmp_path):
    columns = {
        "token_accuracy": lambda step: step / 16, "peak_memory": lambda step: 2e9 + step,
        "model_flops_per_second": lambda step: 3e12, "loss_by_set": lambda step: {"0": step / 2, "1": None},
    }  # fmt: skip
    folder = write_run(tmp_path / "run", 8, **columns)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "eval_loss": 3.0, "eval_token_accuracy": 0.125, '
                   '"eval_token_accuracy_by_set": {"0": 0.75, "1": null}}\n')  # fmt: skip
    run = Run(folder)
    page = Page(run_page(run))
    assert hover(page, "Token accuracy")[3] == "step 4\nshare 0.25"
    assert hover(page, "Token accuracy")[7] == "step 8\nshare 0.5\nevaluation 0.125"
    assert hover(page, "Loss by set")[3] == "step 4\nset 0 2\nset 1 1 not finite"
    text = words(page)
    for note in ("50.0% at the end", "2.00 GB at most", "median 3 TFLOPs a second", "Last: set 0 4, set 1 not finite"):
        assert note in text
    assert "Model FLOPs utilisation" not in text
    cells = [str(cell) for column in run_table(run).columns for cell in column.cells]
    assert [
        cells[cells.index(name) + len(cells) // 2]
        for name in ("token accuracy", "peak memory of a worker", "model FLOPs per second")
    ] == ["0.0625 -> 0.5000", "2.00 GB", "3 T"]
    values = dict(zip(cells, cells[len(cells) // 2 :], strict=False))
    assert values["eval token accuracy"] == "0.1250 -> 0.1250"
    assert values["  eval token accuracy of 0"] == "0.7500 -> 0.7500"
    assert values["  eval token accuracy of 1"] == "no trained token"
    assert "  loss of set 0" in cells


def test_samples_left_out_are_named(tmp_path):
    folder = write_run(tmp_path / "run", 20)
    lines = [
        {"step": step, "split": "train", "id": f"{HOSTILE}{step}", "source": "rows.jsonl:3", "reason": "image_corrupt",
         "message": HOSTILE}
        for step in range(1, 13)
    ]  # fmt: skip
    (folder / SKIPPED_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(run_page(Run(folder)))
    assert "12 in skipped.jsonl, the last 10 here." in words(page)
    named = [each.text for each in page.of("b") if each.parents[-1].tag == "td"]
    assert named == [page_text(f"{HOSTILE}{step}") for step in range(3, 13)]
    assert_needs_nothing(page)


@pytest.mark.parametrize(
    ("last", "state"),
    [
        ({"event": "finish", "step": 8, "workers": 3}, "finished"),
        ({"event": "stop", "step": 8, "workers": 3, "reason": "SIGTERM"}, "stopped: SIGTERM"),
        (
            {"event": "checkpoint", "step": 8, "workers": 3, "name": "checkpoint_8", "seconds": 1.0},
            "under way or broken off; last event: checkpoint after step 8, 2026-11-25T22:00:01+00:00",
        ),
    ],
)
def test_a_run_tells_its_state_and_how_far_it_is(tmp_path, last, state):
    start = {"event": "start", "step": 0, "workers": 2, "total_steps": 20}
    folder = write_run(tmp_path / "run", 8, (start, last))
    for step in (4, 8):
        (folder / f"checkpoint_{step:08d}_a").mkdir()
        Cursor.at(Schedule(9, 1, seed=0, fingerprint="f"), step).write(
            folder / f"checkpoint_{step:08d}_a" / CURSOR_FILE
        )
    run = Run(folder)
    table = run_table(run)
    names, values = (list(map(str, column.cells)) for column in table.columns)
    told = dict(zip(names, values, strict=True))
    expected = {"state": state, "steps": "8 of 20", "last checkpoint": "step 8: checkpoint_00000008_a"}
    assert {name: told[name] for name in expected} == expected
    page = words(Page(run_page(run)))
    assert state in page
    assert "8 of 20" in page


def test_a_run_without_history_or_steps(tmp_path):
    page = Page(run_page(Run(write_run(tmp_path / "old", 3))))
    assert "no history.jsonl" in words(page)
    assert "Workers" not in [each.text for each in page.of("h3")]
    assert "after step 3" in words(page)
    page = Page(run_page(Run(write_run(tmp_path / "new", 0, HISTORY[:1]))))
    assert "No step is finished yet" in words(page)
    assert page.of("figure") == []
    with pytest.raises(UserError, match="holds no run"):
        Run(tmp_path)


def test_the_page_of_a_long_run_is_small_and_keeps_its_spikes(tmp_path):
    steps = 20_000
    folder = write_run(
        tmp_path / "long", steps, loss=lambda step: 99.5 if step == 12_345 else (None if step == 77 else 2.0)
    )
    page = Page(run_page(Run(folder)))
    assert len(page.html) < 400_000
    assert any("99.5" in text for text in hover(page, "Loss"))
    assert any("1 not finite" in text for text in hover(page, "Loss"))
    assert "steps whose loss was not finite" in words(page)


def test_a_run_as_arrays(tmp_path):
    run = Run(write_run(tmp_path / "run", 8, HISTORY, loss=lambda step: None if step == 2 else step))
    assert np.isnan(run.column("loss")).tolist() == [step == 2 for step in range(1, 9)]
    assert run.workers.tolist() == [2] * 4 + [3] * 4
    assert run.eval_column("eval_loss").tolist() == [5.5, 5]
    assert np.isnan(run.column("nothing")).all()
    assert run.is_finished
    assert run.lasted.total_seconds() == 6
    assert repr(run) == f"Run({str(tmp_path / 'run')!r}, steps=8, finished=True)"
