"""The `loss` setting of the job file: which tokens of a sample train, by what signal, and the label maker it gives.

Three modes: what the model would have sampled (`sampled`), every token (`all`), or the turns of some roles. Where the
signal of `sampled` comes from is decided once for each set of rows (`loss_source`), never row by row, and a set without
any is an error: a job that quietly trained in another mode would look the same in every log.
"""

from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Any, Literal

from jinja2 import Environment, TemplateSyntaxError
from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator

from mmray.base.settings import RowKind, Settings
from mmray.errors import UserError
from mmray.families import Family
from mmray.families.base import RoleMarkers
from mmray.loss.labels import LabelMaker, LossRule
from mmray.loss.roles import RoleBoundary, TrainOnEos

SAMPLED_ROLE = "assistant"
"""The role whose turns a model samples."""


class BoundarySettings(Settings):
    """The text around the turns of one role."""

    role: str
    """The role's name, as `roles` uses it. A role may have several boundaries."""
    start: str
    """Text that opens a turn, for example `<|im_start|>assistant\\n`. Of several that match, the longest wins, then the
    one written first."""
    end: Annotated[str, Field(min_length=1)] | None = None
    """Text that closes it; `eos_token` stands for the tokenizer's; null: the sample's end."""
    include_start: bool = False
    """Train the opening text too."""
    include_end: bool = True
    """The closing text belongs to the turn: it is consumed, and trained as `train_on_eos` says. false: it is not
    trained, and may open the next turn."""
    until_next: bool = False
    """No closing text: the turn goes on to where any boundary's `start` stands, or to the sample's end."""

    @model_validator(mode="after")
    def _ends_in_one_way(self) -> "BoundarySettings":
        if self.until_next and self.end is not None:
            raise ValueError(f"until_next and end exclude each other; keep one (end is {self.end!r})")
        return self


class RoleLoss(Settings):
    """Loss on the turns of some roles, found by the text around them."""

    roles: tuple[str, ...] = (SAMPLED_ROLE,)
    """Roles whose turns are trained."""
    train_on_eos: TrainOnEos = "turn"
    """Closing markers to train: of the trained turns, of all turns, of the last trained turn, or none."""
    train_on_inputs: bool = False
    """Train every token but media, whatever the role."""
    boundaries: tuple[BoundarySettings, ...] | None = None
    """Role boundaries to use instead of the model family's."""
    allow_empty: bool = False
    """Keep rows that train no token, and allow an empty `roles`; else such rows are rejected."""

    @model_validator(mode="after")
    def _trains_something(self) -> "RoleLoss":
        if not self.roles and not self.allow_empty and not self.train_on_inputs:
            raise ValueError("roles: [] trains nothing; name a role, or set allow_empty: true")
        return self

    @model_validator(mode="after")
    def _trains_one_way(self) -> "RoleLoss":
        chosen = [name for name in _BY_TURNS if getattr(self, name) != type(self).model_fields[name].default]
        if self.train_on_inputs and chosen:
            raise ValueError(
                f"train_on_inputs: true trains every token, and leaves {', '.join(chosen)} without meaning; keep "
                f"train_on_inputs or {', '.join(chosen)}"
            )
        return self


_BY_TURNS = ("roles", "train_on_eos", "boundaries")
"""Keys of `RoleLoss` that say which turns train, and what of them."""


def _mode(value: Any) -> str | None:
    """The tag of a value's kind; None for what is neither."""
    if isinstance(value, (dict, RoleLoss)):
        return "RoleLoss"
    return "word" if value in ("sampled", "all") else None


Loss = Literal["sampled", "all"] | RoleLoss
LossSetting = Annotated[
    Annotated[Literal["sampled", "all"], Tag("word")] | Annotated[RoleLoss, Tag("RoleLoss")],
    Discriminator(
        _mode,
        custom_error_type="loss",
        custom_error_message="Input should be 'sampled', 'all' or keys such as roles:",
    ),
]
"""`Loss` as the job file reads it: of a value only the kind that was meant is spoken of."""

_ADAPTER: TypeAdapter[Loss] = TypeAdapter(LossSetting)


def loss_record(loss: Loss) -> Any:
    """The setting as plain JSON."""
    return _ADAPTER.dump_python(loss, mode="json")


def loss_of_record(record: Any) -> Loss:
    """The inverse of `loss_record`."""
    return _ADAPTER.validate_python(record)


def allows_empty(loss: Loss) -> bool:
    """Whether rows that train no token are kept."""
    return isinstance(loss, RoleLoss) and loss.allow_empty


