"""role_keep_mask: each rule of the scan by name, and the arguments that are refused."""

import pytest
import torch

from mmray.loss import roles as roles_module
from mmray.loss.scan import scan_tensors
from mmray.masks import RoleBoundary, role_keep_mask

EOS_MODES = ["turn", "all", "last", "none"]


# ---- Both ways, always together ----


def tensor_mask(ids, boundaries, *, roles_to_train, train_on_eos="turn", segment_ids=None):
    """What a GPU computes, here on a CPU; ids [batch, length]."""
    plan = roles_module._plan(tuple(boundaries), frozenset(roles_to_train), train_on_eos)
    return scan_tensors(ids, segment_ids, plan)


def trained(ids, boundaries, roles_to_train=("assistant",), train_on_eos="turn", segments=None):
    """The trained positions of one row, by both ways."""
    rows = torch.tensor([ids])
    segment_ids = None if segments is None else torch.tensor([segments])
    knobs = {"roles_to_train": roles_to_train, "train_on_eos": train_on_eos, "segment_ids": segment_ids}
    keep = role_keep_mask(rows, boundaries, **knobs)
    assert torch.equal(keep, tensor_mask(rows, boundaries, **knobs))
    return keep[0].nonzero().flatten().tolist()


# ChatML in small: 1 opens, 2 user, 3 assistant, 4 system, 9 closes; from 10 on, text.
USER = RoleBoundary("user", (1, 2), (9,))
ASSISTANT = RoleBoundary("assistant", (1, 3), (9,))
CHATML = [USER, ASSISTANT]
TWO_TURNS = [1, 2, 10, 11, 9, 1, 3, 12, 13, 9, 1, 2, 14, 9, 1, 3, 15, 9]


# ---- What opens and closes a span ----


def test_content_and_end_of_the_trained_role():
    assert trained(TWO_TURNS, CHATML) == [7, 8, 9, 16, 17]


def test_other_roles_do_not_train():
    assert trained(TWO_TURNS, CHATML, roles_to_train=["user"]) == [2, 3, 4, 12, 13]
    assert trained(TWO_TURNS, CHATML, roles_to_train=["user", "assistant"]) == [
        2,
        3,
        4,
        7,
        8,
        9,
        12,
        13,
        16,
        17,
    ]
    assert trained(TWO_TURNS, CHATML, roles_to_train=[]) == []


def test_longest_start_wins():
    short, long = RoleBoundary("user", (1,), (9,)), RoleBoundary("assistant", (1, 3), (9,))
    for boundaries in ([short, long], [long, short]):
        assert trained([1, 3, 10, 9], boundaries) == [2, 3]
        assert trained([1, 2, 10, 9], boundaries) == []


def test_first_declared_wins_a_tie():
    user, assistant = RoleBoundary("user", (1, 3), (9,)), RoleBoundary("assistant", (1, 3), (8,))
    assert trained([1, 3, 10, 9, 11, 8], [assistant, user]) == [2, 3, 4, 5]
    assert trained([1, 3, 10, 9, 11, 8], [user, assistant]) == []


def test_starts_inside_a_span_are_text():
    assert trained([1, 2, 10, 1, 3, 11, 9, 12], CHATML) == []
    assert trained([1, 3, 10, 1, 2, 11, 9, 12], CHATML) == [2, 3, 4, 5, 6]


def test_only_the_own_end_closes_a_span():
    tool = RoleBoundary("tool", (1, 5), (8,))
    assert trained([1, 3, 10, 8, 11, 9, 12], [*CHATML, tool]) == [2, 3, 4, 5]


def test_the_end_is_searched_after_the_start_marker():
    boundary = RoleBoundary("assistant", (1, 9), (9,))
    assert trained([1, 9, 10, 9, 11], [boundary]) == [2, 3]
    overlapping = RoleBoundary("assistant", (1, 9), (9, 9))
    assert trained([1, 9, 9, 10, 9, 9, 11], [overlapping]) == [2, 3, 4, 5]


def test_an_end_right_after_the_start_closes_an_empty_span():
    assert trained([1, 3, 9, 10, 11], CHATML) == [2]
    assert trained([1, 3, 9, 10, 11], CHATML, train_on_eos="none") == []


