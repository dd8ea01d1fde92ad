"""The files of a base model, by digests of their content: an adapter is of use with the weights it was trained on.

Each rank reads a part of the files, once at the start of a run, about a second per gigabyte. The same bytes are then
loaded, so the disk is read once where memory holds them.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mmray.errors import UserError
from mmray.training.ranks import Ranks
from mmray.training.weights import listed, weight_files

CONFIG = "config.json"
_THREADS = 4


@dataclass(frozen=True)
class BaseFiles:
    """The files with the weights and the configuration of a base model."""

    digests: Mapping[str, str]
    """The blake2b digest of each file, by its name."""

    @classmethod
    def of(cls, path: str, ranks: Ranks | None = None) -> "BaseFiles":
        """The files of a folder or hub name that is on this machine. ranks: those that read a part each, which then is
        collective; None: this process reads all. Raises UserError where they cannot be read."""
        files = sorted({Path(file) for file in weight_files(path)})
        files += [folder / CONFIG for folder in {file.parent for file in files} if (folder / CONFIG).exists()]
        mine = files if ranks is None else files[ranks.rank :: ranks.size]
        problem, digests = None, {}
        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                digests = dict(zip((file.name for file in mine), pool.map(_digest, mine)))
        except OSError as error:
            problem = f"cannot read {error.filename} of the base model: {error.strerror}"
        parts = [(problem, digests)] if ranks is None else ranks.every((problem, digests))
        for problem, _ in parts:
            if problem is not None:
                raise UserError(problem)
        return cls(dict(sorted((name, digest) for _, part in parts for name, digest in part.items())))

    def check_equal(self, other: "BaseFiles", holder: str) -> None:
        """Raises UserError where other files are not these. holder: what belongs to these files, for the message."""
        names = {*self.digests, *other.digests}
        if changed := sorted(name for name in names if self.digests.get(name) != other.digests.get(name)):
            raise UserError(
                f"{holder} belongs to another base model: {listed(changed)} differ. Set model.path to the files that "
                "it was trained on"
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
