"""Conversion of DeepSpeed's shards, which are cut for one number of ranks, to a form that any number of ranks can load.

The universal form is one file for each parameter and state, from which every rank cuts its own part. Converting reads
the whole checkpoint and writes it once more. All ranks that see the same folder share that work: all ranks, or those of
a node where no folder is shared. A checkpoint of less than TOGETHER_BYTES is converted by one of them; the others wait.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmray.errors import UserError
from mmray.training.deepspeed_config import UNUSED
from mmray.training.ranks import Ranks

SHARDS = "deepspeed"
PREFIX = "mmray-resume-"
CONVERTER = f"""
import sys
sys.modules["{UNUSED}"] = None
from deepspeed.checkpoint.ds_to_universal import main, parse_arguments
main(parse_arguments())
"""
"""Code that runs `deepspeed.checkpoint.ds_to_universal` without imports of DeepSpeed that it does not need."""

TOGETHER_BYTES = 4 << 30
"""Bytes of shards from which on ranks share a conversion: each starts a process, whose imports take some seconds."""
PHASES = 2
"""The converter's passes over its work: it extracts the fragments of each rank, and merges those of each parameter."""
PHASE_DONE = "mmray: a phase is done"
PART_CONVERTER = f"""
import sys
sys.modules["{UNUSED}"] = None
from deepspeed.checkpoint import ds_to_universal

part, parts = int(sys.argv.pop(1)), int(sys.argv.pop(1))
whole, phases = ds_to_universal._do_parallel_work, []

def own_part(work, chunks, workers):
    done = whole(work, sorted(chunks, key=str)[part::parts], workers)
    phases.append(True)
    print("{PHASE_DONE}", flush=True)
    if sys.stdin.readline() != "go\\n":  # when all parts are done
        sys.exit(1)
    if part and len(phases) == {PHASES}:
        sys.exit(0)  # the first one does the rest
    return done

ds_to_universal._do_parallel_work = own_part
ds_to_universal.main(ds_to_universal.parse_arguments())
"""
"""Code that does one part of a conversion, in step with the processes that do the others."""


@contextmanager
def converted(
    source: Path, num_shards: int, scratch: Path, node: str, ranks: Ranks, complete: Callable[[Path], None]
) -> Iterator[Path]:
    """A temporary folder that holds `deepspeed/` in universal form, deleted when the block has ended on every rank.

    source: the checkpoint; num_shards: number of ranks that wrote it.
    scratch: where the folder is made; leftovers of a run that was killed are deleted there.
    node: ranks with the same value see the same `scratch`, and share one conversion.
    complete: called with the converted `deepspeed/` on the rank that converted, to add what a load needs besides.
    Collective. Raises UserError on every rank where the conversion failed on one.
    """
    group = [rank for rank, value in enumerate(ranks.every(node)) if value == node]
    converter = group[0]
    work, problem, is_shared = Path(), None, False
    if ranks.rank == converter:
        scratch.mkdir(parents=True, exist_ok=True)
        for left in scratch.glob(f"{PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=PREFIX, dir=scratch))
        (work / "source").symlink_to((source / SHARDS).resolve())
        is_shared = sum(file.stat().st_size for file in (source / SHARDS).iterdir()) >= TOGETHER_BYTES
    work, is_shared = ranks.every((work, is_shared))[converter]
    try:
        if is_shared:
            problem = _convert_part(source, work, group.index(ranks.rank), len(group), ranks)
        elif ranks.rank == converter:
            problem = _convert(source, work, num_shards)
        if ranks.rank == converter and problem is None:
            problem = _problem_of(lambda: complete(work / SHARDS))
        done = ranks.every((work, problem))
        for _, problem in done:
            if problem is not None:
                raise UserError(problem)
        visible = ranks.every(work.is_dir())
        if not all(visible):
            raise UserError(
                f"workers {[rank for rank, sees in enumerate(visible) if not sees]} do not see {scratch}; "
                f"to resume with another number of workers, give a folder that all of them share"
            )
        yield work
        ranks.every(None)
    finally:
        if ranks.rank == converter:
            shutil.rmtree(work, ignore_errors=True)


def _problem_of(work: Callable[[], None]) -> str | None:
    """The text of the error that a function raises, which all ranks must learn of; None for none."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 (files of any kind are read and written)
        return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return None


def _convert(source: Path, work: Path, num_shards: int) -> str | None:
    """Converts the shards in `source` to `work/deepspeed`; returns the error's text where that failed.

    It runs in a process of its own, because the converter forks workers, which this process, with its threads and
    perhaps CUDA, must not; and with relative paths, because the converter takes its paths for regular expressions.
    """
    workers = str(max(1, min(4, os.cpu_count() or 1, num_shards)))
    command = [sys.executable, "-P", "-c", CONVERTER, "--inject_missing_state"]
    command += ["--input_folder", "source", "--output_folder", SHARDS]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode == 0:
        return None
    tail = " | ".join(done.stdout.strip().splitlines()[-5:])
    return f"converting {source} for another number of workers failed (exit {done.returncode}): {tail}"


def _convert_part(source: Path, work: Path, part: int, parts: int, ranks: Ranks) -> str | None:
    """Does one part of a conversion to `work/deepspeed`; returns the error's text where that failed. Collective."""
    command = [sys.executable, "-P", "-c", PART_CONVERTER, str(part), str(parts), "--inject_missing_state"]
    command += ["--input_folder", "source", "--output_folder", SHARDS]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    process: subprocess.Popen[str] | None = None
    said: deque[str] = deque(maxlen=5)
    try:
        process = subprocess.Popen(
            command, cwd=work, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:  # such as a folder that this rank does not see
        said.append(f"{work}: {error.strerror or error}")
    try:
        for _ in range(PHASES):
            goes_on = process is not None and _reaches_end_of_phase(process, said)
            if not all(ranks.every(goes_on)):  # the others see that too, and end
                return None if goes_on else _failure(source, process, said)
            assert process is not None
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert process is not None
        said.extend(process.communicate()[0].splitlines())
        return None if process.returncode == 0 else _failure(source, process, said)
    finally:
        if process is not None:
            process.kill()
            process.wait()


def _reaches_end_of_phase(process: "subprocess.Popen[str]", said: deque[str]) -> bool:
    """Waits until a process has done its part of a phase, True, or has ended. said: gets what it prints."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == PHASE_DONE:
            return True
        said.append(line.strip())
    return False


def _failure(source: Path, process: "subprocess.Popen[str] | None", said: deque[str]) -> str:
    code = "it did not start" if process is None else f"exit {process.wait()}"
    return f"converting {source} for another number of workers failed ({code}): {' | '.join(said)}"
