"""The operations of every kind of model in the zoo, against those that torch counts while it runs."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmray.training.loss import packed_loss_sum
from mmray.training.model_flops import Load, ModelFlops
from tests.mmray.families.small_models import small_model
from tests.mmray.families.zoo import ZOO

EXPERTS = {
    "gemma4, images seen whole": 1 / 2,
    "glm4v_moe": 1 / 2,
    "llama4": 1 / 2,
    "qwen3_5_moe": 1 / 2,
    "qwen3_vl_moe": 1 / 2,
}
"""The share of their experts that the small models send a token to."""


@pytest.mark.parametrize("name", [name for name in ZOO if name != "mllama"])  # leaves layers out for text alone
def test_every_kind_of_model_is_counted(name, zoo_folder):
    """Text alone. torch does not count products in groups, nor leave out experts: theirs are counted here."""
    member = ZOO[name]
    if member.missing_for_model:
        pytest.skip(f"{name} needs {', '.join(member.missing_for_model)}")
    model = small_model(name, zoo_folder(name), member.attentions[0])
    ids = torch.arange(3, 9).repeat(7)[None, :40]
    with FlopCounterMode(display=False) as counter:
        packed_loss_sum(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids).backward()
    counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    experts = sum(
        6 * 40 * weight.numel() * EXPERTS[name] for part, weight in model.named_parameters() if ".experts." in part
    )
    load = Load(lengths=np.asarray([40]), trained_tokens=39, visual_tokens=0, pixels=0)
    expected = counts["aten.mm"] + counts.get("aten.addmm", 0) + experts
    assert ModelFlops(model).in_matrices(load) == pytest.approx(expected, rel=0.1)
    assert ModelFlops(model).of(load) > expected
