"""The attention of a run: what its job says, what it began with, or the default of a new run."""

from pathlib import Path

from mmray.config.job import Job
from mmray.training.checkpoint import read_settings

DEFAULT = "packed"
BEFORE_RECORDS = "sdpa"
"""The attention of runs whose checkpoints do not hold it, where the job does not set it."""


def with_attention(job: Job, checkpoint: Path | None) -> Job:
    """The job with `model.attention` decided. checkpoint: the one that the run continues from; None for a new run.

    Where the job leaves it open, a run goes on with what it began with. Raises UserError for settings in a checkpoint
    that cannot be read.
    """
    if job.model.attention is not None:
        return job
    attention = DEFAULT if checkpoint is None else attention_before(checkpoint) or BEFORE_RECORDS
    return job.model_copy(update={"model": job.model.model_copy(update={"attention": attention})})


def attention_note(job: Job, checkpoint: Path) -> str | None:
    """A line for a person about the attention with which the job's run goes on; None where nothing is to be told."""
    before, now = attention_before(checkpoint), job.model.attention
    if now is None and (before or BEFORE_RECORDS) != DEFAULT:
        return f"{job.output.run} began with model.attention: {before or BEFORE_RECORDS} and goes on so"
    if now is not None and before is not None and now != before:
        return f"{job.output.run} was trained with model.attention: {before} so far and goes on with {now}"
    return None


def attention_before(checkpoint: Path) -> str | None:
    """The attention that a checkpoint was trained with; None where it does not tell."""
    settings = read_settings(checkpoint)
    return None if settings is None else settings[0].attention or DEFAULT
