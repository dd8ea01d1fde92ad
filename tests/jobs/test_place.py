"""Where a run goes on: in its data, on other data when that is asked for; and what any of its steps saw. No cluster."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from jobs import train, training
from jobs.trace import run_tracer
from mmray.config.job import Job, load_job
from mmray.errors import UserError
from mmray.packing.settings import PackingSettings
from mmray.prepared import PreparedDataset
from mmray.run.place import write_place
from mmray.run.plan import RunPlan, run_plan
from mmray.schedule.balanced import BalancedSchedule
from mmray.schedule.cursor import Cursor
from mmray.schedule.schedule import Schedule
from mmray.training.bins_log import TRAINED_FILE, TrainedStep
from mmray.training.checkpoint import STATE_FILE
from mmray.training.checksums import list_files, list_name
from mmray.training.json_lines import JsonLines
from tests.conftest import Inputs
from tests.mmray.preparing import Preparation, write_rows


@pytest.fixture(scope="module")
def folder(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two prepared datasets, `old/train` of 13 bins and `new/train`, packed otherwise."""
    from mmray.families import load_processor

    folder = tmp_path_factory.mktemp("place")
    rows = [{"id": f"row-{number}", "text": f"Total {number}.50 and some words more"} for number in range(26)]
    processor = load_processor(inputs.folder / "processor")
    for name, capacity in (("old", 30), ("new", 60)):
        files = write_rows(folder / f"{name}.jsonl", rows)
        packing = PackingSettings(token_capacity=capacity, visual_capacity=256, window_rows=64)
        Preparation(processor, {"files": files, "kind": "pretrain"}, packing=packing).write(folder / name / "train")
    return folder


def job(inputs: Inputs, folder: Path, data: str, **changes: object) -> Job:
    content = inputs.job(folder, **{"output__prepared": str(folder / data), **changes})  # type: ignore[arg-type]
    return Job.model_validate(content)


def prepared(folder: Path, data: str) -> PreparedDataset:
    return PreparedDataset(str(folder / data / "train"))


def plan_of(job: Job, continue_on: bool = False, checkpoint: Path | None = None) -> tuple[RunPlan, PreparedDataset]:
    data = PreparedDataset(job.prepared_path("train"))
    return run_plan(job, {"train": data}, gpus=False, continue_on=continue_on, checkpoint=checkpoint), data


def write_checkpoint(run: Path, cursor: Cursor, data: PreparedDataset) -> Path:
    """A checkpoint without weights."""
    checkpoint = run / f"checkpoint_{cursor.step:08d}_aa"
    checkpoint.mkdir(parents=True)
    write_place(checkpoint, cursor, data)
    state = {"step": cursor.step, "world_size": 2, "zero_stage": 2, "dtype": "fp32", "lists": 1}
    (checkpoint / STATE_FILE).write_text(json.dumps(state))
    write_list(checkpoint)
    return checkpoint


def write_list(checkpoint: Path) -> None:
    path = checkpoint / list_name(0)
    path.unlink(missing_ok=True)
    files = list_files(checkpoint)
    path.parent.mkdir(exist_ok=True)
    path.write_text(files)


def test_a_checkpoint_of_other_data_is_refused_with_the_difference(
    inputs: Inputs, folder: Path, tmp_path: Path
) -> None:
    plan, old = plan_of(job(inputs, folder, "old"))
    checkpoint = write_checkpoint(tmp_path, plan.place(None, old).advance(3), old)
    assert plan.place(checkpoint, old) == Cursor.at(plan.schedule, 3, prepared=old.path)

    plan, new = plan_of(job(inputs, folder, "new"))
    with pytest.raises(UserError) as refusal:
        plan.place(checkpoint, new)
    lines = str(refusal.value).splitlines()
    assert f"trained to step 3 on other data: its fingerprint is {old.fingerprint} ({old.path})" in lines[0]
    assert f"that of {new.path} is {new.fingerprint}; the difference:" in lines[0]
    assert "  packing.token_capacity: 30 -> 60" in lines
    assert "give --continue-on and its folder" in lines[-1]


def test_continue_on_begins_the_other_data_once(inputs: Inputs, folder: Path, tmp_path: Path) -> None:
    """The same command after an interruption, before and after its first checkpoint, does the same."""
    plan, old = plan_of(job(inputs, folder, "old"))
    first = write_checkpoint(tmp_path, plan.place(None, old).advance(3), old)

    plan, new = plan_of(job(inputs, folder, "new"), continue_on=True)
    cursor = plan.place(first, new)
    assert (cursor.step, cursor.first_step, cursor.fingerprint) == (3, 3, new.fingerprint)
    assert cursor == plan.place(first, new)
    second = write_checkpoint(tmp_path, cursor.advance(2), new)
    assert plan.place(second, new) == cursor.advance(2)
    assert plan_of(job(inputs, folder, "new"))[0].place(second, new) == cursor.advance(2), "now it is the run's data"
    with pytest.raises(UserError, match=f"fingerprint is {new.fingerprint}"):
        plan_of(job(inputs, folder, "old"))[0].place(second, old)


