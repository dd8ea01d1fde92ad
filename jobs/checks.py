"""Checks before work starts, the same for prepare, train and the dry run.

    job_checks       the job and its settings, without a cluster
    open_prepared    the prepared datasets, which must have been made with these settings
    cluster_checks   whether the nodes have room, and can do their part

A run raises the first mistake (`require`); a dry run lists all of them.
"""

import glob
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jobs.capacity import check_capacity, check_elastic, check_growth, prepare_pools, train_pools
from jobs.common import console, in_submitted_job
from jobs.probe import (
    Machine,
    Work,
    check_nodes,
    check_own_machine,
    check_own_programs,
    look,
    packages_of,
    programs_of,
)
from jobs.room import UnknownModel, check_disk, check_memory
from mmray.config.compatibility import job_family
from mmray.config.job import Job
from mmray.doctor import Status, examine_settings
from mmray.errors import UserError
from mmray.loss.labels import LabelMaker
from mmray.loss.sources import label_maker
from mmray.prepared import PreparedDataset
from mmray.prepared.fingerprint import check_settings, settings_record
from mmray.prepared.joined import PreparedMixture, check_common
from mmray.prepared.versions import check_labels, run_labels
from mmray.rows.settings import DatasetSettings
from mmray.run.data import RunData, open_data
from pipelines.nodes import Node

log = logging.getLogger("mmray")


@dataclass(frozen=True)
class Check:
    """One condition that must hold before work starts."""

    name: str
    """Name of the check in a dry run's table."""
    run: Callable[[], str | None]
    """Function that raises UserError where the condition does not hold; returns a note for a person, or None."""
    passed: str = ""
    """Text of a dry run where the condition holds without a note; "": nothing."""


def require(checks: Iterable[Check]) -> None:
    """Runs checks one after another and logs their notes. Raises UserError of the first that fails."""
    for check in checks:
        if note := check.run():
            log.warning("%s", note)


def job_checks(job: Job, *, trains: bool) -> Iterator[Check]:
    """The checks of a job and its settings that need no cluster."""
    yield Check("outputs", partial(check_outputs, job))
    if trains:
        yield Check("tracking", job.tracking.check)


def cluster_checks(
    job: Job, nodes: Sequence[Node], *, trains: bool, gpus: bool = False, joined: bool | None,
    saved_stage: int | None = None,
) -> Iterator[Check]:  # fmt: skip
    """The checks that the nodes have room for a job, and can do their part.

    Args:
        gpus: whether training uses GPUs.
        saved_stage: the ZeRO stage of the checkpoint that a training continues from.
        joined: whether this process has joined a cluster, whose nodes are asked, or started Ray here; None for a
            machine on which no Ray runs.
    """
    what: Work = "training" if trains else "preparing"
    labels = job.resources.train_labels if trains else job.resources.prepare_labels
    pools = train_pools(job, gpus) if trains else prepare_pools()
    yield Check(
        "cluster", partial(check_capacity, job, pools, what, labels, nodes), f"room for all that {what} needs at least"
    )
    if trains and gpus and job.resources.autoscaling:
        yield Check("cluster", partial(check_growth, job, nodes))
    if trains and joined is not None and job.resources.is_elastic:
        yield Check("cluster", partial(check_elastic, job, gpus, nodes))
    machines: list[Machine] = []
    programs = programs_of(job, gpus) if trains else []
    if joined:
        outputs = {"output.prepared": job.output.prepared} | ({"output.run": job.output.run} if trains else {})
        modules = packages_of(job, what)
        splits = {} if trains else job.data.splits  # training reads the prepared dataset, and pictures
        inputs = row_inputs(
            {f"data.{split}[{number}]": dataset for split in splits for number, dataset in enumerate(splits[split])}
        )
        check = partial(
            check_nodes, nodes, labels, outputs, inputs=inputs, modules=modules, programs=programs, gpus=gpus,
            machines=machines,
        )  # fmt: skip
        yield Check("nodes", check)
    elif joined is not None:
        yield Check("nodes", partial(check_own_machine, nodes, gpus))
    if not trains:
        return
    if not joined:
        machines.append(Machine.of("this machine", look({}, [])))
        if programs:
            yield Check("offloading", partial(check_own_programs, programs))
    for name, check_room in (("memory", check_memory), ("disk", check_disk)):
        yield Check(name, partial(_where_known, partial(check_room, job, gpus, machines, saved_stage)))


