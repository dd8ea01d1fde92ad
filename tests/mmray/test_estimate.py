"""What would be prepared, estimated from a sample of rows, against what is prepared."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray.config.job import Job
from mmray.families import load_processor
from mmray.packing.settings import PackingSettings
from mmray.prepared import estimate
from mmray.prepared.estimate import estimate_split
from mmray.rows import count
from mmray.rows.count import RowCount, count_rows
from mmray.rows.files import first_piece, source_files
from mmray.rows.read import read_piece
from mmray.rows.settings import DatasetSettings
from tests.conftest import Inputs
from tests.here import prepare_here
from tests.mmray.preparing import Preparation, write_rows

WORDS = ["invoice", "total", "date", "street", "number", "page", "signed", "by", "the", "clerk", "of", "this", "office"]
PACKING = PackingSettings(token_capacity=256, visual_capacity=64, window_rows=1024)


def texts(count: int, seed: int, most: int) -> list[dict[str, str]]:
    """Rows of 1 to `most` words; each hundredth is far too long for a bin."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, most) if number % 100 else 400 for number in range(count)]
    return [{"id": f"{seed}-{n}", "text": " ".join(draw.choices(WORDS, k=length))} for n, length in enumerate(lengths)]


@pytest.fixture
def sets(tmp_path: Path) -> list[dict[str, str]]:
    """Two sets: three JSONL files with short rows, a Parquet file with longer ones."""
    for part in range(3):
        write_rows(tmp_path / f"short-{part}.jsonl", texts(900, part, 20))
    pq.write_table(pa.Table.from_pylist(texts(2500, 7, 60)), tmp_path / "long.parquet", row_group_size=64)
    return [{"files": f"{tmp_path}/short-*.jsonl", "kind": "pretrain"}, {"files": f"{tmp_path}/long.parquet"}]


def preparation(inputs: Inputs, sets: list[dict[str, str]]) -> Preparation:
    return Preparation(
        load_processor(inputs.folder / "processor"), *({"kind": "pretrain", **each} for each in sets), packing=PACKING
    )


def estimated(inputs: Inputs, tmp_path: Path, made: Preparation, **options: float) -> estimate.Estimate:
    changes = {"data__train": [each.model_dump() for each in made.data.train], "packing": PACKING.model_dump()}
    job = Job.model_validate(inputs.job(tmp_path, images={}, **changes))
    return estimate_split(job, "train", made.family, made.policy, **options)


def test_bins_of_a_sample_are_those_of_all_rows(inputs: Inputs, tmp_path: Path, sets: list[dict[str, str]]) -> None:
    made = preparation(inputs, sets)
    facts = made.write(tmp_path / "out").statistics
    guess = estimated(inputs, tmp_path, made)
    assert guess.rows == RowCount(facts["rows_read"], True)
    assert guess.sampled < guess.rows.rows / 4
    assert guess.windows == 6
    assert guess.bins == pytest.approx(facts["bins"], rel=0.1)
    assert guess.packed == pytest.approx(facts["rows_packed"], rel=0.02)
    assert guess.tokens == pytest.approx(facts["tokens"], rel=0.1)


def test_few_rows_are_all_encoded_and_their_bins_are_exact(inputs: Inputs, tmp_path: Path) -> None:
    files = write_rows(tmp_path / "few.jsonl", texts(300, 1, 30))
    made = preparation(inputs, [{"files": files}])
    facts = made.write(tmp_path / "out").statistics
    guess = estimated(inputs, tmp_path, made)
    assert (guess.sampled, guess.bins, guess.packed) == (300, facts["bins"], facts["rows_packed"])
    assert guess.tokens == facts["tokens"]


def test_a_file_too_long_to_read_through_is_counted_by_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", texts(4000, 3, 40))
    files = source_files([DatasetSettings(files=(path,), kind="pretrain")])
    assert count_rows(files, seconds=10) == RowCount(4000, True)
    monkeypatch.setattr(count, "READ_BYTES", 1 << 14)
    part = count_rows(files, seconds=0)
    assert str(part).startswith("about ")
    assert part.rows == pytest.approx(4000, rel=0.1)


