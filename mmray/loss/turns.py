"""The turns that the scan for role boundaries opens, one by one, for checks of rows and boundaries.

They are found with `role_keep_mask` itself, one scan for each boundary, so that they cannot differ from what is trained
on. That is too slow for every row of a job and fast enough for some.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from mmray.loss.roles import RoleBoundary, role_keep_mask


class OpenedTurn(NamedTuple):
    """One turn: tokens [start, stop) of its sample, including the markers that belong to it."""

    boundary: int
    """Index of the boundary that opened the turn."""
    start: int
    stop: int
    is_closed: bool
    """True if the turn ends at the end marker of its boundary."""


def opened_turns(input_ids: np.ndarray, boundaries: Sequence[RoleBoundary]) -> list[OpenedTurn]:
    """Finds the turns of one sample, in order. input_ids: int [n]."""
    ids = torch.from_numpy(input_ids.astype(np.int64))
    names = [str(number) for number in range(len(boundaries))]
    whole = [replace(boundary, role=name, include_start=True) for boundary, name in zip(boundaries, names)]
    inner = [replace(boundary, role=name, include_start=False) for boundary, name in zip(boundaries, names)]
    opener = np.full(len(ids), -1)
    for number, name in enumerate(names):
        opener[role_keep_mask(ids, whole, roles_to_train=[name]).numpy()] = number
    inside = role_keep_mask(ids, inner, roles_to_train=names).numpy()
    ending = inside & ~role_keep_mask(ids, inner, roles_to_train=names, train_on_eos="none").numpy()
    turns: list[OpenedTurn] = []
    stop = 0
    while (opener[stop:] >= 0).any():
        start = stop + int((opener[stop:] >= 0).argmax())
        number = int(opener[start])
        boundary = boundaries[number]
        content = start + len(boundary.start)
        outside = ~inside[content:]  # the next turn's start marker is
        stop = content + (int(outside.argmax()) if outside.any() else len(outside))
        is_closed = bool(ending[content:stop].any()) if boundary.include_end else bool(boundary.end) and stop < len(ids)
        turns.append(OpenedTurn(number, start, stop, is_closed))
    return turns