def test_the_first_of_overlapping_end_matches_closes():
    boundary = RoleBoundary("assistant", (1,), (8, 8))
    assert trained([1, 10, 8, 8, 8, 11], [boundary]) == [1, 2, 3]


def test_empty_end_runs_to_the_end_of_the_sample():
    boundary = RoleBoundary("assistant", (1, 3))
    assert trained([10, 1, 3, 11, 1, 3, 9, 12], [boundary]) == [3, 4, 5, 6, 7]


def test_unclosed_span_runs_to_the_end_of_the_sample():
    assert trained([1, 3, 10, 11, 1, 2, 12], CHATML) == [2, 3, 4, 5, 6]


def test_a_cut_marker_at_the_end_is_text():
    boundary = RoleBoundary("assistant", (1, 3), (8, 9))
    assert trained([1, 3, 10, 8], [boundary]) == [2, 3]
    assert trained([10, 1], [boundary]) == []
    assert trained([1, 3], [boundary]) == []


# ---- include_start, include_end ----


def test_include_start_trains_the_start_marker_of_trained_roles_only():
    user = RoleBoundary("user", (1, 2), (9,), include_start=True)
    assistant = RoleBoundary("assistant", (1, 3), (9,), include_start=True)
    assert trained(TWO_TURNS, [user, assistant]) == [5, 6, 7, 8, 9, 14, 15, 16, 17]


def test_without_include_end_the_end_marker_does_not_train():
    assistant = RoleBoundary("assistant", (1, 3), (9,), include_end=False)
    for mode in EOS_MODES:
        assert trained(TWO_TURNS, [USER, assistant], train_on_eos=mode) == (
            [4, 7, 8, 13, 16] if mode == "all" else [7, 8, 16]
        )


def test_an_end_not_consumed_is_the_next_start():
    """Mistral V7: [INST] question [/INST] answer </s>, where [/INST] ends the one and starts the other."""
    inst, end_inst, eos = 1, 2, 9
    user = RoleBoundary("user", (inst,), (end_inst,), include_end=False)
    assistant = RoleBoundary("assistant", (end_inst,), (eos,))
    stream = [inst, 10, 11, end_inst, 12, 13, eos, inst, 14, end_inst, 15, eos]
    assert trained(stream, [user, assistant]) == [4, 5, 6, 10, 11]
    consumed = RoleBoundary("user", (inst,), (end_inst,), include_end=True)
    assert trained(stream, [consumed, assistant]) == []


def test_an_end_not_consumed_may_train_as_the_next_start():
    user = RoleBoundary("user", (1,), (2,), include_end=False)
    assistant = RoleBoundary("assistant", (2,), (9,), include_start=True)
    assert trained([1, 10, 2, 11, 9], [user, assistant]) == [2, 3, 4]


def test_a_consumed_end_is_no_start():
    assistant = RoleBoundary("assistant", (1,), (2, 1))
    assert trained([1, 10, 2, 1, 11, 1, 12], [assistant]) == [1, 2, 3, 6]


# ---- until_next ----

# GLM: 6 the assistant, 7 the user, 8 what a tool answers; no turn has an end of its own.
OPEN_TURNS = [
    RoleBoundary(role, (start,), until_next=True) for role, start in (("assistant", 6), ("user", 7), ("tool", 8))
]
CALL = [7, 10, 6, 11, 8, 12, 6, 13, 14, 7, 15]


def test_a_turn_may_go_on_to_the_next_start():
    assert trained(CALL, OPEN_TURNS) == [3, 7, 8]
    assert trained(CALL, OPEN_TURNS, roles_to_train=["user"]) == [1, 10]
    assert trained(CALL, OPEN_TURNS, roles_to_train=["tool"]) == [5]
    for mode in EOS_MODES:
        assert trained(CALL, OPEN_TURNS, train_on_eos=mode) == [3, 7, 8]


def test_the_next_start_may_be_of_the_same_role_and_of_several_tokens():
    assert trained([6, 6, 11, 6], OPEN_TURNS) == [2]
    boundaries = [RoleBoundary("assistant", (6,), until_next=True), RoleBoundary("user", (7, 7), (9,))]
    assert trained([6, 7, 11, 7, 7, 12, 9, 13], boundaries) == [1, 2]
    assert trained([6, 11, 7, 7], boundaries, segments=[0, 0, 0, 1]) == [1, 2]  # no start across a border


