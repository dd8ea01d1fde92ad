"""What breaks while preparing on a real Ray reaches the user as one line, and what was committed is kept."""

import shutil
from pathlib import Path

import pytest
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, RayTaskError

import pipelines.prepare
import pipelines.row_ids
from mmray.errors import UserError
from pipelines.dataset import out_of_room
from pipelines.prepare import prepare
from tests.conftest import Inputs, RayHead
from tests.here import prepare_here
from tests.mmray.prepared.test_driver import job_of, job_on, once, write_twice
from tests.mmray.preparing import contents


@pytest.fixture
def rows(inputs: Inputs, tmp_path: Path) -> Path:
    return shutil.copy(inputs.folder / "data" / "pages.jsonl", tmp_path / "rows.jsonl")


class Killed(BaseException):
    """Ends a prepare like a signal."""


def kill() -> None:
    raise Killed


def test_a_folder_that_breaks_in_an_actor_is_one_line_and_the_next_run_has_the_same_result(
    ray_head: RayHead, inputs: Inputs, rows: Path, tmp_path: Path
) -> None:
    """A file where the folder was: the actors, not the driver, find that they cannot write.

    An earlier run has committed a window, and the file stands there before any actor starts: however busy the machine,
    each window that an actor tries to write is one it cannot.
    """
    job = job_on(rows, inputs, tmp_path / "broken")
    with pytest.raises(Killed):
        prepare_here(job, on_progress=once(kill))
    folder, aside = Path(job.prepared_path("train")), tmp_path / "aside"

    def put_a_file() -> None:
        folder.rename(aside)
        folder.write_text("in the way")

    with pytest.raises(UserError, match=rf"^{folder}: [\w ]+; a file stands where a folder should be; move it, or"):
        prepare(job, "train", on_progress=once(put_a_file))
    folder.unlink()
    aside.rename(folder)
    (committed,) = folder.glob("bins-*")
    written = committed.stat().st_mtime_ns
    expected = prepare_here(job_on(rows, inputs, tmp_path / "whole"))
    assert contents(prepare_here(job).path) == contents(expected.path)
    assert committed.stat().st_mtime_ns == written


def test_rows_that_are_repeated_or_stand_twice_are_equal_on_the_cluster_in_graphs_of_few_chunks(
    ray_head: RayHead, inputs: Inputs, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph is made of some chunks at a time; which, does not change the bins."""
    write_twice(rows)
    pages = {"kind": "pretrain", "image_root": str(inputs.folder / "data"), "files": str(rows)}
    sets = [pages | {"repeat": 1.5}, pages | {"max_rows": 20}]
    options = {"data": {"train": sets, "duplicate_ids": "reject", "max_rejected_share": 1}}
    expected = prepare_here(job_of(inputs, tmp_path / "here", **options))
    assert expected.statistics["rows_repeated"] > 3
    assert expected.statistics["rejected_by_reason"]["duplicate_id"] > 3
    monkeypatch.setattr(pipelines.prepare, "CHUNKS_AT_ONCE", 2)
    monkeypatch.setattr(pipelines.prepare, "CHUNKS_AN_ACTOR", 1)
    monkeypatch.setattr(pipelines.row_ids, "CHUNKS_AT_ONCE", 2)
    dataset, _ = prepare(job_of(inputs, tmp_path / "ray", **options), "train")
    assert len(dataset.manifest["shards"]) > 2
    assert contents(dataset.path) == contents(expected.path)


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