def test_steps_count_all_and_epochs_those_of_the_new_data(inputs: Inputs, folder: Path, tmp_path: Path) -> None:
    plan, old = plan_of(job(inputs, folder, "old"))
    checkpoint = write_checkpoint(tmp_path, plan.place(None, old).advance(5), old)

    plan, new = plan_of(job(inputs, folder, "new"), continue_on=True)
    cursor = plan.place(checkpoint, new)
    assert plan.total_steps(cursor) == 12
    two_epochs = {"training__steps": None, "training__epochs": 2}
    by_epochs, _ = plan_of(job(inputs, folder, "new", **two_epochs), continue_on=True)
    assert by_epochs.total_steps(cursor) == 5 + 2 * -(-len(new) // 4)

    short, _ = plan_of(job(inputs, folder, "new", training__steps=5), continue_on=True)
    with pytest.raises(UserError, match=r"training\.steps is 5, and 5 are done: no step is left .* Raise training"):
        short.place(checkpoint, new)


def test_another_order_is_refused_also_on_other_data(inputs: Inputs, folder: Path, tmp_path: Path) -> None:
    plan, old = plan_of(job(inputs, folder, "old"))
    checkpoint = write_checkpoint(tmp_path, plan.place(None, old).advance(3), old)
    plan, new = plan_of(job(inputs, folder, "new", training__seed=7), continue_on=True)
    with pytest.raises(UserError, match="its seed is 0, this job's is 7; put seed back"):
        plan.place(checkpoint, new)


@pytest.fixture
def moved_run(inputs: Inputs, folder: Path, tmp_path: Path) -> Path:
    """Steps 1 to 3 on the old data with two workers, 4 and 5 on the new with one, and a checkpoint after these; a job
    file for three workers on the new data."""
    run = tmp_path / "run"
    plan, old = plan_of(job(inputs, folder, "old"))
    cursor = plan.place(None, old)
    write_trained(run, plan, cursor, steps=3, workers=2)
    first = write_checkpoint(tmp_path, cursor.advance(3), old)
    plan, new = plan_of(job(inputs, folder, "new"), continue_on=True)
    cursor = plan.place(first, new)
    write_trained(run, plan, cursor, steps=2, workers=1)
    write_checkpoint(run, cursor.advance(2), new)
    changes = {"output__prepared": str(folder / "new"), "output__run": str(run), "resources": {"workers": 3}}
    (tmp_path / "job.yaml").write_text(json.dumps(inputs.job(folder, **changes)))  # type: ignore[arg-type]
    return tmp_path / "job.yaml"


def write_trained(run: Path, plan: RunPlan, cursor: Cursor, steps: int, workers: int) -> None:
    lines = JsonLines(run / TRAINED_FILE)
    batches = plan.batches("train", plan.schedule, workers)
    for step in range(cursor.step, cursor.step + steps):
        dealt = [batches.order.rank_bins(step - cursor.first_step, rank, workers) for rank in range(workers)]
        bins = [[number for micro in rank for number in micro if number is not None] for rank in dealt]
        lines.append(asdict(TrainedStep(step + 1, cursor.fingerprint, workers, bins)))
    lines.close()


def test_a_trace_tells_what_steps_saw_and_will_see(inputs: Inputs, folder: Path, moved_run: Path) -> None:
    tracer = run_tracer(load_job(moved_run))
    traced = {step: list(tracer.samples(step)) for step in range(1, 8)}
    assert [traced[step][0].workers for step in traced] == [2, 2, 2, 1, 1, 3, 3]
    assert [traced[step][0].trained for step in traced] == [True] * 5 + [False] * 2

    old, new = prepared(folder, "old"), prepared(folder, "new")
    for data, first, steps in ((old, 1, 3), (new, 4, 4)):
        for step in range(first, first + steps):
            assert all(f"/{Path(data.path).parent.name}.jsonl:" in sample.source for sample in traced[step])
    epoch = -(-len(new) // 4)
    assert epoch <= 4, "the new data's first epoch is within the traced steps"
    seen = [sample.bin for step in range(4, 4 + epoch) for sample in traced[step]]
    assert sorted(set(seen)) == list(range(len(new)))

    done, plan = traced[2], plan_of(job(inputs, folder, "old"))[0]
    assert {sample.bin for sample in done} == set(plan.batches("train", plan.schedule, 2).order.bins(1)) - {None}
    assert {sample.rank for sample in done} == {0, 1}
    assert [(s.rank, s.micro_batch) for s in done] == sorted((s.rank, s.micro_batch) for s in done)
    for sample in done:
        assert sample.id in old.bin(sample.bin).sample_ids


def test_the_command_traces_without_a_cluster(
    moved_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "connect", lambda *_, **__: pytest.fail("Ray was joined"))
    train.main(moved_run, [], steps="3:6", as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["step"] for line in lines} == {3, 4, 5, 6}
    assert lines[0].keys() == {"step", "workers", "rank", "micro_batch", "bin", "id", "source", "trained"}
    train.main(moved_run, [], steps="6")
    shown = capsys.readouterr().out
    assert "step 6: to come with 3 workers" in shown
    assert all(line["id"] in shown for line in lines if line["step"] == 6)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("x", r"--trace x: give a step, such as 100, or the first and the last, as 100:105"),
        ("0", r"--trace 0: steps are counted from 1, as in metrics.jsonl, to 12"),
        ("13", r"--trace 13: steps are counted from 1, as in metrics.jsonl, to 12"),
    ],
)
def test_a_trace_of_no_step_is_refused(moved_run: Path, steps: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train.main(moved_run, [], steps=steps)


def test_a_trace_of_data_prepared_anew_is_refused(inputs: Inputs, folder: Path, moved_run: Path) -> None:
    path = moved_run.parent / "run" / "checkpoint_00000005_aa" / "cursor.json"
    cursor = Cursor.read(path)
    replace(cursor, earlier=(replace(cursor.earlier[0], prepared=str(folder / "new" / "train")),)).write(path)
    write_list(path.parent)
    tracer = run_tracer(load_job(moved_run))
    with pytest.raises(UserError, match=r"the run trained on \S+ from step 1 on: it was prepared anew since"):
        list(tracer.samples(2))
    assert list(tracer.samples(4))


def test_continue_on_wants_the_folder_above_train(inputs: Inputs, folder: Path, moved_run: Path) -> None:
    with pytest.raises(UserError, match=r"--continue-on .*train: give the folder that holds `train`"):
        train.main(moved_run, [], other_data=str(folder / "new" / "train"))


def test_a_run_that_began_with_sorted_batches_ends_with_them(inputs: Inputs, folder: Path, tmp_path: Path) -> None:
    """A cursor of before `balance.across_batches`, when every job that did not say `balance: null` sorted: the same job
    file goes on in that order, also on other data, and a job that says otherwise is refused."""
    plan, old = plan_of(job(inputs, folder, "old"))
    balance = {
        "window_batches": 64, "tolerance": 0.05, "group_bins": None, "one_shape_per_batch": False, "token_pair": 3.3e-5,
        "whole_row_attention": True, "trained_token": 0.18, "visual_token": 1.9, "visual_pair": 1e-3,
    }  # fmt: skip
    began = replace(Cursor.at(plan.schedule, 3, prepared=old.path), balance=balance)
    checkpoint = write_checkpoint(tmp_path, began, old)
    plan, _ = plan_of(job(inputs, folder, "old"), checkpoint=checkpoint)
    cursor = plan.place(checkpoint, old)
    assert cursor == began

    def order_of(schedule: Schedule | BalancedSchedule) -> list[list[int | None]]:
        plan_ = plan.batches("train", schedule, 1)
        return [plan_.order.bins(step) for step in range(2 * schedule.steps_per_epoch)]

    sorted_ = job(inputs, folder, "old", balance={"across_batches": True})
    before = plan_of(sorted_, checkpoint=checkpoint)[0].schedule
    assert order_of(plan.schedule_at(cursor)) == order_of(before) != order_of(plan.schedule)
    assert plan_of(sorted_, checkpoint=checkpoint)[0].place(checkpoint, old) == began
    tracer = run_tracer(job(inputs, folder, "old", output__run=str(tmp_path)))
    assert {sample.bin for sample in tracer.samples(4)} == set(order_of(before)[3]) - {None}

    plan, new = plan_of(job(inputs, folder, "new"), continue_on=True, checkpoint=checkpoint)
    moved = plan.place(checkpoint, new)
    assert moved.balance == balance
    assert plan.schedule_at(moved).balance.sorts_batches

    refused = (
        ({"across_batches": False}, "set balance.across_batches to true"),
        ({"tolerance": 0.1}, r"set balance\.tolerance to 0\.05"),
        (None, "set balance.across_batches to true"),
    )
    for written, message in refused:
        with pytest.raises(UserError, match=message):
            plan_of(job(inputs, folder, "old", balance=written), checkpoint=checkpoint)[0].place(checkpoint, old)
