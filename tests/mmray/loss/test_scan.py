"""Both ways of the scan: equal to a plain reference on random streams; the tensor way waits for no device."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mmray.loss import roles as roles_module
from mmray.loss.scan import scan_tensors
from mmray.masks import RoleBoundary, role_keep_mask

EOS_MODES = ["turn", "all", "last", "none"]


# ---- The reference: one token after the other, nothing clever ----


def reference_mask(ids, boundaries, roles_to_train, train_on_eos, segments):
    """ids, segments: lists of one row. The trained positions as a list of bool."""
    keep = [False] * len(ids)
    borders = [i for i in range(len(ids)) if i == 0 or segments[i] != segments[i - 1]] + [len(ids)]
    for first, stop in pairwise(borders):
        if segments[first] >= 0:
            for i in reference_sample(ids[first:stop], boundaries, roles_to_train, train_on_eos):
                keep[first + i] = True
    return keep


def reference_sample(ids, boundaries, roles_to_train, train_on_eos):
    trained = set()
    ends_of_trained_spans = []
    at = 0
    while at < len(ids):
        boundary = reference_start(ids, at, boundaries)
        if boundary is None:
            at += 1
            continue

        content = at + len(boundary.start)
        end = content
        while end < len(ids):
            if boundary.end and tuple(ids[end : end + len(boundary.end)]) == boundary.end:
                break
            if boundary.until_next and reference_start(ids, end, boundaries) is not None:
                break
            end += 1
        end_marker = range(end, end + len(boundary.end)) if end < len(ids) and boundary.include_end else range(0)

        if boundary.role in roles_to_train:
            trained.update(range(content, end))
            ends_of_trained_spans.append(end_marker)
            if boundary.include_start:
                trained.update(range(at, content))
            if train_on_eos == "turn":
                trained.update(end_marker)
        if train_on_eos == "all":
            trained.update(end_marker)
        at = end + len(end_marker)
    if train_on_eos == "last" and ends_of_trained_spans:
        trained.update(ends_of_trained_spans[-1])
    return trained


def reference_start(ids, at, boundaries):
    """The boundary that a turn at a position has, or None."""
    found = None
    for candidate in boundaries:
        longer = found is None or len(candidate.start) > len(found.start)
        if longer and tuple(ids[at : at + len(candidate.start)]) == candidate.start:
            found = candidate
    return found


def tensor_mask(ids, boundaries, *, roles_to_train, train_on_eos="turn", segment_ids=None):
    """What a GPU computes, here on a CPU; ids [batch, length]."""
    plan = roles_module._plan(tuple(boundaries), frozenset(roles_to_train), train_on_eos)
    return scan_tensors(ids, segment_ids, plan)


# ---- Both ways against the reference ----

MARKERS = st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple)
KNOBS = {"include_start": st.booleans(), "include_end": st.booleans()}
ROLES = st.sampled_from(["user", "assistant", "tool"])
BOUNDARIES = st.lists(
    st.one_of(
        st.builds(RoleBoundary, role=ROLES, start=MARKERS, end=st.one_of(st.just(()), MARKERS), **KNOBS),
        st.builds(RoleBoundary, role=ROLES, start=MARKERS, until_next=st.just(True), **KNOBS),
    ),
    min_size=1,
    max_size=4,
)


@st.composite
def batches(draw):
    """Rows over an alphabet so small that markers overlap, nest and are shared; runs of segments, or None."""
    num_rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    of_row = st.lists(st.integers(0, 3), min_size=length, max_size=length)
    ids = draw(st.lists(of_row, min_size=num_rows, max_size=num_rows))
    if draw(st.booleans()):
        return ids, None
    segments = []
    for _ in range(num_rows):
        runs = draw(st.lists(st.tuples(st.integers(-1, 2), st.integers(1, 12)), min_size=1))
        row = [value for value, size in runs for _ in range(size)]
        segments.append((row + [-1] * length)[:length])
    return ids, segments


@settings(max_examples=400, deadline=None)
@given(batch=batches(), boundaries=BOUNDARIES, mode=st.sampled_from(EOS_MODES), data=st.data())
def test_both_ways_equal_the_reference(batch, boundaries, mode, data):
    ids, segments = batch
    roles = data.draw(st.sets(st.sampled_from(sorted({boundary.role for boundary in boundaries}))))
    expected = [
        reference_mask(row, boundaries, roles, mode, segments[i] if segments else [0] * len(row))
        for i, row in enumerate(ids)
    ]
    segment_ids = None if segments is None else torch.tensor(segments)
    knobs = {"roles_to_train": roles, "train_on_eos": mode, "segment_ids": segment_ids}
    assert role_keep_mask(torch.tensor(ids), boundaries, **knobs).tolist() == expected
    assert tensor_mask(torch.tensor(ids), boundaries, **knobs).tolist() == expected


def test_long_rows_equal_the_reference():
    """Many more turns than a property test's rows have: the doubling's number of steps matters here."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4, (3, 2001), generator=generator)
    segment_ids = torch.randint(-1, 4, (3, 2001 // 87), generator=generator).repeat_interleave(87, dim=1)
    boundaries = [
        RoleBoundary("user", (1,), (2,), include_end=False),
        RoleBoundary("assistant", (2,), (3,)),
        RoleBoundary("tool", (0, 0), (0,), include_start=True),
        RoleBoundary("tool", (0,), until_next=True),
    ]
    for mode in EOS_MODES:
        for segments in (torch.zeros_like(ids), segment_ids):
            expected = [
                reference_mask(row, boundaries, {"assistant", "tool"}, mode, row_segments)
                for row, row_segments in zip(ids.tolist(), segments.tolist())
            ]
            knobs = {"roles_to_train": ["assistant", "tool"], "train_on_eos": mode, "segment_ids": segments}
            assert role_keep_mask(ids, boundaries, **knobs).tolist() == expected
            assert tensor_mask(ids, boundaries, **knobs).tolist() == expected


@pytest.mark.parametrize("length", [1, 2, 3, 64, 65])
def test_as_many_spans_as_tokens(length):
    """Each token ends a span and starts the next: as many hops from the row's first start as there can be."""
    boundary = RoleBoundary("assistant", (1,), (1,), include_start=True, include_end=False)
    ids = torch.ones(2, length, dtype=torch.int64)
    assert role_keep_mask(ids, [boundary], roles_to_train=["assistant"]).all()
    assert tensor_mask(ids, [boundary], roles_to_train=["assistant"]).all()


# ---- No waiting ----

# ChatML in small: 1 opens, 2 user, 3 assistant, 4 system, 9 closes; from 10 on, text.
CHATML = [RoleBoundary("user", (1, 2), (9,)), RoleBoundary("assistant", (1, 3), (9,))]
TWO_TURNS = [1, 2, 10, 11, 9, 1, 3, 12, 13, 9, 1, 2, 14, 9, 1, 3, 15, 9]


class WaitsForDevice(TorchDispatchMode):
    """Fails on the operations for which a host waits for its GPU."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "_unique",
        "lift_fresh",
        "is_nonzero",
        "equal",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in self.WAITING, name
        if name == "index":
            assert all(index.dtype == torch.int64 for index in args[1]), "an index that is a mask is counted first"
        if name == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None, "how many is counted first"
        if name == "where":
            assert all(arg.dim() > 0 for arg in args), "a number is copied to the device first"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", EOS_MODES)
def test_the_tensor_way_waits_for_nothing(mode):
    ids, segment_ids = torch.tensor([TWO_TURNS] * 2), torch.zeros(2, 18, dtype=torch.int64)
    with WaitsForDevice():
        for segments in (None, segment_ids):
            tensor_mask(ids, CHATML, roles_to_train=["assistant"], train_on_eos=mode, segment_ids=segments)
    with pytest.raises(AssertionError, match="nonzero"), WaitsForDevice():
        ids.nonzero()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", EOS_MODES)
def test_on_a_gpu_without_waiting(mode):
    ids = torch.tensor([TWO_TURNS * 20, TWO_TURNS[::-1] * 20])
    segment_ids = (torch.arange(360) // 50).expand(2, 360).contiguous()
    knobs = {"roles_to_train": ["assistant"], "train_on_eos": mode}
    expected = role_keep_mask(ids, CHATML, segment_ids=segment_ids, **knobs)
    on_gpu, segments_on_gpu = ids.cuda(), segment_ids.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        keep = role_keep_mask(on_gpu, CHATML, segment_ids=segments_on_gpu, **knobs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert keep.device == on_gpu.device
    assert torch.equal(keep.cpu(), expected)
