"""Conversion of DeepSpeed's shards, which are cut for one number of ranks, to a form that any number of ranks can load.

The universal form is one file for each parameter and state, from which every rank cuts its own part. Converting reads
the whole checkpoint and writes it once more. One rank does it where all see the same folder; where none is shared one
rank of each node does, into that node's own disk. The others wait.
"""

import os
import shutil
import subprocess
import sys
import tempfile
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
    converter = ranks.every(node).index(node)
    work, problem = Path(), None
    if ranks.rank == converter:
        scratch.mkdir(parents=True, exist_ok=True)
        for left in scratch.glob(f"{PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=PREFIX, dir=scratch))
        problem = _convert(source, work, num_shards)
        if problem is None:
            problem = _problem_of(lambda: complete(work / SHARDS))
    done = ranks.every((work, problem))
    work = done[converter][0]
    try:
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
    (work / "source").symlink_to((source / SHARDS).resolve())
    workers = str(max(1, min(4, os.cpu_count() or 1, num_shards)))
    command = [sys.executable, "-P", "-c", CONVERTER, "--inject_missing_state"]
    command += ["--input_folder", "source", "--output_folder", SHARDS]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode == 0:
        return None
    tail = " | ".join(done.stdout.strip().splitlines()[-5:])
    return f"converting {source} for another number of workers failed (exit {done.returncode}): {tail}"
