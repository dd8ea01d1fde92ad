"""Text models of any class before which LLaVA and its kin stand: how their turns are found, and which of them pack."""

import copy
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig

from mmray.families import PackedRow, Tile, family_of
from mmray.families.base import positions_in_sample
from mmray.families.text_models import PACKING_TEXT_MODELS, packing_problem, role_markers
from mmray.loss.labels import segment_ids
from mmray.loss.rules import IGNORE_INDEX, LossRule
from mmray.loss.settings import RoleLoss
from mmray.loss.sources import label_maker
from mmray.training.attention_paths import attention_names, plain_attention
from mmray.training.model import build_model
from mmray.training.settings import ModelSettings
from tests.mmray.families.zoo import ZOO
from tests.mmray.families.zoo.llava import small_config
from tests.mmray.noise import noise
from tests.mmray.preparing import Preparation, chat

# ---- Formats ----

FORMATS = {
    "chatml": ("<|im_start|>{role}\n", "<|im_end|>\n"),
    "onevision": ("<|im_start|>{role} \n", "<|im_end|>"),
    "llama3": ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
    "llava_next on llama3": ("<|start_header_id|>{role}<|end_header_id|>\n\n\n", "<|eot_id|>"),
    "phi3": ("<|{role}|>\n", "<|end|>\n"),
}
"""What stands before and after the content of each turn."""

LIKE_LLAMA, LIKE_GPT2 = "llava", "llava_onevision"
"""Members of the zoo with tokenizers of both kinds."""

ASKED, ANSWERED = ("Who is it for?", "And why?"), ("Anna Berg, of course.", "She paid 12.50.")


def text_of(pieces: dict[str, tuple[str, str]], system: str = "") -> str:
    """A chat of two turns. pieces: what stands before and after the content, by role."""
    turns = [("system", system)] if system else []
    for question, answer in zip(ASKED, ANSWERED):
        turns += [("user", question), ("assistant", answer)]
    return "".join(f"{pieces[role][0]}{content}{pieces[role][1]}" for role, content in turns)


def trained(
    zoo_processor: Any, name: str, template: str, text: str, *, markers: Sequence[str] = (), **settings: Any
) -> str:
    """What trains of a text by the boundaries of a chat template. markers: which are tokens of their own."""
    processor = copy.copy(zoo_processor(name))
    processor.chat_template = template
    if markers:
        processor.tokenizer = copy.deepcopy(processor.tokenizer)
        processor.tokenizer.add_tokens(list(markers), special_tokens=True)
    family = family_of(processor)
    tokenizer = family.tokenizer
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"])
    maker = label_maker(RoleLoss(**settings), family)
    labels = maker.of_arrays(ids, np.asarray([len(ids)]), np.asarray([LossRule.ROLES]), np.zeros(len(ids), bool), [])
    return tokenizer.decode(labels[labels != IGNORE_INDEX], skip_special_tokens=False)


@pytest.mark.parametrize("train_on_eos", ["turn", "none"])
@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("tokenizer", [LIKE_GPT2, LIKE_LLAMA])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_with_headers(zoo_processor, name, tokenizer, system, train_on_eos):
    header, end = FORMATS[name]
    pieces = {role: (header.format(role=role), end) for role in ("system", "user", "assistant")}
    template = f"{header} {end}".replace("{role}", "assistant")
    text = text_of(pieces, system)
    markers = sorted(set(re.findall(r"<\|\w+\|>", text)))
    found = trained(zoo_processor, tokenizer, template, text, markers=markers, train_on_eos=train_on_eos)
    kept = end.strip() if train_on_eos == "turn" else ""
    assert found == "".join(answer + kept for answer in ANSWERED)


def vicuna(end: str) -> dict[str, tuple[str, str]]:
    return {"system": ("", " "), "user": ("USER: ", " "), "assistant": ("ASSISTANT: ", f"{end} ")}


def mistral(end: str) -> dict[str, tuple[str, str]]:
    return {"system": ("<<SYS>>\n", "\n<</SYS>>\n\n"), "user": ("[INST] ", " [/INST]"), "assistant": (" ", f"{end} ")}


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("tokenizer", [LIKE_GPT2, LIKE_LLAMA])
@pytest.mark.parametrize("form", [vicuna, mistral])
def test_formats_of_plain_text(zoo_processor, form, tokenizer, system):
    """Markers are ordinary text, which tokenizers read otherwise at different places."""
    eos = zoo_processor(tokenizer).tokenizer.eos_token
    text = text_of(form(eos), system)
    template = f"USER: ASSISTANT: {eos}" if form is vicuna else f"[INST] [/INST] {eos}"
    found = trained(zoo_processor, tokenizer, template, text)
    assert found == "".join(f" {answer}{eos}" for answer in ANSWERED)
    found = trained(zoo_processor, tokenizer, template, text, roles=("user",))
    assert [found.count(question) for question in ASKED] == [1, 1]
    assert not any(answer in found for answer in ANSWERED)


