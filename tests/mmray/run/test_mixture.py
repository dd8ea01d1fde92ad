"""A run on a mixture, on forked ranks: in one go; stopped, killed, on other numbers of ranks, with other weights."""

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.trace import run_tracer
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.prepared import PreparedDataset
from mmray.report import run_table
from mmray.report.run import Run
from mmray.report.run_page import run_page
from mmray.run.callback import Callback, Loop, Step
from mmray.run.data import open_data
from mmray.run.export import export_model
from mmray.run.history import in_words, read_history
from mmray.schedule.cursor import Cursor
from mmray.training.bins_log import read_trained
from tests.conftest import Inputs
from tests.here import prepare_here, train_here

NAMES = ("pages", "chats", "texts")
STAGE = {"until": 3, "weights": [1, 1, 0]}
FIRST, SECOND = (5, 3, 2), (1, 0.5, 2.5)


class KilledAt(Callback):
    """Ends the last rank by `kill -9` in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def before_step(self, loop: Loop, step: Step) -> None:
        if step.number == self.step and loop.run.ranks.rank == loop.run.ranks.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def folder(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three prepared datasets, each in the folder of its name."""
    folder = tmp_path_factory.mktemp("mixture")
    texts = folder / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"id": str(n), "text": f"Total {n} " * (n % 9 + 20)}) + "\n" for n in range(60))
    )
    data = inputs.folder / "data"
    for name, file, kind in zip(
        NAMES, (data / "pages.jsonl", data / "chat.jsonl", texts), ("pretrain", "chat", "pretrain")
    ):
        rows = {"train": [{"files": str(file), "kind": kind}]}
        output = {"prepared": str(folder / name / "prepared"), "run": "unused"}
        prepare_here(Job.model_validate(inputs.job(folder, data=rows, output=output)))
    return folder


def mixed_job(inputs: Inputs, folder: Path, run: str, weights: tuple[float, ...], **changes: Any) -> Job:
    mixture = [{"prepared": str(folder / name / "prepared"), "weight": weight} for name, weight in zip(NAMES, weights)]
    settings = {
        "output__run": str(folder / run), "training__checkpoint_every_steps": 3, "mixture": mixture, "stages": [STAGE],
    }  # fmt: skip
    return Job.model_validate(inputs.job(folder, **settings | changes))


def job_of_pages(inputs: Inputs, folder: Path, run: str, **changes: Any) -> Job:
    """A job that trains on the pages alone, without a mixture."""
    rows = {"train": [{"files": str(inputs.folder / "data" / "pages.jsonl"), "kind": "pretrain"}]}
    output = {"prepared": str(folder / "pages" / "prepared"), "run": str(folder / run)}
    return Job.model_validate(inputs.job(folder, data=rows, output=output, **changes))


def known(losses: dict[str, float | None]) -> dict[str, float]:
    """The losses of sets that a step has trained tokens of."""
    return {name: loss for name, loss in losses.items() if loss is not None}


def parts(folder: Path) -> dict[str, PreparedDataset]:
    return {name: PreparedDataset(str(folder / name / "prepared" / "train")) for name in NAMES}


@pytest.fixture(scope="module")
def whole(inputs: Inputs, folder: Path) -> list[dict[str, Any]]:
    """Two ranks: eight steps in one go with the first weights, then six with the second. Lines of metrics.jsonl."""
    train_here(mixed_job(inputs, folder, "whole", FIRST, training__steps=8), ranks=2)
    second = mixed_job(inputs, folder, "whole", SECOND, training__steps=14)
    return train_here(second, ranks=2, continue_on=True)


