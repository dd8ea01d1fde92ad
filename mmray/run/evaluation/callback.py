"""Evaluation during training, as a callback: losses of the eval sets, and texts that the model writes for some rows.

Nothing of training depends on it: the random generators are put back as they were, the model is in evaluation mode
meanwhile, and the batches of training come in the same order.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmray.batches.micro_batch import MicroBatch
from mmray.batches.plan import BatchMaker
from mmray.errors import RowError
from mmray.families import Family
from mmray.loss.labels import IGNORE_INDEX, LossRule
from mmray.loss.settings import loss_record
from mmray.loss.sources import label_maker
from mmray.prepared import PreparedDataset
from mmray.run.callback import Callback, DoneStep, Evaluation, Loop
from mmray.run.evaluation.evaluator import text_results
from mmray.run.evaluation.generate import TextGenerator
from mmray.run.evaluation.in_training import EvaluationPlans, EvaluationSource, kinds_of
from mmray.run.evaluation.prompts import PromptCutter, ReadingTask
from mmray.run.evaluation.standalone import write_results
from mmray.run.scoring.results import EVALUATIONS_FOLDER, BadRow, RowResult, ShownRows, metrics
from mmray.run.scoring.settings import EvaluationSettings
from mmray.run.skipped import BatchCounts
from mmray.run.state import RunState
from mmray.storage import Folder, replacing
from mmray.training.checkpoint import rng_kept
from mmray.training.engine import TokenSums

PROGRESS_FILE = ".evaluating.json"
"""File in the run's folder with the progress of an evaluation, while there is one. It is no record."""


