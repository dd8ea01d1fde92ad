"""The display of a training while it runs: the driver reads what rank 0 and the actors append to the run's folder.

It prints a line for each event worth reading, the progress of the steps and the number of warnings; at the end the last
of the warnings. Workers themselves print nothing that a person has to read.
"""

import contextlib
import json
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from mmray.base.words import counted
from mmray.display.progress import ProgressBar
from mmray.errors import UserError
from mmray.run.evaluation.callback import PROGRESS_FILE
from mmray.run.folder import PUBLISH_SECONDS, RunFolder
from mmray.run.history import HISTORY_FILE, in_words
from mmray.run.metrics import METRICS_FILE, SHARE_STEPS, shares_of_bins
from mmray.run.warnings import WARNINGS_FILE, read_warnings

log = logging.getLogger("mmray")

POLL_SECONDS = 0.5
TAIL_BYTES = 4096
SHOWN_DATASETS = 6
"""The most datasets of a mixture whose shares the progress line shows one by one."""


class RunWatch:
    """Shows the progress of a run: `with RunWatch(name, run, total_steps): …` around its training."""

    def __init__(self, name: str, run: RunFolder, total_steps: int) -> None:
        self._run, self._every = run, POLL_SECONDS if run.shared_path else PUBLISH_SECONDS
        self._name, self._path, self._total = name, run.fetch() / METRICS_FILE, total_steps
        self._warnings, self._history = run.path / WARNINGS_FILE, run.path / HISTORY_FILE
        self._old_warnings, self._events_read, self._old_metrics = map(
            _size, (self._warnings, self._history, self._path)
        )
        self._evaluating, self._idle_seconds = run.path / PROGRESS_FILE, 0.0
        self._metrics_read = _size(self._path)
        self._stop = threading.Event()
        self.has_begun = False
        """Whether workers have started, or were restarted, since then."""
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if new_warnings := read_warnings(self._warnings, self._old_warnings):
            log.warning("%s: %d warnings, the last: %s", self._warnings, len(new_warnings), new_warnings[-1])

    def _show(self) -> None:
        with ProgressBar(f"{self._name}: training", "steps") as bar:
            finished = False
            while not finished:
                finished = self._stop.wait(self._every)
                with contextlib.suppress(OSError, UserError):  # progress is no reason to stop: it is asked again
                    self._run.fetch()
                self._tell_events()
                if _size(self._path) != self._old_metrics:  # else it ends with steps that will be done again
                    self._old_metrics = -1
                    self._update(bar)

    def _steps(self, num_bytes: int) -> list[dict[str, Any]]:
        """The lines of training steps with a loss in the last bytes of metrics.jsonl."""
        with self._path.open("rb") as file:
            if (begin := self._path.stat().st_size - num_bytes) > 0:
                file.seek(begin)
                file.readline()  # the rest of a line, which may begin like one, with a table of its own
            lines = [json.loads(line) for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
        return [line for line in lines if line.get("loss") is not None]

    def _tell_events(self) -> None:
        """Prints a line for each event since the last call."""
        if _size(self._history) <= self._events_read:
            return
        with self._history.open("rb") as file:
            file.seek(self._events_read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._events_read += len(whole)
        for line in whole.splitlines():
            event = json.loads(line)
            self.has_begun |= event["event"] in ("start", "resume")
            if words := in_words(event):
                log.info("%s: %s", self._name, words)

    def _update(self, bar: ProgressBar) -> None:
        self._tell_evaluations()
        lines = self._steps(TAIL_BYTES) or self._steps(16 * TAIL_BYTES)  # a step of many datasets has a long line
        if lines and "bins_by_dataset" in lines[-1]:
            lines = self._steps(SHARE_STEPS * 2 * len(json.dumps(lines[-1])))  # evaluations stand between them
        if lines:
            last = lines[-1]
            note = _step_note(last) + self._evaluation_note()
            if shares := shares_of_bins(lines):
                note += f"  last {counted(min(SHARE_STEPS, len(lines)), 'step')}: {_shares_note(shares)}"
            if warning_lines := read_warnings(self._warnings, self._old_warnings):
                note += f"  warnings: {len(warning_lines)}"
            bar.update(last["step"], self._total, note, idle_seconds=self._idle_seconds)

    def _tell_evaluations(self) -> None:
        """Prints a line for each evaluation that is done since the last call, and counts its time."""
        size = _size(self._path)
        if size < self._metrics_read:  # cut back to a checkpoint: its steps are done again
            self._metrics_read = size
        with self._path.open("rb") as file:
            file.seek(self._metrics_read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._metrics_read += len(whole)
        for line in whole.splitlines():
            if line.startswith(b"{") and (values := json.loads(line)).get("eval_seconds") is not None:
                self._idle_seconds += values["eval_seconds"]
                log.info("%s: %s", self._name, evaluation_in_words(values))

    def _evaluation_note(self) -> str:
        """The progress of an evaluation that runs now, in a few words; "" where none does."""
        try:
            values = json.loads(self._evaluating.read_text())
        except (OSError, ValueError):
            return ""
        done = f" {values['done']}/{values['total']}" if values["total"] else ""
        return f"  evaluating after step {values['step']:,}: {values['what']}{done}"


def _shares_note(shares: Mapping[str, float]) -> str:
    """The shares of datasets in a few words, the largest first."""
    largest = sorted(shares, key=lambda name: -shares[name])
    words = [f"{name} {shares[name]:.1%}" for name in largest[:SHOWN_DATASETS]]
    rest = sum(shares[name] for name in largest[SHOWN_DATASETS:])
    return ", ".join(words) + (f", {len(largest) - SHOWN_DATASETS} others {rest:.1%}" if rest else "")


def _step_note(line: dict[str, Any]) -> str:
    """The metrics of a step in a few words."""
    waited, seconds = line["data_wait_seconds"], line["step_seconds"]
    whole = max(waited + seconds, 1e-9)
    words = [f"loss {line['loss']:.4f}", f"{line['tokens'] / whole:,.0f} tokens/s", f"data wait {waited / whole:.0%}"]
    if workers := line.get("workers"):
        words.append(counted(workers, "worker"))
    return "  ".join(words)


def evaluation_in_words(line: dict[str, Any]) -> str:
    """One line about an evaluation for a person. line: of metrics.jsonl."""
    words = [f"loss {line['eval_loss']:.4f}" if line.get("eval_loss") is not None else "no loss"]
    names = {"eval_token_accuracy": "token accuracy", "eval_cer": "CER", "eval_wer": "WER", "eval_exact_match": "exact"}
    words += [f"{name} {line[key]:.4f}" for key, name in names.items() if line.get(key) is not None]
    return f"evaluation after step {line['step']:,}: {', '.join(words)} ({line['eval_seconds']:.1f} s)"


def _size(path: Path) -> int:
    """The size of a file in bytes; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0
