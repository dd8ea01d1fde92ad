"""DeepSeek-VL, which no family of mmray serves: general rules."""

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmray.synthetic.processors import Recipe, write_recipe
from tests.mmray.families.zoo.base import Member

TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<image_placeholder>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|end|>' -}}
{%- endfor -%}
"""

RECIPE = Recipe(
    special_tokens=("<bos>", "<|end|>", "<|user|>", "<|assistant|>", "<image_placeholder>"),
    bos="<bos>",
    eos="<|end|>",
    pad="<|end|>",
    chat_template=TEMPLATE,
    processor_class="DeepseekVLProcessor",
    image_processor={
        "image_processor_type": "DeepseekVLImageProcessor",
        "size": {"height": 56, "width": 56},
        "min_size": 14,
    },
    processor={"num_image_tokens": 16},
    tokenizer={"image_token": "<image_placeholder>"},
)


def write_processor(folder: Path) -> None:
    write_recipe(folder, RECIPE)


def config(folder: Path) -> PretrainedConfig:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = {
        "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 56, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<image_placeholder>")
    return AutoConfig.for_model("deepseek_vl", text_config=text, vision_config=vision, image_token_id=image_token)


MEMBERS = (
    Member(
        name="generic",
        by_sample=(),
        model_type="deepseek_vl",
        write_processor=write_processor,
        config=config,
        vision=("vision_model", "aligner"),
        turns=None,
        tiling={"preset": "ocr_pages", "tile_size": (56, 56), "overview": (56, 56), "labels": True},
        refuses="no test has shown",
    ),
)
