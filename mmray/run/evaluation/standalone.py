"""Evaluating rows of files with a model, apart from any training: what `jobs/evaluate.py` does.

Each batch's results are written as they come, so that a killed evaluation continues; the files for people come last.
`run_here` does all work in this process; `pipelines/evaluate.py` has the same on a cluster.
"""

import hashlib
import json
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from mmray.config.job import Job
from mmray.errors import UserError
from mmray.rows.endings import Endings
from mmray.rows.files import Chunk, source_files
from mmray.run.evaluation.evaluator import RowEvaluator
from mmray.run.evaluation.model import EvaluatedModel
from mmray.run.evaluation.rows import EvaluationData, RowEncoder, RowRenderer, as_rows
from mmray.run.scoring.page import evaluation_page
from mmray.run.scoring.results import (
    EVALUATIONS_FOLDER,
    METRICS,
    PARTS,
    PREDICTIONS,
    REPORT,
    BadRow,
    RowResult,
    ShownRows,
    from_parquet,
    metrics,
    to_parquet,
)
from mmray.run.scoring.settings import EvaluationSettings
from mmray.storage import Folder, explained

_NOT_IN_NAMES = re.compile(r"[^\w.=-]+")

_NOT_READ = {"train", "eval", "rows", "weigh_by", "size_cache", "verify_rows"}
"""Settings of `data` that change no result of an evaluation, or count with its sets."""

_PLAN, _OWNER = "plan.json", "owner"

BatchResult = tuple[str, list[RowResult], list[BadRow]]
"""The name of a batch that is done, its results and its bad rows."""