def test_without_it_an_empty_end_is_that_of_the_sample():
    boundaries = [RoleBoundary("assistant", (6,)), *OPEN_TURNS[1:]]
    assert trained(CALL, boundaries) == [3, 4, 5, 6, 7, 8, 9, 10]


def test_a_turn_up_to_the_next_start_stops_at_its_sample():
    assert trained([6, 11, 12, 13], OPEN_TURNS, segments=[0, 0, 1, 1]) == [1]


# ---- train_on_eos ----


def test_turn_trains_the_ends_of_trained_turns():
    assert trained(TWO_TURNS, CHATML, train_on_eos="turn") == [7, 8, 9, 16, 17]


def test_all_trains_the_ends_of_every_role():
    assert trained(TWO_TURNS, CHATML, train_on_eos="all") == [4, 7, 8, 9, 13, 16, 17]
    assert trained(TWO_TURNS, CHATML, roles_to_train=[], train_on_eos="all") == [4, 9, 13, 17]


def test_all_is_gated_by_include_end_of_each_role():
    user = RoleBoundary("user", (1, 2), (9,), include_end=False)
    assert trained(TWO_TURNS, [user, ASSISTANT], train_on_eos="all") == [7, 8, 9, 16, 17]


def test_last_trains_the_end_of_the_last_trained_turn():
    assert trained(TWO_TURNS, CHATML, train_on_eos="last") == [7, 8, 16, 17]
    assert trained(TWO_TURNS[:14], CHATML, train_on_eos="last") == [7, 8, 9]


def test_last_is_counted_in_each_sample():
    stream, segments = TWO_TURNS + TWO_TURNS, [0] * 18 + [1] * 18
    assert trained(stream, CHATML, train_on_eos="last", segments=segments) == [7, 8, 16, 17, 25, 26, 34, 35]


def test_last_trains_no_end_where_the_last_trained_turn_is_unclosed():
    assert trained(TWO_TURNS[:17], CHATML, train_on_eos="last") == [7, 8, 16]


def test_none_overrides_include_end_and_still_consumes():
    assert trained(TWO_TURNS, CHATML, train_on_eos="none") == [7, 8, 16]
    chain = [RoleBoundary("user", (1,), (2,)), RoleBoundary("assistant", (2,), (9,))]
    assert trained([1, 10, 2, 11, 9], chain, train_on_eos="none") == []


# ---- Samples and padding ----


def test_an_unclosed_turn_stops_at_its_sample():
    stream = [1, 3, 10, 11, 1, 2, 12, 9, 1, 3, 13, 9]
    assert trained(stream, CHATML, segments=[0] * 4 + [1] * 8) == [2, 3, 10, 11]


def test_an_empty_end_stops_at_its_sample():
    boundary = RoleBoundary("assistant", (1, 3))
    assert trained([1, 3, 10, 11, 12, 13], [boundary], segments=[0, 0, 0, 1, 1, 1]) == [2]


def test_no_marker_matches_across_a_border():
    with_start = RoleBoundary("assistant", (1, 3), (9,), include_start=True)
    assert trained([1, 3, 10, 9], [with_start], segments=[0, 0, 1, 1]) == [0, 1]
    assert trained([1, 3, 10, 9], [with_start], segments=[0, 1, 1, 1]) == []
    boundary = RoleBoundary("assistant", (1, 3), (8, 9))
    assert trained([1, 3, 10, 8, 9, 11], [boundary], segments=[0, 0, 0, 0, 1, 1]) == [2, 3]


def test_each_run_is_a_sample_even_with_a_value_seen_before():
    assert trained([1, 3, 10, 11, 12, 9], CHATML, segments=[5, 5, 5, 2, 5, 5]) == [2]


def test_padding_never_trains_and_ends_a_sample():
    stream = [1, 3, 10, 9, 1, 3, 11, 9]
    assert trained(stream, CHATML, segments=[0, 0, 0, 0, -1, -1, -1, -1]) == [2, 3]
    assert trained(stream, CHATML, segments=[0, 0, 0, -1, -1, 1, 1, 1]) == [2]


def test_rows_are_samples_of_their_own():
    ids = torch.tensor([[1, 3, 10, 11], [12, 9, 13, 14], [1, 3, 15, 9]])
    expected = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(role_keep_mask(ids, CHATML, roles_to_train=["assistant"]), expected)
    assert torch.equal(tensor_mask(ids, CHATML, roles_to_train=["assistant"]), expected)


