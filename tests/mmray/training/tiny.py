"""A small real Qwen2-VL and packed bins made by hand for it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mmray.loss.rules import IGNORE_INDEX
from mmray.training.settings import ModelSettings, TrainingSettings

IMAGE_TOKEN = 151
MERGE = 2
PATCH_VALUES = 3 * 2 * 4 * 4  # channels × frames × patch height × patch width

TINY_QWEN2_VL = {
    "model_type": "qwen2_vl",
    "text_config": {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    },
    "vision_config": {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "in_channels": 3,
    },
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 152,
    "vision_start_token_id": 153,
    "vision_end_token_id": 154,
    "tie_word_embeddings": True,
}


def model_settings(**changes) -> ModelSettings:
    return ModelSettings(**({"config": TINY_QWEN2_VL, "dtype": "fp32", "seed": 1, "attention": "sdpa"} | changes))


def training_settings(**changes) -> TrainingSettings:
    """A high learning rate, warm-up, decay and clipping, so that a slip in any of them shows in the losses."""
    defaults = {
        "steps": 6,
        "global_batch_bins": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
    }
    return TrainingSettings(**(defaults | changes))


@dataclass(frozen=True)
class Sample:
    """One sample: ids and labels [L], M-RoPE positions [3, L], patches of its images, grids [n, 3]."""

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    pixel_values: Tensor
    grids: Tensor


@dataclass(frozen=True)
class TinyBin:
    """Samples packed into one row; fulfils MicroBatch."""

    samples: tuple[Sample, ...]

    @property
    def num_tokens(self) -> int:
        return self.labels.numel()

    @property
    def labels(self) -> Tensor:
        return torch.cat([sample.labels for sample in self.samples])[None]

    def model_inputs(self, device: torch.device, dtype: torch.dtype, config: PretrainedConfig) -> dict[str, Tensor]:
        within = [torch.arange(len(sample.input_ids)) for sample in self.samples]
        positions = torch.cat([sample.positions for sample in self.samples], dim=1)
        inputs = {
            "input_ids": torch.cat([sample.input_ids for sample in self.samples])[None],
            "position_ids": torch.cat([torch.cat(within)[None], positions])[:, None],
            "pixel_values": torch.cat([sample.pixel_values for sample in self.samples]).to(dtype),
            "image_grid_thw": torch.cat([sample.grids for sample in self.samples]),
        }
        lengths = torch.tensor([len(sample.input_ids) for sample in self.samples])
        if "flash" in str(config._attn_implementation):
            bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        return {name: value.to(device) for name, value in inputs.items()}


def make_sample(
    generator: torch.Generator, *, before: int, grid: tuple[int, int] | None, after: int, trained: int
) -> Sample:
    """`before` text tokens, an image of `grid` patches (height, width), `after` text tokens; the last are trained."""
    text = torch.randint(0, 150, (before + after,), generator=generator)
    positions = [torch.arange(before).expand(3, -1)]
    media, start = torch.zeros(0, dtype=torch.long), before
    pixels, grids = torch.zeros(0, PATCH_VALUES), torch.zeros(0, 3, dtype=torch.long)
    if grid is not None:
        height, width = grid[0] // MERGE, grid[1] // MERGE
        media = torch.full((height * width,), IMAGE_TOKEN)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        positions.append(before + torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1))
        start = before + max(height, width)
        pixels = torch.randn(grid[0] * grid[1], PATCH_VALUES, generator=generator)
        grids = torch.tensor([[1, *grid]])
    positions.append(start + torch.arange(after).expand(3, -1))
    input_ids = torch.cat([text[:before], media, text[before:]])
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    if trained:
        labels[-trained:] = input_ids[-trained:]
    return Sample(input_ids, labels, torch.cat(positions, dim=1), pixels, grids)


def dummy_image(generator: torch.Generator) -> Sample:
    """What a text-only bin carries so that it runs the vision tower too: an image that trains nothing."""
    return make_sample(generator, before=1, grid=(4, 4), after=1, trained=0)


def global_batch(step: int) -> list[TinyBin]:
    """Four bins with 61, 4, 0 and 17 trained tokens: images first, in the middle, several, and none."""
    g = torch.Generator().manual_seed(1000 + step)
    return [
        TinyBin(
            (
                make_sample(g, before=5, grid=(8, 4), after=40, trained=39),
                make_sample(g, before=1, grid=(4, 12), after=30, trained=22),
            )
        ),
        TinyBin((make_sample(g, before=20, grid=None, after=10, trained=4), dummy_image(g))),
        TinyBin((make_sample(g, before=9, grid=(4, 4), after=5, trained=0),)),
        TinyBin(
            (
                make_sample(g, before=1, grid=(8, 8), after=11, trained=10),
                make_sample(g, before=3, grid=None, after=12, trained=7),
            )
        ),
    ]


def empty_bin() -> TinyBin:
    """Fills a slot of a global batch that does not divide evenly; trains nothing."""
    return TinyBin((dummy_image(torch.Generator().manual_seed(7)),))


def micro_batches(bins: list[TinyBin], rank: int, world_size: int, grad_accumulation: int) -> list[TinyBin]:
    """This rank's micro-batches, bins of one micro-batch joined into one row; empty bins fill up the last slots."""
    slots = world_size * grad_accumulation
    per_micro_batch = max(1, len(bins) // slots)
    bins = bins + [empty_bin()] * (slots * per_micro_batch - len(bins))
    starts = range(rank * grad_accumulation, (rank + 1) * grad_accumulation)
    return [join(bins[i * per_micro_batch : (i + 1) * per_micro_batch]) for i in starts]


def join(bins: list[TinyBin]) -> TinyBin:
    return TinyBin(tuple(sample for packed in bins for sample in packed.samples))
