"""A disk that is full while a checkpoint is written is told in one line; bugs keep their traces."""

from pathlib import Path

import pyarrow.fs
import pytest
import torch

from jobs.checkpoint_writer import _as_user_error
from mmray.errors import UserError

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
    message = "a checkpoint could not be written into /run: .*[Nn]o space left on device.*make room or mend the disk"
    with pytest.raises(UserError, match=message), _as_user_error("/run"):
        write()


def test_other_errors_are_not(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ours"), _as_user_error(tmp_path):
        raise RuntimeError("ours")
