"""The `masking` part of the job file, and the label maker that it and a family give."""

from typing import Literal

from mmray.errors import UserError
from mmray.families import Family
from mmray.families.base import RoleMarkers
from mmray.masks.labels import LabelMaker
from mmray.masks.roles import RoleBoundary
from mmray.settings import Settings


class BoundarySettings(Settings):
    """The text around the turns of one role."""

    role: str
    """The role's name, as `roles_to_train` uses it."""
    start: str
    """Text that opens a turn, for example `<|im_start|>assistant\\n`."""
    end: str | None = None
    """Text that closes it; `eos_token` stands for the tokenizer's; null: the sample's end."""
    include_start: bool = False
    """Train the opening text too."""
    include_end: bool = True
    """The closing text belongs to the turn: it is consumed, and trained as `train_on_eos` says."""


class MaskingSettings(Settings):
    """Which tokens of chat rows are trained. Pre-training rows train every token but images."""

    roles_to_train: tuple[str, ...] = ("assistant",)
    """Roles whose turns are trained."""
    train_on_eos: Literal["turn", "all", "last", "none"] = "turn"
    """Closing markers to train: of the trained turns, of all turns, of the last trained turn, or none."""
    train_on_inputs: bool = False
    """Train every token of chat rows but images, whatever the role."""
    boundaries: tuple[BoundarySettings, ...] | None = None
    """Role boundaries to use instead of the model family's."""


def label_maker(settings: MaskingSettings, family: Family) -> LabelMaker:
    """The label maker of a job. Raises UserError for roles without a boundary and markers that encode to nothing."""
    if settings.boundaries is None:
        markers = family.role_markers
    else:
        markers = tuple(
            RoleMarkers(each.role, each.start, _end_text(each.end, family), each.include_start, each.include_end)
            for each in settings.boundaries
        )
    known = {marker.role for marker in markers}
    missing = [role for role in settings.roles_to_train if role not in known]
    if missing or not settings.roles_to_train:
        raise UserError(
            f"masking.roles_to_train: {list(settings.roles_to_train)} but the boundaries have {sorted(known)}; "
            "name at least one of these, or give masking.boundaries"
        )
    return LabelMaker(
        boundaries=tuple(_boundary(marker, family) for marker in markers),
        roles_to_train=settings.roles_to_train,
        train_on_eos=settings.train_on_eos,
        media_token_ids=family.media_token_ids,
    )


def _end_text(end: str | None, family: Family) -> str:
    if end != "eos_token":
        return end or ""
    if family.tokenizer.eos_token is None:
        raise UserError("masking.boundaries: the end is eos_token, but the tokenizer has none; write the closing text")
    return str(family.tokenizer.eos_token)


def _boundary(marker: RoleMarkers, family: Family) -> RoleBoundary:
    def encode(text: str) -> tuple[int, ...]:
        return tuple(family.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()

    start = encode(marker.start)
    if not start:
        raise UserError(f"masking: the start {marker.start!r} of role {marker.role!r} encodes to no token")
    return RoleBoundary(marker.role, start, encode(marker.end), marker.include_start, marker.include_end)
