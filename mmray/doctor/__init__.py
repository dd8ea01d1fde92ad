"""Checks a job before it runs, without a cluster and in about a minute: `mmray doctor JOB.yaml`.

`examine` runs every check; `examine_settings`, the cheap part, is run by a training job before it uses a GPU.
"""

from collections.abc import Generator, Iterator

import torch
from transformers import PretrainedConfig

from mmray.config.compatibility import check_attention, check_packing, fitting_family
from mmray.config.job import Job
from mmray.doctor.findings import (
    Finding,
    Status,
    as_json,
    as_table,
    failed,
    failed_by,
    guarded,
    has_failed,
    not_applicable,
    passed,
)
from mmray.doctor.model import examine_model
from mmray.doctor.parts import examine_parts
from mmray.doctor.pixels import CHECK as PIXELS
from mmray.doctor.pixels import examine_pixels
from mmray.doctor.rows import FirstRows, examine_rows
from mmray.doctor.weights import CHECK as WEIGHTS
from mmray.doctor.weights import NAMES, examine_names, examine_weights
from mmray.errors import UserError
from mmray.families import Family
from mmray.training.attention_paths import attention_paths
from mmray.training.deepspeed_check import check_deepspeed
from mmray.training.model import empty_model
from mmray.training.settings import load_deepspeed_overrides

__all__ = ["Finding", "FirstRows", "Status", "as_json", "as_table", "examine", "examine_settings", "has_failed"]


def examine_settings(job: Job) -> Iterator[Finding]:
    """Yield the findings on a job's settings; reads no row, builds no model."""
    yield from _settings(job)


def examine(job: Job) -> Iterator[Finding | FirstRows]:
    """Yield the finding of every check, and between them the first rows of the training set, for a preview.

    A check that needs the result of a failed one is left out.
    """
    known = yield from _settings(job)
    if known is None:
        return
    config, family = known
    try:
        policy = family.resolved_tiling(job.images)
    except UserError as error:
        yield failed("images", str(error))
        return
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    training = FirstRows(job, "train", family, policy, positions)
    are_read = yield from _rows(training)
    if job.data.eval:
        yield from _rows(FirstRows(job, "eval", family, policy, positions))
    if are_read:
        yield training
    if are_read:
        yield guarded(PIXELS, lambda: examine_pixels(training, config))
    yield from examine_model(job, family, policy, config)
    if are_read:
        yield guarded(WEIGHTS, lambda: examine_weights(job, training))
    else:
        yield not_applicable(WEIGHTS, "the rows of data.train cannot be read")


def _settings(job: Job) -> Generator[Finding, None, tuple[PretrainedConfig, Family] | None]:
    """Yield the findings on model, processor and packing; returns configuration and family, or None without a fit."""
    try:
        config, family = fitting_family(job)
    except UserError as error:
        yield failed("processor", str(error))
        return None
    name = type(family.processor).__name__
    kind = type(family).__name__ if family.is_verified else "general rules, unverified"
    rows, ids = family.embedding_rows(config), family.num_token_ids
    vectors = f"{ids:,} token ids have a vector" if ids <= rows else f"{rows:,} vectors become {ids:,}"
    detail = f"{name} loads, and is the {config.model_type} model's own (family: {kind}); {vectors}"
    yield passed("processor", detail)
    yield guarded("attention", lambda: _attention(job, config, family))
    yield guarded(NAMES, lambda: examine_names(job))
    yield from examine_parts(job)
    if job.training.deepspeed:
        yield guarded("deepspeed", lambda: _deepspeed(job))
    return config, family


def _attention(job: Job, config: PretrainedConfig, family: Family) -> Finding:
    check_attention(job.model)
    check_packing(config, family, job.packing, job.training.micro_batch_bins)
    row = job.packing.token_capacity * job.training.micro_batch_bins
    how = "takes one sample a row" if job.packing.mode == "none" else f"packs rows of up to {row:,} tokens"
    if job.model.computes_samples_apart:
        return passed("attention", f"packed: a {config.model_type} {how}; {_paths(job)}")
    unseen = job.model.attention == "flash_attention_2" and not torch.cuda.is_available()
    note = "; flash_attn is looked for where GPUs are" if unseen else ""
    return passed("attention", f"{job.model.attention}: a {config.model_type} {how}{note}")


def _paths(job: Job) -> str:
    """The attention of each part of the job's model, in words; that a model cannot be built is told by a check of its
    own."""
    try:
        return "; ".join(map(str, attention_paths(empty_model(job.model))))
    except Exception as error:  # noqa: BLE001 (settings that do not fit fail in a model in many ways)
        return f"what each part runs is not known, because the model cannot be built: {type(error).__name__}"


def _deepspeed(job: Job) -> Finding:
    if note := check_deepspeed(job.model, job.training):
        return not_applicable("deepspeed", note)
    keys = ", ".join(load_deepspeed_overrides(job.training.deepspeed))
    return passed("deepspeed", f"training.deepspeed: DeepSpeed knows all keys and takes their values ({keys})")


def _rows(rows: FirstRows) -> Generator[Finding, None, bool]:
    """Yield the findings on a split's first rows; returns whether the rows can be read."""
    try:
        yield from examine_rows(rows)
    except Exception as error:  # noqa: BLE001 (files of any kind and place are tried)
        yield failed_by("rows", error)
        return False
    return True
