"""Faults of preparing: after each the same command is run again, and the result compared with an undisturbed one."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmray.config.job import Job
from mmray.prepared import PreparedDataset
from tests.conftest import Inputs
from tests.faults.machines import JobProcess, Machines, kill, remount, small_disk, wait_for
from tests.faults.table import Row

ROWS, WINDOW_ROWS = 12_000, 512
"""Long enough to be met in the middle, windows small enough that some are done by then."""


class Preparing:
    """One job's prepare, begun and begun again."""

    def __init__(self, machines: Machines, inputs: Inputs, folder: Path, name: str, **changes: Any) -> None:
        self.machines, self.folder = machines, folder / name
        rows = many_rows(inputs, folder)
        content = inputs.job(self.folder, packing__window_rows=WINDOW_ROWS, **changes)
        content["data"]["train"] = [  # type: ignore[index]
            {"files": str(rows), "kind": "pretrain", "image_root": str(inputs.folder / "data")}
        ]
        content["data"]["max_rejected_share"] = 1  # type: ignore[index]  # rows that are bad on purpose
        self.content = content
        self.prepared = Path(Job.model_validate(content).prepared_path("train"))

    def start(self, *options: str) -> JobProcess:
        """The command."""
        return JobProcess("prepare", self.content, self.folder, self.machines.address, *options)

    def written(self) -> dict[str, int]:
        """The files of bins that are there, and when they were written."""
        found = {}
        for path in self.prepared.glob("bins-*.parquet"):
            with contextlib.suppress(FileNotFoundError):
                found[path.name] = path.stat().st_mtime_ns
        return found

    def begun(self, job: JobProcess) -> None:
        """Wait until some windows are there and others are not."""
        wait_for(lambda: len(self.written()) >= 3 or job.code is not None, f"windows of {self.prepared}")
        assert job.code is None, job.output[-3000:]

    def again(self, before: dict[str, int]) -> str:
        """How many of the windows that were there have been written again since."""
        now = self.written()
        kept = sum(now.get(name) == time for name, time in before.items())
        return f"{len(before) - kept} of {len(before)} windows"


def many_rows(inputs: Inputs, folder: Path) -> Path:
    """The rows of the pages again and again, each under an id of its own, in one file."""
    path = folder / "many.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (inputs.folder / "data" / "pages.jsonl").read_text().splitlines()
        good = [row for row in map(_parsed, lines) if row]
        beside = path.with_suffix(".half")
        with beside.open("w") as file:
            for number in range(ROWS):
                file.write(json.dumps(good[number % len(good)] | {"id": f"row-{number}"}) + "\n")
        beside.replace(path)
    return path