@pytest.fixture(scope="module")
def chained(inputs: Inputs, folder: Path, whole: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with one of two ranks killed in step 5 and started again, three ranks from step 6 on, one from the
    change of weights on, which is killed in step 11, and two for the rest."""
    job = mixed_job(inputs, folder, "chained", FIRST, training__steps=5)
    with pytest.raises(AssertionError, match=r"exit codes|Connection"):
        train_here(job, KilledAt(5), ranks=2)
    train_here(job, ranks=2)
    train_here(mixed_job(inputs, folder, "chained", FIRST, training__steps=8), ranks=3)
    job = mixed_job(inputs, folder, "chained", SECOND, training__steps=14)
    with pytest.raises(AssertionError, match="exit codes"):
        train_here(job, KilledAt(11), ranks=1, continue_on=True)
    return train_here(job, ranks=2)


def test_interruptions_other_ranks_and_weights_change_neither_bins_nor_losses(
    whole: list[dict[str, Any]], chained: list[dict[str, Any]], folder: Path
) -> None:
    assert [line["step"] for line in chained] == [line["step"] for line in whole] == list(range(1, 15))
    ours, theirs = read_trained(folder / "chained"), read_trained(folder / "whole")
    assert [step.named_bins for step in ours] == [step.named_bins for step in theirs]
    assert [step.workers for step in ours] == [2] * 5 + [3] * 3 + [1] + [2] * 5
    for line, expected in zip(chained, whole):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3), line["step"]
        assert line["bins_by_dataset"] == expected["bins_by_dataset"]
    for line, expected in zip(chained[:5], whole[:5]):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert known(line["loss_by_set"]) == pytest.approx(known(expected["loss_by_set"]), rel=1e-6)


def test_each_epoch_of_each_dataset_holds_each_bin_once(whole: list[dict[str, Any]], folder: Path) -> None:
    """Over the change of weights: by what the ranks received."""
    received: dict[str, list[int]] = {part.fingerprint: [] for part in parts(folder).values()}
    for step in read_trained(folder / "whole"):
        assert step.datasets == list(received)
        for fingerprint, number in step.named_bins:
            received[fingerprint].append(number)
    passes = {}
    for name, part in parts(folder).items():
        counts = Counter(received[part.fingerprint])
        assert max(counts.values()) - min(counts[number] for number in range(len(part))) <= 1
        passes[name] = len(received[part.fingerprint]) / len(part)
    assert max(passes.values()) > 1, passes


def test_counts_are_those_of_the_weights_in_each_part(whole: list[dict[str, Any]]) -> None:
    """Three steps of the stage, five of the first weights, six of the second, 4 bins each; to less than one bin."""
    for steps, weights in ((slice(0, 3), (1, 1, 0)), (slice(3, 8), FIRST), (slice(8, 14), SECOND)):
        lines = whole[steps]
        for name, weight in zip(NAMES, weights):
            count = sum(line["bins_by_dataset"][name] for line in lines)
            assert abs(count - 4 * len(lines) * weight / sum(weights)) < 1


def test_the_loss_of_sets_adds_up_to_the_loss(whole: list[dict[str, Any]], folder: Path) -> None:
    """Weighted by the trained tokens that preparing counted in the bins that the ranks received."""
    by_fingerprint = {part.fingerprint: (name, part) for name, part in parts(folder).items()}
    for line, step in zip(whole, read_trained(folder / "whole"), strict=True):
        tokens: Counter[str] = Counter()
        for fingerprint, number in step.named_bins:
            name, part = by_fingerprint[fingerprint]
            tokens[name] += part.bin(number).trained_tokens
        losses = line["loss_by_set"]
        assert known(losses).keys() == {name for name in tokens if tokens[name]}
        assert tokens.total() == line["trained_tokens"]
        mean = sum(losses[name] * count for name, count in tokens.items() if count) / tokens.total()
        assert mean == pytest.approx(line["loss"], rel=1e-5)


def test_the_history_keeps_mixtures_and_their_changes(chained: list[dict[str, Any]], folder: Path) -> None:
    events = [event for event in read_history(folder / "chained") if "mixture" in event]
    assert [(event["event"], event["step"]) for event in events] == [("start", 0), ("continue_on", 8)]
    assert [dataset["weight"] for dataset in events[1]["mixture"]["datasets"]] == list(SECOND)
    assert in_words(events[0]) == "started with 2 workers, training on pages 50, chats 50, texts 0 %"
    assert in_words(events[1]) == "from step 8 on it trains on pages 25, chats 12.5, texts 62.5 %"


def test_bins_that_a_change_skips_are_told() -> None:
    event = {"event": "continue_on", "step": 8, "workers": 2, "prepared": "/x", "bins": 50}
    assert in_words(event) == "from step 8 on it trains on /x, 50 bins"
    assert in_words(event | {"skipped_bins": 1}) == (
        "from step 8 on it trains on /x, 50 bins; 1 bin left in a window of sorted batches is not trained on this epoch"
    )


def test_any_step_is_traced_before_and_after_the_change(
    inputs: Inputs, chained: list[dict[str, Any]], folder: Path
) -> None:
    """Steps that are done, as they were done; and the first that is not, which begins with what the last did not
    take."""
    tracer = run_tracer(mixed_job(inputs, folder, "chained", SECOND, training__steps=15))
    names = {str(folder / name / "prepared" / "train"): part.fingerprint for name, part in parts(folder).items()}
    for done in read_trained(folder / "chained"):
        samples = list(tracer.samples(done.step))
        traced = {(names[str(sample.dataset)], sample.bin) for sample in samples}
        assert traced == set(done.named_bins)
        assert {sample.workers for sample in samples} == {done.workers}
    sample = next(tracer.samples(15))
    assert (sample.trained, Path(sample.dataset or "").parent.parent.name in NAMES) == (False, True)
    assert sample.id in PreparedDataset(sample.dataset or "").bin(sample.bin).sample_ids


def test_the_cursor_is_one_integer_and_tells_how_far_datasets_are(
    inputs: Inputs, chained: list[dict[str, Any]], folder: Path
) -> None:
    (path,) = (folder / "chained").glob("checkpoint_00000014_*/cursor.json")
    cursor = Cursor.read(path)
    received = Counter(name for step in read_trained(folder / "chained") for name, _ in step.named_bins)
    assert {name: place.bins for name, place in cursor.taken_now().items()} == dict(received)
    progress = json.loads(path.read_text())["progress"]
    for name, part in parts(folder).items():
        epochs, bins = divmod(received[part.fingerprint], len(part))
        assert progress[name] == {"epochs": epochs, "bins": bins, "of": len(part)}
    assert [span.first_step for span in cursor.spans] == [0, 8]


def test_other_weights_are_an_act_of_their_own(inputs: Inputs, chained: list[dict[str, Any]], folder: Path) -> None:
    job = mixed_job(inputs, folder, "chained", FIRST, training__steps=16)
    with pytest.raises(AssertionError) as refusal:
        train_here(job, ranks=1)
    said = str(refusal.value)
    for words in (
        "was trained to step 14 on other data",
        "pages: share 25.0000% -> 50.0000%",
        "Put mixture and stages of the checkpoint back into the job file; or, to train on with the job's mixture",
        "give --continue-on mixture",
    ):
        assert words in said


def test_a_dataset_that_is_appended_joins_where_the_others_stand(inputs: Inputs, folder: Path) -> None:
    """A run on one dataset alone is continued on a mixture with it and a new one: its bins go on as they would have,
    mixed with the new ones from the first step, and nothing is prepared twice."""
    alone = job_of_pages(inputs, folder, "appended", training__steps=3)
    before = train_here(alone, ranks=1)
    assert "loss_by_set" not in before[0]
    job = mixed_job(inputs, folder, "appended", (1, 0, 1), training__steps=9, stages=[])
    train_here(job, ranks=1, continue_on=True)
    pages, texts = parts(folder)["pages"], parts(folder)["texts"]
    steps = read_trained(folder / "appended")
    assert [step.datasets is None for step in steps] == [True] * 3 + [False] * 6
    order = Cursor.at(alone_order(alone, pages)).order_of(Cursor.at(alone_order(alone, pages)).spans[0])
    of_pages = [number for step in steps for name, number in step.named_bins if name == pages.fingerprint]
    expected = [order.bin_at(*divmod(n, len(pages))) for n in range(len(of_pages))]  # type: ignore[attr-defined]
    assert Counter(of_pages) == Counter(expected)
    assert all(any(name == texts.fingerprint for name, _ in step.named_bins) for step in steps[3:])


def alone_order(job: Job, data: PreparedDataset) -> Any:
    from mmray.run.plan import run_plan

    return run_plan(job, {"train": data}, gpus=False).schedule


def test_a_mixture_of_one_dataset_trains_as_the_dataset_alone(inputs: Inputs, folder: Path) -> None:
    """The same bins and losses, to the end of the first epoch, whose last batch a mixture does not pad."""
    steps = len(parts(folder)["pages"]) // 4
    expected = train_here(job_of_pages(inputs, folder, "alone", training__steps=steps), ranks=1)
    one = [{"prepared": str(folder / "pages" / "prepared"), "weight": 0.3}]
    job = mixed_job(inputs, folder, "one", FIRST, mixture=one, stages=[], training__steps=steps)
    lines = train_here(job, ranks=1)
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-6)
    assert [line["loss_by_set"]["pages"] for line in lines] == pytest.approx([line["loss"] for line in lines], rel=1e-6)
    ours, theirs = read_trained(folder / "one"), read_trained(folder / "alone")
    assert [step.bins for step in ours] == [step.bins for step in theirs]


def test_reports_show_shares_and_losses_of_sets(chained: list[dict[str, Any]], folder: Path) -> None:
    run = Run(folder / "chained")
    bins = np.asarray([[line["bins_by_dataset"][name] for name in NAMES] for line in chained])
    got = np.cumsum(bins, axis=0) / (4 * np.arange(1, 15))[:, None]
    for number, name in enumerate(NAMES):
        assert run.shares[name] == pytest.approx(got[:, number])
        asked = [*[STAGE["weights"][number] / 2] * 3, *[FIRST[number] / 10] * 5, *[SECOND[number] / 4] * 6]  # type: ignore[index]
        assert run.asked_shares[name] == pytest.approx(asked)
        assert run.columns_by_name("loss_by_set")[name] == pytest.approx(
            [np.nan if line["loss_by_set"][name] is None else line["loss_by_set"][name] for line in chained],
            nan_ok=True,
        )
    page = run_page(run)
    for words in ("Share of each dataset", "Loss by set", "pages, asked for", f"texts {got[-1, 2]:.1%} of 62.5%"):
        assert words in page
    cells = [str(cell) for column in run_table(run).columns for cell in column.cells]
    assert "  loss of texts" in cells
    assert f"{got[-1, 0]:.1%} of the last 100 steps' bins, 25.0% asked for" in cells


def test_a_mixtures_checkpoint_is_exported(inputs: Inputs, chained: list[dict[str, Any]], folder: Path) -> None:
    exported = export_model(str(folder / "chained"), str(folder / "exported"))
    assert exported.step == 14
    sidecar = json.loads((folder / "exported" / "mmray.json").read_text())
    assert sidecar["kinds"] == ["chat", "pretrain"]
    assert all(name in sidecar["prepared"] for name in NAMES)
    readme = (folder / "exported" / "README.md").read_text()
    assert all(name in readme for name in ("pages.jsonl", "chat.jsonl", "texts.jsonl"))


def test_folders_that_cannot_be_mixed_are_refused(inputs: Inputs, folder: Path) -> None:
    inner = [{"prepared": str(folder / "pages" / "prepared" / "train"), "weight": 1}]
    with pytest.raises(UserError, match=r"mixture: \S+train is a prepared dataset: give the folder that holds `train`"):
        open_data(mixed_job(inputs, folder, "no", FIRST, mixture=inner, stages=[]))
    (folder / "copy").symlink_to(folder / "pages")
    twice = [{"prepared": str(folder / name / "prepared"), "weight": 1} for name in ("pages", "copy")]
    with pytest.raises(UserError, match=r"mixture: \S+copy/prepared/train holds the same bins as an earlier dataset"):
        open_data(mixed_job(inputs, folder, "no", FIRST, mixture=twice, stages=[]))
