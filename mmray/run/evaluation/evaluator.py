"""What a model makes of rendered rows: the loss of their trained tokens, and the texts it writes."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from mmray.batches.micro_batch import MicroBatch, Rendered, mask
from mmray.errors import RowError
from mmray.families import Family
from mmray.loss.labels import LabelMaker
from mmray.loss.sources import label_maker
from mmray.run.evaluation.generate import TextGenerator, Written
from mmray.run.evaluation.prompts import PromptCutter, ReadingTask
from mmray.run.evaluation.rows import EvaluationRow, RenderedBatch
from mmray.run.scoring.metrics import score_row
from mmray.run.scoring.results import BadRow, RowResult
from mmray.run.scoring.settings import EvaluationSettings
from mmray.training.loss import count_trained_tokens, packed_loss_sum


class RowEvaluator:
    """Computes losses and texts with one model, for rows of one family."""

    def __init__(
        self, model: PreTrainedModel, family: Family, settings: EvaluationSettings, *, dtype: torch.dtype,
        device: torch.device, stop_token_ids: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Binds a model in evaluation mode on `device`. stop_token_ids: as for `TextGenerator`."""
        self.model, self.family, self._settings = model, family, settings
        self._dtype, self._device = dtype, device
        self._cutter = PromptCutter(family, settings.generate, settings.prompt)
        self._writer = TextGenerator(
            model, self._cutter, settings.generate, dtype=dtype, device=device, stop_token_ids=stop_token_ids
        )
        self._labels: LabelMaker = label_maker("sampled", family)

    def __call__(self, rendered: RenderedBatch) -> tuple[list[RowResult], list[BadRow]]:
        """The results of a batch, and its bad rows: those of its chunk, and rows with nothing to read."""
        bad, counted = list(rendered.batch.bad), []
        for row, arrays, picture in zip(rendered.batch.rows, rendered.rendered, rendered.pictures):
            batch = self._micro_batch(arrays)
            if batch.skipped:
                problem = batch.skipped[0]
                bad.append(BadRow(row.id, row.source, row.set, problem.reason, problem.message))
                continue
            tasks: list[ReadingTask] = []
            try:
                tasks = self._cutter.tasks(batch, row.kind)
            except RowError as error:
                bad.append(BadRow(row.id, row.source, row.set, error.reason, error.message))
            counted.append((row, *self._loss(batch), tasks, picture))
        written = iter(self._writer.write_all([task for *_, tasks, _ in counted for task in tasks]))
        results: list[RowResult] = []
        for row, loss_sum, trained, tasks, picture in counted:
            results += row_results(
                row, loss_sum, trained, [(task, next(written)) for task in tasks], picture, self._settings
            )
        return results, bad

    def _micro_batch(self, arrays: Rendered) -> MicroBatch:
        return MicroBatch(mask(arrays, self.family, self._labels, torch.device("cpu")), self.family)

    def _loss(self, batch: MicroBatch) -> tuple[float, int]:
        """The sum of the cross-entropies of a row's trained tokens, in nats, and their number."""
        labels = batch.labels.to(self._device)
        with torch.no_grad():
            inputs = batch.model_inputs(self._device, self._dtype, self.model.config)
            total = packed_loss_sum(self.model, inputs, labels)
        return float(total), int(count_trained_tokens(labels))


def row_results(
    row: EvaluationRow, loss_sum: float | None, trained_tokens: int, texts: Sequence[tuple[ReadingTask, Written]],
    picture: bytes, settings: EvaluationSettings,
) -> list[RowResult]:  # fmt: skip
    """The results of a row: one for each of its texts, the loss with the first; one without a text where none was
    read."""
    common: dict[str, Any] = {
        "number": row.number, "id": row.id, "source": row.source, "set": row.set, "bucket": row.bin.bucket,
    }  # fmt: skip
    losses = [(loss_sum, trained_tokens), *[(None, 0)] * len(texts)]
    if not texts:
        return [RowResult(**common, loss_sum=loss_sum, trained_tokens=trained_tokens)]
    return [
        RowResult(
            **common, loss_sum=loss, trained_tokens=trained, turn=task.turn, reference=task.reference,
            prediction=written.text, stopped=written.stopped, predicted_tokens=len(written.token_ids),
            scores=score_row(task.reference, written.text, settings.normalisation), picture=picture or None,
        )
        for (task, written), (loss, trained) in zip(texts, losses)
    ]  # fmt: skip
