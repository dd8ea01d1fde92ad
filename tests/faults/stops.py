"""Runs that end on purpose: asked to stop, or by a mistake that only workers find."""

import signal
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from mmray.run.history import read_history
from mmray.training.model import build_model
from tests.conftest import Inputs
from tests.faults.machines import JobProcess, Machines
from tests.faults.pictures import pages, with_own_pictures
from tests.faults.runs import TrainingRun, steps_done_again
from tests.faults.table import Row
from tests.faults.training import judged

STOPPED = "stopped after step {}, which is saved; the same command continues"
STEPS = 40


def stop_at_a_step(inputs: Inputs, folder: Path, whole: TrainingRun) -> Row:
    """Ctrl-C while a step runs; the same command goes on from that step."""
    with Machines(head_cpus=6) as machines:
        run = TrainingRun(machines, inputs, folder, "stop", training__steps=STEPS)
        return _stopped(run, whole, STOP, "Ctrl-C in the middle of a step; the same command again", _interrupt)


def group_sigterm(inputs: Inputs, folder: Path, whole: TrainingRun) -> Row:
    """SIGTERM to the whole process group of a command that has started Ray itself."""
    run = TrainingRun(None, inputs, folder, "group", training__steps=STEPS)
    return _stopped(
        run, whole, GROUP, "SIGTERM to the process group of a command with a Ray of its own; the same command again",
        lambda run: _driver(run).interrupt_group(signal.SIGTERM),
    )  # fmt: skip


def _driver(run: TrainingRun) -> JobProcess:
    assert run.driver is not None
    return run.driver


def _interrupt(run: TrainingRun) -> int:
    return _driver(run).interrupt()


def _stopped(
    run: TrainingRun, whole: TrainingRun, name: str, what: str, interrupt: Callable[[TrainingRun], int]
) -> Row:
    run.start()
    run.reach(7)
    code = interrupt(run)
    line = _driver(run).output.strip().splitlines()[-1]
    at, last = run.step, read_history(run.run)[-1]
    run.start()
    run.finish()
    resumed = [event["step"] for event in run.resumes()]
    holds = (
        code == 130 and line == STOPPED.format(at) and (last["event"], last["step"]) == ("stop", at)
        and resumed == [at] and steps_done_again(run) == 0
    )  # fmt: skip
    return judged(
        run, whole, name, what, f"{steps_done_again(run)} steps",
        f"{'' if holds else 'FAILED: '}exit code {code}: {line}; resumed at {resumed}", needs=STEPS,
    )  # fmt: skip


def worker_mistake(inputs: Inputs, folder: Path, _: TrainingRun) -> Row:
    """Pictures that are gone, in a job that wants to be told: an actor finds it, a worker raises it."""
    with Machines(head_cpus=6) as machines:
        return _mistaken(machines, inputs, folder)


def _mistaken(machines: Machines, inputs: Inputs, folder: Path) -> Row:
    run = with_own_pictures(machines, inputs, folder, "mistake", training__max_failures=3)
    run.content["data"]["on_bad_row"] = "error"
    for picture in pages(run):
        picture.unlink()
    code = run.start().wait()
    lines = _driver(run).output.strip().splitlines()
    starts = [event["event"] for event in read_history(run.run)]
    holds = (
        code == 2 and starts == ["start"] and lines[-1].startswith("error: ") and "data.on_bad_row" in lines[-1]
        and not any("Traceback" in line for line in lines)
    )  # fmt: skip
    return Row(
        MISTAKE, "the pictures deleted, data.on_bad_row: error, max_failures: 3", 0, 0, "nothing",
        f"{'' if holds else 'FAILED: '}workers started {len(starts)} time, exit code {code}: {lines[-1][:120]}…",
    )  # fmt: skip


def lacking_weights(inputs: Inputs, folder: Path, _: TrainingRun) -> Row:
    """Files of a model without one of its weights: nothing is drawn at random, no step is done."""
    run = TrainingRun(None, inputs, folder, "lacking")  # type: ignore[arg-type]  # its own Ray, which it never starts
    model = run.folder / "model"
    build_model(run.job.model).save_pretrained(model)
    weights = load_file(model / "model.safetensors")
    lacking = next(name for name in sorted(weights) if "down_proj" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lacking}, model / "model.safetensors")
    run.content["model"] = {"path": str(model), "processor": run.job.model.processor_source, "dtype": "fp32"}
    code = run.start().wait()
    line = next(line for line in reversed(_driver(run).output.strip().splitlines()) if line.startswith("error: "))
    holds = code == 2 and lacking in line and "model.allow_missing" in line and not run.metrics
    return Row(
        LACKING, f"model.path whose files lack {lacking}", 0, 0, "nothing",
        f"{'' if holds else 'FAILED: '}no step was done, exit code {code}: {line[:160]}…",
    )  # fmt: skip


STOP, GROUP, MISTAKE = "a stop at a step", "SIGTERM to the process group", "a worker makes out a mistake"
LACKING = "weights that lack a layer"
FAULTS: dict[str, Callable[[Inputs, Path, TrainingRun], Row]] = {
    STOP: stop_at_a_step,
    GROUP: group_sigterm,
    MISTAKE: worker_mistake,
    LACKING: lacking_weights,
}
