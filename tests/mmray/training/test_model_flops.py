"""The operations that a model is said to need, against those that torch counts while it runs."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmray.training.loss import packed_loss_sum
from mmray.training.model import build_model
from mmray.training.model_flops import Load, ModelFlops, bf16_peak
from tests.mmray.training import tiny

MATRICES = ("mm", "addmm", "convolution", "convolution_backward", "_grouped_mm")
CPU = torch.device("cpu")


def counted(model: Any, packed: tiny.TinyBin) -> tuple[float, float]:
    """What torch counts in matrices, and in products of batches of matrices: attention, one that is eager."""
    with FlopCounterMode(display=False) as counter:
        packed_loss_sum(model, packed.model_inputs(CPU, torch.float32, model.config), packed.labels).backward()
    counts = {str(operation).split(".")[-1]: count for operation, count in counter.get_flop_counts()["Global"].items()}
    return sum(counts.get(name, 0) for name in MATRICES), counts.get("bmm", 0)


def load_of(packed: tiny.TinyBin) -> Load:
    patches = sum(len(sample.pixel_values) for sample in packed.samples)
    return Load(
        lengths=np.asarray([len(sample.input_ids) for sample in packed.samples]),
        trained_tokens=int((packed.labels[0, 1:] >= 0).sum()),
        visual_tokens=patches // tiny.MERGE**2,
        pixels=patches * 4 * 4,
    )


@pytest.mark.parametrize("frozen", [(), ("visual",), ("language_model", "lm_head"), ("visual", "language_model")])
def test_matrices_of_a_model_of_which_parts_are_frozen(frozen: tuple[str, ...]) -> None:
    model = build_model(
        tiny.model_settings(attention="eager", config=tiny.TINY_QWEN2_VL | {"tie_word_embeddings": False})
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    packed = tiny.global_batch(0)[0]
    expected, _ = counted(model, packed)
    assert ModelFlops(model).in_matrices(load_of(packed)) == pytest.approx(expected, rel=0.03)


def test_attention_of_the_text() -> None:
    """Of one sample: half of what eager attention computes, which masks the rest."""
    model = build_model(tiny.model_settings(attention="eager"))
    sample = tiny.make_sample(torch.Generator().manual_seed(0), before=100, grid=None, after=100, trained=50)
    flops, packed = ModelFlops(model), tiny.TinyBin((sample,))
    inputs = {"input_ids": sample.input_ids[None]}
    with FlopCounterMode(display=False) as counter:
        packed_loss_sum(model, inputs, packed.labels).backward()
    eager = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "bmm" in str(name))
    load = load_of(packed)
    assert flops.of(load) - flops.in_matrices(load) == pytest.approx(eager / 2, rel=0.01)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_are_known_by_name(name: str, peak: float | None) -> None:
    assert bf16_peak(name) == peak
