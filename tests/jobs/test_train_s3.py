"""Everything in an object store: rows, images, the prepared dataset and the run's folder."""

import json
from pathlib import Path
from typing import Any

from jobs.checks import open_prepared
from jobs.training import train
from mmray.config.job import Job
from mmray.prepared import PreparedDataset
from mmray.report import Run
from mmray.run.checkpoints import checkpoint_names
from mmray.run.folder import RunFolder
from mmray.run.history import read_history
from mmray.run.metrics import METRICS_FILE, read_metrics
from mmray.storage import Folder
from mmray.training.bins_log import read_trained
from pipelines.prepare import prepare
from tests.conftest import Inputs, RayHead
from tests.here import prepare_here, train_here
from tests.jobs.test_train import assert_same_steps
from tests.s3 import PORT, SECRET


def upload(folder: Path, uri: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            Folder(uri).write(path.relative_to(folder).as_posix(), path.read_bytes())


def job_in(place: str, inputs: Inputs, run: str, outputs: str | None = None, **changes: object) -> Job:
    """The small job with its rows at `place`. run: where the run goes; outputs: all else, by default `place`."""
    outputs = outputs or place
    rows: list[dict[str, Any]] = [
        {"files": f"{place}/data/pages.jsonl", "kind": "pretrain"},
        {"files": f"{place}/data/chat.jsonl", "kind": "chat"},
    ]
    data = {"train": rows, "size_cache": f"{outputs}/sizes"}
    output = {"prepared": f"{outputs}/prepared", "run": run}
    return Job.model_validate(inputs.job(Path("/unused"), data=data, output=output, **changes))


def run_job(job: Job) -> list[dict[str, Any]]:
    train(job, open_prepared(job))
    return [line for line in read_metrics(Run(job.output.run).folder / METRICS_FILE) if "loss" in line]


def test_all_in_s3_with_a_damaged_checkpoint_and_other_workers_equals_a_loop_without_ray(
    ray_head: RayHead, inputs: Inputs, bucket: str, tmp_path: Path
) -> None:
    upload(inputs.folder / "data", f"{bucket}/data")
    local = job_in(str(inputs.folder), inputs, "/unused", outputs=str(tmp_path))
    local_prepared = prepare_here(local)
    prepared, _ = prepare(job_in(bucket, inputs, "/unused"), "train")
    assert isinstance(prepared, PreparedDataset)
    assert prepared.statistics == local_prepared.statistics
    assert [prepared.bin(number).input_ids.tolist() for number in range(len(prepared))] == [
        local_prepared.bin(number).input_ids.tolist() for number in range(len(prepared))
    ]

    # The order of bins goes by the fingerprint, in which the rows' place counts: both runs are on these bins.
    expected = train_here(job_in(bucket, inputs, str(tmp_path / "run"), training__steps=6))
    uri, every = f"{bucket}/runs/one", {"training__checkpoint_every_steps": 2}
    assert len(run_job(job_in(bucket, inputs, uri, training__steps=4, **every))) == 4
    newest = checkpoint_names(RunFolder(uri))[0]
    shard = next(name for name in Folder(uri).files() if name.startswith(newest) and name.endswith("optim_states.pt"))
    Folder(uri).write(shard, Folder(uri).read(shard)[:-1])
    resumed = run_job(
        job_in(bucket, inputs, uri, training__steps=6, resources={"workers": 1, "encode_actors": 2}, **every)
    )
    assert_same_steps(resumed, expected, tolerance=1e-4)
    run = RunFolder(uri).fetch()
    assert [step.workers for step in read_trained(run)] == [2, 2, 1, 1, 1, 1]
    events = [(event["event"], event["step"]) for event in read_history(run)]
    assert events == [
        ("start", 0), ("checkpoint", 2), ("checkpoint", 4), ("finish", 4),
        ("damaged_checkpoint", 4), ("resume", 2), ("checkpoint", 4), ("checkpoint", 6), ("finish", 6),
    ]  # fmt: skip
    assert len(checkpoint_names(RunFolder(uri))) == 2
    assert any(name.startswith("tensorboard/") for name in Folder(uri).files())
    assert [each.step for each in Run(uri).checkpoints] == [4, 6]

    settings = json.dumps(prepared.manifest)
    assert "mmray-tests" not in settings
    assert f"127.0.0.1:{PORT}" not in settings
    for name in Folder(uri).files():
        if not name.startswith("checkpoint_"):
            assert SECRET.encode() not in Folder(uri).read(name), name