@pytest.mark.parametrize("tokenizer", [LIKE_GPT2, LIKE_LLAMA])
@pytest.mark.parametrize(
    ("form", "end", "written"),
    [(vicuna, "", "{{ 'ASSISTANT: ' }}"), (mistral, "<\\s>", "{{ '[INST] [/INST] <\\s>' }}")],
)
def test_a_template_without_an_end_of_the_assistant_s_turn(zoo_processor, tokenizer, form, end, written):
    """The next question ends it."""
    found = trained(zoo_processor, tokenizer, written, text_of(form(end), "Be brief."))
    for answer in ANSWERED:
        assert answer in found
    for other in (*ASKED, "Be brief.", "USER", "INST"):
        assert other not in found


@pytest.mark.parametrize("tokenizer", [LIKE_GPT2, LIKE_LLAMA])
def test_a_question_of_a_picture_alone(zoo_processor, tokenizer):
    """LLaVA writes a line break and no space before the answer's marker."""
    text = "USER: <image>\nASSISTANT: A label. USER: Whose? ASSISTANT: Anna's. "
    assert trained(zoo_processor, tokenizer, "ASSISTANT:", text).split() == ["A", "label.", "Anna's."]


def test_granite_s_answers_alone_have_an_end(zoo_processor):
    eos = zoo_processor(LIKE_GPT2).tokenizer.eos_token
    pieces = {role: (f"<|{role}|>\n", eos if role == "assistant" else "\n") for role in ("system", "user", "assistant")}
    found = trained(zoo_processor, LIKE_GPT2, "<|assistant|>\n eos_token", text_of(pieces, "Be brief."))
    assert found == "".join(answer + eos for answer in ANSWERED)


@pytest.mark.parametrize("template", [None, "{{ messages }}", {"other": "<|im_start|>"}])
def test_formats_that_are_not_known_have_no_markers(zoo_processor, template):
    processor = copy.copy(zoo_processor(LIKE_GPT2))
    processor.chat_template = template
    assert role_markers(processor) == ()


def test_the_default_of_several_templates_counts(zoo_processor):
    processor = copy.copy(zoo_processor(LIKE_GPT2))
    processor.chat_template = {"rag": "[INST]", "default": "<|im_start|>"}
    assert {marker.end for marker in role_markers(processor)} == {"<|im_end|>"}


