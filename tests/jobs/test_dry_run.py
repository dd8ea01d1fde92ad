"""`--dry-run` tells what a run would do, as it then does it, and leaves nothing behind."""

import json
import os
import re
from pathlib import Path

import pytest
import typer

from jobs import dry_run, prepare, train
from mmray import doctor
from mmray.config.job import Job
from mmray.run.place import write_place
from mmray.run.plan import run_plan
from mmray.schedule.cursor import Cursor
from tests.conftest import Inputs, RayHead
from tests.here import prepare_here
from tests.mmray.run.test_checkpoints import write_checkpoint


@pytest.fixture(autouse=True)
def wide_and_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are not broken; the doctor's small copy of the model, which takes seconds, has tests of its own."""
    monkeypatch.setattr(dry_run.console, "_width", 400)
    monkeypatch.setattr(doctor, "examine_model", lambda *_: iter(()))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def planned(main: object, job: dict[str, object], folder: Path, capsys: pytest.CaptureFixture[str], **options: object):
    """The exit code and what is printed; nothing below the folder has changed."""
    file = folder / "job.yaml"
    file.write_text(json.dumps(job))
    before = listing(folder)
    with pytest.raises(typer.Exit) as exit_:
        main(file, [], dry_run=True, **options)  # type: ignore[operator]
    assert listing(folder) == before
    return exit_.value.exit_code, " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.usefixtures("inputs")
def test_the_plan_is_what_is_done(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job").mkdir()
    job = inputs.job(tmp_path / "job", resources={"workers": 2, "cpus_per_worker": 0.5})
    code, shown = planned(prepare.main, job, tmp_path, capsys)
    assert code == 0, shown
    assert "train rows 71, in 2 windows" in shown
    assert "data.train[0] (pretrain) 46 in 1 file; 6 of 46 looked at would be rejected; about" in shown
    assert "prepared/train: nothing there yet" in shown
    assert "train: 62 rows" in shown
    assert "p5 p25 p50 p75 p95 p99 most set 0 (pretrain) tokens" in " ".join(re.sub("[━-╿]", " ", shown).split())
    assert "2 rows (3.23%) are over packing.token_capacity 512;" in shown
    code, shown_unprepared = planned(train.main, job, tmp_path, capsys)
    assert code == 0
    assert "jobs/prepare.py must run first" in shown_unprepared
    assert "begins at step" not in shown_unprepared

    made = prepare_here(Job.model_validate(job))
    assert f"train bins {len(made)}: " in shown, "all rows were looked at"
    code, shown = planned(prepare.main, job, tmp_path, capsys)
    assert "prepared/train: up to date, nothing to do" in shown
    code, shown = planned(train.main, job, tmp_path, capsys)
    assert code == 0
    assert f"train bins {len(made)}, prepared: {made.path}" in shown
    assert f"train: 60 of 60 packed rows of {made.path}".replace(" ", "") in "".join(shown.split())
    assert "2 rows (3.23%) are over packing.token_capacity 512;" in shown
    per_epoch = -(-len(made) // 4)
    assert f"steps 12: {12 / per_epoch:.3g} epochs of {per_epoch} steps" in shown
    assert "global batch 4 bins of up to 2,048 tokens: on each worker 2 micro-batches of 1" in shown
    assert "workers 2, 0.5 CPU each" in shown
    assert re.search(
        r"memory each of 2 takes [\d.]+ [kMG]B: weights .*, optimizer .* \(ZeRO 2\); activations about", shown
    )
    assert re.search(r"disk a checkpoint has about [\d.]+ [kMG]B; up to 3 at once are in", shown)
    assert "begins at step 0" in shown
    code, shown = planned(train.main, job, tmp_path, capsys, step_seconds="600")
    assert (code, "time about 2 h: 12 steps of 600 s (as given)" in shown) == (0, True), shown

    schedule = run_plan(Job.model_validate(job), {"train": made}, gpus=False).schedule
    checkpoint = write_checkpoint(tmp_path / "job" / "run", 5)
    write_place(checkpoint, Cursor.at(schedule, 5, prepared=made.path), made)
    code, shown = planned(train.main, job, tmp_path, capsys)
    assert code == 0
    assert f"goes on from step 5 ({checkpoint.name}): 7 steps left" in shown
    job["training"] = job["training"] | {"seed": 7}  # type: ignore[operator]
    code, shown = planned(train.main, job, tmp_path, capsys)
    assert code == 2
    assert "resume fail the checkpoint stands at step 5 of another order: its seed is 0, this job's is 7" in shown
    assert "goes on" not in shown


def test_all_that_is_wrong_is_told_and_the_exit_code_is_2(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "local_cpus", lambda _: 2)
    job = inputs.job(tmp_path, packing__token_capacity=40, resources={"workers": 3, "use_gpu": False})
    code, shown = planned(train.main, job, tmp_path, capsys)
    assert code == 2
    assert "capacities fail" in shown
    assert "cluster fail training needs 5 CPU (it has 2). Lower the pools" in shown
    cores = os.cpu_count()
    assert re.search(rf"this machine {cores} cores?, [\d.]+ GB of memory; training takes 5 CPU, at least", shown)
    assert "It would not run like this" in shown


def test_a_cluster_is_asked_for_room(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_head: RayHead
) -> None:
    job = inputs.job(tmp_path, resources={"workers": 2, "cpus_per_worker": 3})
    code, shown = planned(train.main, job, tmp_path, capsys, address=ray_head.address)
    assert code == 2
    assert "cluster fail training needs 8 CPU (it has 4)" in shown
