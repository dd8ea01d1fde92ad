"""What must train of a conversation, told by its words alone.

Every text of a conversation holds a word in capitals that stands nowhere else. The oracle knows these words and no
boundary, no turn and no template: what trains must hold all that are to train and none of the others, whatever the text
between them. A row that is refused must be refused rightly: the template itself raises, or leaves a word out of its
text, in every form in which the same conversation can be handed to it.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from mmray.families import Family, family_of
from mmray.loss.rules import IGNORE_INDEX
from mmray.loss.settings import RoleLoss
from mmray.packing.settings import PackingSettings
from mmray.rows.preflight import sample_labels
from mmray.rows.sample import RejectedRow
from tests.mmray.families.zoo import ZOO
from tests.mmray.preparing import Preparation

SHARED = Path(__file__).parents[4] / "shared/data"

PUBLISHED = {
    "ax_qwen2_vl": "qwen2_vl",
    "trl_qwen2_5_vl": "qwen2_5_vl",
    "trl_qwen3_vl": "qwen3_vl",
    "trl_qwen3_5_think": "qwen3_5",
    "trl_glm4moe": "glm4v_moe",
    "trl_gemma3": "gemma3",
    "ax_gemma4": "gemma4",
    "trl_idefics3": "smolvlm",
    "ax_llava": "llava",
    "trl_llava_next": "llava_next",
    "ax_pixtral": "pixtral",
    "ax_mistral_v7_tekken": "mistral3",
    "ax_llama3_2_vision": "mllama",
}
"""Templates of published models, and the member of the zoo on whose processor each is set."""

LOSSES: dict[str, Any] = {
    "sampled": "sampled",
    **{f"roles, {eos}": RoleLoss(train_on_eos=eos) for eos in ("turn", "all", "last", "none")},
    "turns: last": RoleLoss(turns="last"),
}
PACKING = PackingSettings(token_capacity=100_000, visual_capacity=100_000)


def own_templates() -> list[str]:
    """Members of the zoo with a chat template of their own, one of each template."""
    return [name for name, member in ZOO.items() if member.turns and not member.missing]


def family_with(processor: Any, member: str, template: str | None) -> Family:
    """The family of a member, with a published template in place of its own."""
    processor = copy.copy(processor)
    if template is not None:
        processor.chat_template = (SHARED / f"templates/{template}.jinja").read_text(encoding="utf-8")
    family = family_of(processor, model_type=ZOO[member].model_type)
    family.takes_text_only = True  # no picture matters here
    return family


def conversations() -> list[dict[str, Any]]:
    """The rows of the shared data."""
    lines = (SHARED / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def preparation_of(family: Family, loss: Any, **dataset: Any) -> Preparation:
    return Preparation(family, {"files": "rows.jsonl", "kind": "chat"} | dataset, packing=PACKING, loss=loss)


def trained_text(preparation: Preparation, row: dict[str, Any]) -> str | RejectedRow:
    """What trains of a row, as text; or its refusal."""
    (found,) = preparation.encode(row, verify=False)
    if isinstance(found, RejectedRow):
        return found
    (labels,) = sample_labels([found], preparation.labels)
    tokens: np.ndarray = labels[labels != IGNORE_INDEX]
    return str(preparation.family.tokenizer.decode(tokens, skip_special_tokens=False))


def expected_words(row: dict[str, Any], mode: str) -> tuple[set[str], set[str]]:
    """The words that train, and those that do not."""
    trained, untrained = set(row["trained_words"]), set(row["untrained_words"])
    if mode != "turns: last":
        return trained, untrained
    last = [message for message in row["messages"] if message["role"] == "assistant"][-1:]
    kept = trained & _words(last)
    return kept, untrained | (trained - kept)


def _words(value: Any) -> set[str]:
    return set(re.findall(r"[A-Z]{6,}", json.dumps(value)))


def is_rightly_refused(family: Family, row: dict[str, Any]) -> str | None:
    """Why the template cannot write a conversation, by the template alone; None where it can."""
    words = _words(row["messages"])
    reasons = []
    for messages in _forms(row["messages"]):
        options = dict(row.get("chat_template_kwargs") or {})
        if row.get("tools"):
            options["tools"] = row["tools"]
        try:
            text = family.processor.apply_chat_template(messages, tokenize=False, **options)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            reasons.append(f"raises: {' '.join(str(error).split())}")
            continue
        missing = sorted(word for word in words if word not in text)
        if not missing:
            return None
        reasons.append(f"leaves out {', '.join(missing)}")
    return min(reasons, key=len)


def _forms(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The same conversation in the forms that templates read: contents as text, and as parts."""
    forms = []
    for as_parts in (False, True):
        written = []
        for message in messages:
            content = message.get("content") or ""
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            role = {"developer": "system"}.get(message["role"], message["role"])
            form = [{"type": "text", "text": text}] if as_parts else text
            written.append({**message, "role": role, "content": form})
        forms.append(written)
    return forms
