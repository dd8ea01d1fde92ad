"""Reads several prepared datasets as one: their bins, and the sets of their rows, are counted through.

Bin b of a dataset has the number b plus the bins of the datasets before it, and so have sets. One dataset alone has the
numbers it always had.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from mmray.base.words import counted
from mmray.errors import UserError
from mmray.images import TilingPolicy
from mmray.prepared.dataset import Bin, PreparedDataset
from mmray.prepared.fingerprint import differences
from mmray.prepared.versions import old_chats
from mmray.schedule.loads import Loads
from mmray.schedule.mixture import Mixture


class JoinedDatasets:
    """Gives read access to one or more prepared datasets. Raises UserError when a folder has no manifest."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.parts = tuple(PreparedDataset(path) for path in paths)
        self.first_bins = [0, *accumulate(len(part) for part in self.parts)]
        """The number of each dataset's first bin, and the number of all bins."""
        self.first_sets = [0, *accumulate(part.num_sets for part in self.parts)]
        """The number of each dataset's first set of rows, and the number of all sets."""

    def __len__(self) -> int:
        return self.first_bins[-1]

    @property
    def tiling(self) -> TilingPolicy:
        """The tiling policy that samples were measured with; all datasets have the same."""
        return self.parts[0].tiling

    @property
    def statistics(self) -> dict[str, Any]:
        """Counts of rows and tokens over all datasets; only those that can be added up."""
        names = ("rows_read", "rows_packed", "rows_rejected", "bins", "tokens", "visual_tokens", "trained_tokens")
        return {name: sum(part.statistics[name] for part in self.parts) for name in names}

    def part_of(self, number: int) -> tuple[int, int]:
        """The dataset of a bin, and the bin's number within it. Raises IndexError for a number out of range."""
        if not 0 <= number < len(self):
            raise IndexError(f"bin {number} of prepared datasets with {counted(len(self), 'bin')}")
        part = bisect_right(self.first_bins, number) - 1
        return part, number - self.first_bins[part]

    def bin(self, number: int) -> Bin:
        """Read one bin, with the number of the bin and of its samples' sets counted through all datasets."""
        part, index = self.part_of(number)
        packed = self.parts[part].bin(index)
        if len(self.parts) == 1:
            return packed
        sets = self.first_sets[part] + np.maximum(packed.sample_sets, 0)  # format 2 names none: it counts as one
        return replace(packed, index=number, sample_sets=sets.astype(np.int32))

    def loads(self, bins: np.ndarray) -> Loads:
        """Read the loads of bins, in the order of `bins`. bins: bin numbers, int64 [n], at least one."""
        parts = np.searchsorted(self.first_bins, bins, side="right") - 1
        order = np.argsort(parts, kind="stable")
        pieces = [
            self.parts[part].loads(bins[order][parts[order] == part] - self.first_bins[part])
            for part in np.unique(parts).tolist()
        ]
        return Loads.joined(pieces).take(np.argsort(order))


class PreparedMixture(JoinedDatasets):
    """The prepared datasets of a mixture, with their weights. mixture: in the order of the datasets."""

    def __init__(self, paths: Sequence[str], mixture: Mixture) -> None:
        super().__init__(paths)
        self.mixture = mixture

    @property
    def path(self) -> str:
        """The paths of all datasets, for people."""
        return " + ".join(part.path for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """Identifies datasets and weights; a training order is valid only for both."""
        return self.mixture.fingerprint

    @property
    def record(self) -> dict[str, Any]:
        """Everything the datasets depend on: the settings that all have in common, and the rows of each."""
        rows = {
            name: [value for part in self.parts for value in part.record.get(name, [])]
            for name in ("files", "datasets")
        }
        return self.parts[0].record | rows | {"mixture": self.mixture.record()}


_COMMON = ("processor", "tiling", "loss")
_CAPACITIES = ("token_capacity", "visual_capacity", "mode")


def common_record(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a dataset's record that all datasets of a mixture must share."""
    packing = {name: record["packing"].get(name) for name in _CAPACITIES}
    return {name: record[name] for name in _COMMON} | {"packing": packing}


def check_common(prepared: PreparedDataset, record: dict[str, Any]) -> None:
    """Raise UserError, saying what differs, when a dataset of a mixture was not prepared as the job trains.

    record: the job's own settings, with the keys of a dataset's record. Chats of an earlier version are refused, too:
    other tokens of them might be trained on now, and their rows are not at hand.
    """
    now = json.loads(json.dumps(common_record(record)))
    if lines := differences(common_record(prepared.record), now):
        shown = "\n  ".join(lines[:8])
        raise UserError(
            f"{prepared.path} cannot be mixed in: it was prepared with other settings than the job has:\n  {shown}\n"
            "Prepare it anew with the job's settings: jobs/prepare.py --replace"
        )
    if old_chats(prepared.manifest):
        raise UserError(
            f"{prepared.path} cannot be mixed in: its chats were prepared by an earlier version, which chose the "
            "tokens to train on in another way; prepare it anew (jobs/prepare.py --replace)"
        )
