"""The turns one by one: the same that the scan keeps, each with the boundary that opened it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.loss.roles import RoleBoundary, role_keep_mask
from mmray.loss.turns import OpenedTurn, opened_turns

TOKENS = st.lists(st.integers(0, 4), max_size=30)
MARKERS = st.lists(st.integers(0, 4), min_size=1, max_size=2).map(tuple)


@st.composite
def boundary(draw):
    until_next = draw(st.booleans())
    end = () if until_next else draw(st.one_of(st.just(()), MARKERS))
    return RoleBoundary("x", draw(MARKERS), end, include_end=draw(st.booleans()), until_next=until_next)


def walk(ids, boundaries):
    """The rules of the scan, token by token."""

    def starting(at):
        fitting = [k for k, each in enumerate(boundaries) if tuple(ids[at : at + len(each.start)]) == each.start]
        return max(fitting, key=lambda k: (len(boundaries[k].start), -k), default=None)

    turns, at = [], 0
    while at < len(ids):
        number = starting(at)
        if number is None:
            at += 1
            continue
        own, stop, is_closed = boundaries[number], len(ids), False
        for place in range(at + len(own.start), len(ids)):
            if own.end and tuple(ids[place : place + len(own.end)]) == own.end:
                stop, is_closed = place + len(own.end) * own.include_end, True
                break
            if own.until_next and starting(place) is not None:
                stop = place
                break
        turns.append(OpenedTurn(number, at, stop, is_closed))
        at = stop
    return turns


@settings(max_examples=300, deadline=None)
@given(TOKENS, st.lists(boundary(), max_size=3))
def test_turns_are_those_of_the_scan(ids, boundaries):
    found = opened_turns(np.asarray(ids, dtype=np.int32), boundaries)
    assert found == walk(ids, boundaries)
    if ids and boundaries:
        inside = np.zeros(len(ids), dtype=bool)
        for turn in found:
            inside[turn.start + len(boundaries[turn.boundary].start) : turn.stop] = True
        assert role_keep_mask(torch.tensor(ids), boundaries, roles_to_train=["x"]).tolist() == inside.tolist()


@pytest.mark.parametrize(
    ("include_end", "expected"),
    [(True, [OpenedTurn(0, 1, 4, True), OpenedTurn(0, 4, 6, False)]), (False, [OpenedTurn(0, 1, 3, True),
                                                                              OpenedTurn(0, 4, 6, False)])],
)  # fmt: skip
def test_a_turn_is_closed_by_its_own_end(include_end, expected):
    boundaries = [RoleBoundary("x", (1,), (2,), include_end=include_end)]
    assert opened_turns(np.asarray([0, 1, 5, 2, 1, 5]), boundaries) == expected
