"""What breaks while preparing reaches the user as one line, and what was committed is kept.

On a real Ray where it is `prepare`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, RayTaskError

from mmray.config.job import Job
from mmray.errors import UserError
from mmray.prepared import PreparedDataset
from pipelines.dataset import out_of_room
from pipelines.prepare import prepare
from tests.conftest import Inputs, RayHead
from tests.here import prepare_here


def job_of(inputs: Inputs, folder: Path, rows: Path, **data: object) -> Job:
    """A job on a copy of the pages' rows, in windows of 20; it may be spoiled."""
    content = inputs.job(folder, packing__window_rows=20)
    root = str(inputs.folder / "data")
    content["data"] = {"train": [{"files": str(rows), "kind": "pretrain", "image_root": root}], **data}
    return Job.model_validate(content)


@pytest.fixture
def rows(inputs: Inputs, tmp_path: Path) -> Path:
    return shutil.copy(inputs.folder / "data" / "pages.jsonl", tmp_path / "rows.jsonl")


def once(do: Callable[[], object]) -> Callable[[int, int], None]:
    """A progress callback that does something when the first window is committed."""
    left = [do]

    def on_progress(done: int, total: int) -> None:
        if done and left:
            left.pop()()

    return on_progress


def parquet_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.parquet")}


def test_a_folder_that_breaks_in_an_actor_is_one_line_and_the_next_run_has_the_same_result(
    ray_head: RayHead, inputs: Inputs, rows: Path, tmp_path: Path
) -> None:
    """A file where the folder was: the actors, not the driver, find that they cannot write.

    Of 46 windows, so that most are still to come when the first is committed.
    """
    rows.write_text(rows.read_text() * 20)
    expected = prepare_here(job_of(inputs, tmp_path / "whole", rows))
    job = job_of(inputs, tmp_path / "broken", rows)
    folder, aside = Path(job.prepared_path("train")), tmp_path / "aside"

    def put_a_file() -> None:
        folder.rename(aside)
        folder.write_text("in the way")

    with pytest.raises(UserError, match=rf"^{folder}: [\w ]+; a file stands where a folder should be; move it, or"):
        prepare(job, "train", on_progress=once(put_a_file))
    folder.unlink()
    aside.rename(folder)
    committed = {path.name: path.stat().st_mtime_ns for path in folder.glob("bins-*")}
    assert 0 < len(list(folder.glob("window-*"))) <= len(committed) < len(expected.manifest["shards"])
    again = prepare_here(job)
    assert parquet_of(again.path) == parquet_of(expected.path)
    assert committed.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("bins-*")}.items()


def test_rows_that_change_while_they_are_prepared_stop_it(inputs: Inputs, rows: Path, tmp_path: Path) -> None:
    job = job_of(inputs, tmp_path / "job", rows)

    def replace() -> None:
        lines = rows.read_text().splitlines(keepends=True)
        rows.write_text("".join(lines[:30]))

    with pytest.raises(UserError, match=f"{rows} has changed while it was being prepared; .* --replace"):
        prepare_here(job, on_progress=once(replace))
    with pytest.raises(UserError, match="no prepared dataset"):
        PreparedDataset(job.prepared_path("train"))
    with pytest.raises(UserError, match=r"(?s)files\[0\]: .* -> .*--replace"):
        prepare_here(job)


def test_ids_that_stand_twice_are_rejected_on_the_cluster_too_and_blank_lines_are_progress(
    ray_head: RayHead, inputs: Inputs, rows: Path, tmp_path: Path
) -> None:
    first = [{"id": f"id-{number}", "text": f"words {number}"} for number in range(12)]
    rows.write_text("\n\n".join(map(json.dumps, [*first, *first[3:], {"id": "last", "text": "words"}])) + "\n" * 90)
    seen: list[tuple[int, int]] = []
    job = job_of(inputs, tmp_path, rows, duplicate_ids="reject")
    dataset, _ = prepare(job, "train", on_progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == [*range(0, 121, 20), seen[0][1]], "blank lines are no rows, but progress"
    facts = dataset.statistics
    assert facts["rows_read"] == 22 == facts["rows_packed"] + facts["rows_rejected"]
    assert facts["rejected_by_reason"] == {"duplicate_id": 9}
    assert facts["duplicate_ids"] == 0
    places = [row["source"] for row in dataset.rejected().to_pylist() if row["reason"] == "duplicate_id"]
    assert places == [f"{rows}:{line}" for line in range(25, 43, 2)]


def caused_by(cause: BaseException) -> BaseException:
    """An error as Ray hands it on: wrapped, and wrapped again."""
    try:
        try:
            raise cause
        except type(cause) as inner:
            raise RayTaskError("map", "traceback", inner) from inner
    except RayTaskError as wrapped:
        return wrapped


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ObjectStoreFullError("full"), "object store is full"),
        (OutOfDiskError("full"), "spills"),
        (OutOfMemoryError("killed"), "out of memory"),
        (caused_by(OutOfMemoryError("killed")), "out of memory"),
        (caused_by(ValueError("a bug")), ""),
        (RuntimeError("a bug"), ""),
    ],
)
def test_what_ray_lacks_is_told_and_bugs_stay_bugs(error: BaseException, words: str) -> None:
    assert words in out_of_room(error)
    assert bool(out_of_room(error)) == bool(words)
