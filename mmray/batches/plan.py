"""The micro-batches of a prepared dataset in one process, without Ray: for evaluation, for looking at a batch, and for
anyone who trains with something else. `pipelines/ingest.py` runs the same steps on actors.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch

from mmray.batches.micro_batch import MicroBatch, Place, Rendered, mask, render
from mmray.batches.render import OnBadRow, RenderPage
from mmray.config.job import TileCacheSettings
from mmray.families import Family, load_family
from mmray.images import TilingPolicy, render_tiles
from mmray.images.tile_cache import TileCache
from mmray.loss.labels import LabelMaker
from mmray.loss.settings import Loss
from mmray.loss.sources import label_maker
from mmray.prepared import PreparedDataset
from mmray.schedule.balanced import BalancedSchedule, BoundSchedule
from mmray.schedule.schedule import Schedule


@dataclass(frozen=True)
class BatchPlan:
    """Everything that the batches of a run follow from, small enough to send to every actor.

    prepared: path of the prepared dataset; processor: folder or hub name; model_type: `config.model_type` of the
    model; world_size: ranks; micro_batch_bins: bins of one micro-batch; on_bad_row: as for `render`; first_step: step
    of the run at which the schedule begins, since a run may have trained on other data before.
    """

    prepared: str
    processor: str
    model_type: str | None
    trust_remote_code: bool
    loss: Loss
    schedule: Schedule | BalancedSchedule
    world_size: int
    micro_batch_bins: int
    on_bad_row: OnBadRow = "error"
    first_step: int = 0

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each rank in one step."""
        return self.schedule.micro_batches_per_rank(self.world_size, self.micro_batch_bins)

    @cached_property
    def dataset(self) -> PreparedDataset:
        """The prepared dataset. Opened in each process that asks: a plan travels without it."""
        return PreparedDataset(self.prepared)

    @cached_property
    def order(self) -> Schedule | BoundSchedule:
        """The bins of each step; of a balanced schedule they follow from the dataset's loads."""
        if isinstance(self.schedule, BalancedSchedule):
            return self.schedule.bound_to(self.dataset.loads)
        return self.schedule

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def bins(self, place: Place) -> list[int | None]:
        """The bins of one micro-batch; None is an empty one."""
        step = place.step - self.first_step
        return self.order.rank_bins(step, place.rank, self.world_size, self.micro_batch_bins)[place.micro]


class BatchMaker:
    """Makes the micro-batches of a plan. Opens the dataset, the processor and the tile cache when first used."""

    def __init__(
        self, plan: BatchPlan, device: torch.device | str = "cpu", *, tile_cache: TileCacheSettings | None = None
    ) -> None:
        self.plan = plan
        self.device = torch.device(device)
        self._tile_cache = tile_cache

    @cached_property
    def prepared(self) -> PreparedDataset:
        return self.plan.dataset

    @cached_property
    def policy(self) -> TilingPolicy:
        return self.prepared.tiling

    @cached_property
    def family(self) -> Family:
        plan = self.plan
        return load_family(
            plan.processor,
            tiled=self.policy.is_tiled,
            model_type=plan.model_type,
            trust_remote_code=plan.trust_remote_code,
        )

    @cached_property
    def labels(self) -> LabelMaker:
        return label_maker(self.plan.loss, self.family)

    @cached_property
    def render_page(self) -> RenderPage:
        """How the tiles of one page are come by."""
        if self._tile_cache is None:
            return render_tiles
        return TileCache(self._tile_cache.folder, self._tile_cache.max_bytes).render_tiles

    def render(self, place: Place) -> Rendered:
        """The micro-batch with its pictures decoded (CPU)."""
        bins = [None if number is None else self.prepared.bin(number) for number in self.plan.bins(place)]
        return render(bins, place, self.family, self.policy, self.render_page, on_bad_row=self.plan.on_bad_row)

    def micro_batch(self, place: Place) -> MicroBatch:
        """The finished micro-batch; masks are computed on this maker's device."""
        return MicroBatch(mask(self.render(place), self.family, self.labels, self.device), self.family)

    def steps(self, rank: int, start: int, stop: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of one rank, step by step, from step `start` to before `stop`."""
        for step in range(start, stop):
            yield [self.micro_batch(Place(step, rank, micro)) for micro in range(self.plan.micro_batches)]