def test_counting_tells_its_files(tmp_path: Path) -> None:
    """Over all sets, also where the time is up before all are counted."""
    for number in range(5):
        write_rows(tmp_path / f"rows-{number}.jsonl", texts(10, 3, 40))
    sets = [
        DatasetSettings(files=(f"{tmp_path}/rows-[0-1].jsonl",), kind="pretrain"),
        DatasetSettings(files=(f"{tmp_path}/rows-[2-4].jsonl",), kind="pretrain"),
    ]
    told: list[tuple[int, int]] = []
    counts = estimate.count_sets(sets, 60, lambda done, total: told.append((done, total)))
    assert [count.rows for count in counts] == [20, 30]
    assert told == [(number, 5) for number in (0, 1, 2, 2, 3, 4, 5)]
    told.clear()
    assert not any(count.is_exact for count in estimate.count_sets(sets, -1, lambda *counts: told.append(counts)))
    assert told == [(0, 5), (2, 5), (2, 5), (5, 5)]


def test_blank_lines_are_no_rows_and_the_last_needs_no_end(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n\n  \r\n{"text": "b"}')
    files = source_files([DatasetSettings(files=(f"{tmp_path}/rows.jsonl",), kind="pretrain")])
    assert count_rows(files, seconds=10) == RowCount(2, True)


def test_windows_hold_every_set_at_its_share() -> None:
    windows = estimate._windows([250, 10, 500], 100)
    assert windows.total() == 8
    assert sum(number * count for kind, number in windows.items() for *_, count in kind) == 760
    for kind in windows:
        rows = {number: count for number, _, count in kind}
        whole = sum(rows.values()) / 100
        assert all(abs(rows.get(number, 0) - share * whole) < 2 for number, share in enumerate((32.9, 1.3, 65.8)))


def test_many_windows_are_packed_as_one() -> None:
    windows = estimate._windows([25_000, 0, 75_040], 100)
    assert sorted(windows.values()) == [1, 1000]
    assert sum(number * count for kind, number in windows.items() for *_, count in kind) == 100_040
    assert estimate._windows([100_000], 100) == {((0, 0, 100),): 1000}


@pytest.mark.parametrize("name", ["short-0.jsonl", "long.parquet"])
def test_the_first_rows_of_a_file_alone(tmp_path: Path, sets: list[dict[str, str]], name: str) -> None:
    (file,) = source_files([DatasetSettings(files=(f"{tmp_path}/{name}",), kind="pretrain")])
    ids = [row.value["id"] for row in read_piece(first_piece(file, 3))]
    assert [each.partition("-")[2] for each in ids] == ["0", "1", "2"]
    assert len(list(read_piece(first_piece(file, 9999)))) == {"short-0.jsonl": 900, "long.parquet": 2500}[name]


def test_bins_of_equal_cost_are_estimated_as_they_are_packed(inputs: Inputs, tmp_path: Path) -> None:
    files = write_rows(tmp_path / "few.jsonl", texts(60, 1, 4) + texts(240, 2, 62)[:99])
    packing = PackingSettings(mode="equal_cost", token_capacity=256, visual_capacity=64, window_rows=1024)
    changes = {"data__train": [{"files": files, "kind": "pretrain"}], "packing": packing.model_dump()}
    job = Job.model_validate(inputs.job(tmp_path, images={}, **changes))
    made = prepare_here(job)
    family = preparation(inputs, [{"files": files}]).family
    guess = estimate_split(job, "train", family, family.resolved_tiling(job.images))
    assert guess.bins == made.statistics["bins"]
    fewest = estimated(inputs, tmp_path, preparation(inputs, [{"files": files}]))
    assert guess.bins > fewest.bins, "the other mode has other bins, or this shows nothing"


def test_sets_are_estimated_as_often_as_they_are_taken(inputs: Inputs, tmp_path: Path) -> None:
    few, more = (write_rows(tmp_path / f"{name}.jsonl", texts(200, name, 30)) for name in (1, 2))
    sets = [{"files": few, "repeat": 2.5}, {"files": more, "max_rows": 50}]
    made = preparation(inputs, sets)
    facts = made.write(tmp_path / "out").statistics["sets"]
    guess = estimated(inputs, tmp_path, made)
    assert [str(each.taking) for each in guess.sets] == ["500 taken, 2.5 times each", "50 taken, 150 left out"]
    for number, each in enumerate(guess.sets):
        assert each.tokens == pytest.approx(facts[str(number)]["tokens"], rel=0.15)
        assert each.bins == pytest.approx(facts[str(number)]["bins"], rel=0.3)
    assert guess.tokens == sum(each.tokens for each in guess.sets)
