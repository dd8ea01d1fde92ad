"""The `loss` setting of the job file: by what signal trained tokens are determined, and the label maker it gives.

The source of the signal is decided once for each data set (`loss_source`), never row by row: a job that silently
trained in another mode would look the same in every log. In chats the messages say what is trained on. Boundaries are
the text around turns, by which `loss: {roles: …}` finds turns again in tokens, on the actors that compute labels.
"""

from enum import StrEnum
from itertools import pairwise
from typing import Any

from jinja2 import Environment, TemplateSyntaxError

from mmray.base.settings import RowKind
from mmray.errors import UserError
from mmray.families import Family
from mmray.families.base import RoleMarkers
from mmray.loss.labels import LabelMaker
from mmray.loss.roles import RoleBoundary
from mmray.loss.rules import LossRule
from mmray.loss.settings import (
    SAMPLED_ROLE,
    BoundarySettings,
    Loss,
    LossSetting,
    RoleLoss,
    allows_empty,
    loss_of_record,
    loss_record,
)

__all__ = [
    "SAMPLED_ROLE",
    "BoundarySettings",
    "Loss",
    "LossSetting",
    "LossSource",
    "RoleLoss",
    "allows_empty",
    "chat_template",
    "ending_texts",
    "ending_token_ids",
    "label_maker",
    "loss_of_record",
    "loss_record",
    "loss_source",
    "marks_generated",
    "stop_token_ids",
    "turn_markers",
]


class LossSource(StrEnum):
    """The signal that determines which tokens of a data set are trained on."""

    EVERY_TOKEN = "all"
    """No signal needed: every token except media is trained on."""
    ROLES = "roles"
    """The boundaries of the roles that the setting names determine the trained tokens."""
    ROW = "row"
    """The row's `sampled_mask` or `labels` determine the trained tokens."""
    MESSAGES = "messages"
    """A chat's messages, located in the text that the chat template writes, determine the trained tokens."""
    ANSWER = "answer"
    """The text after the prompt is trained on, in models that read a prompt as a whole (`Family.has_prompt`)."""

    @property
    def rule(self) -> LossRule:
        """The LossRule of samples with this source."""
        return _RULES[self]


_RULES = {
    LossSource.EVERY_TOKEN: LossRule.ALL,
    LossSource.ROLES: LossRule.ROLES,
    LossSource.ROW: LossRule.GIVEN,
    LossSource.MESSAGES: LossRule.GIVEN,
    LossSource.ANSWER: LossRule.GIVEN,
}


def loss_source(loss: Loss, kind: RowKind, family: Family) -> LossSource:
    """Chooses the signal that determines the trained tokens of a data set.

    Raises UserError for `tokenized` rows and a setting that only messages can follow.
    """
    if kind == "pretrain" and family.has_prompt:
        return LossSource.ANSWER
    if kind == "pretrain" or loss == "all" or (isinstance(loss, RoleLoss) and loss.train_on_inputs):
        return LossSource.EVERY_TOKEN
    if isinstance(loss, RoleLoss):
        if kind == "tokenized" and loss.chooses_messages:
            raise UserError(
                "loss: turns, reasoning and train_empty_thoughts choose among messages, which tokenized rows do not "
                "have; give such a set a loss of its own (data.train[].loss)"
            )
        return LossSource.ROLES
    return LossSource.ROW if kind == "tokenized" else LossSource.MESSAGES


def chat_template(processor: Any) -> str:
    """Returns the processor's chat template, the default one of several; empty where there is none."""
    template = processor.chat_template
    return (template.get("default", "") if isinstance(template, dict) else template) or ""


def marks_generated(processor: Any) -> bool:
    """Tells whether the chat template marks what the model generates: a `{% generation %}` block outside comments."""
    try:
        tokens = [token for token in Environment().lex(chat_template(processor)) if token[1] != "whitespace"]
    except TemplateSyntaxError:  # each row will say so
        return False
    return any(kind == "block_begin" and word == "generation" for (_, kind, _), (_, _, word) in pairwise(tokens))


def stop_token_ids(family: Family) -> tuple[int, ...]:
    """Returns the ids of those of the family's stop tokens that are in the vocabulary."""
    return tuple(family.known_token_ids(family.stop_tokens))