# As published: blocks hold the answer without the end of its turn, and of a string nothing is written.
WITH_BLOCKS = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + ' ' -}}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}
{{- '<image>' -}}
{%- endfor -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- '\\n' + part['text'] -}}
{%- endgeneration -%}
{%- else -%}
{{- '\\n' + part['text'] -}}
{%- endif -%}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
"""


def test_onevision_learns_to_stop_where_its_template_leaves_the_end_out(zoo_processor, tmp_path):
    noise((60, 50)).save(tmp_path / "page.png")
    processor = copy.copy(zoo_processor(LIKE_GPT2))
    processor.chat_template = WITH_BLOCKS
    dataset = {"files": "rows.jsonl", "kind": "chat", "image_root": str(tmp_path)}
    preparation = Preparation(processor, dataset)
    sample = preparation.sample(chat(f"<image>{ASKED[0]}", ANSWERED[0], ASKED[1], ANSWERED[1], images=["page.png"]))
    assert sample.rule == LossRule.GIVEN
    labels = preparation.labels.of_arrays(
        sample.input_ids,
        np.asarray([len(sample.input_ids)]),
        np.asarray([sample.rule]),
        sample.given_mask,
        sample.blocks,
    )
    found = processor.tokenizer.decode(labels[labels != IGNORE_INDEX], skip_special_tokens=False)
    assert found == "".join(f"{answer}<|im_end|>" for answer in ANSWERED)


# ---- Packing ----

SETTINGS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma": {"head_dim": 16},
    "cohere2": {"sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "glm4": {"head_dim": 16},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "granitemoe": {"num_local_experts": 4},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "sliding_window": 8},
    "olmo3": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    },
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}  # fmt: skip
"""Beside the small sizes: windows shorter than the samples, few experts."""


@cache
def small_llava(folder: Any, text_model: str, attention: str) -> Any:
    config = small_config("llava", folder, text={"model_type": text_model, **SETTINGS.get(text_model, {})})
    settings = ModelSettings(config=config.to_dict(), dtype="fp32", attention=attention, seed=3)
    model = build_model(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def packed_errors(family: Any, model: Any, **changes: Any) -> list[float]:
    """The largest error of the logits of each of three samples in one row, relative to those of the sample alone."""
    page = noise((56, 56))
    texts = [("Total 12.50 please pay at once", []), ("A <image> label", [page]), ("<image>\nRead the page.", [page])]
    alone = [dict(family.process(text, pictures, return_tensors="pt")) for text, pictures in texts]
    lengths = torch.tensor([each["input_ids"].shape[1] for each in alone])
    tiles = tuple(Tile(sample, page.size, ((56, 56),)) for sample in (1, 2))
    ids = torch.cat([each["input_ids"][0] for each in alone])
    row = PackedRow(ids, lengths, segment_ids(lengths), tiles)
    frames = [torch.from_numpy(frame) for _ in tiles for frame in family.frames(page)]
    positions = positions_in_sample(lengths)[None]
    inputs = family.model_inputs(row, positions, frames, torch.float32, model.config)
    with torch.no_grad():
        packed = model(**{"use_cache": False} | inputs | changes).logits[0].split(lengths.tolist())
        with plain_attention(model):
            expected = [model(**each, use_cache=False).logits[0] for each in alone]
    assert max(float(logits.abs().max()) for logits in expected) > 0.5
    return [float((found - logits).abs().max() / logits.abs().max()) for found, logits in zip(packed, expected)]


@pytest.mark.parametrize("text_model", PACKING_TEXT_MODELS)
def test_text_models_that_pack(zoo_processor, zoo_folder, text_model):
    family = family_of(zoo_processor("llava"))
    packed = small_llava(zoo_folder("llava"), text_model, "packed")
    assert attention_names(packed) == {"text": "sdpa" if text_model == "stablelm" else "packed", "vision": "sdpa"}
    assert max(packed_errors(family, packed)) < 1e-5
    for attention in ("sdpa", "eager"):
        if (text_model, attention) == ("gemma2", "sdpa"):
            continue  # it has no such implementation
        model = small_llava(zoo_folder("llava"), text_model, attention)
        assert family.packing_problem(model.config, sample_tokens=100, row_tokens=100) is None
        assert max(packed_errors(family, model)) < 1e-5
        assert max(packed_errors(family, model, use_cache=True)) > 0.05


def test_text_models_that_no_test_has_packed_are_refused():
    config = PretrainedConfig()
    config.model_type = "mamba"
    assert "a mamba, keeps samples apart" in (packing_problem(config, 100) or "")


def test_gpt_oss_takes_no_notice_of_positions(zoo_processor, zoo_folder):
    """InternVL 3.5 has one on such a model."""
    family, model = family_of(zoo_processor("llava")), small_llava(zoo_folder("llava"), "gpt_oss", "eager")
    first, *others = packed_errors(family, model)
    assert first < 1e-5
    assert min(others) > 0.1
    problem = family.packing_problem(model.config, sample_tokens=100, row_tokens=100)
    assert "a gpt_oss, keeps samples apart" in (problem or "")


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 64),
        (
            {
                "rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 32,
            },
            32,
        ),
    ],
)  # fmt: skip
def test_frequencies_that_depend_on_the_longest_sample_do_not_pack(rope, limit):
    rope = {"rope_theta": 10_000.0, **rope}
    by_layer = LlamaConfig(max_position_embeddings=64)
    by_layer.rope_parameters = {"sliding_attention": {"rope_type": "default"}, "full_attention": rope}
    for config in (LlamaConfig(max_position_embeddings=64, rope_parameters=rope), by_layer):
        assert packing_problem(config, limit) is None
        assert f"at most {limit} to pack" in (packing_problem(config, limit + 1) or "")


def test_the_longest_sample_sets_the_frequencies_of_all(zoo_processor, zoo_folder):
    """Why such rows are refused: InternVL 3 has such a text model."""
    family = family_of(zoo_processor("llava"))
    errors = []
    for limit in (16, 64):
        rope = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10_000.0}
        text = {"model_type": "llama", "max_position_embeddings": limit, "rope_parameters": rope}
        config = small_config("llava", zoo_folder("llava"), text=text)
        model = build_model(ModelSettings(config=config.to_dict(), dtype="fp32", attention="sdpa", seed=3))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)
        errors.append(packed_errors(family, model))
    assert max(errors[0]) > 1e-3
    assert max(errors[1]) < 1e-5


# ---- Model and processor that do not fit ----


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llava",
            {"vision_feature_select_strategy": "full"},
            "makes 17 features .* the processor writes 16",
        ),
        ("llava", {"vision_config": {"patch_size": 8}}, "makes 49 features"),
        ("llava", {"vision_config": {"image_size": 70}}, "takes frames of 70 x 70 pixels, the processor makes 56 x 56"),
        ("llava_next", {"image_grid_pinpoints": [[56, 112]]}, r"image_grid_pinpoints are \[\[56, 112\]\]"),
        ("llava_next", {"vision_feature_select_strategy": "full"}, "makes 17 features"),
        ("llava_onevision", {"vision_aspect_ratio": "anyres_max_9"}, "vision_aspect_ratio is anyres_max_9"),
        ("llava_onevision", {"vision_config": {"patch_size": 8}}, "makes 49 features"),
        ("internvl", {"downsample_ratio": 1.0}, "makes 16 features of a frame of 56 x 56 pixels"),
    ],
)
def test_a_model_that_does_not_make_what_the_processor_counts_on(zoo_processor, zoo_folder, name, changes, message):
    family, config = family_of(zoo_processor(name)), ZOO[name].config(zoo_folder(name))
    assert family.model_problem(config) is None
    for key, value in changes.items():
        if isinstance(value, dict):
            for inner, each in value.items():
                setattr(getattr(config, key), inner, each)
        else:
            setattr(config, key, value)
    assert re.search(message, family.model_problem(config) or "")
