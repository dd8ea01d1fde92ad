"""What every benchmark returns: ratios between two ways on the same data in one process.

A ratio carries from one machine to the next where seconds do not; the seconds stand beside it as explanation.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of RESULTS.md."""

    name: str
    """What is compared with what, on which data."""
    ratio: float
    explanation: str
    """What the ratio is of, with the measured numbers and their units."""
    goal: float | None = None
    """What the ratio should reach; None: it is only reported."""
    lower_is_better: bool = False
    """The goal is the most that is good, not the least."""

    @property
    def is_met(self) -> bool:
        if self.goal is None:
            return True
        return self.ratio <= self.goal if self.lower_is_better else self.ratio >= self.goal


def best_seconds(
    work: Callable[[], object], repeats: int = 5, *, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The shortest of some runs: what the work costs when nothing else disturbs it. The first run, which may
    compile, does not count unless it is the only one. clock: `time.process_time` for CPU time, all threads together."""
    timings = []
    for _ in range(repeats):
        started = clock()
        work()
        timings.append(clock() - started)
    return min(timings[1:] or timings)
