"""Compares policies: what a job would prepare with other settings, each estimated from a sample of its rows.

Rows are counted once, and processors are loaded once; each policy then takes 1 to 3 s.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from mmray.config.compatibility import check_packing, fitting_family
from mmray.config.job import Job, load_job
from mmray.errors import UserError
from mmray.families import Family
from mmray.images import TilingPolicy
from mmray.prepared.estimate import Estimate, count_sets, estimate_split
from mmray.rows.count import RowCount


@dataclass(frozen=True)
class Policy:
    """A job with some settings changed. settings: `key.path=value`, none for the job as it is."""

    settings: tuple[str, ...]
    job: Job

    @property
    def name(self) -> str:
        return "; ".join(self.settings) or "the job as it is"


@dataclass(frozen=True)
class PolicyEstimate:
    """The estimate of the training set under a policy."""

    policy: Policy
    estimate: Estimate

    @property
    def fills(self) -> tuple[float, float]:
        """The shares of tokens and of visual tokens to which bins are full; 0 without bins."""
        packing, bins = self.policy.job.packing, max(self.estimate.bins, 1)
        return (
            self.estimate.tokens / bins / packing.token_capacity,
            self.estimate.visual_tokens / bins / packing.visual_capacity,
        )

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(self.estimate.bins / self.policy.job.training.global_batch_bins)


def policies(job_file: str | Path, overrides: Sequence[str], tries: Sequence[str]) -> list[Policy]:
    """Reads a job with the settings of each policy; the first is the job as it is.

    overrides: settings changed in every policy; tries: settings of each policy, several separated by `;`.

    Raises UserError for a setting that does not exist or does not fit the others.
    """
    changed = [tuple(part.strip() for part in text.split(";") if part.strip()) for text in tries]
    loaded = [Policy((), load_job(job_file, overrides))]
    for settings in changed:
        if not settings:
            raise UserError("--try is empty: write key.path=value, such as packing.token_capacity=16384")
        try:
            loaded.append(Policy(settings, load_job(job_file, [*overrides, *settings])))
        except UserError as error:
            raise UserError(f"--try {'; '.join(settings)!r}: {str(error).rpartition('--set ')[2]}") from error
    return loaded


def compare(wanted: Sequence[Policy]) -> Iterator[PolicyEstimate]:
    """Yields the estimate of each policy, in order. Raises UserError for a policy that the model cannot train with."""
    counts: dict[str, list[RowCount]] = {}
    families = _Families()
    fitting = [families.of(policy) for policy in wanted]
    for policy, (family, tiling) in zip(wanted, fitting, strict=True):
        data = policy.job.data.model_dump_json()
        if data not in counts:
            counts[data] = count_sets(policy.job.data.train)
        yield PolicyEstimate(policy, estimate_split(policy.job, "train", family, tiling, counts=counts[data]))


class _Families:
    """Loads the family of each model once."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, bool], tuple[PretrainedConfig, Family]] = {}

    def of(self, policy: Policy) -> tuple[Family, TilingPolicy]:
        """The family of a policy's model, and the tiling policy as resolved for it."""
        job = policy.job
        key = job.model.model_dump_json(), job.images.is_tiled
        try:
            if key not in self._loaded:
                self._loaded[key] = fitting_family(job)
            config, family = self._loaded[key]
            check_packing(config, family, job.packing, job.training.micro_batch_bins)
            return family, family.resolved_tiling(job.images)
        except UserError as error:
            raise UserError(f"{policy.name}: {error}") from error
