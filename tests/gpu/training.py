"""What ranks do in the checks of training, and a step of a wide model."""

import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_step import GPU_SCALE, Samples, step
from mmray.training.checkpoint import save_state
from mmray.training.model import build_model
from mmray.training.settings import ModelSettings
from tests.mmray.training import scenarios, tiny

Case = tuple[int, str]
HERE = Path(__file__).resolve().parents[2] / "mmray"


def _losses(engine: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        bins = tiny.global_batch(engine.step_count)
        mine = tiny.micro_batches(bins, engine.rank, engine.world_size, engine.grad_accumulation)
        losses.append(engine.step(mine).loss)
    return losses


def saved_and_resumed(
    rank: int, world_size: int, cases: list[Case], folder: Path
) -> dict[Case, tuple[list[float], list[float]]]:
    """The losses of three steps, saved after the first, and of the last two from that checkpoint, for each case."""
    results = {}
    for case in cases:
        engine = scenarios.build(case, 2)
        whole = _losses(engine, 1)
        save_state(engine, folder / scenarios.checkpoint_name(case))
        whole += _losses(engine, 2)
        engine.close()
        engine = scenarios.build(case, 2, resume_from=folder / scenarios.checkpoint_name(case))
        results[case] = whole, _losses(engine, 2)
        engine.close()
    return results


def waits_of_a_step(rank: int, world_size: int) -> list[str]:
    """The places in mmray, file:line, at which a step waits for the GPU."""
    engine = scenarios.build((1, "bf16"), 2)
    _losses(engine, 2)
    bins = tiny.micro_batches(tiny.global_batch(0), rank, world_size, 2)
    inputs = [batch.model_inputs(engine.device, engine.dtype, engine.model.config) for batch in bins]
    labels = [batch.labels.to(engine.device) for batch in bins]

    class Ready:
        """A micro-batch whose inputs are on the device."""

        def __init__(self, number: int) -> None:
            self.number, self.labels, self.num_tokens = number, bins[number].labels, bins[number].num_tokens

        def model_inputs(self, *_: object) -> dict[str, Any]:
            self.labels = labels[self.number]
            return inputs[self.number]

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            engine.step([Ready(number) for number in range(len(bins))])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    mine = [one for one in told if "synchron" in str(one.message) and Path(one.filename).is_relative_to(HERE)]
    engine.close()
    return [f"{Path(one.filename).relative_to(HERE)}:{one.lineno}" for one in mine]


def _wide(device: torch.device) -> tuple[Any, list[Any], int]:
    """A model as wide as Qwen2-VL-2B, with a quarter of its layers, packed rows, and their number of tokens."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        samples = Samples(Path(folder), GPU_SCALE)
        config = samples.config(GPU_SCALE)
        batches = [batch.to(device, torch.bfloat16) for batch in samples.packed(config)]
    model = build_model(ModelSettings(config=config.to_dict(), dtype="bf16", attention="sdpa"), device=device)
    return model, batches, samples.num_tokens


def wide_step(device: torch.device) -> tuple[float, float]:
    """FLOPs of the language model's matrices in a step (6 a weight and token), and the step's least seconds."""
    model, batches, tokens = _wide(device)
    weights = sum(weight.numel() for name, weight in model.named_parameters() if "layers" in name and weight.dim() == 2)
    times = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        step(model, batches)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 6.0 * weights * tokens, min(times[1:])


def profiled(device: torch.device) -> str:
    """The kernels with the most time of a wide step, with their shares."""
    from torch.profiler import ProfilerActivity, profile

    model, batches, _ = _wide(device)
    step(model, batches)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as watched:
        step(model, batches)
        torch.cuda.synchronize(device)
    kernels = sorted(watched.key_averages(), key=lambda one: -one.self_device_time_total)
    whole = sum(one.self_device_time_total for one in kernels) or 1
    return ", ".join(f"{one.key[:40]} {one.self_device_time_total / whole:.0%}" for one in kernels[:8])


def reserved(rank: int, world_size: int, expandable: bool) -> int:
    """Bytes that torch reserves after rows of all lengths. expandable: whether its segments grow."""
    torch.cuda.memory._set_allocator_settings(f"expandable_segments:{expandable}")
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator().manual_seed(0)
    for length in torch.randint(1, 512, (200,), generator=generator).tolist():
        rows = [torch.empty(length, 65_536, device=device) for _ in range(4)]
        del rows[::2]
    return int(torch.cuda.max_memory_reserved(device))
