"""LLaVA 1.5: a CLIP before a Llama, with Llama's kind of tokenizer and Vicuna's turns."""

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmray.synthetic.documents import sample_texts
from mmray.synthetic.processors import Recipe, write_recipe
from tests.mmray.families.zoo.base import Member, Turns

VISION = ("vision_tower", "multi_modal_projector")
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}

# All images of a turn come before all its text. Content may be a string here, which published templates skip.
TEMPLATE = """\
{%- for message in messages -%}
{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string \
else message['content'] -%}
{%- if message['role'] != 'system' -%}
{{- message['role'] | upper + ': ' -}}
{%- endif -%}
{%- for part in parts if part['type'] == 'image' -%}
{{- '<image>\\n' -}}
{%- endfor -%}
{%- for part in parts if part['type'] == 'text' -%}
{{- part['text'] + ' ' -}}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
"""

RECIPE = Recipe(
    special_tokens=("<unk>", "<s>", "</s>", "<image>", "<pad>"),
    bos="<s>",
    eos="</s>",
    unk="<unk>",
    pad="<pad>",
    chat_template=TEMPLATE,
    processor_class="LlavaProcessor",
    image_processor={
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 56},
        "crop_size": {"height": 56, "width": 56},
        **CLIP,
    },
    processor={
        "image_token": "<image>",
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    },
)


def write_llama_recipe(folder: Path, recipe: Recipe) -> None:
    """A processor with a tokenizer such as Llama's first two: a space belongs to the word after it, also before the
    text's first word, letters not known become bytes, and a text begins with <s>."""
    write_recipe(folder, recipe)
    path = folder / "tokenizer.json"
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words
    marks = ["USER: ASSISTANT: [INST] [/INST] <<SYS>> <</SYS>>"] * 20
    trainer = trainers.BpeTrainer(vocab_size=400, min_frequency=2, show_progress=False)
    lines = [line for text in sample_texts() for line in text.splitlines()]  # a line break is a byte
    tokenizer.train_from_iterator([*lines, *marks], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    tokens = dict.fromkeys(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *trained["vocab"]])
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in trained["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in recipe.special_tokens])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path))


def text_config(folder: Path, **settings: Any) -> dict[str, Any]:
    """A text model of two layers that takes the tokenizer of a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    small = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    return small | settings


def vision_config(**settings: Any) -> dict[str, Any]:
    """A vision tower for pictures of 56 pixels in patches of 14."""
    small = {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
    }  # fmt: skip
    return small | settings


def small_config(model_type: str, folder: Path, *, text: dict[str, Any], vision: Any = None, **settings: Any) -> Any:
    """The configuration of a LLaVA of some kind for the processor of a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoConfig.for_model(
        model_type,
        text_config=text_config(folder, **text),
        vision_config=vision_config(**vision or {}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **settings,
    )


def unscale_vision(model: Any, scale: float) -> None:
    """SigLIP, unlike other models, is drawn at unit scale: larger weights only blow up rounding."""
    for parameter in model.model.vision_tower.parameters():
        if parameter.dim() > 1:
            parameter.div_(scale)


def config(folder: Path) -> PretrainedConfig:
    return small_config("llava", folder, text={"model_type": "llama"}, vision={"num_hidden_layers": 3})


MEMBERS = (
    Member(
        name="llava",
        model_type="llava",
        processor="LlavaProcessor",
        write_processor=functools.partial(write_llama_recipe, recipe=RECIPE),
        config=config,
        vision=VISION,
        scale=3.0,
        unused=("post_layernorm", "encoder.layers.2"),
        turns=Turns(
            ends={"user": "", "assistant": ""},
            reply=lambda content: f" {content}",
            final_reply=lambda content: f" {content} ",
        ),
        tiling={"preset": "ocr_pages", "tile_size": (50, 70), "overview": (56, 56), "labels": True},
        settings=(
            {"size": {"shortest_edge": 40}},
            {"size": {"height": 42, "width": 70}, "do_center_crop": False},
            {"crop_size": {"height": 28, "width": 61}},
        ),
    ),
)