class LossSource(StrEnum):
    """What says which tokens of a set of rows train."""

    EVERY_TOKEN = "all"
    """Nothing has to: every token but media."""
    ROLES = "roles"
    """The boundaries of the roles that the setting names."""
    ROW = "row"
    """The row's own `sampled_mask` or `labels`."""
    TEMPLATE = "template"
    """The `{% generation %}` blocks of the chat template."""
    ANSWER = "answer"
    """What follows the prompt of the row's text, where the model sees a prompt as a whole (`Family.has_prompt`)."""
    BOUNDARIES = "boundaries"
    """The family's boundaries of the assistant's turns."""

    @property
    def rule(self) -> LossRule:
        """The rule of its samples."""
        return _RULES[self]


_RULES = {
    LossSource.EVERY_TOKEN: LossRule.ALL,
    LossSource.ROLES: LossRule.ROLES,
    LossSource.ROW: LossRule.GIVEN,
    LossSource.TEMPLATE: LossRule.GIVEN,
    LossSource.ANSWER: LossRule.GIVEN,
    LossSource.BOUNDARIES: LossRule.ROLES,
}


def loss_source(loss: Loss, kind: RowKind, family: Family) -> LossSource:
    """What says which tokens of a set of rows train. Raises UserError where `sampled` has no signal."""
    if kind == "pretrain" and family.has_prompt:
        return LossSource.ANSWER
    if kind == "pretrain" or loss == "all" or (isinstance(loss, RoleLoss) and loss.train_on_inputs):
        return LossSource.EVERY_TOKEN
    if isinstance(loss, RoleLoss):
        return LossSource.ROLES
    if kind == "tokenized":
        return LossSource.ROW
    if marks_generated(family.processor):
        return LossSource.TEMPLATE
    if _samples_by_boundaries(family):
        return LossSource.BOUNDARIES
    raise UserError(
        f"loss: sampled: nothing says which tokens of chat rows the model samples: the chat template of "
        f"{type(family.processor).__name__} has no {{% generation %}} blocks, and mmray knows no text around its "
        "assistant's turns. Put blocks into the template, or set loss: {roles: [assistant], boundaries: [...]}, or "
        "loss: all"
    )


def chat_template(processor: Any) -> str:
    """The processor's chat template, the default one of several; empty where there is none."""
    template = processor.chat_template
    return (template.get("default", "") if isinstance(template, dict) else template) or ""


def marks_generated(processor: Any) -> bool:
    """Whether the chat template says what the model generates: a `{% generation %}` block, outside comments."""
    try:
        tokens = [token for token in Environment().lex(chat_template(processor)) if token[1] != "whitespace"]
    except TemplateSyntaxError:  # each row will say so
        return False
    return any(kind == "block_begin" and word == "generation" for (_, kind, _), (_, _, word) in pairwise(tokens))


def stop_token_ids(family: Family) -> tuple[int, ...]:
    """The ids of the family's stop tokens, those that the vocabulary has."""
    return tuple(family.known_token_ids(family.stop_tokens))


def ending_token_ids(family: Family) -> tuple[int, ...]:
    """The ids of all single tokens by which the model ends its turn: a template's block may hold the content alone."""
    ends = (marker.end for marker in family.role_markers if marker.role == SAMPLED_ROLE and marker.end)
    return tuple(family.known_token_ids(tuple(dict.fromkeys((*family.stop_tokens, *ends)))))


def turn_markers(loss: Loss, family: Family) -> tuple[RoleMarkers, ...]:
    """The texts by which a job finds turns: its own, else the family's."""
    if not isinstance(loss, RoleLoss) or loss.boundaries is None:
        return family.role_markers
    return tuple(
        RoleMarkers(
            each.role,
            each.start,
            _end_text(each.end, family),
            each.include_start,
            each.include_end,
            until_next=each.until_next,
        )
        for each in loss.boundaries
    )


def label_maker(loss: Loss, family: Family) -> LabelMaker:
    """The label maker of a job. Raises UserError for a role without a boundary and a marker that cannot be encoded."""
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
    """The tokens of a marker as it stands after some text, without those that the tokenizer adds around a text."""
    tokenizer = family.tokenizer
    before, both = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (after, after + text))
    ids = tuple(both[len(before) :])
    if not ids:
        raise UserError(f"loss: the {which} {text!r} of role {role!r} encodes to no token")
    if tokenizer.unk_token_id in ids and str(tokenizer.unk_token) not in text:
        raise UserError(
            f"loss: the {which} {text!r} of role {role!r} cannot be encoded: the tokenizer has only its unknown token "
            f"{str(tokenizer.unk_token)!r} for some of it. Write text of its vocabulary"
        )
    return ids
