"""The checkpoints in a run's folder: finding the newest whole one, and deleting those no longer needed.

The folder itself is asked, and not Ray Train's record of it: that is a file which is overwritten in place, so that a
crash can leave it torn, and it does not list a checkpoint that was whole but not yet registered when the run died.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmray.errors import UserError
from mmray.run.callback_states import best_step
from mmray.run.folder import SMALL_BYTES, RunFolder
from mmray.training.checkpoint import read_state
from mmray.training.checksums import ListedFile, listed_files
from mmray.training.ranks import Ranks

log = logging.getLogger(__name__)

_NAME = re.compile(r"(damaged_)?checkpoint_(\d+)_")


def checkpoint_name(step: int, unique: str) -> str:
    """The folder name of the checkpoint after `step` steps. unique: text that tells two checkpoints of one step
    apart."""
    return f"checkpoint_{step:08d}_{unique}"


def checkpoint_names(run: Path | RunFolder) -> list[str]:
    """The checkpoints in a run's folder, newest first, whole or not."""
    return sorted(RunFolder.of(run).checkpoint_names(), key=lambda name: (step_of(name), name), reverse=True)


def looks_whole(folder: Path) -> bool:
    """Quick check: every listed file exists with its size, and small files match their checksums."""
    files, problem = _contents(folder)
    looks = (f.problem_in(folder) if f.size <= SMALL_BYTES else f.size_problem_in(folder) for f in files)
    return problem is None and not any(looks)


def newest_looking_whole(run: Path | RunFolder) -> Path | None:
    """The newest checkpoint that passes the quick check, for an inspection from outside (`RunFolder.shadow`).

    To restore a checkpoint use `newest_whole`, which reads all of it.
    """
    folder = RunFolder.of(run)
    shadows = (folder.shadow(name) for name in checkpoint_names(folder))
    return next((shadow for shadow in shadows if looks_whole(shadow)), None)


@dataclass(frozen=True)
class Scratch:
    """The place on a node's own disk where its ranks put a checkpoint that lies in an object store.

    node: ranks with the same value see the same folder.
    """

    folder: Path
    node: str


def newest_whole(
    run: Path | RunFolder, ranks: Ranks, on_damage: Callable[[str, str], None], scratch: Scratch | None = None
) -> Path | None:
    """The newest checkpoint of a run whose every byte is as it was written; None where the run has none. Collective.

    Each rank reads a part of the files. A checkpoint in an object store is first copied to `scratch` by one rank of
    each node, and the ranks of a node read that copy. on_damage: called on rank 0 with the name and the problem of each
    newer checkpoint that is not whole; these are renamed and ignored from then on.

    Raises UserError, naming each checkpoint and its problem, where there are checkpoints but none is whole.
    """
    run = RunFolder.of(run)
    problems: dict[str, str] = {}
    nodes = ranks.every("shared" if scratch is None else scratch.node)
    own_node = [rank for rank, node in enumerate(nodes) if node == nodes[ranks.rank]]
    for name in ranks.from_first(checkpoint_names(run) if ranks.rank == 0 else None):
        folder = run.path / name
        if scratch is not None:
            folder = scratch.folder / name
            if own_node[0] == ranks.rank:
                run.restored(name, scratch.folder)
            ranks.every(None)
        problem = _problem(folder, ranks, own_node)
        if problem is None:
            if ranks.rank == 0:
                _set_aside(run, problems, on_damage)
            ranks.every(None)
            return folder
        problems[name] = problem
    if problems:
        lines = "\n  ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise UserError(
            f"{run} has checkpoints, but none of them is whole:\n  {lines}\n"
            "Put one of them back from a copy, or start again in a new output.run"
        )
    return None


def prune(run: Path | RunFolder, keep: int) -> None:
    """Deletes checkpoints, whole or not, that are older than the newest `keep` whole ones.

    The newest whole checkpoints of the best evaluation, and of the step after which the decay of the wsd schedule
    begins, are kept beside them, by the records in the newest one.
    """
    run = RunFolder.of(run)
    all_whole = [name for name in checkpoint_names(run) if looks_whole(run.shadow(name))]
    whole = all_whole[:keep]
    if len(whole) < keep:
        return
    newest = run.shadow(whole[0])
    kept = set(whole)
    for step in (best_step(newest), read_state(newest).decays_from):
        kept.update([name for name in all_whole if step_of(name) == step][:1])
    for name in run.all_checkpoint_names():
        if _NAME.match(name) and name not in kept and step_of(name) <= step_of(whole[-1]):
            run.remove(name)


def _set_aside(run: RunFolder, problems: dict[str, str], on_damage: Callable[[str, str], None]) -> None:
    for name, problem in problems.items():
        log.warning("%s/%s is passed over, it is not whole: %s", run, name, problem)
        on_damage(name, problem)
        run.set_aside(name)


def _problem(folder: Path, ranks: Ranks, own_node: list[int]) -> str | None:
    """The problem with a checkpoint, the same on every rank; None for none. Collective.

    own_node: ranks that read the same copy.
    """
    files, unknown = ranks.from_first(_contents(folder) if ranks.rank == 0 else None)
    if unknown is not None:
        return unknown
    mine = (file.problem_in(folder) for file in files[own_node.index(ranks.rank) :: len(own_node)])
    rank_problems = ranks.every(next((problem for problem in mine if problem is not None), None))
    return next((problem for problem in rank_problems if problem is not None), None)


def _contents(folder: Path) -> tuple[list[ListedFile], str | None]:
    """The files of a checkpoint, and the reason why they are not known."""
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
    """The number of steps in a checkpoint's name; 0 for a name that has none."""
    match = _NAME.match(name)
    return int(match[2]) if match else 0