def ending_texts(family: Family) -> tuple[str, ...]:
    """Returns the texts by which the model ends its turn: its stop tokens, the end markers of the assistant's turns,
    and the tokenizer's `eos_token`. A stop token that the vocabulary lacks is written as text, and counts too."""
    ends = (marker.end for marker in family.role_markers if marker.role == SAMPLED_ROLE and marker.end)
    eos = family.tokenizer.eos_token
    return tuple(dict.fromkeys((*family.stop_tokens, *ends, *([str(eos)] if eos else ()))))


def ending_token_ids(family: Family) -> tuple[int, ...]:
    """Returns the ids of all single tokens by which the model ends its turn."""
    ends = (marker.end for marker in family.role_markers if marker.role == SAMPLED_ROLE and marker.end)
    return tuple(family.known_token_ids(tuple(dict.fromkeys((*family.stop_tokens, *ends)))))


def turn_markers(loss: Loss, family: Family) -> tuple[RoleMarkers, ...]:
    """Returns the markers by which a job finds turns: those of `loss.boundaries`, else the family's."""
    if not isinstance(loss, RoleLoss) or loss.boundaries is None:
        return family.role_markers
    return tuple(
        RoleMarkers(
            boundary.role,
            boundary.start,
            _end_text(boundary.end, family),
            boundary.include_start,
            boundary.include_end,
            until_next=boundary.until_next,
        )
        for boundary in loss.boundaries
    )


def label_maker(loss: Loss, family: Family) -> LabelMaker:
    """Builds the label maker of a job. Raises UserError for a role without a boundary and for a marker that cannot be
    encoded."""
    if isinstance(loss, RoleLoss) and not loss.train_on_inputs:
        return LabelMaker(
            boundaries=_role_boundaries(loss, family),
            roles_to_train=loss.roles,
            train_on_eos=loss.train_on_eos,
            media_token_ids=family.media_token_ids,
        )
    scans = loss == "sampled" and _samples_by_boundaries(family)
    return LabelMaker(
        boundaries=_encoded(family.role_markers, family) if scans else (),
        roles_to_train=(SAMPLED_ROLE,) if scans else (),
        train_on_eos="turn",
        media_token_ids=family.media_token_ids,
        stop_token_ids=stop_token_ids(family) if scans else (),
    )


def _samples_by_boundaries(family: Family) -> bool:
    return any(marker.role == SAMPLED_ROLE for marker in family.role_markers)


def _role_boundaries(loss: RoleLoss, family: Family) -> tuple[RoleBoundary, ...]:
    markers = turn_markers(loss, family)
    known = {marker.role for marker in markers}
    if not known.issuperset(loss.roles):
        remedy = "name some of these, or give loss.boundaries" if known else "give loss.boundaries"
        raise UserError(f"loss.roles: {list(loss.roles)} but the boundaries have {sorted(known)}; {remedy}")
    return _encoded(markers, family)


def _end_text(end: str | None, family: Family) -> str:
    if end != "eos_token":
        return end or ""
    if family.tokenizer.eos_token is None:
        raise UserError("loss.boundaries: the end is eos_token, but the tokenizer has none; write the closing text")
    return str(family.tokenizer.eos_token)


def _encoded(markers: tuple[RoleMarkers, ...], family: Family) -> tuple[RoleBoundary, ...]:
    return tuple(
        RoleBoundary(
            marker.role,
            _marker_ids("start", marker.start, marker.role, family, marker.start_after),
            _marker_ids("end", marker.end, marker.role, family) if marker.end else (),
            marker.include_start,
            marker.include_end,
            marker.until_next,
        )
        for marker in markers
    )


def _marker_ids(which: str, text: str, role: str, family: Family, after: str = "") -> tuple[int, ...]:
    """Encodes a marker as it stands after the text `after`, without the tokens that the tokenizer adds around a text.

    Raises UserError for a marker that encodes to no token or to unknown tokens.
    """
    tokenizer = family.tokenizer
    before, both = (tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in (after, after + text))
    ids = tuple(both[len(before) :])
    if not ids:
        raise UserError(f"loss: the {which} {text!r} of role {role!r} encodes to no token")
    if tokenizer.unk_token_id in ids and str(tokenizer.unk_token) not in text:
        raise UserError(
            f"loss: the {which} {text!r} of role {role!r} cannot be encoded: the tokenizer has only its unknown token "
            f"{str(tokenizer.unk_token)!r} for some of it. Write text of its vocabulary"
        )
    return ids
