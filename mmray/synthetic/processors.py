"""Small processors that transformers loads like those of published models.

`write_processor` leaves a folder of the same files, by a `Recipe`: `tokenizer.json` (a real byte-level BPE tokenizer,
trained on given texts, with the family's special tokens under their own names), `tokenizer_config.json`,
`preprocessor_config.json`, `chat_template.jinja` and, for the Idefics3 families, `processor_config.json`.
Only two things are small: the vocabulary (so that an embedding table is a few kilobytes) and the pictures'
limits (so that a page is at most about a hundred visual tokens).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mmray.synthetic.documents import sample_texts

# The words of the templates, often enough to become tokens.
_TURNS = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "User: ", "Assistant:"] * 20
VOCABULARY = 600  # byte-pair tokens, before special tokens; few texts give fewer

_QWEN_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# As granite-docling: roles between markers, turns ended by the end of text.
_IDEFICS3_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<image>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|end_of_text|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_of_role|>assistant<|end_of_role|>' -}}
{%- endif -%}
"""

# As SmolVLM: one start marker, capitalised roles, a space after the colon unless an image follows.
_SMOLVLM_TEMPLATE = """\
{{- '<|im_start|>' -}}
{%- for message in messages -%}
{{- message['role'] | capitalize -}}
{%- if message['content'] is string -%}
{{- ': ' + message['content'] -}}
{%- else -%}
{{- ':' if message['content'][0]['type'] == 'image' else ': ' -}}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<image>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<end_of_utterance>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:' -}}
{%- endif -%}
"""

_TILE_TOKENS = (
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<end_of_utterance>",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The files that make a processor folder one of a family. Class names are those that published folders carry."""

    special_tokens: tuple[str, ...]
    bos: str | None = None
    eos: str
    pad: str
    unk: str | None = None
    chat_template: str | None
    processor_class: str
    image_processor: dict[str, Any]
    """Content of preprocessor_config.json."""
    processor: dict[str, Any] | None = None
    """Content of processor_config.json, for families that have one, such as the number of visual tokens of a tile."""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """Other content of tokenizer_config.json."""


def _qwen(processor_class: str) -> Recipe:
    return Recipe(
        special_tokens=(
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|vision_pad|>",
            "<|image_pad|>",
            "<|video_pad|>",
        ),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        chat_template=_QWEN_TEMPLATE,
        processor_class=processor_class,
        image_processor={
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 4 * 28 * 28,  # 4 visual tokens
            "max_pixels": 96 * 28 * 28,  # 96 visual tokens
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )


def _tiled(class_stem: str, chat_template: str, turn_tokens: tuple[str, ...], bos: str, eos: str, pad: str) -> Recipe:
    """The recipe of an Idefics3 family: tiles of 64 pixels and 4 visual tokens, at most 2 x 2 and an overview."""
    return Recipe(
        special_tokens=(*turn_tokens, *_TILE_TOKENS),
        bos=bos,
        eos=eos,
        pad=pad,
        chat_template=chat_template,
        processor_class=f"{class_stem}Processor",
        image_processor={
            "image_processor_type": f"{class_stem}ImageProcessor",
            "do_convert_rgb": True,
            "do_image_splitting": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "max_image_size": {"longest_edge": 64},
            "resample": 1,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": 128},
        },
        processor={"image_seq_len": 4},
    )


_RECIPES = {
    "qwen2_vl": _qwen("Qwen2VLProcessor"),
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor"),
    "idefics3": _tiled(
        "Idefics3",
        _IDEFICS3_TEMPLATE,
        ("<|pad|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|unk|>"),
        bos="<|start_of_role|>",
        eos="<|end_of_text|>",
        pad="<|end_of_text|>",
    ),
    "smolvlm": _tiled(
        "SmolVLM",
        _SMOLVLM_TEMPLATE,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
    ),
}

MODEL_TYPES = tuple(_RECIPES)


def write_processor(
    folder: str | Path, model_type: str = "qwen2_vl", texts: Iterable[str] | None = None,
    image_processor: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Writes a small processor of a family to `folder`, and returns the folder (see `write_recipe`).

    image_processor: entries of preprocessor_config.json in place of the family's. Raises ValueError for a family not in
    MODEL_TYPES.
    """
    recipe = _recipe_of(model_type)
    recipe = replace(recipe, image_processor=recipe.image_processor | (image_processor or {}))
    return write_recipe(folder, recipe, texts)


def write_recipe(folder: str | Path, recipe: Recipe, texts: Iterable[str] | None = None) -> Path:
    """Writes the processor of a recipe to `folder`, and returns the folder. The same files for the same arguments.

    texts: what the tokenizer is trained on; None takes the texts of the synthetic pages. Any other text is
        still encoded, byte by byte at worst.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = sample_texts() if texts is None else texts
    tokenizer = _train_tokenizer([*texts, *_TURNS], recipe.special_tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": recipe.processor_class,
            "model_max_length": 32768,
            "bos_token": recipe.bos,
            "eos_token": recipe.eos,
            "pad_token": recipe.pad,
            "additional_special_tokens": list(recipe.special_tokens),
            "clean_up_tokenization_spaces": False,
        }
        | ({} if recipe.unk is None else {"unk_token": recipe.unk})
        | recipe.tokenizer,
    )
    settings = recipe.image_processor | {"processor_class": recipe.processor_class}
    _write_json(folder / "preprocessor_config.json", settings)
    if recipe.chat_template is not None:
        (folder / "chat_template.jinja").write_text(recipe.chat_template, encoding="utf-8")
    if recipe.processor is not None:
        settings = {"processor_class": recipe.processor_class} | recipe.processor
        _write_json(folder / "processor_config.json", settings)
    return folder


def _recipe_of(model_type: str) -> Recipe:
    """The recipe of a family. Raises ValueError, listing the families, for an unknown one."""
    if model_type not in _RECIPES:
        raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}")
    return _RECIPES[model_type]


def _train_tokenizer(texts: Iterable[str], special_tokens: tuple[str, ...]) -> Tokenizer:
    """Trains a byte-level BPE tokenizer. Digits stand alone: numbers are read digit by digit. Special tokens come
    last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens])
    return tokenizer


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
