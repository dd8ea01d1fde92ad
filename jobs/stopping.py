"""A planned stop: Ctrl-C, SIGTERM and `ray job stop` let a run finish its step and save it.

Ray Train's own answer to Ctrl-C is to end the workers where they are. So `fit` runs in a thread, where it sets no
handler, and this process's main thread waits for signals: at the first it asks the run's folder for a stop, which rank
0 sees before its next step (`mmray/run/callbacks.py`).
"""

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from mmray.run.folder import RunFolder

log = logging.getLogger("mmray")

POLL_SECONDS = 0.2
BOUNCE_SECONDS = 1.0
"""Seconds within which a second signal counts as the first: supervisors signal a process and its group."""


def run_until_stopped(
    work: Callable[[], object], run: RunFolder, has_begun: Callable[[], bool], seconds: float
) -> None:
    """Does the work to its end. The first Ctrl-C or SIGTERM asks the run to stop, the second ends it at once.

    Args:
        has_begun: whether workers train, so that there is something to save; otherwise the first signal ends it, too.
        seconds: time after the first signal until it ends at once.

    Raises the errors of the work, and KeyboardInterrupt where it ends at once. Outside of the main thread signals do
    not arrive, and it only does the work.
    """
    if threading.current_thread() is not threading.main_thread():
        work()
        return
    errors: list[BaseException] = []
    thread = threading.Thread(target=_keep_error, args=(work, errors), daemon=True)
    with _Signals() as signals:
        thread.start()
        asked = False
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            if signals.first is None or not thread.is_alive():
                continue
            if not asked:
                if run.shared_path is not None and not has_begun():
                    raise KeyboardInterrupt
                run.ask_to_stop(signals.name)
                log.info(
                    "%s: the run stops after the step it is in and saves it, within %g s; again: at once",
                    signals.name, seconds,
                )  # fmt: skip
                asked = True
            elif time.monotonic() - signals.first > seconds:
                log.warning("the step and its checkpoint took more than %g s (training.stop_seconds)", seconds)
                raise KeyboardInterrupt
    if errors:
        raise errors[0]


def _keep_error(work: Callable[[], object], errors: list[BaseException]) -> None:
    try:
        work()
    except BaseException as error:  # noqa: BLE001 (raised again in the main thread)
        errors.append(error)


class _Signals:
    """Records SIGINT and SIGTERM inside the block; a second one, later than BOUNCE_SECONDS, raises
    KeyboardInterrupt."""

    def __init__(self) -> None:
        self.first: float | None = None
        """When the first came, by the monotonic clock."""
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.first is None:
            self.first = time.monotonic()
            self.name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        elif time.monotonic() - self.first > BOUNCE_SECONDS:
            raise KeyboardInterrupt
