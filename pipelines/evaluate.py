"""Evaluates rows with a model on a Ray cluster; all other parts are `mmray.run.evaluation`'s.

    chunks of 128 rows ─ EncodeRows ─ RenderRows ─ EvaluateRows (a model each, on a GPU where there are any)

Encoding cuts a chunk into batches of like length, and each batch goes on as one row, so that models are busy while
other pages are decoded. Results come back in no order; each is committed by the driver as it comes.
"""

import pickle
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError

from mmray.errors import UserError
from mmray.prepared.arrow import binary_cell
from mmray.rows.files import Chunk
from mmray.run.evaluation.evaluator import RowEvaluator
from mmray.run.evaluation.rows import RowEncoder, RowRenderer
from mmray.run.evaluation.standalone import BatchResult, EvaluationPlan
from pipelines.dataset import ERROR, one_row_blocks, out_of_room


class EncodeRows:
    """Actor that encodes chunks of rows into batches."""

    def __init__(self, plan: EvaluationPlan, done: Collection[int]) -> None:
        """Stores the arguments. done: numbers of rows that are left out."""
        self._plan, self._done = plan, frozenset(done)

    @cached_property
    def _encoder(self) -> RowEncoder:
        return self._plan.encoder()

    def __call__(self, block: dict[str, Any]) -> Iterator[pa.Table]:
        try:
            for chunk in block["chunk"]:
                for batch in self._encoder.batches(chunk, self._done):
                    yield _cell(batch)
        except UserError as mistake:
            yield _mistake(mistake)


class RenderRows:
    """Actor that decodes the pictures of batches."""

    def __init__(self, plan: EvaluationPlan) -> None:
        torch.set_num_threads(1)
        self._plan = plan

    @cached_property
    def _render(self) -> RowRenderer:
        encoder = self._plan.encoder()
        return RowRenderer(encoder.family, encoder.policy)

    def __call__(self, block: pa.Table) -> pa.Table:
        if error := block[ERROR][0].as_py():
            return _mistake(error)
        try:
            return _cell(self._render(_value(block)))
        except UserError as mistake:
            return _mistake(mistake)


class EvaluateRows:
    """Actor that holds the model."""

    def __init__(self, plan: EvaluationPlan, device: str, threads: int) -> None:
        """Stores the arguments. threads: threads of torch on CPUs."""
        torch.set_num_threads(threads)
        self._plan, self._device = plan, torch.device(device)

    @cached_property
    def _evaluate(self) -> RowEvaluator:
        return self._plan.evaluator(self._plan.encoder(), self._device)

    def __call__(self, block: pa.Table) -> pa.Table:
        if error := block[ERROR][0].as_py():
            return _mistake(error)
        rendered = _value(block)
        try:
            return _cell((rendered.batch.name, *self._evaluate(rendered)))
        except UserError as mistake:
            return _mistake(mistake)


def run_batches(
    plan: EvaluationPlan, chunks: Sequence[Chunk], done: Collection[int], *, gpus: bool
) -> Iterator[BatchResult]:
    """Does the batches of some chunks on the cluster that this process is connected to: a `RunBatches`.

    gpus: whether each model takes a GPU. Raises UserError for mistakes that actors find, and where Ray lacks
    resources.
    """
    if not chunks:
        return
    resources = plan.job.resources
    dataset = one_row_blocks([{"chunk": chunk} for chunk in chunks], resources.train_labels)
    dataset.context.execution_options.preserve_order = False
    dataset = dataset.map_batches(
        EncodeRows, batch_size=1, fn_constructor_args=(plan, done), compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
    )  # fmt: skip
    dataset = dataset.map_batches(
        RenderRows, batch_size=1, batch_format="pyarrow", fn_constructor_args=(plan,),
        compute=ray.data.ActorPoolStrategy(size=resources.render_actors), num_cpus=1,
    )  # fmt: skip
    cpus = max(1, int(resources.cpus_per_worker))
    needs: dict[str, Any] = {"num_cpus": resources.cpus_per_worker} | ({"num_gpus": 1} if gpus else {})
    dataset = dataset.map_batches(
        EvaluateRows, batch_size=1, batch_format="pyarrow",
        fn_constructor_args=(plan, "cuda" if gpus else "cpu", cpus),
        compute=ray.data.ActorPoolStrategy(min_size=resources.min_workers, max_size=resources.max_workers), **needs,
    )  # fmt: skip
    try:
        for row in dataset.iter_rows():
            if row[ERROR]:
                raise UserError(row[ERROR])
            yield pickle.loads(row["value"])
    except RayError as error:
        if lack := out_of_room(error):
            raise UserError(
                f"{lack}: lower evaluation.generate.batch_rows or the actors under resources, or give Ray more memory; "
                "then the same command continues, finished batches are kept"
            ) from error
        raise


def _cell(value: Any) -> pa.Table:
    """A one-row table that holds a Python value."""
    return pa.table({"value": binary_cell(pickle.dumps(value)), ERROR: pa.array([None], pa.string())})


def _mistake(mistake: UserError | str) -> pa.Table:
    return pa.table({"value": binary_cell(b""), ERROR: pa.array([str(mistake)], pa.string())})


def _value(block: pa.Table) -> Any:
    return pickle.loads(block["value"][0].as_py())
