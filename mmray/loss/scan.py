"""The scan for role boundaries, computed in two ways that agree on every input.

The rules of the scan are in `mmray.loss.roles`. The scan is sequential by nature: where a span begins depends on
where the one before it ended.

- `scan_compiled`, for the CPU: a compiled loop that reads each token about once. 1 to 2 ns a token on one
  thread; matching positions with tensor operations and walking the turns in Python costs 30 to 90.
- `scan_tensors`, for any device: tensor operations only, nothing that waits for the device. Each position
  that may open a span points to the position where the next span would open after it. The spans that the scan
  really opens are those reachable from the row's beginning, and pointer doubling finds them in log2(turns)
  steps for all rows at once. The remaining steps are prefix sums, scatters and gathers over the batch. The
  price: on a CPU it is 200 times slower than the loop.

Operations that wait for a GPU are avoided: `item`, `nonzero`, a boolean index, Python control flow on values, a
table copied from the host. Numbers travel as kernel arguments; hence `masked_fill`, where `torch.where` would
make a tensor of the number first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmray.base.compiled import compiled

SIZE_BITS = 15
"""Markers are shorter than 2**SIZE_BITS tokens, so that a rule is packed in 63 bits."""


class Rule(NamedTuple):
    """One boundary, with the parts of its spans to train on."""

    start: tuple[int, ...]
    end: tuple[int, ...]
    consumes_end: bool
    trains_start: bool
    trains_content: bool
    trains_end: bool
    until_next: bool
    """True if the span ends where any start marker matches, instead of at an end marker."""


class ScanPlan:
    """The settings in the form that both implementations read; built once for each combination of settings.

    rules: in order of precedence.
    last_end_only: whether only the end marker of a sample's last trained span may be trained on.
    """

    def __init__(self, rules: Sequence[Rule], last_end_only: bool) -> None:
        self.rules = tuple(rules)
        self.last_end_only = last_end_only
        self.arrays = _as_arrays(self.rules)


def _as_arrays(rules: Sequence[Rule]) -> tuple[np.ndarray, np.ndarray]:
    """Lays rules out for the compiled loop: a table [rules, 9] and the ids of all markers in one array; both int64.

    Columns: first index and size of the start marker in the array of ids, first index and size of the end marker,
    then the five flags in order.
    """
    tokens: list[int] = []
    table = np.zeros((len(rules), 9), dtype=np.int64)
    for i, rule in enumerate(rules):
        table[i] = (len(tokens), len(rule.start), len(tokens) + len(rule.start), len(rule.end), *rule[2:])
        tokens += rule.start + rule.end
    return table, np.array(tokens, dtype=np.int64)


# ---- CPU: one compiled loop ----


def scan_compiled(rows: Tensor, segments: Tensor | None, plan: ScanPlan) -> Tensor:
    """Marks the tokens to train on, bool [batch, length]. rows, segments: integers [batch, length] on the CPU."""
    keep = torch.zeros(rows.shape, dtype=torch.bool)
    ids = _as_array(rows)
    runs = ids[:0] if segments is None else _as_array(segments)
    _scan_batch(ids, runs, segments is not None, *plan.arrays, plan.last_end_only, keep.numpy())
    return keep


def _as_array(tensor: Tensor) -> np.ndarray:
    """Returns a contiguous int32 or int64 array, so that few variants of the loop are compiled."""
    wide = tensor if tensor.dtype in (torch.int32, torch.int64) else tensor.to(torch.int32)
    return wide.contiguous().numpy()


@compiled()
def _matches(ids: np.ndarray, at: int, stop: int, tokens: np.ndarray, first: int, size: int) -> bool:
    if at + size > stop:
        return False
    for k in range(size):  # noqa: SIM110 (numba has no all())
        if ids[at + k] != tokens[first + k]:
            return False
    return True


@compiled()
def _rule_at(ids: np.ndarray, at: int, stop: int, table: np.ndarray, tokens: np.ndarray) -> int:
    """Finds the rule whose start matches at a position; returns the number of rules where none does."""
    rule = 0
    while rule < len(table) and not _matches(ids, at, stop, tokens, table[rule, 0], table[rule, 1]):
        rule += 1
    return rule


@compiled()
def _scan_sample(
    ids: np.ndarray,
    at: int,
    stop: int,
    table: np.ndarray,
    tokens: np.ndarray,
    last_end_only: bool,
    keep: np.ndarray,
) -> None:
    """Scans ids[at:stop], one sample, and sets its trained tokens in keep."""
    last_end, last_end_stop = stop, stop
    while at < stop:
        rule = _rule_at(ids, at, stop, table, tokens)
        if rule == len(table):
            at += 1
            continue
        content = at + table[rule, 1]
        end_first, end_size, consumes_end = table[rule, 2], table[rule, 3], table[rule, 4]
        trains_start, trains_content, trains_end = table[rule, 5], table[rule, 6], table[rule, 7]
        end, end_stop = stop, stop
        if end_size > 0:
            for i in range(content, stop - end_size + 1):
                if ids[i] == tokens[end_first] and _matches(ids, i, stop, tokens, end_first, end_size):
                    end, end_stop = i, i + end_size * consumes_end
                    break
        elif table[rule, 8]:
            end = content
            while end < stop and _rule_at(ids, end, stop, table, tokens) == len(table):
                end += 1
            end_stop = end
        if trains_start:
            keep[at:content] = True
        if trains_content:
            keep[content:end] = True
            last_end, last_end_stop = end, end + (end_stop - end) * trains_end
        if trains_end and not last_end_only:
            keep[end:end_stop] = True
        at = end_stop
    if last_end_only:
        keep[last_end:last_end_stop] = True


@compiled()
def _scan_batch(
    ids: np.ndarray,
    segments: np.ndarray,
    segmented: bool,
    table: np.ndarray,
    tokens: np.ndarray,
    last_end_only: bool,
    keep: np.ndarray,
) -> None:
    num_rows, length = ids.shape
    for row in range(num_rows):
        if not segmented:
            _scan_sample(ids[row], 0, length, table, tokens, last_end_only, keep[row])
            continue
        first = 0
        while first < length:
            segment = segments[row, first]
            stop = first + 1
            while stop < length and segments[row, stop] == segment:
                stop += 1
            if segment >= 0:
                _scan_sample(ids[row], first, stop, table, tokens, last_end_only, keep[row])
            first = stop


# ---- Any device: tensor operations over the flattened batch of n tokens ----

# A position that may open a span carries its rule as one integer, so that choosing the rule costs one kernel a
# rule. 0: no start. Otherwise: the size of the start marker, the size of the end marker, the end marker's row
# among the distinct end markers (15 bits each), and five flags.
_END_SIZE, _END_ROW = SIZE_BITS, 2 * SIZE_BITS
_FLAGS = tuple(1 << bit for bit in range(58, 63))
_CONSUMES_END, _TRAINS_START, _TRAINS_CONTENT, _TRAINS_END, _UNTIL_NEXT = _FLAGS


class _Spans(NamedTuple):
    """The span that each position would open; all int64 [n]. Undefined where `rule` is 0."""

    rule: Tensor
    content: Tensor
    """The position after the start marker."""
    end: Tensor
    """The position of the end marker, or the end of the sample."""
    stop: Tensor
    """The position at which the scan goes on."""


def scan_tensors(rows: Tensor, segments: Tensor | None, plan: ScanPlan) -> Tensor:
    """Marks the tokens to train on, on any device and without waiting for it; arguments as in `scan_compiled`."""
    num_rows, length = rows.shape
    if not plan.rules:
        return torch.zeros_like(rows, dtype=torch.bool)
    sample_end = _sample_ends(rows, segments)
    spans = _possible_spans(rows, segments, sample_end, plan)
    shortest = min(len(rule.start) for rule in plan.rules)
    opened = _opened(spans, length, max_spans=max(length // shortest, 1))
    rule = _only_last_ends(spans.rule, opened, sample_end) if plan.last_end_only else spans.rule
    return _paint(spans._replace(rule=rule), opened).reshape(num_rows, length)


def _next_true(flags: Tensor) -> Tensor:
    """Finds, for each index of 0…m, the first True at or after it; m where there is none. Returns int64 [m + 1]."""
    m = flags.numel()
    count = flags.cumsum(0)
    places = torch.full((m + 2,), m, dtype=torch.int64, device=flags.device)
    unused = m + 1
    rank = (count - 1).masked_fill(~flags, unused)
    places.scatter_(0, rank, torch.arange(m, device=flags.device))
    return torch.cat([places[count - flags.long()], places[m : m + 1]])


def _sample_ends(rows: Tensor, segments: Tensor | None) -> Tensor:
    """Finds the flat position after the last token of each token's sample. Returns int64 [n]."""
    num_rows, length = rows.shape
    if segments is None:
        row_end = torch.arange(length, (num_rows + 1) * length, length, device=rows.device)
        return row_end.unsqueeze(1).expand(num_rows, length).reshape(-1)
    border = torch.ones_like(segments, dtype=torch.bool)
    border[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return _next_true(border.reshape(-1))[1:]


def _possible_spans(rows: Tensor, segments: Tensor | None, sample_end: Tensor, plan: ScanPlan) -> _Spans:
    n = rows.numel()
    at = torch.arange(n, device=rows.device)
    room = sample_end - at
    widest = max(max(len(rule.start), len(rule.end)) for rule in plan.rules)
    ids = torch.nn.functional.pad(rows.reshape(-1).long(), (0, widest), value=-1)

    def marker_matches(marker: tuple[int, ...]) -> Tensor:
        matches = room >= len(marker)
        for k, token in enumerate(marker):
            matches = matches & (ids[k : k + n] == token)
        return matches

    end_markers = list(dict.fromkeys(rule.end for rule in plan.rules if not rule.until_next))
    rule_at = torch.zeros_like(at)
    for rule in reversed(plan.rules):
        row = len(end_markers) if rule.until_next else end_markers.index(rule.end)
        rule_at.masked_fill_(marker_matches(rule.start), _as_integer(rule, row))
    if segments is not None:
        rule_at.masked_fill_(segments.reshape(-1) < 0, 0)

    size_mask = (1 << SIZE_BITS) - 1
    content = at + (rule_at & size_mask)
    end_size = (rule_at >> _END_SIZE) & size_mask
    row_offset = ((rule_at >> _END_ROW) & size_mask) * n
    ends = [marker_matches(marker) for marker in end_markers]
    if any(rule.until_next for rule in plan.rules):
        ends.append(rule_at != 0)
    next_end = _next_true(torch.cat(ends))
    end = next_end[row_offset + content] - row_offset
    closed = ((end_size > 0) | ((rule_at & _UNTIL_NEXT) != 0)) & (end < sample_end)
    end = torch.where(closed, end, sample_end)
    consumed = closed & ((rule_at & _CONSUMES_END) != 0)
    return _Spans(rule_at, content, end, end + end_size * consumed)


def _as_integer(rule: Rule, end_row: int) -> int:
    bits = len(rule.start) | len(rule.end) << _END_SIZE | end_row << _END_ROW
    return bits | sum(bit for bit, is_set in zip(_FLAGS, rule[2:]) if is_set)


def _opened(spans: _Spans, length: int, max_spans: int) -> Tensor:
    """Marks the starts that the scan of each row opens, by pointer doubling from the row's first start. bool [n].

    A row's last start leads to the next row's first one, which is marked anyway; n leads to itself. With starts at
    0, 3, 5 and 9 of which the span at 3 covers 5, `follower` is 0 → 3, 3 → 9, 5 → 9: two doublings mark 0, 3, 9.
    """
    n = spans.rule.numel()
    next_start = _next_true(spans.rule != 0)
    follower = torch.cat([next_start[spans.stop], next_start[n:]])
    opened = torch.zeros(n + 1, dtype=torch.bool, device=follower.device)
    opened.scatter_(0, next_start[:n:length].contiguous(), True)
    for _ in range((max_spans - 1).bit_length()):
        opened.scatter_(0, follower.masked_fill(~opened, n), True)
        follower = follower[follower]
    return opened[:n]


def _only_last_ends(rule: Tensor, opened: Tensor, sample_end: Tensor) -> Tensor:
    """Clears the flag that trains the end marker on all but the last trained span of each sample."""
    following = _next_true(opened & ((rule & _TRAINS_CONTENT) != 0))[1:]
    return torch.where(following >= sample_end, rule, rule & ~_TRAINS_END)


def _paint(spans: _Spans, opened: Tensor) -> Tensor:
    """Marks each token to train on, by the span opened last at or before it. bool [n].

    Before the first span a token looks up position 0, which then is no start and is not trained on.
    """
    at = torch.arange(opened.numel(), device=opened.device)
    count = opened.cumsum(0)
    unused = opened.numel() + 1
    places = torch.zeros(unused + 1, dtype=torch.int64, device=opened.device)
    places.scatter_(0, count.masked_fill(~opened, unused), at)
    span = places[count]

    rule, content, end, stop = (of_start[span] for of_start in spans)
    in_start = (at < content) & ((rule & _TRAINS_START) != 0)
    in_content = (at >= content) & (at < end) & ((rule & _TRAINS_CONTENT) != 0)
    in_end = (at >= end) & (at < stop) & ((rule & _TRAINS_END) != 0)
    return in_start | in_content | in_end