def _parsed(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def digests(prepared: Path) -> dict[str, str]:
    """A hash of each file of data, by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(prepared.glob("*.parquet"))}


def accounted(prepared: Path) -> tuple[int, int]:
    """Rows lost and doubled, by their ids."""
    dataset = PreparedDataset(str(prepared))
    ids = [each for number in range(len(dataset)) for each in dataset.bin(number).sample_ids]
    ids += dataset.rejected()["id"].to_pylist()
    every = {f"row-{number}" for number in range(ROWS)}
    return len(every - set(ids)), len(ids) - len(set(ids))


Break = Callable[[Machines, JobProcess], str]


def kill_driver(machines: Machines, job: JobProcess) -> str:
    job.kill()
    return "kill -9 of `jobs/prepare.py`; the same command again"


def kill_encode_actor(machines: Machines, job: JobProcess) -> str:
    kill(machines.processes("EncodeChunk")[-1])
    return "kill -9 of an actor that reads headers and tokenises"


def kill_pack_actor(machines: Machines, job: JobProcess) -> str:
    kill(machines.processes("PackWindow")[-1])
    return "kill -9 of the actor that packs and writes windows"


DEATHS: dict[str, Break] = {
    "prepare: the driver dies": kill_driver,
    "prepare: an encode actor dies": kill_encode_actor,
    "prepare: the pack actor dies": kill_pack_actor,
}


def broken_and_continued(whole: Preparing, machines: Machines, inputs: Inputs, folder: Path, name: str) -> Row:
    """Break a prepare in the middle; run the command again if it ended; compare."""
    preparing = Preparing(machines, inputs, folder, name.split(": ")[1].replace(" ", "-"))
    job = preparing.start()
    preparing.begun(job)
    what = DEATHS[name](machines, job)
    return _compared(whole, preparing, job, name, what)


def _compared(whole: Preparing, preparing: Preparing, job: JobProcess, name: str, what: str) -> Row:
    before = preparing.written()
    code = job.wait()
    again = "it went on by itself"
    if code != 0:
        again = "the command again"
        preparing.start().succeed()
    return judged(whole, preparing, name, what, preparing.again(before), again)


def judged(whole: Preparing, preparing: Preparing, name: str, what: str, redone: str, note: str) -> Row:
    """The row: rows by their ids, files against the undisturbed prepare's."""
    lost, doubled = accounted(preparing.prepared)
    equal = digests(preparing.prepared) == digests(whole.prepared)
    result = "byte-equal to an undisturbed prepare" if equal else "FAILED: other bytes than an undisturbed prepare"
    return Row(name, what, lost, doubled, redone, f"{note}; {result}")


def lose_a_node(whole: Preparing, inputs: Inputs, folder: Path) -> Row:
    """Encoders on a machine that goes."""
    with Machines(head_cpus=1) as machines:
        machines.add_node(cpus=1)
        gone = machines.add_node(cpus=1)
        preparing = Preparing(machines, inputs, folder, "node")
        job = preparing.start()
        preparing.begun(job)
        machines.kill_node(gone)
        machines.add_node(cpus=1)
        return _compared(
            whole, preparing, job, "prepare: a machine dies", "kill -9 of everything on one of three nodes"
        )


def small_object_store(whole: Preparing, inputs: Inputs, folder: Path) -> Row:
    """As little memory for Ray's objects as Ray allows."""
    with Machines(head_cpus=3, store_bytes=80 << 20) as machines:
        preparing = Preparing(machines, inputs, folder, "store")
        preparing.start().succeed()
        return judged(
            whole, preparing, "prepare: little object store", "80 MB of object store for three actors", "nothing",
            "finished in one go",
        )  # fmt: skip


def full_disk(whole: Preparing, machines: Machines, inputs: Inputs, folder: Path) -> Row | None:
    """The output on a file system that is full in the middle; then enlarged."""
    with small_disk(folder / "small", megabytes=1.5) as disk:
        if disk is None:
            return None
        preparing = Preparing(machines, inputs, folder, "full", output__prepared=str(disk / "prepared"))
        code, message = _refused(preparing.start())
        manifest = (preparing.prepared / "manifest.json").exists()
        before = preparing.written()
        remount(disk, "size=200m")
        preparing.start().succeed()
        note = f"exit code {code}: {message}; enlarged, the command again"
        return judged(
            whole, preparing, "prepare: the disk is full", "output on a disk of 1.5 MB, later 200",
            preparing.again(before), "FAILED: a manifest; " if manifest else note,
        )  # fmt: skip


def read_only(whole: Preparing, machines: Machines, inputs: Inputs, folder: Path) -> Row | None:
    """The output on a file system mounted read-only; then writable."""
    with small_disk(folder / "closed", megabytes=200) as disk:
        if disk is None:
            return None
        remount(disk, "ro")
        preparing = Preparing(machines, inputs, folder, "read-only", output__prepared=str(disk / "prepared"))
        code, message = _refused(preparing.start())
        remount(disk, "rw")
        preparing.start().succeed()
        return judged(
            whole, preparing, "prepare: the output is read-only", "output on a read-only file system, later writable",
            "nothing", f"exit code {code}: {message}; the command again",
        )  # fmt: skip


def changed_rows(machines: Machines, inputs: Inputs, folder: Path) -> Row:
    """A row file replaced between two prepares into one folder."""
    preparing = Preparing(machines, inputs, folder, "changed")
    own = folder / "changed" / "rows.jsonl"
    own.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(many_rows(inputs, folder), own)
    preparing.content["data"]["train"][0]["files"] = str(own)
    preparing.start().succeed()
    before = digests(preparing.prepared)
    text = own.read_text()
    own.write_text(text[: text.rindex("\n", 0, len(text) - 1) + 1])
    code, message = _refused(preparing.start())
    kept = digests(preparing.prepared) == before
    return Row(
        "prepare: a row file is replaced", "one row fewer, the same command again", 0, 0, "nothing",
        f"{'' if kept else 'FAILED: '}exit code {code}: {message}; what was prepared is untouched",
    )  # fmt: skip


def _refused(job: JobProcess) -> tuple[int, str]:
    """The exit code of a command that must not succeed, and its message, short."""
    code = job.wait()
    if code == 0:
        raise RuntimeError(f"{job.log} succeeded")
    lines = [line for line in job.output.splitlines() if line.startswith("error:")]
    return code, (lines[-1] if lines else job.output.strip().splitlines()[-1])[:200]


def faults(inputs: Inputs, folder: Path, names: list[str]) -> Iterator[Row]:
    """The rows of these faults of preparing."""
    with Machines(head_cpus=4) as machines:
        whole = Preparing(machines, inputs, folder, "whole-prepare")
        whole.start().succeed()
        for name in names:
            if name in DEATHS:
                yield broken_and_continued(whole, machines, inputs, folder, name)
        if "prepare: the disk is full" in names and (row := full_disk(whole, machines, inputs, folder)):
            yield row
        if "prepare: the output is read-only" in names and (row := read_only(whole, machines, inputs, folder)):
            yield row
        if "prepare: a row file is replaced" in names:
            yield changed_rows(machines, inputs, folder)
    if "prepare: a machine dies" in names:
        yield lose_a_node(whole, inputs, folder)
    if "prepare: little object store" in names:
        yield small_object_store(whole, inputs, folder)


NAMES = [
    *DEATHS, "prepare: a machine dies", "prepare: little object store", "prepare: the disk is full",
    "prepare: the output is read-only", "prepare: a row file is replaced",
]  # fmt: skip