@dataclass(frozen=True)
class EvaluationPlan:
    """One evaluation: which model on which rows, and how. Small enough to send to every actor."""

    job: Job
    model: EvaluatedModel
    data: EvaluationData
    settings: EvaluationSettings
    limit: int | None = None

    @property
    def folder(self) -> str:
        """Folder of the results, by path or URI."""
        data = self.data.name
        ending = "" if data == "eval" else f"-{data.rstrip('/').rpartition('/')[2].split('.')[0]}"
        ending = _NOT_IN_NAMES.sub("_", ending) + ("" if self.limit is None else f"-limit{self.limit}")
        return f"{self.job.output.run.rstrip('/')}/{EVALUATIONS_FOLDER}/{self.model.name}{ending}"

    def earlier(self) -> dict[str, Any] | None:
        """The content of metrics.json in the folder; None where there is none."""
        folder = Folder(self.folder)
        with explained(self.folder):
            return json.loads(folder.read(METRICS)) if folder.exists(METRICS) else None

    def is_of(self, values: dict[str, Any]) -> bool:
        """True if the content of a metrics.json is the result of this plan."""
        return bool(values.get("plan") == json.loads(json.dumps(self.identity)))

    def encoder(self) -> RowEncoder:
        """The encoder of its rows."""
        return RowEncoder(self.job, self.data, batch_rows=self.settings.generate.batch_rows)

    def evaluator(self, encoder: RowEncoder, device: torch.device) -> RowEvaluator:
        """Loads the model onto a device."""
        model = self.model.load(self.job, device)
        eos = model.generation_config.eos_token_id
        stops = [*(eos if isinstance(eos, list) else [eos]), *Endings(self.data.datasets, encoder.family).documents]
        return RowEvaluator(
            model, encoder.family, self.settings, dtype=model.dtype, device=device,
            stop_token_ids=[token for token in stops if token is not None],
        )  # fmt: skip

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the results depend on, as plain JSON: an evaluation continues only where it is equal."""
        files = [f"{file.uri} size={file.size} version={file.version}" for file in source_files(self.data.datasets)]
        job, settings = self.job, self.settings.model_dump(mode="json", exclude={"every_steps", "metrics", "sets"})
        read_by = {
            "model": job.model.model_dump(mode="json"), "images": job.images.model_dump(mode="json"),
            "packing": job.packing.model_dump(mode="json"), "data": job.data.model_dump(mode="json", exclude=_NOT_READ),
            "sets": [dataset.record() for dataset in self.data.datasets],
        }  # fmt: skip
        return {
            "model": asdict(self.model), "weights": _digest(self.model.files(job)), "base": job.model.path,
            "data": self.data.name, "rows": _digest(files), "read_by": _digest(read_by), "limit": self.limit,
            "settings": settings,
        }  # fmt: skip


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


RunBatches = Callable[[EvaluationPlan, Sequence[Chunk], Collection[int]], Iterator[BatchResult]]
"""Does the batches of some chunks, without the rows whose numbers are given."""


def evaluate(
    plan: EvaluationPlan, *, run_batches: RunBatches | None = None, replace: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], bool]:  # fmt: skip
    """Evaluates a model; returns the content of metrics.json, and whether anything was left to do.

    replace: whether results of the same evaluation are made anew; otherwise they are returned.
    on_progress: called with the rows that are done, and all of them.

    Raises UserError for rows, a model or a folder that cannot be used.
    """
    folder, identity, started = Folder(plan.folder), plan.identity, time.monotonic()
    if not replace and (known := plan.earlier()) is not None and plan.is_of(known):
        return known, False
    with explained(plan.folder):
        parts = _Parts(plan.folder, identity, replace=replace)
        chunks = plan.data.chunks(plan.limit)
        total, done = sum(chunk.num_rows for chunk in chunks), parts.done()
        done_rows = len(done)
        on_progress(done_rows, total)
        for name, results, bad in (run_batches or run_here)(plan, chunks, done):
            parts.write(name, results, bad)
            done_rows += len({result.source for result in results} | {row.source for row in bad})
            on_progress(min(done_rows, total), total)
        on_progress(total, total)
        parts.check_owner()
        results, bad = parts.read()
        found_metrics = metrics(
            results, bad, step=plan.model.step, model=plan.model.path or plan.job.model.path or "random weights",
            sets=as_rows(plan.data), seconds=round(time.monotonic() - started, 1),
            normalisation=plan.settings.normalisation.model_dump(mode="json"),
            generation=plan.settings.generate.model_dump(mode="json"), plan=identity,
        )  # fmt: skip
        shown = ShownRows.of(results)
        results = parts.with_pictures(results, shown.all)
        write_results(folder, found_metrics, results, shown, title=plan.job.name)
        parts.remove()
    return found_metrics, True


def write_results(
    folder: Folder, values: dict[str, Any], results: Sequence[RowResult], shown: ShownRows, *, title: str
) -> None:
    """Writes the three files of an evaluation, metrics.json last."""
    folder.create()
    folder.write(PREDICTIONS, to_parquet(results, shown.all))
    page = evaluation_page(values, results, shown, title=title)
    folder.write(REPORT, page.encode(errors="backslashreplace"))
    folder.write(METRICS, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())


def run_here(plan: EvaluationPlan, chunks: Sequence[Chunk], done: Collection[int]) -> Iterator[BatchResult]:
    """Does the batches of some chunks in this process, on its first GPU where it has one."""
    device = torch.device("cuda" if torch.cuda.is_available() and plan.job.resources.use_gpu is not False else "cpu")
    encoder = plan.encoder()
    renderer = evaluator = None
    for chunk in chunks:
        for batch in encoder.batches(chunk, done):
            if renderer is None or evaluator is None:
                renderer, evaluator = RowRenderer(encoder.family, encoder.policy), plan.evaluator(encoder, device)
            yield batch.name, *evaluator(renderer(batch))


class _Parts:
    """The batches of an evaluation that are done: a Parquet file each, below `parts`."""

    def __init__(self, folder: str, identity: dict[str, Any], *, replace: bool) -> None:
        """Opens those of the same evaluation; others are deleted. Another process that works on them ends."""
        self._uri, self._all, self._folder = folder, Folder(folder), Folder(f"{folder}/{PARTS}")
        content = json.dumps(identity, sort_keys=True).encode()
        if replace or not self._folder.exists(_PLAN) or self._folder.read(_PLAN) != content:
            self._all.remove_tree(PARTS)
            self._folder.create()
            self._folder.write(_PLAN, content)
        self._owner = uuid.uuid4().bytes
        self._folder.write(_OWNER, self._owner)

    @property
    def names(self) -> list[str]:
        """Names of the batches that are done, sorted."""
        ending = ".parquet"
        return [name.removesuffix(ending) for name in self._folder.names() if name.endswith(ending)]

    def done(self) -> frozenset[int]:
        """The numbers of the rows with a result. Bad rows without one are forgotten: what was wrong with them, such as
        a missing picture, may be mended by now."""
        numbers: set[int] = set()
        for name in self.names:
            results, bad = self._read(name)
            numbers.update(result.number for result in results)
            sources = {result.source for result in results}
            if not results:
                self._folder.remove(f"{name}.parquet")
            elif any(row.source not in sources for row in bad):
                self.write(name, results, [row for row in bad if row.source in sources])
        return frozenset(numbers)

    def write(self, name: str, results: Sequence[RowResult], bad: Sequence[BadRow]) -> None:
        """Commits the results of a batch. Raises UserError where another process has taken over."""
        self.check_owner()
        self._folder.write(f"{name}.parquet", to_parquet(results, bad=[asdict(row) for row in bad]))

    def check_owner(self) -> None:
        """Raises UserError where another process has begun to work on the evaluation."""
        if not self._folder.exists(_OWNER) or self._folder.read(_OWNER) != self._owner:
            raise UserError(f"{self._uri}: another evaluation into this folder was started and goes on; this one ends")

    def _read(self, name: str) -> tuple[list[RowResult], list[BadRow]]:
        results, metadata = from_parquet(self._folder.read(f"{name}.parquet"))
        return results, [BadRow(**row) for row in metadata["bad"]]

    def read(self) -> tuple[list[RowResult], list[BadRow]]:
        """All results in the order of rows, without pictures, and all bad rows."""
        results: list[RowResult] = []
        bad: list[BadRow] = []
        for name in self.names:
            part, bad_part = self._read(name)
            results += [RowResult(**{**vars(result), "picture": None}) for result in part]
            bad += bad_part
        results.sort(key=lambda result: (result.number, result.turn or 0))
        return results, sorted(bad, key=lambda row: (row.set, row.source))

    def with_pictures(self, results: Sequence[RowResult], places: Sequence[int]) -> list[RowResult]:
        """The results, those at some places with their pictures."""
        wanted = {(results[place].number, results[place].turn) for place in places}
        pictures = {
            (result.number, result.turn): result.picture
            for name in self.names for result in self._read(name)[0] if (result.number, result.turn) in wanted
        }  # fmt: skip
        return [
            RowResult(**{**vars(result), "picture": pictures.get((result.number, result.turn))}) for result in results
        ]

    def remove(self) -> None:
        """Deletes the parts."""
        self._all.remove_tree(PARTS)
