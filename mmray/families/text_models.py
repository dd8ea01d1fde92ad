"""The text models that LLaVA and its relatives are built on: how they write turns, and which of them pack.

How turns are written follows the text model, not the vision model: LLaVA-NeXT alone is published on Vicuna, Mistral,
Llama 3, Qwen and Granite. The format is told from the chat template. Where markers are ordinary text, tokenizers read
them otherwise after a word than after a line break or at the beginning; each reading is a boundary of its own.

Samples are kept apart by their positions, by transformers' own rule. That holds for attention layers; what carries a
state along the row, or sets its frequencies by the row's longest sample, does not pack. Only text models that a test
has packed are taken.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from mmray.families.base import Family, RoleMarkers

PACKING_TEXT_MODELS = (
    "cohere2", "gemma", "gemma2", "gemma3_text", "glm4", "granite", "granitemoe", "llama", "ministral3", "mistral",
    "mixtral", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm",
)  # fmt: skip
"""The `model_type` of text models for which a test has shown that packed rows equal their samples.

gpt_oss is not among them: transformers 5.23 makes its masks without the positions.
"""

WITHOUT_BOUNDS = ("stablelm",)
"""The `model_type` of text models whose layers transformers 5.23 does not tell where samples begin."""

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""The name that ChatML writes for each role."""
LLAMA_ROLES = ROLES | {"tool": "ipython"}


class OnTextModel(Family):
    """A family whose models join a vision tower to a text model of another class."""

    @functools.cached_property
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        return role_markers(self.processor)

    @classmethod
    def by_sample_problem(cls, config: PretrainedConfig) -> str | None:
        text = config.get_text_config()
        if text.model_type in WITHOUT_BOUNDS:
            return f"transformers gives the layers of a {text.model_type} no bounds of samples"
        return _untested(text)

    def packing_problem(self, config: PretrainedConfig, *, sample_tokens: int, row_tokens: int) -> str | None:
        return packing_problem(config.get_text_config(), sample_tokens)


def packing_problem(text: PretrainedConfig, sample_tokens: int) -> str | None:
    """The reason why a text model cannot take several samples in one row, told apart by their positions; None where it
    can.

    sample_tokens: the most tokens that a sample will have.
    """
    if problem := _untested(text):
        return problem
    for kind, limit in _lengths_that_matter(text.to_dict()):
        if sample_tokens > limit:
            return (
                f"its rope_type {kind} turns all samples of a row by the longest one where that has more than {limit} "
                f"tokens; set packing.token_capacity to at most {limit} to pack"
            )
    return None


def _untested(text: PretrainedConfig) -> str | None:
    """The reason why it is not known whether a text model keeps samples apart; None for one that a test has packed."""
    if text.model_type in PACKING_TEXT_MODELS:
        return None
    return f"no test has shown how its text model, a {text.model_type}, keeps samples apart"


def _lengths_that_matter(settings: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Kinds of rotary embeddings whose frequencies depend on the longest position in a row, and from how many tokens
    on.

    They may be set for all layers or for each kind of layer.
    """
    rope = settings.get("rope_parameters") or {}
    for parameters in (rope, *rope.values()):
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        if kind == "dynamic":
            yield kind, settings["max_position_embeddings"]
        elif kind == "longrope":
            yield kind, parameters["original_max_position_embeddings"]


def role_markers(processor: Any) -> tuple[RoleMarkers, ...]:
    """The role boundaries of the format that the chat template writes; none for an unknown format."""
    template = processor.chat_template or ""
    if isinstance(template, dict):
        template = template.get("default", "")
    for mark, markers in _FORMATS.items():
        if mark in template:
            return tuple(markers(processor.tokenizer, template))
    return ()


# ---------------------------------------------------------------- formats


def _chatml(tokenizer: Any, template: str) -> Iterator[RoleMarkers]:
    """The markers of ChatML.

    LLaVA-OneVision writes a space and a line break after the role. The bare header is for turns whose first characters
    are one token with these, and for those that begin with an image.
    """
    return _headers("<|im_start|>{}", ("\n", " \n", ""), "<|im_end|>", ROLES)


def _llama3(tokenizer: Any, template: str) -> Iterator[RoleMarkers]:
    """The markers of Llama 3. LLaVA-NeXT writes two line breaks after the header and one before each text."""
    return _headers("<|start_header_id|>{}<|end_header_id|>", ("\n\n", "\n\n\n", ""), "<|eot_id|>", LLAMA_ROLES)


def _headers(header: str, breaks: Iterable[str], end: str, roles: Mapping[str, str]) -> Iterator[RoleMarkers]:
    return (
        RoleMarkers(role, header.format(name) + line_break, end)
        for line_break in breaks
        for role, name in roles.items()
    )


def _bars(tokenizer: Any, template: str) -> Iterator[RoleMarkers]:
    """The markers of Granite and Phi-3."""
    for line_break in ("\n", ""):
        yield RoleMarkers("system", f"<|system|>{line_break}", until_next=True)
        yield RoleMarkers("user", f"<|user|>{line_break}", until_next=True)
        yield RoleMarkers("tool", f"<|tool|>{line_break}", until_next=True)
        yield _answer(tokenizer, template, f"<|assistant|>{line_break}")


def _mistral(tokenizer: Any, template: str) -> Iterator[RoleMarkers]:
    """The markers of Mistral.

    The marker after the user's turn opens the assistant's. The system's turn comes before the user's first.
    """
    yield RoleMarkers("system", "<<SYS>>", until_next=True)
    for space, before in _PLACES:
        yield RoleMarkers("user", f"{space}[INST]", start_after=before, until_next=True)
        yield _answer(tokenizer, template, f"{space}[/INST]", before)


def _vicuna(tokenizer: Any, template: str) -> Iterator[RoleMarkers]:
    """The markers of Vicuna, whose system text has none."""
    for space, before in _PLACES:
        yield RoleMarkers("user", f"{space}USER:", start_after=before, until_next=True)
        yield _answer(tokenizer, template, f"{space}ASSISTANT:", before)


_PLACES = (("", ""), (" ", "a"), ("", "\n"))
"""The places of markers that are plain text: at the beginning, after a word, after a line break."""


def _answer(tokenizer: Any, template: str, start: str, before: str = "") -> RoleMarkers:
    """The markers of the assistant's turn.

    It ends with the first of these tokens that the template writes, or else with the next turn: a template of
    LLaVA-NeXT wrote `<\\s>` for `</s>`, and LLaVA 1.5's writes none.
    """
    eos = tokenizer.eos_token or ""
    writes_eos = bool(eos) and (eos in template or "eos_token" in template)
    end = "<|end|>" if "<|end|>" in template else eos if writes_eos else ""
    return RoleMarkers("assistant", start, end, start_after=before, until_next=not end)


_FORMATS: dict[str, Callable[[Any, str], Iterator[RoleMarkers]]] = {
    "<|im_start|>": _chatml,
    "<|start_header_id|>": _llama3,
    "<|assistant|>": _bars,
    "[INST]": _mistral,
    "ASSISTANT:": _vicuna,
}
"""The markers of each format, by a text that only templates of that format contain."""
