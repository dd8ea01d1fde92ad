"""The speed of a run's steps: tokens and model FLOPs a second, and their share of what the devices can do."""

import logging
from collections.abc import Sequence

import torch

from mmray.batches.micro_batch import MicroBatch
from mmray.errors import UserError
from mmray.loss.rules import IGNORE_INDEX
from mmray.training.engine import TrainingEngine
from mmray.training.model import transformers_model
from mmray.training.model_flops import Load, ModelFlops, bf16_peak

log = logging.getLogger("mmray")


class FlopsCounter:
    """Counts the operations that a model needs for a rank's micro-batches; 0 where they are not known."""

    def __init__(self, engine: TrainingEngine) -> None:
        """Reads the weights of the engine's model."""
        self._flops: ModelFlops | None = None
        self.read(engine)

    def read(self, engine: TrainingEngine) -> None:
        """Reads the weights anew, of which others are trained in another stage of the training."""
        try:
            self._flops = ModelFlops(transformers_model(engine.model))
        except UserError as error:
            log.info("model FLOPs are not counted: %s", error)

    def of(self, micro_batches: Sequence[MicroBatch]) -> int:
        """Number of operations of a step of this rank."""
        return sum(self._flops.of(load_of(batch)) for batch in micro_batches) if self._flops else 0


def load_of(batch: MicroBatch) -> Load:
    """The samples of a micro-batch; of the pictures, an added one counts, too."""
    masked = batch.masked
    return Load(
        lengths=masked.lengths[~masked.padding],
        trained_tokens=int((masked.labels != IGNORE_INDEX).sum()),
        visual_tokens=int(masked.blocks[:, 1].sum()),
        pixels=int(masked.frame_sizes.astype(int).prod(axis=1).sum()),
    )


def speed_metrics(tokens: int, flops: int, seconds: float, workers: int, device: str | None) -> dict[str, float]:
    """The speed of a step as its metrics have it.

    Args:
        tokens: number of tokens of the samples of all workers.
        flops: the model's operations of all workers; 0 where they are not known.
        seconds: time of the step, without waiting for data.
        device: name of the GPU of each worker that trains in bf16; None elsewhere.

    Returns `tokens_per_second`; `model_flops_per_second` and, where the GPU's peak is known, `mfu`, the share of it.
    """
    seconds = max(seconds, 1e-9)
    metrics = {"tokens_per_second": tokens / seconds}
    if flops:
        metrics["model_flops_per_second"] = flops / seconds
        if device and (peak := bf16_peak(device)):
            metrics["mfu"] = flops / seconds / (peak * workers)
    return metrics


def bf16_device(engine: TrainingEngine) -> str | None:
    """The name of the GPU that an engine trains on in bf16; None elsewhere."""
    on_gpu = engine.device.type == "cuda" and engine.dtype == torch.bfloat16
    return torch.cuda.get_device_name(engine.device) if on_gpu else None
