"""`mmray verify` on a real Ray: what processes of one machine find, resumed, and in bounded memory."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mmray.config.job import Job
from mmray.errors import UserError
from mmray.prepared import verify as module
from mmray.prepared.verify import Part, PartResult, in_processes, verify
from pipelines.verify import run_parts
from tests.conftest import Inputs, RayHead
from tests.here import prepare_here
from tests.mmray.preparing import blank_unseen


class Killed(BaseException):
    """Ends the driver like a signal."""


@pytest.fixture
def broken(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prepared dataset two of whose pictures break afterwards, in parts of two bins."""
    monkeypatch.setattr(module, "BINS_PER_PART", 2)
    data = shutil.copytree(inputs.folder / "data", tmp_path / "data")
    rows = {"files": str(data / "pages.jsonl"), "kind": "pretrain"}
    prepared = prepare_here(Job.model_validate(inputs.job(tmp_path, data={"train": [rows], "max_rejected_share": 1})))
    uris = sorted({image["uri"] for packed in prepared.bins(0, len(prepared)) for image in packed.images})
    Path(uris[0]).unlink()
    blank_unseen(Path(uris[1]))
    return str(prepared.path)


def reported(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(f"{path}-verify/report.jsonl").read_text().splitlines()]


def test_a_cluster_finds_what_this_machine_finds_and_continues_what_was_begun(
    ray_head: RayHead, broken: str, tmp_path: Path
) -> None:
    here = verify(broken, run_parts=in_processes(1))
    expected = reported(broken)
    assert {"image_missing", "image_unreadable"} <= {entry["reason"] for entry in expected}
    shutil.rmtree(f"{broken}-verify")

    def killed(path: str, parts: Sequence[Part]) -> Iterator[tuple[int, PartResult]]:
        for number, result in enumerate(run_parts(path, parts)):
            if number == 2:
                raise Killed
            yield result

    with pytest.raises(Killed):
        verify(broken, run_parts=killed)
    written = {file.name: file.stat().st_mtime_ns for file in Path(f"{broken}-verify").glob("part-*")}
    assert len(written) == 2
    seen: list[tuple[int, int]] = []
    there = verify(broken, run_parts=run_parts, on_progress=lambda done, total: seen.append((done, total)))
    assert reported(broken) == expected
    assert (there.pictures, there.listed) == (here.pictures, here.listed)
    assert seen[0][0] > 0, "it begins with what was done"
    for name, time in written.items():
        assert (Path(f"{broken}-verify") / name).stat().st_mtime_ns == time


def test_a_mistake_that_an_actor_finds_is_one_line(ray_head: RayHead, broken: str) -> None:
    for file in Path(broken).glob("bins-*"):
        file.write_bytes(b"PAR1 cut off")
    with pytest.raises(UserError, match="prepared/train"):
        verify(broken, run_parts=run_parts)
