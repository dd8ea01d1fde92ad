"""Notices that a node will be preempted, agreed on by all ranks.

Ray Train learns of a node that drains by polling every five seconds, and passes the notice on through a call that waits
for all ranks and goes through an actor (3 ms with two). So ranks ask at most once a second: rank 0 decides when, and
its decision travels with the numbers that ranks exchange before each step anyway (0.4 ms).
"""

import logging
import time
from datetime import UTC, datetime
from typing import Any

import ray.train

from mmray.run.callback import Callback, DoneStep, Loop

ASK_SECONDS = 1.0
log = logging.getLogger("mmray")


class Preemption(Callback):
    """Asks for a checkpoint, once for each notice, after the step in which the notice arrives.

    A node may have two notices: of a risk, without a deadline, and of its end. Each gets a checkpoint.
    """

    def __init__(self) -> None:
        self._asked = time.monotonic()
        self._known: set[tuple[str, int | None]] = set()

    def flag(self) -> int:
        """True if it is time to ask. The answer of rank 0 counts for all ranks."""
        return int(time.monotonic() - self._asked >= ASK_SECONDS)

    def after_step(self, loop: Loop, done: DoneStep) -> None:
        notice = self._ask() if done.step.flags[self.name][0] else None
        if notice:
            log.warning("nodes %s will be taken away; writing a checkpoint", ", ".join(notice["nodes"]))
            loop.run.note("preemption", loop.step, **notice)
            loop.save(wait=True)

    def _ask(self) -> dict[str, Any] | None:
        """The `nodes` and `deadline` (ISO 8601, or None) of a notice that names a node, or its deadline, for the first
        time. Collective."""
        info = ray.train.get_preemption_info()
        self._asked = time.monotonic()
        ends = {(node, info.deadline_ms) for node in info.preempted_node_ids} if info else set()
        if info is None or self._known.issuperset(ends):
            return None
        self._known.update(ends)
        at = info.deadline_ms and datetime.fromtimestamp(info.deadline_ms / 1000, UTC).isoformat(timespec="seconds")
        return {"nodes": info.preempted_node_ids, "deadline": at or None}
