"""The micro-batches of a prepared dataset in one process, without Ray: for evaluation, for looking at a batch, and for
anyone who trains with something else. `pipelines/ingest.py` runs the same steps on actors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from mmray.batch import MicroBatch, Place, Rendered, mask, render
from mmray.families import Family, family_of, load_processor
from mmray.images import TilingPolicy
from mmray.masks.labels import LabelMaker
from mmray.masks.settings import MaskingSettings, label_maker
from mmray.prepared import PreparedDataset
from mmray.schedule import Schedule


@dataclass(frozen=True)
class BatchPlan:
    """Everything that the batches of a run follow from, small enough to send to every actor.

    prepared: path of the prepared dataset; processor: folder or hub name; world_size: ranks; micro_batch_bins: bins
    of one micro-batch.
    """

    prepared: str
    processor: str
    trust_remote_code: bool
    masking: MaskingSettings
    schedule: Schedule
    world_size: int
    micro_batch_bins: int

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each rank in one step."""
        return self.schedule.micro_batches_per_rank(self.world_size, self.micro_batch_bins)

    def bins(self, place: Place) -> list[int | None]:
        """The bins of one micro-batch; None is an empty one."""
        return self.schedule.rank_bins(place.step, place.rank, self.world_size, self.micro_batch_bins)[place.micro]


class BatchMaker:
    """Makes the micro-batches of a plan. Opens the dataset and the processor when first used."""

    def __init__(self, plan: BatchPlan, device: torch.device | str = "cpu") -> None:
        self.plan = plan
        self.device = torch.device(device)

    @cached_property
    def prepared(self) -> PreparedDataset:
        return PreparedDataset(self.plan.prepared)

    @cached_property
    def policy(self) -> TilingPolicy:
        return self.prepared.tiling

    @cached_property
    def family(self) -> Family:
        processor = load_processor(self.plan.processor, trust_remote_code=self.plan.trust_remote_code)
        return family_of(processor, tiled=self.policy.is_tiled)

    @cached_property
    def labels(self) -> LabelMaker:
        return label_maker(self.plan.masking, self.family)

    def render(self, place: Place) -> Rendered:
        """The micro-batch with its pictures decoded (CPU)."""
        bins = [None if number is None else self.prepared.bin(number) for number in self.plan.bins(place)]
        return render(bins, place, self.family, self.policy)

    def micro_batch(self, place: Place) -> MicroBatch:
        """The finished micro-batch; masks are computed on this maker's device."""
        return MicroBatch(mask(self.render(place), self.family, self.labels, self.device), self.family)

    def steps(self, rank: int, start: int, stop: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of one rank, step by step, from step `start` to before `stop`."""
        for step in range(start, stop):
            yield [self.micro_batch(Place(step, rank, micro)) for micro in range(self.plan.micro_batches)]
