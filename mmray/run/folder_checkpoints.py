"""Checkpoints that ranks write straight into a run's folder, without Ray, for runs whose ranks share a disk."""

import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from mmray.run.checkpoints import checkpoint_name, prune
from mmray.training.checksums import LISTS, list_files, list_name
from mmray.training.ranks import Ranks


class FolderCheckpoints:
    """A `CheckpointStore` in a folder that all ranks see. A checkpoint is whole when `save` returns."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        """Opens the store. keep: number of whole checkpoints that are kept; older ones are deleted."""
        self._folder, self._ranks, self._keep = folder, ranks, keep

    def save(self, write: Callable[[Path], None], step: int, *, wait: bool) -> str:
        """Writes a checkpoint and returns its name. Collective. wait: has no effect, because it always waits."""
        part = self._folder / ".writing" / f"rank-{self._ranks.rank:05d}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        name: str = self._ranks.from_first(checkpoint_name(step, uuid4().hex[:8]))
        files, target = list_files(part), self._folder / name
        for path in sorted(part.rglob("*")):
            place = target / path.relative_to(part)
            if path.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)
        (target / LISTS).mkdir(parents=True, exist_ok=True)
        (target / list_name(self._ranks.rank)).write_text(files)
        shutil.rmtree(part)
        self.finish()
        return name

    def finish(self) -> None:
        """Waits for all ranks' files, and deletes checkpoints that are no longer kept. Collective."""
        self._ranks.every(None)
        if self._ranks.rank == 0:
            prune(self._folder, self._keep)
