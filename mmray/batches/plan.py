"""Makes the micro-batches of a prepared dataset in one process, without Ray.

Evaluation uses it, so does whoever inspects a batch or trains with another engine. `pipelines/ingest.py` runs the same
steps on actors.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch

from mmray.batches.micro_batch import MicroBatch, Place, Rendered, mask, render
from mmray.batches.render import OnBadRow, RenderPage
from mmray.config.resources import TileCacheSettings
from mmray.families import Family, load_family
from mmray.images import TilingPolicy, render_tiles
from mmray.images.tile_cache import TileCache
from mmray.loss.labels import LabelMaker
from mmray.loss.settings import Loss
from mmray.loss.sources import label_maker
from mmray.prepared.joined import JoinedDatasets
from mmray.prepared.versions import run_labels
from mmray.schedule.balanced import BalancedSchedule, BoundSchedule
from mmray.schedule.order import Order


@dataclass(frozen=True)
class BatchPlan:
    """Determines every batch of a run; small enough to send to every actor.

    prepared: path of the prepared dataset; paths of all of a mixture.
    processor: folder or hub name of the processor.
    model_type: `config.model_type` of the model.
    world_size: number of ranks.
    micro_batch_bins: number of bins in one micro-batch.
    on_bad_row: what happens to a sample with a picture that cannot be used (`render`).
    first_step: step of the run at which the schedule begins; above 0 when the run trained on other data before.
    """

    prepared: str | tuple[str, ...]
    processor: str
    model_type: str | None
    trust_remote_code: bool
    loss: Loss
    schedule: Order | BalancedSchedule
    world_size: int
    micro_batch_bins: int
    on_bad_row: OnBadRow = "error"
    first_step: int = 0

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of each rank in one step."""
        return self.schedule.micro_batches_per_rank(self.world_size, self.micro_batch_bins)

    @cached_property
    def dataset(self) -> JoinedDatasets:
        """The prepared datasets, opened in each process that uses them: a pickled plan does not hold them."""
        return JoinedDatasets((self.prepared,) if isinstance(self.prepared, str) else self.prepared)

    @cached_property
    def order(self) -> Order | BoundSchedule:
        """The order of bins; a balanced schedule derives it from the datasets' loads."""
        if isinstance(self.schedule, BalancedSchedule):
            return self.schedule.bound_to(self.dataset.loads)
        return self.schedule

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def bins(self, place: Place) -> list[int | None]:
        """The bin numbers of one micro-batch; None is an empty bin."""
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
    def prepared(self) -> JoinedDatasets:
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
        if len(self.prepared.parts) == 1:
            return run_labels(self.prepared.parts[0], self.plan.loss, self.family)
        return label_maker(self.plan.loss, self.family)

    @cached_property
    def render_page(self) -> RenderPage:
        """The function that renders the tiles of a page, from the tile cache where there is one."""
        if self._tile_cache is None:
            return render_tiles
        return TileCache(self._tile_cache.folder, self._tile_cache.max_bytes).render_tiles

    def render(self, place: Place) -> Rendered:
        """Render a micro-batch: decode its pictures, on the CPU."""
        bins = [None if number is None else self.prepared.bin(number) for number in self.plan.bins(place)]
        return render(bins, place, self.family, self.policy, self.render_page, on_bad_row=self.plan.on_bad_row)

    def micro_batch(self, place: Place) -> MicroBatch:
        """Make a micro-batch, with labels and positions computed on this maker's device."""
        return MicroBatch(mask(self.render(place), self.family, self.labels, self.device), self.family)

    def steps(self, rank: int, start: int, stop: int) -> Iterator[list[MicroBatch]]:
        """Yield the micro-batches of one rank in each step from `start` to `stop` - 1."""
        for step in range(start, stop):
            yield [self.micro_batch(Place(step, rank, micro)) for micro in range(self.plan.micro_batches)]
