"""Finds the tokens of a chat to train on by the markers that open and close each role's turn.

The scan of one sample reads from left to right. Outside a span, the longest `start` marker that matches opens
one (the first declared wins a tie). Inside, only the `end` of that boundary is searched for, from after the
start marker on; other starts there are plain text. The span ends at its first end marker, or with the sample.
A boundary with `until_next` has no end marker: its span ends where any start marker matches, as turns do
in the GLM templates.
An end marker that is consumed (`include_end`) is passed over; one that is not may be the next span's start,
as `[/INST]` is in the Mistral templates. A sample is one row, or one run of `segment_ids`; no marker matches
across its border.

The scan has no loop over tokens or turns in Python: see `mmray.loss.scan` for how, and what it costs (1 to 2
ns a token on one CPU thread).
"""

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import torch
from torch import Tensor

from mmray.loss.scan import SIZE_BITS, Rule, ScanPlan, scan_compiled, scan_tensors
from mmray.loss.settings import TrainOnEos

_MAX_MARKER_SIZE = (1 << SIZE_BITS) - 1
_MAX_TOKEN_ID = 2**31 - 1
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class RoleBoundary:
    """Says how the turns of one role begin and end, in token ids. A role may have several boundaries.

    Raises ValueError, with the value, for an empty start, a marker of more than 32,767 tokens, or an id
    outside [0, 2**31).
    """

    role: str
    """The name that `roles_to_train` refers to."""
    start: tuple[int, ...]
    """Token ids that open a turn; not empty."""
    end: tuple[int, ...] = ()
    """Token ids that close a turn; empty: the turn goes on to the end of the sample."""
    include_start: bool = False
    """True if the start marker is trained on with the turn."""
    include_end: bool = True
    """True if the end marker belongs to the turn: it may be trained on (`train_on_eos`) and the scan goes on
    after it. False: it is never trained on as an end, and may be the next turn's start."""
    until_next: bool = False
    """True if the turn goes on to the start marker of any turn, or to the end of the sample; `end` must be empty."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", self._marker("start", self.start))
        object.__setattr__(self, "end", self._marker("end", self.end))
        if not self.start:
            raise ValueError(f"role {self.role!r}: start is {self.start!r}; give at least one token id")
        if self.until_next and self.end:
            raise ValueError(f"role {self.role!r}: until_next leaves no place for an end; it is {self.end!r}")

    def _marker(self, name: str, tokens: Iterable[int]) -> tuple[int, ...]:
        try:
            marker = tuple(operator.index(token) for token in tokens)
        except TypeError as error:
            raise ValueError(f"role {self.role!r}: {name} is {tokens!r}; give a tuple of token ids") from error
        if len(marker) > _MAX_MARKER_SIZE:
            raise ValueError(
                f"role {self.role!r}: {name} has {len(marker)} tokens; at most {_MAX_MARKER_SIZE} are allowed"
            )
        for token in marker:
            if not 0 <= token <= _MAX_TOKEN_ID:
                raise ValueError(f"role {self.role!r}: {name} has the id {token}; token ids are 0 to {_MAX_TOKEN_ID}")
        return marker


def role_keep_mask(
    input_ids: Tensor,
    boundaries: Sequence[RoleBoundary],
    *,
    roles_to_train: Collection[str],
    train_on_eos: TrainOnEos = "turn",
    segment_ids: Tensor | None = None,
) -> Tensor:
    """Marks the tokens to train on: those of the turns of `roles_to_train`, by the scan described above.

    input_ids: integers, [batch, length] or [length].
    boundaries: in order of declaration; the longest matching start wins, then the first declared.
    roles_to_train: roles whose content is trained on (with the start marker, where `include_start`). Empty: none.
    train_on_eos: the end markers to train on; each only where its boundary has `include_end`.
        "turn": those of trained turns.
        "all": those of every role's turns.
        "last": in each sample, only that of its last trained turn. Where that turn is unclosed, none is
            trained on: an earlier turn is not the last one.
        "none": never. This decides what is trained on, not how the scan goes on: a consumed end stays consumed.
    segment_ids: integers, shape and device of input_ids. Each maximal run of one value is a separate sample; a
        value below 0 is padding, which is never trained on. None: each row is one sample.

    Returns bool, shape and device of input_ids. Nothing inside waits for a GPU.
    Raises ValueError, with the value received, for arguments that do not fit.
    """
    _check_ids(input_ids, segment_ids)
    _check_choices(boundaries, roles_to_train, train_on_eos)
    if input_ids.numel() == 0:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    plan = _plan(tuple(boundaries), frozenset(roles_to_train), train_on_eos)
    rows = input_ids.reshape(-1, input_ids.shape[-1])
    segments = None if segment_ids is None else segment_ids.reshape(rows.shape)
    scan = scan_compiled if input_ids.device.type == "cpu" else scan_tensors
    return scan(rows, segments, plan).reshape(input_ids.shape)


def _check_ids(input_ids: Tensor, segment_ids: Tensor | None) -> None:
    if input_ids.dtype not in _INTEGERS:
        raise ValueError(f"input_ids has dtype {input_ids.dtype}; token ids are integers")
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give [batch, length] or [length]")
    if segment_ids is None:
        return
    if segment_ids.dtype not in _INTEGERS:
        raise ValueError(f"segment_ids has dtype {segment_ids.dtype}; segment ids are integers")
    if segment_ids.shape != input_ids.shape:
        raise ValueError(
            f"segment_ids has shape {tuple(segment_ids.shape)}; it must be that of input_ids, {tuple(input_ids.shape)}"
        )
    if segment_ids.device != input_ids.device:
        raise ValueError(f"segment_ids is on {segment_ids.device}, input_ids on {input_ids.device}; move one")


def _check_choices(
    boundaries: Sequence[RoleBoundary], roles_to_train: Collection[str], train_on_eos: TrainOnEos
) -> None:
    if isinstance(roles_to_train, str):
        raise ValueError(f"roles_to_train is the text {roles_to_train!r}; give a list, [{roles_to_train!r}]")
    known = list(dict.fromkeys(boundary.role for boundary in boundaries))
    for role in roles_to_train:
        if role not in known:
            raise ValueError(f"roles_to_train has {role!r}; the boundaries given are those of {known}")
    if train_on_eos not in get_args(TrainOnEos):
        raise ValueError(f"train_on_eos is {train_on_eos!r}; choose one of {list(get_args(TrainOnEos))}")


@lru_cache(maxsize=64)
def _plan(boundaries: tuple[RoleBoundary, ...], roles: frozenset[str], train_on_eos: TrainOnEos) -> ScanPlan:
    """Compiles boundaries to rules, longest start first; stable sorting keeps equal lengths as declared."""
    rules = []
    for boundary in sorted(boundaries, key=lambda boundary: -len(boundary.start)):
        trained = boundary.role in roles
        end_of_role = train_on_eos == "all" or (trained and train_on_eos != "none")
        rules.append(
            Rule(
                start=boundary.start,
                end=boundary.end,
                consumes_end=boundary.include_end,
                trains_start=trained and boundary.include_start,
                trains_content=trained,
                trains_end=boundary.include_end and end_of_role,
                until_next=boundary.until_next,
            )
        )
    return ScanPlan(rules, last_end_only=train_on_eos == "last")
