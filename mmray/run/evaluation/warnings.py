"""Warnings about the evaluations of a run before it starts: none will come, or they test what is trained on."""

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np

from mmray.base.words import counted
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.prepared import PreparedDataset
from mmray.prepared.dataset import Bin
from mmray.rows.files import source_files

MOST_TRAINING_BINS = 2_000
"""Training bins whose rows are compared with those of evaluation, evenly spaced: some seconds."""


def evaluation_warnings(job: Job, total_steps: int) -> Iterator[str]:
    """Yields one line for each thing that a person should look at. total_steps: steps of the whole run."""
    settings = job.evaluation
    every_steps = job.training.eval_every_steps if settings is None else settings.every_steps
    if every_steps is not None and every_steps > total_steps:
        name = "training.eval_every_steps" if settings is None else "evaluation.every_steps"
        only = "there will be none" if settings is None else "there will be one, at the end"
        yield f"{name} is {every_steps}, and the run has {counted(total_steps, 'step')}: {only}"
    if job.data.eval and (settings is not None or every_steps is not None):
        yield from _shared_rows(job)


def _shared_rows(job: Job) -> Iterator[str]:
    """Yields a warning where rows of evaluation are trained on: by their files, and by their tokens and images."""
    try:
        train, evaluation = ({file.uri for file in source_files(sets)} for sets in (job.data.train, job.data.eval))
        if shared := sorted(train & evaluation):
            more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
            yield f"data.eval names files that are trained on: {shared[0]}{more}; evaluations will look too good"
            return
    except UserError:  # row files may be gone once they are prepared
        pass
    tested = PreparedDataset(job.prepared_path("eval"))
    trained = [PreparedDataset(path) for path in job.trained_paths("train")]
    most = -(-MOST_TRAINING_BINS // len(trained))
    known = {_hash(packed, number): packed.sample_ids[number] for packed, number in _samples(tested, len(tested))}
    looked_at, equal = 0, set()
    for packed, number in itertools.chain.from_iterable(_samples(dataset, most) for dataset in trained):
        looked_at += 1
        if (digest := _hash(packed, number)) in known:
            equal.add(digest)
    if equal:
        example = known[min(equal)]
        of = "all" if max(map(len, trained)) <= most else f"{looked_at:,} looked at"
        yield (
            f"{len(equal):,} of {len(known):,} rows of data.eval are also rows of data.train ({of}), such as "
            f"{example!r}: evaluations will look too good"
        )


def _samples(prepared: PreparedDataset, most_bins: int) -> Iterator[tuple[Bin, int]]:
    """Yields the samples of up to `most_bins` bins, evenly spaced, as (bin, number in the bin)."""
    for index in np.linspace(0, len(prepared) - 1, min(len(prepared), most_bins)).round().astype(int).tolist():
        packed = prepared.bin(index)
        yield from ((packed, number) for number in range(len(packed.sample_ids)))


def _hash(packed: Bin, number: int) -> bytes:
    """The hash of a sample's tokens and of the names or bytes of its images."""
    stop = int(packed.sample_lengths[: number + 1].sum())
    digest = hashlib.blake2b(packed.input_ids[stop - int(packed.sample_lengths[number]) : stop].tobytes())
    for image in packed.images:
        if image["sample"] == number:
            digest.update(image["data"] or str(image["uri"]).rpartition("/")[2].encode())
    return digest.digest()