class Evaluate(Callback):
    """Evaluates the job's eval set after the steps at which it is due (`EvaluationPlans`)."""

    def __init__(self, run: RunState, plans: EvaluationPlans | None, source: EvaluationSource | None) -> None:
        """plans, source: both None for a run without evaluations."""
        self._run, self._plans, self._source = run, plans, source
        self._progress = _Progress(run.folder.path / PROGRESS_FILE) if run.is_first else None

    def after_step(self, loop: Loop, done: DoneStep) -> None:
        if self._plans is None or not self._plans.is_due(done.number):
            return
        started = time.monotonic()
        try:
            with rng_kept():
                evaluation = self._evaluation(done)
        finally:
            if self._progress:
                self._progress.remove()
        loop.evaluated(replace(evaluation, seconds=time.monotonic() - started))

    def _evaluation(self, done: DoneStep) -> Evaluation:
        assert self._plans is not None
        assert self._source is not None
        run, rank_counts, settings = self._run, BatchCounts(), self._run.plan.job.evaluation
        batches = rank_counts.through(self._source.losses())
        if settings is None:  # as before there were such settings: one number, and no time of its own
            whole = run.engine.evaluate(batches)
            return _evaluation(done, whole, self._counts(rank_counts))
        self._tell(done.number, "loss", 0, 0)
        sums = run.engine.evaluate_sets(batches, len(self._kinds))
        whole = TokenSums(*(sum(values) for values in zip(*sums, strict=True)))
        evaluation = replace(
            _evaluation(done, whole, self._counts(rank_counts)),
            loss_by_set=_by_set([of_set.mean_loss for of_set in sums]),
            token_accuracy_by_set=_by_set([of_set.accuracy for of_set in sums]),
        )
        return self._with_texts(evaluation, settings) if self._plans.texts is not None else evaluation

    def _counts(self, counts: BatchCounts) -> BatchCounts:
        """The counts of all ranks."""
        every = self._run.ranks.every((counts.samples, counts.skipped))
        return BatchCounts(sum(samples for samples, _ in every), [one for _, skipped in every for one in skipped])

    def _with_texts(self, evaluation: Evaluation, settings: EvaluationSettings) -> Evaluation:
        """The evaluation with what the model writes for the chosen rows, whose files rank 0 writes. Collective."""
        results, bad = self._read(evaluation.step)
        every = self._run.ranks.every((results, bad))
        joined = [result for rank_results, _ in every for result in rank_results]
        joined.sort(key=lambda result: result.number)
        bad_rows = [row for _, rank_bad in every for row in rank_bad]
        values = metrics(
            joined, bad_rows, step=evaluation.step, model=self._run.folder.uri, sets=[
                {"name": str(number), "kind": dataset["kind"], "files": dataset["files"]}
                for number, dataset in enumerate(self._prepared.manifest["record"]["datasets"])
            ],
            normalisation=settings.normalisation.model_dump(mode="json"),
            generation=settings.generate.model_dump(mode="json"), loss=evaluation.loss,
            loss_by_set=evaluation.loss_by_set,
        )  # fmt: skip
        shown = ShownRows.of(joined)
        if self._run.is_first:
            folder = self._run.folder.path / EVALUATIONS_FOLDER / f"{evaluation.step:08d}"
            write_results(Folder(str(folder)), values, joined, shown, title=self._run.plan.job.name)
        reading: dict[str, float | None] = {name: values["all"][name] for name in settings.metrics}
        return replace(evaluation, reading=reading, texts=tuple(joined[place] for place in shown.all))

    def _read(self, step: int) -> tuple[list[RowResult], list[BadRow]]:
        """This rank's texts, and its bad rows."""
        assert self._plans is not None
        assert self._plans.texts is not None
        assert self._source is not None
        results: list[RowResult] = []
        bad: list[BadRow] = []
        done: set[tuple[int, int]] = set()
        engine = self._run.engine
        engine.deepspeed.eval()
        try:
            for number, batches in enumerate(self._source.texts()):
                self._tell(step, "rows", number, self._plans.rounds)
                rows = self._plans.texts.rows[number][self._run.ranks.rank]
                tasks = [self._task(batch, row.set) for (batch, _), row in zip(batches, rows)]
                written = self._writer.write_all([task for task, _ in tasks])
                for row, (batch, picture), (task, problem), text in zip(rows, batches, tasks, written):
                    if (row.bin, row.sample) in done or self._is_elsewhere(number, row):
                        continue
                    done.add((row.bin, row.sample))
                    known = self._described(batch, row)
                    if problem is not None:
                        bad.append(BadRow(known["id"], known["source"], known["set"], *problem))
                    else:
                        results += text_results(known, [(task, text)], picture, self._settings)
        finally:
            engine.deepspeed.train()
        return results, bad

    def _is_elsewhere(self, round_number: int, row: Any) -> bool:
        """True if a lower rank has the row in this round too, which it counts."""
        assert self._plans is not None
        assert self._plans.texts is not None
        ranks = self._plans.texts.rows[round_number]
        return any(row in ranks[rank] for rank in range(self._run.ranks.rank))

    def _task(self, batch: MicroBatch, set_number: int) -> tuple[ReadingTask, tuple[str, str] | None]:
        """The task of a row, and what is wrong with it. A bad row has a task too, which is not counted: ranks must
        generate equally often."""
        problem = None
        if batch.skipped:
            problem = batch.skipped[0].reason, batch.skipped[0].message
        try:
            (task,) = self._cutter.tasks(self._by_turns(batch, set_number), self._kinds[set_number])
        except RowError as error:
            problem = problem or (error.reason, error.message)
            task = self._cutter.whole(batch)
        return task, problem

    def _by_turns(self, batch: MicroBatch, set_number: int) -> MicroBatch:
        """The micro-batch with labels of the assistant's turns, where the job trains on other tokens of its chats."""
        if self._kinds[set_number] != "chat" or self._losses[set_number] == "sampled":
            return batch
        masked = batch.masked
        rules = np.full(len(masked.lengths), LossRule.ROLES)
        labels = self._turns.of_arrays(
            masked.input_ids, masked.lengths, rules, np.zeros(len(masked.input_ids), dtype=bool), masked.blocks
        )
        labels[int(masked.lengths[0]) :] = IGNORE_INDEX
        return MicroBatch(replace(masked, labels=labels), batch.family)

    def _described(self, batch: MicroBatch, row: Any) -> dict[str, Any]:
        packed = self._prepared.bin(row.bin)
        return {
            "number": row.bin * 1_000_000 + row.sample, "id": packed.sample_ids[row.sample],
            "source": packed.sample_sources[row.sample], "set": str(row.set), "bucket": packed.bucket,
        }  # fmt: skip

    def _tell(self, step: int, what: str, done: int, total: int) -> None:
        if self._progress:
            self._progress.write({"step": step, "what": what, "done": done, "total": total})

    # ---------------------------------------------------------------- what stays the same

    @property
    def _settings(self) -> EvaluationSettings:
        settings = self._run.plan.job.evaluation
        assert settings is not None
        generate = settings.generate.model_copy(update={"turns": "last"})
        return settings.model_copy(update={"generate": generate})

    @cached_property
    def _prepared(self) -> PreparedDataset:
        return PreparedDataset(self._run.plan.job.prepared_path("eval"))

    @cached_property
    def _kinds(self) -> Sequence[Any]:
        return kinds_of(self._prepared)

    @cached_property
    def _losses(self) -> list[Any]:
        """The `loss` setting of each set, as recorded."""
        whole = loss_record(self._run.plan.job.loss)
        return [dataset.get("loss", whole) for dataset in self._prepared.manifest["record"]["datasets"]]

    @cached_property
    def _family(self) -> Family:
        assert self._plans is not None
        return BatchMaker(self._plans.losses).family

    @cached_property
    def _turns(self) -> Any:
        return label_maker("sampled", self._family)

    @cached_property
    def _cutter(self) -> PromptCutter:
        return PromptCutter(self._family, self._settings.generate, self._settings.prompt)

    @property
    def _writer(self) -> TextGenerator:
        """Made anew for each evaluation: at the end of a training stage the engine builds another model."""
        engine = self._run.engine
        return TextGenerator(
            engine.model, self._cutter, self._settings.generate, dtype=engine.dtype, device=engine.device,
            stop_token_ids=self._document_ends(), synced=engine.zero_stage == 3 and engine.world_size > 1,
        )  # fmt: skip

    def _document_ends(self) -> list[int]:
        ends = (dataset.get("end_of_document") for dataset in self._prepared.manifest["record"]["datasets"])
        return [self._family.token_id(end) for end in ends if end]


def _evaluation(done: DoneStep, whole: TokenSums, counts: BatchCounts) -> Evaluation:
    return Evaluation(done.number, done.epoch, whole.mean_loss, whole.trained_tokens, counts, whole.accuracy)


def _by_set(values: Sequence[float]) -> dict[str, float | None]:
    """The values of sets by their numbers; None for one that is not finite."""
    return {str(number): value if math.isfinite(value) else None for number, value in enumerate(values)}


class _Progress:
    """The progress of an evaluation, in a file that the driver looks at."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.remove()

    def write(self, values: Mapping[str, Any]) -> None:
        """Replaces the progress."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path, sync=False) as beside:
            beside.write_text(json.dumps(values))

    def remove(self) -> None:
        """Deletes the file."""
        self._path.unlink(missing_ok=True)
