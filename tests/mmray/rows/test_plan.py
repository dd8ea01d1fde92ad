"""A plan is known window by window, and takes no memory for its rows and windows."""

import tracemalloc
from itertools import chain

import pytest

from mmray.rows import plan as plans
from mmray.rows.files import Reading, RowIndex, SourceFile, source_files
from mmray.rows.plan import Plan, indexed_files, plan_chunks
from mmray.rows.settings import DatasetSettings
from mmray.rows.taking import Taking
from tests.mmray.preparing import write_rows

READING = Reading(columns=("id", "text"))


def simulated(num_files: int, rows: int, sets: int) -> list[RowIndex]:
    """Indexed Parquet files that do not exist."""
    files = (
        SourceFile(number * sets // num_files, f"/rows/part-{number:06d}.parquet", "parquet", 1, "1", READING)
        for number in range(num_files)
    )
    return [RowIndex(file, "parquet", READING, range(rows + 1)) for file in files]


@pytest.mark.parametrize("dealing", [1, 2])
def test_any_window_is_known_alone(dealing: int) -> None:
    indexed = simulated(40, 117, sets=3)
    plan = Plan(indexed, window_rows=512, chunk_rows=64, dealing=dealing)
    windows = [plan.window(number) for number in range(plan.num_windows)]
    assert plan.window(5) == windows[5]
    assert list(chain.from_iterable(windows)) == list(plan.chunks())
    assert [sum(chunk.num_rows for chunk in window) for window in windows] == [
        plan.rows_of_window(number) for number in range(plan.num_windows)
    ]
    rows = [
        (piece.uri, row)
        for chunk in plan.chunks()
        for piece in chunk.pieces
        for row in range(piece.first_row, piece.first_row + piece.num_rows)
    ]
    assert len(rows) == len(set(rows)) == 40 * 117
    first_rows = [chunk.first_row for chunk in plan.chunks()]
    assert first_rows == list(range(0, 40 * 117, 64))


def test_a_billion_rows_in_many_files_take_memory_for_the_files_alone() -> None:
    tracemalloc.start()
    indexed = simulated(10_000, 100_000, sets=64)
    held, _ = tracemalloc.get_traced_memory()
    plan = Plan(indexed, window_rows=8192, chunk_rows=512)
    for number in range(0, plan.num_windows, plan.num_windows // 50):
        assert sum(chunk.num_rows for chunk in plan.window(number)) == 8192
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.num_rows == 10**9
    assert held < 10_000 * 700
    assert peak < held + 5e6


def test_a_tiny_set_that_is_repeated_often_keeps_its_share_in_every_window() -> None:
    indexed = simulated(2, 1000, sets=2)
    takings = [Taking(1000, 100_000, 1), Taking(1000, 300_000, 2)]
    plan = Plan(indexed, takings, window_rows=4000, chunk_rows=500)
    for number in range(plan.num_windows):
        pieces = [piece for chunk in plan.window(number) for piece in chunk.pieces]
        assert sum(piece.num_taken for piece in pieces if piece.dataset == 0) == pytest.approx(1000, abs=2)


def test_starts_of_rows_that_are_many_lie_on_the_disk(tmp_path, monkeypatch) -> None:
    for number in range(3):
        write_rows(tmp_path / f"{number}.jsonl", [{"text": "x" * n} for n in range(50)])
    files = source_files([DatasetSettings(files=(f"{tmp_path}/*.jsonl",), kind="pretrain")])
    expected = plan_chunks(files, window_rows=40, chunk_rows=20)
    monkeypatch.setattr(plans, "STARTS_IN_MEMORY", 64)
    assert plan_chunks(files, window_rows=40, chunk_rows=20) == expected


def test_how_many_files_are_looked_through_is_told(tmp_path) -> None:
    for number in range(5):
        write_rows(tmp_path / f"{number}.jsonl", [{"text": "x"}])
    calls: list[tuple[int, int]] = []
    indexed_files(
        source_files([DatasetSettings(files=(f"{tmp_path}/*.jsonl",), kind="pretrain")]),
        lambda done, total: calls.append((done, total)),
    )
    assert calls == [(number, 5) for number in range(1, 6)]