def row_inputs(datasets: Mapping[str, DatasetSettings]) -> dict[str, str]:
    """A row file of each set, and the folder of its images where the job names one, as far as they are on disks.

    datasets: sets by their names in the job. Returns paths by the names of their settings.
    """
    inputs = {}
    for set_name, dataset in datasets.items():
        patterns = (pattern for pattern in dataset.files if "://" not in pattern)
        first_file = next((path for pattern in patterns for path in glob.iglob(pattern, recursive=True)), None)
        for name, path in (("files", first_file), ("image_root", dataset.image_root)):
            if path and Path(path).exists():
                inputs[f"{set_name}.{name}"] = path
    return inputs


def _where_known(check: Callable[[], str | None]) -> None:
    """Runs a check that needs the model's configuration, where it can be read from here."""
    try:
        check()
    except UnknownModel:
        return


def check_job_settings(job: Job) -> None:
    """The cheap part of `mmray doctor`, before anything starts: one line for each check, UserError for a failed one."""
    for finding in examine_settings(job):
        if finding.status is Status.FAIL:
            raise UserError(f"{finding.check}: {finding.detail}")
        console.print(f"{finding.check}: {finding.detail}", markup=False, highlight=False, soft_wrap=True)


def open_prepared(job: Job) -> dict[str, RunData]:
    """The job's prepared datasets. Raises UserError when one is missing, empty, or was made with other settings."""
    family = job_family(job)
    tiling = family.resolved_tiling(job.images)
    datasets: dict[str, RunData] = {}
    for split in job.data.splits:
        data = datasets[split] = open_data(job, split)
        if isinstance(data, PreparedMixture):
            record = settings_record(processor=family.processor, tiling=tiling, packing=job.packing, loss=job.loss)
            labels = label_maker(job.loss, family)
            for part in data.parts:
                check_common(part, record)
                _check_bins(part, labels)
            continue
        check_settings(
            data.path, data.manifest["record"], processor=family.processor,
            tiling=tiling, packing=job.packing, loss=job.loss,
            datasets=getattr(job.data, split), data=job.data,
        )  # fmt: skip
        _check_bins(data, run_labels(data, job.loss, family))
    return datasets


def _check_bins(prepared: PreparedDataset, labels: LabelMaker) -> None:
    """Raises UserError where a dataset has no bins or its labels would be others; tells of pictures read otherwise."""
    if prepared.is_read_otherwise:
        console.print(
            f"{prepared.path} was prepared before orientations of signed kinds in EXIF, and of bytes in TIFF, "
            "counted: such pictures go on as they are stored, with the sizes they were prepared with; prepare anew "
            "to turn them",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    prepared.check_has_bins()
    check_labels(prepared, labels)


def check_outputs(job: Job) -> None:
    """Raises UserError when results would go into Ray's copy of a submitted checkout, which vanishes with the job."""
    here = Path.cwd()
    cache = job.resources.tile_cache
    shared, local = "that all nodes share", "on each node's own disk"
    for name, path, where in (
        ("output.prepared", job.output.prepared, shared),
        ("output.run", job.output.run, shared),
        ("data.size_cache", job.data.size_cache, shared),
        *((f"mixture.{number}.prepared", part.prepared, shared) for number, part in enumerate(job.mixture)),
        ("resources.tile_cache.folder", cache and cache.folder, local),
    ):
        if in_submitted_job() and path and Path(path).is_relative_to(here):
            raise UserError(
                f"{name} {str(Path(path).relative_to(here))!r} is relative: under `ray job submit` that is a "
                f"temporary copy of the checkout. Give an absolute path {where}"
            )
