"""Preparing on a real Ray: what the library alone gives, to the byte, and what Prometheus is told."""

import contextlib
import csv
import gzip
import io
import json
from pathlib import Path
from unittest.mock import ANY

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from jobs.preparing import prepare_splits
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.images.size_cache import read_sizes
from mmray.prepared import PreparedDataset, driver
from mmray.rows.from_pdf import write_pdf_rows
from pipelines import measures
from pipelines.prepare import prepare
from tests.conftest import Inputs, RayHead
from tests.here import prepare_here, prepare_without_ray
from tests.mmray.pdfs import pdf_of
from tests.mmray.preparing import contents
from tests.scraping import wait_until_told


@pytest.fixture(scope="module")
def prepared(
    ray_head: RayHead, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, PreparedDataset]:
    folder = tmp_path_factory.mktemp("prepared")
    job = Job.model_validate(inputs.job(folder, name="prepared", resources__encode_actors=1))
    calls: list[tuple[int, int]] = []
    dataset, made = prepare(job, "train", on_progress=lambda done, total: calls.append((done, total)))
    assert made
    total = sum(inputs.rows.values())
    assert calls == [(0, total), (64, total), (total, total)]
    return job, dataset


def test_the_library_without_ray_gives_the_same_bytes(
    prepared: tuple[Job, PreparedDataset], inputs: Inputs, tmp_path: Path
) -> None:
    job, dataset = prepared
    assert contents(prepare_here(Job.model_validate(inputs.job(tmp_path))).path) == contents(dataset.path)
    assert not prepare(job, "train")[1], "there is nothing left to do"


def test_a_dataset_without_bins_is_a_mistake_for_the_command(ray_head: RayHead, inputs: Inputs, tmp_path: Path) -> None:
    """Each time that it runs."""
    job = Job.model_validate(inputs.job(tmp_path, packing__token_capacity=1))
    data = job.data.model_copy(update={"max_rejected_share": 1})
    job = job.model_copy(update={"data": data})
    assert len(prepare_here(job)) == 0
    with pytest.raises(UserError, match="prepared/train has no bins: every row was rejected, see its rejected"):
        prepare_splits(job)


def test_prometheus_is_told_the_same_counts(prepared: tuple[Job, PreparedDataset]) -> None:
    """At the node's endpoint, summed over all actors, also after these are gone."""
    facts = prepared[1].statistics
    expected: dict[measures.Measure, object] = {
        measures.ROWS_READ: {("train",): facts["rows_read"]},
        measures.ROWS_PACKED: {("train",): facts["rows_packed"]},
        measures.BINS_WRITTEN: {("train",): len(prepared[1])},
        measures.ROWS_REJECTED: {("train", reason): rows for reason, rows in facts["rejected_by_reason"].items()},
        measures.STAGE_BUSY_SECONDS: {("encode",): ANY, ("pack",): ANY},
    }
    wait_until_told(expected, job_name="prepared")


FORMS = ("rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet", "rows.jsonl.zst", "pages.jsonl")


def write_forms(inputs: Inputs, folder: Path) -> list[dict[str, object]]:
    """The rows of the inputs in each of FORMS, the last of them the pages of a PDF; returns the data sets."""
    lines = (inputs.folder / "data" / "pages.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for line in lines if isinstance(row := _parsed(line), dict) and isinstance(row.get("text"), str)]
    texts = [{"id": str(row.get("id")), "text": row["text"], "images": row.get("images") or []} for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in texts).encode()
    table = [{**row, "images": json.dumps(row["images"])} for row in texts]
    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, ["id", "text", "images"])
    writer.writeheader()
    writer.writerows(table)
    half = text.index(b"\n", len(text) // 2) + 1
    contents_of = {
        "rows.jsonl.gz": gzip.compress(text[:half]) + gzip.compress(text[half:]),
        "rows.json": json.dumps(texts).encode(), "rows.csv": sheet.getvalue().encode(),
        "rows.jsonl.zst": zstandard.compress(text),
    }  # fmt: skip
    for name, content in contents_of.items():
        (folder / name).write_bytes(content)
    pq.write_table(pa.Table.from_pylist(texts), folder / "rows.parquet", row_group_size=7)
    pdf_of(folder / "scan.pdf", [{"points": (90 + 3 * number, 120)} for number in range(40)])
    write_pdf_rows([str(folder / "scan.pdf")], str(folder / "pages.jsonl"), text=True)
    data = str(inputs.folder / "data")
    return [
        {"files": str(folder / name), "kind": "pretrain", "image_root": str(folder) if name == "pages.jsonl" else data}
        for name in FORMS
    ]


def _parsed(line: str) -> object:
    with contextlib.suppress(ValueError):
        return json.loads(line)
    return None


def test_every_form_gives_the_same_bytes_with_two_actors_that_continue_a_killed_run(
    ray_head: RayHead, inputs: Inputs, tmp_path: Path
) -> None:
    """The library makes the first window and is killed; what it then makes in one go is the same."""
    (tmp_path / "forms").mkdir()
    data = {"train": write_forms(inputs, tmp_path / "forms"), "max_rejected_share": 1}
    changes: dict[str, object] = {"data": data, "packing__mode": "equal_cost"}
    job = Job.model_validate(inputs.job(tmp_path, **changes, resources__encode_actors=2))
    assert prepare_without_ray(job, tmp_path, kill=True).returncode == -9
    (first,) = Path(job.prepared_path("train")).glob("bins-*")
    written = first.stat().st_mtime_ns
    dataset, made = prepare(job, "train")
    assert made
    assert first.stat().st_mtime_ns == written
    facts = dataset.statistics
    assert facts["rows_packed"] > 150
    assert facts["rows_read"] == facts["rows_packed"] + facts["rows_rejected"]
    assert len(dataset.manifest["shards"]) > 2
    here = prepare_here(Job.model_validate(inputs.job(tmp_path / "here", **changes)))
    assert contents(dataset.path) == contents(here.path)


def test_few_eval_rows_are_prepared_in_the_driver(
    ray_head: RayHead, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same bytes, the same sizes in the cache and the same errors."""
    for graph in ("pipelines.prepare.one_row_blocks", "pipelines.row_ids.one_row_blocks"):
        monkeypatch.setattr(graph, lambda *_: pytest.fail("Ray Data was asked"))
    eval_rows = [{"files": str(inputs.folder / "data" / "chat.jsonl"), "kind": "chat"}]

    def job_in(folder: Path, **changes: object) -> Job:
        content = inputs.job(folder, data__eval=eval_rows, data__size_cache=str(folder / "sizes.parquet"), **changes)
        return Job.model_validate(content)

    def sizes_in(folder: Path) -> list[dict[str, object]]:
        return sorted(read_sizes(str(folder / "sizes.parquet")).to_pylist(), key=str)

    dataset, made = prepare(job_in(tmp_path / "ray"), "eval")
    assert made
    expected, _ = driver.prepare(job_in(tmp_path / "here"), "eval")
    assert contents(dataset.path) == contents(expected.path)
    assert sizes_in(tmp_path / "ray") == sizes_in(tmp_path / "here") != []
    with pytest.raises(UserError, match=r"chat\.jsonl:5: image_missing: "):
        prepare(job_in(tmp_path / "error", data__on_bad_row="error"), "eval")
