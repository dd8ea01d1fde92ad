"""The vision tower of Qwen2.5-VL with packed attention against sdpa, on 19 tiles of 504 × 504 pixels.

With sdpa each layer makes a call for each tile, and the layers with windows one for each of a tile's 25 windows: 475 a
layer. With packed attention each run of neighbouring windows of one size is a call on a CPU, and all windows are one on
a GPU with bf16.

On one CPU thread a call costs some 30 µs, which only a narrow tower can feel: at the published width matrices take
nearly all the time, and the attention of a layer with windows took 9.9 s against 9.6 forward and backward. On GPUs,
where kernels take microseconds, the calls of a layer are most of its time. So on the CPU the tower is measured as
narrow as it runs, in fp32, and calls are counted beside it. Both ways give the same features, or the benchmark fails.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from benchmarks.bench_lengths import one_thread
from benchmarks.common import Result, best_seconds
from mmray.families.packed_attention import PACKED_FLASH

TILES, GRID, PATCH = 19, 36, 14
WIDE = {"depth": 8, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "fullatt_block_indexes": [7]}
NARROW = {"depth": 8, "hidden_size": 32, "intermediate_size": 80, "num_heads": 2, "fullatt_block_indexes": [7]}
"""As published, a quarter of its layers, and as narrow as it runs."""
PUBLISHED_DEPTH = {"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31]}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
REPEATS = 2


def run() -> list[Result]:
    with one_thread():
        return [whole_tower()] if torch.cuda.is_available() else [whole_tower(), calls()]


def whole_tower() -> Result:
    """Forward and backward of the tower: a narrow one on the CPU, a quarter of the published one on a GPU."""
    device, dtype = place()
    size = WIDE if device.type == "cuda" else NARROW
    torch.manual_seed(0)
    tower = Qwen2_5_VisionTransformerPretrainedModel(config_of(size)).to(device, dtype)
    grids = torch.tensor([[1, GRID, GRID]] * TILES, device=device)
    patches = torch.randn(TILES * GRID**2, 3 * 2 * PATCH**2).to(device, dtype)
    seconds = {way: seconds_of(tower, lambda: tower(patches, grids).pooler_output, way) for way in WAYS}
    return Result(
        name="the vision tower of Qwen2.5-VL, packed attention against sdpa: 19 tiles of 504 × 504",
        ratio=seconds["sdpa"] / seconds["packed"],
        goal=1.5,
        explanation=f"{seconds['packed']:.2f} s forward and backward against {seconds['sdpa']:.2f} on {where()}; "
        f"{size['depth']} layers of width {size['hidden_size']}",
    )


def calls() -> Result:
    """Calls of torch's attention in a forward of a tower of 32 layers on the CPU."""
    tower = Qwen2_5_VisionTransformerPretrainedModel(config_of(NARROW | PUBLISHED_DEPTH))
    grids = torch.tensor([[1, GRID, GRID]] * TILES)
    patches = torch.zeros(TILES * GRID**2, 3 * 2 * PATCH**2)
    counted = {}
    for way, implementation in WAYS.items():
        tower.config._attn_implementation = implementation
        with torch.no_grad(), Calls() as made:
            tower(patches, grids)
        counted[way] = made.number
    return Result(
        name="calls of attention in a forward of Qwen2.5-VL's vision tower, sdpa against packed: 19 tiles",
        ratio=counted["sdpa"] / counted["packed"],
        explanation=f"{counted['sdpa']:,} against {counted['packed']:,} on a CPU; 32 layers, 28 of them with windows",
    )


class Calls(TorchFunctionMode):
    """Counts the calls of torch's attention inside the block."""

    number = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.nn.functional.scaled_dot_product_attention
        return func(*args, **kwargs or {})


WAYS = {"packed": PACKED_FLASH, "sdpa": "sdpa"}


def seconds_of(module: torch.nn.Module, features: Callable[[], Tensor], way: str) -> float:
    """Time of forward and backward; CPU time on the CPU. Raises AssertionError where features are not sdpa's."""
    config = module.config
    config._attn_implementation = "sdpa"
    with torch.no_grad():
        expected = features()
    config._attn_implementation = WAYS[way]
    with torch.no_grad():
        error = (features() - expected).abs().max() / expected.abs().max()
    if error > TOLERANCE[expected.dtype]:
        raise AssertionError(f"{way} attention and sdpa differ by {error:.0e}")
    clock = time.perf_counter if expected.is_cuda else time.process_time
    return best_seconds(partial(forward_backward, module, features), REPEATS, clock=clock)


def forward_backward(module: torch.nn.Module, features: Callable[[], Tensor]) -> None:
    module.zero_grad(set_to_none=True)
    features().float().square().sum().backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def config_of(size: dict[str, Any]) -> Qwen2_5_VLVisionConfig:
    config = Qwen2_5_VLVisionConfig(**size, out_hidden_size=size["hidden_size"], patch_size=PATCH)
    config._attn_implementation = "sdpa"
    return config


def place() -> tuple[torch.device, torch.dtype]:
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def where() -> str:
    return "the GPU" if torch.cuda.is_available() else "one CPU thread"
