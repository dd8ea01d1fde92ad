"""A disk that is full while a checkpoint is written is told in one line; bugs keep their traces."""

from pathlib import Path

import pyarrow.fs
import pytest
import torch

from mmray.errors import PassingError
from mmray.storage import explained, library_write_errors

FULL = Path("/dev/full")


def by_python() -> None:
    FULL.write_bytes(b"x")


def by_torch() -> None:
    torch.save({"weights": torch.zeros(100_000)}, FULL)


def by_arrow() -> None:
    with pyarrow.fs.LocalFileSystem().open_output_stream(str(FULL)) as stream:
        stream.write(b"x")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("write", [by_python, by_torch, by_arrow])
def test_a_full_disk_is_the_users_matter(write) -> None:
    message = "a checkpoint in /run: .*[Nn]o space left on device.*; free some space there; then the same command cont"
    with pytest.raises(PassingError, match=message), explained("a checkpoint in /run"), library_write_errors():
        write()


def test_other_errors_are_not(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ours"), explained(str(tmp_path)), library_write_errors():
        raise RuntimeError("ours")
