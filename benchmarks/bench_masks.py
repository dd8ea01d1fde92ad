"""role_keep_mask on ChatML streams, on one thread, against two ways to do without it.

- plain: a Python loop that looks at one token after the other;
- bisect: every marker's positions by vectorised comparison, then a Python loop over the turns that finds each
  turn's end by bisection. The usual fast way.
"""

from bisect import bisect_left

import numpy as np
import torch

from benchmarks.common import Result, best_seconds
from mmray.masks import RoleBoundary, role_keep_mask

IM_START, IM_END, NEWLINE = 151644, 151645, 198
ROLES = {"system": 8948, "user": 872, "assistant": 77091}
BOUNDARIES = [RoleBoundary(role, (IM_START, token, NEWLINE), (IM_END,)) for role, token in ROLES.items()]
TRAINED = ("assistant",)
GOAL_AGAINST_BISECT = 5.0


def chatml_streams(num_rows: int, length: int) -> torch.Tensor:
    """int64 [num_rows, length]: a system prompt, then user and assistant by turns, 5 to 400 tokens each."""
    rng = np.random.default_rng(0)
    rows = np.empty((num_rows, length), dtype=np.int64)
    for row in rows:
        tokens: list[int] = []
        role = "system"
        while len(tokens) < length:
            text = rng.integers(1000, 150_000, rng.integers(5, 400)).tolist()
            tokens += [IM_START, ROLES[role], NEWLINE, *text, IM_END, NEWLINE]
            role = "assistant" if role == "user" else "user"
        row[:] = tokens[:length]
    return torch.from_numpy(rows)


def plain_mask(input_ids: torch.Tensor) -> torch.Tensor:
    """One token after the other."""
    starts = {boundary.start: boundary for boundary in BOUNDARIES}
    rows = []
    for ids in input_ids.tolist():
        keep = [False] * len(ids)
        at = 0
        while at < len(ids):
            boundary = starts.get(tuple(ids[at : at + 3]))
            if boundary is None:
                at += 1
                continue
            at += len(boundary.start)
            in_turn = True
            while in_turn and at < len(ids):
                keep[at] = boundary.role in TRAINED
                in_turn = ids[at] != IM_END
                at += 1
        rows.append(keep)
    return torch.tensor(rows)


def bisect_mask(input_ids: torch.Tensor) -> torch.Tensor:
    """The markers' positions by comparison of whole rows, then one turn after the other."""
    keep = torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, ids in enumerate(input_ids):
        turns = sorted((at, boundary) for boundary in BOUNDARIES for at in marker_positions(ids, boundary.start))
        ends = {end: marker_positions(ids, end) for end in {boundary.end for boundary in BOUNDARIES}}
        free_from = 0
        for at, boundary in turns:
            if at < free_from:
                continue
            content = at + len(boundary.start)
            positions = ends[boundary.end]
            found = bisect_left(positions, content)
            free_from = positions[found] + len(boundary.end) if found < len(positions) else len(ids)
            if boundary.role in TRAINED:
                keep[row, content:free_from] = True
    return keep


def marker_positions(ids: torch.Tensor, marker: tuple[int, ...]) -> list[int]:
    windows = ids.unfold(0, len(marker), 1)
    return (windows == torch.tensor(marker)).all(dim=1).nonzero().flatten().tolist()


def run() -> list[Result]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [result for length in (4096, 32768) for result in at_length(length)]
    finally:
        torch.set_num_threads(num_threads)


def at_length(length: int) -> list[Result]:
    input_ids = chatml_streams(8, length)
    segment_ids = (torch.arange(length) // 1000).expand(8, length).contiguous()
    data = f"8×{length:,} tokens"

    def mask() -> torch.Tensor:
        return role_keep_mask(input_ids, BOUNDARIES, roles_to_train=TRAINED)

    def mask_of_bins() -> torch.Tensor:
        return role_keep_mask(input_ids, BOUNDARIES, roles_to_train=TRAINED, segment_ids=segment_ids)

    for other in (plain_mask, bisect_mask):
        if not torch.equal(mask(), other(input_ids)):
            raise AssertionError(f"{other.__name__} and role_keep_mask differ at {data}")
    own, bins = best_seconds(mask, 20), best_seconds(mask_of_bins, 20)
    bisect = best_seconds(lambda: bisect_mask(input_ids), 4)
    plain = best_seconds(lambda: plain_mask(input_ids), 3)

    def result(name: str, seconds: float, against: float, goal: float | None = None) -> Result:
        nanoseconds = [1e9 * each / input_ids.numel() for each in (seconds, against)]
        explanation = "{:.2f} ns a token against {:.1f}".format(*nanoseconds)
        return Result(name=f"{name}, {data}", ratio=against / seconds, explanation=explanation, goal=goal)

    results = [
        result("masks against bisecting over matches", own, bisect, GOAL_AGAINST_BISECT),
        result("masks against a plain loop", own, plain),
        result("masks of packed bins against bisecting (unpacked)", bins, bisect, GOAL_AGAINST_BISECT),
    ]
    if torch.cuda.is_available():
        on_gpu = input_ids.cuda()

        def mask_on_gpu() -> None:
            role_keep_mask(on_gpu, BOUNDARIES, roles_to_train=TRAINED)
            torch.cuda.synchronize()

        results.append(result("masks on the GPU against bisecting", best_seconds(mask_on_gpu, 20), bisect))
    return results
