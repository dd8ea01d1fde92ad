"""The checkpoints in a run's folder: which is the newest whole one, and which are no longer needed.

The folder itself is asked, and nothing that Ray Train remembers of it: that memory is a file which is overwritten in
place, so that a crash can leave it torn, and it knows nothing of a checkpoint that was whole but not yet registered
when the run died.
"""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from mmray.errors import UserError
from mmray.training.checkpoint import read_state
from mmray.training.checksums import ListedFile, listed_files
from mmray.training.ranks import Ranks

log = logging.getLogger(__name__)

DAMAGED = "damaged_"
SMALL_BYTES = 1 << 16
"""What a look at a checkpoint reads: a driver acts on the cursor before any worker has read it all."""
_NAME = re.compile(r"(damaged_)?checkpoint_(\d+)_")


def checkpoint_name(step: int, unique: str) -> str:
    """The folder of the checkpoint after `step` steps. unique: tells two of the same step apart."""
    return f"checkpoint_{step:08d}_{unique}"


def checkpoint_names(run: Path) -> list[str]:
    """The checkpoints in a run's folder, newest first, whole or not."""
    if not run.is_dir():
        return []
    names = [path.name for path in run.iterdir() if path.name.startswith("checkpoint_") and path.is_dir()]
    return sorted(names, key=lambda name: (step_of(name), name), reverse=True)


def looks_whole(folder: Path) -> bool:
    """Whether all ranks' files are there in their sizes, and the small ones unchanged: a look, without reading all."""
    files, problem = _contents(folder)
    looks = (f.problem_in(folder) if f.size <= SMALL_BYTES else f.size_problem_in(folder) for f in files)
    return problem is None and all(found is None for found in looks)


def newest_looking_whole(run: Path) -> Path | None:
    """The newest checkpoint that looks whole. For a look from outside; to restore one, `newest_whole` reads it all."""
    return next((run / name for name in checkpoint_names(run) if looks_whole(run / name)), None)


def newest_whole(run: Path, ranks: Ranks, on_damage: Callable[[str, str], None]) -> Path | None:
    """The newest checkpoint of a run whose every byte is as it was written; None where the run has none. Collective.

    Ranks read a part of the files each. on_damage: called on rank 0 with the name and the problem of each newer
    checkpoint that is not whole; these are renamed, and not looked at again. Raises UserError, naming each and its
    problem, where checkpoints are there but none is whole.
    """
    problems: dict[str, str] = {}
    for name in ranks.from_first(checkpoint_names(run)):
        problem = _problem(run / name, ranks)
        if problem is None:
            if ranks.rank == 0:
                _set_aside(run, problems, on_damage)
            ranks.every(None)
            return run / name
        problems[name] = problem
    if problems:
        lines = "\n  ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise UserError(
            f"{run} has checkpoints, but none of them is whole:\n  {lines}\n"
            "Put one of them back from a copy, or start again in a new output.run"
        )
    return None


def prune(run: Path, keep: int) -> None:
    """Delete checkpoints, whole or not, that are older than the newest `keep` whole ones."""
    whole = [name for name in checkpoint_names(run) if looks_whole(run / name)][:keep]
    if len(whole) < keep:
        return
    for path in run.iterdir():
        if _NAME.match(path.name) and path.name not in whole and step_of(path.name) <= step_of(whole[-1]):
            shutil.rmtree(path, ignore_errors=True)


def _set_aside(run: Path, problems: dict[str, str], on_damage: Callable[[str, str], None]) -> None:
    for name, problem in problems.items():
        log.warning("%s is passed over, it is not whole: %s", run / name, problem)
        on_damage(name, problem)
        (run / name).rename(run / f"{DAMAGED}{name}")


def _problem(folder: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint, the same on every rank; None for nothing. Collective."""
    files, unknown = ranks.from_first(_contents(folder) if ranks.rank == 0 else None)
    if unknown is not None:
        return unknown
    mine = (file.problem_in(folder) for file in files[ranks.rank :: ranks.size])
    found = ranks.every(next((problem for problem in mine if problem is not None), None))
    return next((problem for problem in found if problem is not None), None)


def _contents(folder: Path) -> tuple[list[ListedFile], str | None]:
    """The files of a checkpoint, and why they are not known."""
    try:
        return listed_files(folder, read_state(folder).lists), None
    except UserError as error:
        return [], str(error)
    except OSError as error:
        return (
            [],
            f"{Path(str(error.filename)).name}, a list of its files: {error.strerror}; it was not copied to its end",
        )
    except ValueError as error:
        return [], f"a list of its files is damaged: {error}"


def step_of(name: str) -> int:
    """The steps a checkpoint's name tells; 0 for a name that tells none."""
    match = _NAME.match(name)
    return int(match[2]) if match else 0
