"""What an expert checks by hand before a run, without a cluster and in about a minute: `mmray doctor JOB.yaml`.

`examine` looks at everything; `examine_settings`, its cheap part, is what a training job runs before it takes a GPU.
"""

from collections.abc import Generator, Iterator

from mmray.config import Job
from mmray.doctor.findings import Finding, Status, as_json, as_table, failed, has_failed, passed
from mmray.doctor.model import examine_model
from mmray.doctor.rows import FirstRows, examine_rows
from mmray.doctor.weights import examine_weights
from mmray.errors import UserError
from mmray.families import Family, load_family
from mmray.training.compatibility import check_attention, check_model, check_packing
from mmray.training.model import load_config

__all__ = ["Finding", "FirstRows", "Status", "as_json", "as_table", "examine", "examine_settings", "has_failed"]


def examine_settings(job: Job) -> Iterator[Finding]:
    """The checks of a job's settings: no row is read, no model built."""
    family = yield from _family(job)
    if family is not None:
        yield from _fit(job, family)


def examine(job: Job) -> Iterator[Finding | FirstRows]:
    """Every check, one after the other as they are done; the first rows of the training set, for a preview, between.

    A check that needs what another one failed to give is left out.
    """
    family = yield from _family(job)
    if family is None:
        return
    yield from _fit(job, family)
    try:
        policy = family.resolved_tiling(job.images)
        training = FirstRows(job, "train", family, policy)
        for rows in [training] + ([FirstRows(job, "eval", family, policy)] if job.data.eval else []):
            yield from examine_rows(rows)
        yield training
    except UserError as error:
        yield failed("rows", str(error))
        return
    config = load_config(job.model)
    yield from examine_model(job, family, policy, config)
    yield examine_weights(job, training)


def _family(job: Job) -> Generator[Finding, None, Family | None]:
    check = "processor"
    try:
        config = load_config(job.model)
        family = load_family(
            job.model.processor_source,
            tiled=job.images.is_tiled,
            model_type=config.model_type,
            trust_remote_code=job.model.trust_remote_code,
        )
        check_model(config, family)
    except UserError as error:
        yield failed(check, str(error))
        return None
    name = type(family.processor).__name__
    kind = type(family).__name__ if family.is_verified else "general rules, unverified"
    yield passed(check, f"{name} loads, and is the {config.model_type} model's own (family: {kind})")
    return family


def _fit(job: Job, family: Family) -> Iterator[Finding]:
    config = load_config(job.model)
    try:
        check_attention(job.model)
        check_packing(config, family, job.packing, job.training.micro_batch_bins)
    except UserError as error:
        yield failed("attention", str(error))
    else:
        row = job.packing.token_capacity * job.training.micro_batch_bins
        how = "takes one sample a row" if job.packing.mode == "none" else f"packs rows of up to {row:,} tokens"
        yield passed("attention", f"{job.model.attention}: a {config.model_type} {how}")
