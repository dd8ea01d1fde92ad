"""What a test must know of a model to build a small one, with random weights, and its processor."""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

Inputs = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Turns:
    """What the chat template writes in a turn, as text: what each way to train a chat must keep."""

    ends: Mapping[str, str]
    """For each role whose turns have markers, the one that ends its turn and belongs to it; "" where there is none."""
    reply: Callable[[str], str] = lambda content: content
    """The assistant's content as the template writes it after the marker that opens the turn."""
    final_reply: Callable[[str], str] | None = None
    """The same in the last turn of a chat, where it is another: such as a space after it, which after others is a token
    with what follows."""
    stop: str = ""
    """What the model writes to end its turn where that is no end of the assistant's in `ends`: the next turn's first
    token. Trained with `loss: sampled` alone."""
    final_stop: str = ""
    """The same after the last turn of a chat."""
    has_system: bool = True
    """The template takes a system message."""

    def replies(self, contents: Sequence[str]) -> list[str]:
        """What the template writes for all the assistant's contents of a chat."""
        *earlier, last = contents
        return [*map(self.reply, earlier), (self.final_reply or self.reply)(last)]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One kind of model."""

    name: str
    """As the docs name it."""
    model_type: str
    """`config.model_type`"""
    processor: str | None = None
    """The class of its processor, where the same model_type has others, served by another family."""
    write_processor: Callable[[Path], object]
    """Writes the files of a small processor into a folder."""
    config: Callable[[Path], PretrainedConfig]
    """The configuration of a small model that takes the processor of that folder."""
    vision: tuple[str, ...]
    """What the names of the vision tower's parameters hold, with what joins it to the text model."""
    turns: Turns | None
    """None: the family's processor has no chat template."""
    tiling: dict[str, Any] | None = None
    """A tiling policy that the family takes."""
    pixel_names: tuple[str, ...] = ("pixel_values",)
    """What of the processor's output the vision tower takes; equal to `Family.pixel_inputs`."""
    alone: Callable[[Inputs], Inputs] = lambda inputs: inputs
    """From the processor's output for a sample to the arguments of the model's forward."""
    naive: Callable[[Inputs], Inputs] = lambda inputs: inputs | {"use_cache": True}
    """From the arguments of a packed row to those with which the samples see each other."""
    refuses: str | None = None
    """Part of `Family.packing_problem`'s answer, where the model cannot pack: then each sample is a row."""
    attentions: tuple[str, ...] = ("sdpa", "eager")
    """Implementations of attention that are tried; a sample alone runs the first."""
    by_sample: tuple[str, ...] = ("text",)
    """Parts that compute samples apart with packed attention."""
    scale: float = 6.0
    """What weights are multiplied with: logits reach 1 and more, so that a mistake in a mask shows."""
    unused: tuple[str, ...] = ()
    """What the names of those parameters hold that the model has and never uses, such as a layer behind the one whose
    output it takes: they get no gradient."""
    prepare_model: Callable[[Any], None] = lambda model: None
    """Changes weights that would hide mistakes, such as gates that start at zero."""
    needs: tuple[str, ...] = ()
    """Modules without which neither model nor processor can be built."""
    model_needs: tuple[str, ...] = ()
    """Modules without which the model cannot be built, though its processor can."""
    tolerance: float = 1e-5
    """Of logits, loss and gradients, relative to the largest value."""
    settings: tuple[dict[str, Any], ...] = field(default=())
    """Changes of the image processor under which lengths and pixels are compared, too."""

    @property
    def missing(self) -> list[str]:
        """Modules of `needs` that are not here."""
        return _absent(self.needs)

    @property
    def missing_for_model(self) -> list[str]:
        """Modules of `model_needs` that are not here."""
        return _absent(self.model_needs)


def _absent(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def begin_with(folder: Path, token: str) -> None:
    """Lets the tokenizer of a processor's folder write this token before a text, where it adds special tokens."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    (found,) = (added["id"] for added in tokenizer["added_tokens"] if added["content"] == token)
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [found], "tokens": [token]}},
    }
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
