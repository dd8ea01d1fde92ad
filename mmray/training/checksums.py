"""Lists of the files in a checkpoint, by which a damaged or half-copied one is never taken for whole.

Each rank lists the files it wrote, with their sizes and blake2b digests, in `files/rank-00000.json`. A rank's list is
written after its files have reached their place, so a checkpoint with all lists has been copied whole;
`training_state.json` holds the number of lists. Hashing takes about a second per gigabyte and core: saving does it
beside the training, restoring divides it among all ranks.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

LISTS = "files"


@dataclass(frozen=True)
class ListedFile:
    """One file of a checkpoint as its rank wrote it."""

    name: str
    """Path in the checkpoint, with forward slashes."""
    size: int
    """Size in bytes."""
    digest: str
    """The blake2b digest, 64 hex digits."""

    def problem_in(self, folder: Path) -> str | None:
        """The problem with the file in this copy of the checkpoint; None for none. Reads the whole file."""
        problem = self.size_problem_in(folder)
        if problem is None and _digest(folder / self.name) != self.digest:
            return f"{self.name} was changed: its checksum is another"
        return problem

    def size_problem_in(self, folder: Path) -> str | None:
        """The problem with the file's size in this copy of the checkpoint; None for none. Reads no content."""
        try:
            size = (folder / self.name).stat().st_size
        except OSError as error:
            return f"{self.name}: {error.strerror}"
        return None if size == self.size else f"{self.name} has {size:,} of its {self.size:,} bytes"


def list_name(rank: int) -> str:
    """The file in which a rank lists its files."""
    return f"{LISTS}/rank-{rank:05d}.json"


def list_files(folder: Path) -> str:
    """The content of a rank's list: all files in `folder`, which that rank wrote alone."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: [(folder / name).stat().st_size, _digest(folder / name)] for name in names}
    return json.dumps(files, indent=1) + "\n"


def listed_files(folder: Path, num_lists: int) -> list[ListedFile]:
    """All files that the lists of a checkpoint name, the largest first.

    Raises OSError where a list is missing, ValueError where one is damaged.
    """
    files = []
    for rank in range(num_lists):
        content = json.loads((folder / list_name(rank)).read_text())
        try:
            files += [ListedFile(name, size, digest) for name, (size, digest) in content.items()]
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{list_name(rank)} is no list of files") from error
    return sorted(files, key=lambda file: (-file.size, file.name))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
