"""Small configs build the real classes, and those run on what the real image processors make of a page."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
)

from mmray.synthetic.documents import make_document
from mmray.synthetic.models import small_config
from mmray.synthetic.pictures import draw_page
from mmray.synthetic.processors import MODEL_TYPES, write_processor

SHARED = Path(__file__).parents[4] / "shared/data/processors"
CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
}


def inputs_of(folder: Path, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """One row: a page's visual tokens, then its text, by the real tokenizer and image processor."""
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    document = make_document(0, 1)
    pixels = images(draw_page(document), return_tensors="pt")
    if "image_grid_thw" in pixels:
        visual_tokens = int(pixels["image_grid_thw"].prod()) // images.merge_size**2
    else:
        tile, patch = config.vision_config.image_size, config.vision_config.patch_size
        visual_tokens = pixels["pixel_values"].shape[1] * (tile // patch // config.scale_factor) ** 2
    ids = tokenizer(document.text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    input_ids = torch.tensor([[config.image_token_id] * visual_tokens + ids])
    types = {"mm_token_type_ids": (input_ids == config.image_token_id).int()}
    return {"input_ids": input_ids} | (types if "image_grid_thw" in pixels else {}) | dict(pixels)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_real_class_runs_on_a_real_page(model_type, tmp_path):
    folder = write_processor(tmp_path, model_type)
    config = small_config(model_type, folder)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    assert type(model).__name__ == CLASSES[model_type]
    assert sum(weight.numel() for weight in model.parameters()) < 500_000

    inputs = inputs_of(folder, config)
    logits = model(**inputs, use_cache=False).logits
    assert logits.shape == (1, inputs["input_ids"].shape[1], len(AutoTokenizer.from_pretrained(folder)))
    assert logits.isfinite().all()

    other = dict(inputs) | {"pixel_values": -inputs["pixel_values"]}
    assert not torch.allclose(model(**other, use_cache=False).logits[:, -1], logits[:, -1])
    logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_config_survives_its_file(model_type, tmp_path):
    config = small_config(model_type, write_processor(tmp_path / "processor", model_type))
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(config)
    assert again.text_config.to_dict() == config.text_config.to_dict()
    assert again.vision_config.to_dict() == config.vision_config.to_dict()
    assert again.image_token_id == config.image_token_id


def test_overrides_reach_the_parts(tmp_path):
    folder = write_processor(tmp_path)
    config = small_config(
        "qwen2_vl",
        folder,
        text_config={
            "hidden_size": 128,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
        },
        vision_config={"depth": 1},
        tie_word_embeddings=True,
    )
    assert config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
    assert (config.text_config.num_hidden_layers, config.vision_config.depth) == (3, 1)
    assert (config.vision_config.hidden_size, config.tie_word_embeddings) == (128, True)
    model = AutoModelForImageTextToText.from_config(config)
    assert model(**inputs_of(folder, config), use_cache=False).logits.isfinite().all()


def test_a_tile_that_cannot_give_its_tokens(tmp_path):
    folder = write_processor(tmp_path, "idefics3")
    (folder / "processor_config.json").write_text('{"image_seq_len": 5}')
    with pytest.raises(ValueError, match="a tile of 64 pixels cannot give 5 visual tokens"):
        small_config("idefics3", folder)


def test_unknown_family(tmp_path):
    with pytest.raises(ValueError, match=r"model_type must be one of .*, got 'llava'"):
        small_config("llava", tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no published processors beside the checkout")
def test_published_processors_fit_too():
    config = small_config("qwen2_vl", SHARED / "qwen2-vl")
    assert (config.image_token_id, config.text_config.vocab_size) == (151655, 151657)

    config = small_config("idefics3", SHARED / "granite-docling")
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        logits = model(**inputs_of(SHARED / "granite-docling", config), use_cache=False).logits
    assert logits.isfinite().all()
