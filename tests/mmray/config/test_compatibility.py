"""Model, processor and packing that do not fit together are found before any work."""

import pytest
from transformers import PretrainedConfig

from mmray.config.compatibility import check_attention, check_model, check_packing
from mmray.errors import UserError
from mmray.families import family_of
from mmray.packing.settings import PackingSettings
from mmray.synthetic.models import small_config
from mmray.training.settings import ModelSettings
from tests.mmray.families.zoo import ZOO


class Refusing:
    """A family that takes rows of at most 100 tokens, and samples of at most 50."""

    def packing_problem(self, config, *, sample_tokens, row_tokens):
        return "too long" if row_tokens > 100 or sample_tokens > 50 else None


@pytest.mark.parametrize(
    ("name", "changes", "settings", "problem"),
    [
        ("qwen2_vl", {}, {}, None),
        ("qwen2_vl", {}, {"dtype": "fp32"}, "take bf16, and model.dtype is fp32"),
        ("mllama", {}, {}, "transformers has none for MllamaForConditionalGeneration, MllamaModel, MllamaTextModel"),
        ("gemma4", {}, {}, None),
        ("gemma4", {"global_head_dim": 512}, {}, "up to 256 numbers, and Gemma4TextAttention has 512"),
    ],
)
def test_flash_attention_that_cannot_run_the_model_is_told_without_a_gpu(tmp_path, name, changes, settings, problem):
    ZOO[name].write_processor(tmp_path)
    config = ZOO[name].config(tmp_path).to_dict()
    if changes:
        config["text_config"] |= changes
        config["text_config"].pop("per_layer_config", None)  # Gemma 4: follows from the others
    model = ModelSettings(config=config, attention="flash_attention_2", **settings)
    if problem is None:
        check_attention(model)
        return
    with pytest.raises(UserError, match=rf"flash_attention_2, which cannot run this model: .*{problem}.*; set sdpa"):
        check_attention(model)
    check_attention(model.model_copy(update={"attention": "sdpa"}))


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
