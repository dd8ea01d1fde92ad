"""The data that a run trains on: one prepared dataset, or a mixture of several."""

from collections import Counter

from mmray.config.job import Job
from mmray.errors import UserError
from mmray.prepared import PreparedDataset
from mmray.prepared.dataset import MANIFEST
from mmray.prepared.joined import PreparedMixture
from mmray.schedule.mixture import MixedDataset, Mixture, WeightStage
from mmray.storage import Folder
from mmray.training.bins_log import TrainedStep
from mmray.training.engine import StepMetrics

RunData = PreparedDataset | PreparedMixture


def open_data(job: Job, split: str = "train") -> RunData:
    """Open the data that a job trains on, or evaluates on. Raises UserError where it is not there, or named twice."""
    if split != "train" or not job.mixture:
        return PreparedDataset(job.prepared_path(split))
    for setting in job.mixture:
        if Folder(setting.prepared).exists(MANIFEST):
            raise UserError(
                f"mixture: {setting.prepared} is a prepared dataset: give the folder that holds `train`, as in "
                "output.prepared"
            )
    paths = job.trained_paths(split)
    parts = [PreparedDataset(path) for path in paths]
    for number, part in enumerate(parts):
        part.check_has_bins()
        if part.fingerprint in {earlier.fingerprint for earlier in parts[:number]}:
            raise UserError(
                f"mixture: {part.path} holds the same bins as an earlier dataset; write it once, with the sum of the "
                "weights"
            )
    datasets = tuple(
        MixedDataset(part.path, setting.shown_name, part.fingerprint, len(part), setting.weight)
        for part, setting in zip(parts, job.mixture)
    )
    stages = tuple(WeightStage(stage.until, stage.weights) for stage in job.stages)
    return PreparedMixture(paths, Mixture(datasets, stages))


def data_lines(data: RunData) -> dict[str, object]:
    """The data as the history tells it, when a run begins on it in the middle."""
    values: dict[str, object] = {"prepared": data.path, "fingerprint": data.fingerprint, "bins": len(data)}
    return values | mixture_line(data)


def mixture_line(data: RunData) -> dict[str, object]:
    """The datasets and weights of a mixture as the history tells them; nothing for one dataset."""
    return {"mixture": data.mixture.record()} if isinstance(data, PreparedMixture) else {}


def set_names(data: RunData) -> tuple[str, ...]:
    """The names of the sets of rows whose losses are measured apart.

    The sets of one dataset have their numbers in `data.train` as names. In a mixture a dataset of one set has its own
    name, the sets of others their numbers behind it, such as `pages/1`. A single set is not measured apart.
    """
    if not isinstance(data, PreparedMixture):
        return tuple(str(number) for number in range(data.num_sets)) if data.num_sets > 1 else ()
    return tuple(
        dataset.name if part.num_sets == 1 else f"{dataset.name}/{number}"
        for dataset, part in zip(data.mixture.datasets, data.parts)
        for number in range(part.num_sets)
    )


def trained_step(data: RunData, step: int, rank_bins: list[list[int]]) -> TrainedStep:
    """The record of a step. step: counted from 1; rank_bins: bins of each rank, as batches count them through."""
    if not isinstance(data, PreparedMixture):
        return TrainedStep(step, data.fingerprint, len(rank_bins), rank_bins)
    places = [[data.part_of(number) for number in bins] for bins in rank_bins]
    return TrainedStep(
        step,
        data.fingerprint,
        len(rank_bins),
        [[number for _, number in rank] for rank in places],
        [part.fingerprint for part in data.parts],
        [[dataset for dataset, _ in rank] for rank in places],
    )


def set_metrics(data: RunData, trained: TrainedStep, metrics: StepMetrics) -> dict[str, dict[str, float | None]]:
    """The metrics of a step by name: the loss of each set, where there are several, and the bins of each dataset of a
    mixture."""
    names = set_names(data)
    losses = {"loss_by_set": dict(zip(names, metrics.set_losses, strict=True))} if names else {}
    if not isinstance(data, PreparedMixture) or trained.dataset_of is None:
        return losses
    counts = Counter(dataset for rank in trained.dataset_of for dataset in rank)
    bins: dict[str, float | None] = {
        dataset.name: counts[number] for number, dataset in enumerate(data.mixture.datasets)
    }
    return losses | {"bins_by_dataset": bins}
