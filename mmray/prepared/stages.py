"""Runs the two stages of a prepare: encodes a chunk of rows, packs a window of chunks.

`driver.py` runs them in this process, `pipelines/prepare.py` in actors of a Ray cluster: both give the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import pyarrow as pa

from mmray.config.compatibility import job_family
from mmray.config.job import Job
from mmray.families import Family
from mmray.images import TilingPolicy
from mmray.images.header import measured
from mmray.images.size_cache import SizeCache
from mmray.loss.labels import LabelMaker
from mmray.loss.settings import Loss, allows_empty
from mmray.loss.sources import label_maker
from mmray.packing.settings import PackingSettings
from mmray.prepared.fingerprint import prepare_record
from mmray.prepared.window import Window, pack_window, samples_table
from mmray.prepared.writer import WindowWriter
from mmray.rows.encode import Encoder
from mmray.rows.files import Chunk, SourceFile
from mmray.rows.read import RowReader, chunk_rows
from mmray.rows.settings import DatasetSettings, DataSettings
from mmray.schedule.balance import BalanceSettings
from mmray.storage import explained
from mmray.training.model import load_config


@dataclass(frozen=True)
class PrepareContext:
    """Holds everything that preparing one split needs.

    split: `train` or `eval`.
    path: folder or URI of the prepared dataset.
    tiling: the tiling policy as resolved for the family.
    model_type, processor_source: written to the manifest.
    costs: the costs of samples when bins are packed to equal cost, else None.
    dealing: version of the way rows are dealt into windows; the driver sets it.
    bin_cost: the cost of a bin when bins are packed to equal cost, by the first window; the driver sets it.
    """

    split: str
    path: str
    datasets: tuple[DatasetSettings, ...]
    data: DataSettings
    packing: PackingSettings
    loss: Loss
    family: Family
    tiling: TilingPolicy
    model_type: str | None = None
    processor_source: str | None = None
    costs: BalanceSettings | None = None
    dealing: int = 1
    bin_cost: float | None = None

    @classmethod
    def of(cls, job: Job, split: str) -> Self:
        """Make the context of a job's split. Loads the processor; raises UserError when it does not fit the model."""
        family = job_family(job)
        return cls(
            split, job.prepared_path(split), job.data.splits[split], job.data, job.packing, job.loss, family,
            family.resolved_tiling(job.images), load_config(job.model).model_type, job.model.processor_source,
            job.packing_costs,
        )  # fmt: skip

    def dealt(self, dealing: int) -> Self:
        """A copy of the context with this `dealing`."""
        return replace(self, dealing=dealing)

    @property
    def plan(self) -> dict[str, Any]:
        """The fields that the driver sets."""
        return {"dealing": self.dealing, "bin_cost": self.bin_cost}

    def costing(self, bin_cost: float | None) -> Self:
        """A copy of the context with this `bin_cost`."""
        return replace(self, bin_cost=bin_cost)

    def record(self, files: Sequence[SourceFile]) -> dict[str, Any]:
        """The record of everything that changes the result, as plain JSON (`prepare_record`)."""
        return prepare_record(
            files=files, datasets=self.datasets, data=self.data, processor=self.family.processor,
            tiling=self.tiling, packing=self.packing, loss=self.loss,
            costs=self.costs.cost_record() if self.costs else None,
        )  # fmt: skip

    def encoder(self, data: DataSettings, sizes: SizeCache | None) -> Encoder:
        """Make an encoder of the split's rows. It holds the tokenizer: one in each process is enough."""
        return Encoder(
            data, self.datasets, self.family, self.tiling, self.packing, loss=self.loss,
            measure=sizes.measured if sizes else measured,
        )  # fmt: skip

    def labels(self) -> LabelMaker:
        """Make the label maker of the job's loss setting."""
        return label_maker(self.loss, self.family)


class ChunkEncoder:
    """Encodes chunks of rows; each process that encodes has one."""

    def __init__(self, context: PrepareContext, sizes: SizeCache | None = None) -> None:
        """sizes: cache of image sizes that is read and filled; None without a size cache."""
        self._encoder = context.encoder(context.data, sizes)
        self._reader = RowReader()

    def __call__(self, chunk: Chunk) -> pa.Table:
        """Encode a chunk; returns its samples and rejected rows (`schema.SAMPLES`) in row order.

        Raises UserError for rows that stop the job, and when rows or images cannot be reached.
        """
        with explained(f"{chunk.pieces[0].uri} or its images"):  # a store that does not answer, a file that is gone
            rows = list(chunk_rows(chunk, self._reader))
            verify = [line * len(rows) // chunk.num_rows for line in chunk.verify]  # blank lines count, but are no rows
            results = self._encoder.encode(rows, verify, chunk.duplicates)
        return samples_table(results, [row.dataset for row in rows], [row.copy for row in rows])


class WindowPacker:
    """Packs windows and commits their files; each process that packs has one."""

    def __init__(self, context: PrepareContext, token: str) -> None:
        """token: token of the plan that the windows belong to (`PreparedWriter.begin`)."""
        self._context = context
        self._writer = WindowWriter(context.path, token)

    @cached_property
    def _labels(self) -> LabelMaker:
        return self._context.labels()

    def pack(self, samples: pa.Table) -> Window:
        """Pack encoded rows (`schema.SAMPLES`) into a window."""
        context = self._context
        return pack_window(
            samples, context.packing, self._labels, context.family.sample_gap, allows_empty(context.loss),
            mixed=context.dealing > 1, sample_costs=context.costs.sample_costs if context.costs else None,
            bin_cost=context.bin_cost,
        )  # fmt: skip

    def __call__(self, number: int, samples: pa.Table) -> dict[str, Any]:
        """Pack the rows of window `number` and commit it; returns its statistics. Raises UserError."""
        window = self.pack(samples)
        self._writer.write(number, window)
        return window.statistics


class WindowMaker:
    """Makes whole windows in this process: encodes their chunks, packs and commits them."""

    def __init__(self, context: PrepareContext, token: str, sizes: SizeCache | None = None) -> None:
        """token: token of the plan that the windows belong to (`PreparedWriter.begin`); sizes: see `ChunkEncoder`."""
        self._encode, self._pack = ChunkEncoder(context, sizes), WindowPacker(context, token)

    def __call__(self, chunks: Sequence[Chunk]) -> int:
        """Make the window of these chunks; returns its number. Raises UserError."""
        self._pack(chunks[0].window, pa.concat_tables([self._encode(chunk) for chunk in chunks]))
        return chunks[0].window
