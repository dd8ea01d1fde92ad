"""What a rank measures of its own memory: the bytes of the tensors that live when a backward pass of a step has ended,
by what they hold; the most of all its backward passes."""

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from mmray.training.checkpoint import save_state
from mmray.training.engine import TrainingEngine
from tests.mmray.training import tiny

VOCABULARY, INNER = 30_000, 12_000
BUCKET = 20_000
"""Elements of DeepSpeed's buffers, which are not what is measured here."""


def config() -> dict[str, Any]:
    """A model whose weights dwarf all else that lives in the process."""
    text = {**tiny.TINY_QWEN2_VL["text_config"], "vocab_size": VOCABULARY, "intermediate_size": INNER}
    return {**tiny.TINY_QWEN2_VL, "text_config": text, "tie_word_embeddings": False}


def measured(rank: int, world_size: int, stage: int, dtype: str, folder: Path) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer and checkpoint, and the number of parameters."""
    overrides = {
        "reduce_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": 0,
    }
    engine = TrainingEngine(
        tiny.model_settings(config=config(), dtype=dtype),
        tiny.training_settings(zero_stage=stage, deepspeed={"zero_optimization": overrides} if stage else None),
        total_steps=6, grad_accumulation=2,
    )  # fmt: skip
    bins = tiny.global_batch(0)
    mine = tiny.micro_batches(bins, rank, world_size, 2)
    engine.step(mine)
    found: dict[str, int] = {}
    step = engine.deepspeed.step

    def measure() -> None:
        now = _by_use(engine)
        found.update({use: max(size, found.get(use, 0)) for use, size in now.items()})
        step()

    engine.deepspeed.step = measure
    engine.step(tiny.micro_batches(bins, rank, world_size, 2))
    engine.deepspeed.step = step
    save_state(engine, folder / f"{stage}-{dtype}")
    if rank == 0:
        found["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
    engine.close()
    return found


def _by_use(engine: TrainingEngine) -> dict[str, int]:
    gc.collect()
    parameters = list(engine.model.parameters())
    weights = _storages(getattr(parameter, "ds_tensor", parameter).data for parameter in parameters)
    optimizer = engine.deepspeed.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    state = [value for values in inner.state.values() for value in values.values() if isinstance(value, Tensor)]
    names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
    masters = [tensor for name in names for tensor in getattr(optimizer, name, [])]
    of_optimizer = {place: size for place, size in _storages([*state, *masters]).items() if place not in weights}
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]  # Python may not hold them
    whole = _storages([*gradients, *(value for value in gc.get_objects() if isinstance(value, Tensor))])
    of_gradients = {
        place: size
        for place, size in whole.items()
        if place not in weights and place not in of_optimizer and size > 4 * BUCKET + 1000
    }
    return {
        "weights": sum(weights.values()), "optimizer": sum(of_optimizer.values()),
        "gradients": sum(of_gradients.values()),
    }  # fmt: skip


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    return {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor.device.type == "cpu"
    }