# ---- Shapes, types, devices ----


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integer_types_and_layouts(dtype):
    ids = torch.tensor([TWO_TURNS, TWO_TURNS[::-1]], dtype=dtype)
    segment_ids = torch.zeros_like(ids)
    knobs = {"roles_to_train": ["assistant"]}
    keep = role_keep_mask(ids, CHATML, segment_ids=segment_ids, **knobs)
    assert keep.dtype == torch.bool
    assert keep.shape == ids.shape
    assert keep[0].nonzero().flatten().tolist() == [7, 8, 9, 16, 17]
    transposed = ids.t().contiguous().t()
    assert torch.equal(role_keep_mask(transposed, CHATML, segment_ids=segment_ids, **knobs), keep)
    assert torch.equal(role_keep_mask(ids[0], CHATML, **knobs), keep[0])
    assert torch.equal(tensor_mask(transposed, CHATML, segment_ids=segment_ids, **knobs), keep)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_no_tokens(shape):
    keep = role_keep_mask(torch.zeros(shape, dtype=torch.int64), CHATML, roles_to_train=["assistant"])
    assert keep.shape == shape
    assert keep.dtype == torch.bool


def test_ids_larger_than_the_tensor_holds_are_no_match():
    boundary = RoleBoundary("assistant", (257,), (9,))
    assert not role_keep_mask(torch.tensor([1, 9], dtype=torch.uint8), [boundary], roles_to_train=["assistant"]).any()


def test_no_boundaries_train_nothing():
    assert trained(TWO_TURNS, [], roles_to_train=[]) == []


# ---- What is refused ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoleBoundary("user", ()), r"role 'user': start is \(\)"),
        (lambda: RoleBoundary("user", (1, -4)), "role 'user': start has the id -4"),
        (lambda: RoleBoundary("user", (1,), (2**31,)), "role 'user': end has the id 2147483648"),
        (lambda: RoleBoundary("user", (1.5,)), r"role 'user': start is \(1.5,\)"),
        (lambda: RoleBoundary("user", "<s>"), "role 'user': start is '<s>'"),
        (lambda: RoleBoundary("user", None), "role 'user': start is None"),
        (
            lambda: RoleBoundary("user", (1,), (2,), until_next=True),
            "role 'user': until_next leaves no place for an end",
        ),
        (lambda: RoleBoundary("user", (1,) * 32768), "role 'user': start has 32768 tokens"),
    ],
)
def test_boundaries_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_boundaries_are_values():
    boundary = RoleBoundary("user", [1, torch.tensor(2)], [9])
    assert boundary == RoleBoundary("user", (1, 2), (9,))
    assert hash(boundary) == hash(RoleBoundary("user", (1, 2), (9,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(3)}, "input_ids has dtype torch.float32"),
        ({"input_ids": torch.zeros(3, dtype=torch.bool)}, "input_ids has dtype torch.bool"),
        ({"input_ids": torch.zeros(1, 2, 3, dtype=torch.int64)}, r"input_ids has shape \(1, 2, 3\)"),
        ({"input_ids": torch.tensor(3)}, r"input_ids has shape \(\)"),
        ({"segment_ids": torch.zeros(4)}, "segment_ids has dtype torch.float32"),
        ({"segment_ids": torch.zeros(5, dtype=torch.int64)}, r"segment_ids has shape \(5,\).*\(4,\)"),
        ({"segment_ids": torch.zeros(4, dtype=torch.int64, device="meta")}, "segment_ids is on meta"),
        ({"roles_to_train": "assistant"}, "roles_to_train is the text 'assistant'"),
        ({"roles_to_train": ["asistant"]}, r"roles_to_train has 'asistant'.*\['user', 'assistant'\]"),
        ({"train_on_eos": "first"}, "train_on_eos is 'first'"),
    ],
)
def test_arguments_refused(change, message):
    arguments = {
        "input_ids": torch.tensor([1, 3, 10, 9]),
        "boundaries": CHATML,
        "roles_to_train": ["assistant"],
    }
    with pytest.raises(ValueError, match=message):
        role_keep_mask(**{**arguments, **change})
