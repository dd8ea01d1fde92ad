"""Model, processor and packing that do not fit together are found before any work."""

import pytest
from transformers import PretrainedConfig

from mmray.config.compatibility import check_model, check_packing
from mmray.errors import UserError
from mmray.families import family_of
from mmray.packing.settings import PackingSettings
from mmray.synthetic.models import small_config


class Refusing:
    """A family that takes rows of at most 100 tokens, and samples of at most 50."""

    def packing_problem(self, config, *, sample_tokens, row_tokens):
        return "too long" if row_tokens > 100 or sample_tokens > 50 else None


def test_another_image_token(processors, processor_folders):
    family = family_of(processors["qwen2_vl"])
    config = small_config("qwen2_vl", processor_folders["qwen2_vl"])
    check_model(config, family)
    config.image_token_id += 1
    with pytest.raises(UserError, match=rf"image token is {config.image_token_id}, that of Qwen2VLProcessor is"):
        check_model(config, family)


@pytest.mark.parametrize(
    ("mode", "capacity", "micro_batch_bins", "fits"),
    [
        ("bins", 50, 1, True),
        ("bins", 50, 2, True),
        ("bins", 50, 3, False),
        ("bins", 51, 1, False),
        ("none", 1000, 1, True),
        ("none", 50, 3, False),
    ],
)
def test_rows_that_a_model_cannot_take(mode, capacity, micro_batch_bins, fits):
    packing = PackingSettings(mode=mode, token_capacity=capacity, visual_capacity=64)
    if fits:
        check_packing(PretrainedConfig(), Refusing(), packing, micro_batch_bins)
        return
    with pytest.raises(UserError, match=r"too long.*packing\.mode: none"):
        check_packing(PretrainedConfig(), Refusing(), packing, micro_batch_bins)
