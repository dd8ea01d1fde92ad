"""Duplicate ids, found by partitions: the same ones as a set that holds them all would find."""

import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.rows import duplicates
from mmray.rows.duplicates import HASH_BYTES, DuplicateIds, id_hashes


def found(parts: list[list[str]], expected: int) -> list[int]:
    ids = DuplicateIds(expected)
    for part in parts:
        ids.add(id_hashes(part))
    return sorted(np.concatenate(list(ids.later())).tolist())


@given(
    st.lists(st.lists(st.sampled_from([str(n) for n in range(30)]), max_size=9), max_size=9),
    st.sampled_from([0, 9, 99]),
)
@settings(deadline=None, max_examples=60)
def test_those_that_stand_at_an_earlier_position(parts: list[list[str]], expected: int) -> None:
    seen: set[str] = set()
    later = []
    for position, row_id in enumerate(row_id for part in parts for row_id in part):
        later += [position] if row_id in seen else []
        seen.add(row_id)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "PARTITION_IDS", 4)
        assert found(parts, expected) == later


def test_many_ids_are_held_on_the_disk_and_their_files_are_gone_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(duplicates, "PARTITION_IDS", 20_000)
    random = np.random.default_rng(0)
    ids, count = DuplicateIds(1_000_000), 0
    tracemalloc.start()
    for _ in range(100):
        ids.add(random.bytes(10_000 * HASH_BYTES))
        count = max(count, sum(1 for _ in tmp_path.glob("*/*")))
    ids.add(random.bytes(10 * HASH_BYTES) * 2)
    later = np.concatenate(list(ids.later()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sorted(later.tolist()) == list(range(1_000_010, 1_000_020))
    assert count == 64, "partitions"
    assert peak < 8e6, "24 MB in all, and 0.5 MB a partition"
    assert not list(tmp_path.iterdir())
