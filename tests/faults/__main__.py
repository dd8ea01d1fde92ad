"""`python -m tests.faults`: every fault, and the table of docs/reliability.md. `--help` names them."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.conftest import Inputs, write_inputs
from tests.faults import pictures, preparing, stops, table, training
from tests.faults.machines import Machines
from tests.faults.runs import TrainingRun
from tests.faults.soak import soak
from tests.faults.table import Row

SOAK = "soak"
NAMES = [*training.FAULTS, *training.OWN, *stops.FAULTS, *pictures.FAULTS, *preparing.NAMES, SOAK]
ALONE = training.OWN | stops.FAULTS
"""Faults that have a run of their own."""
STEPS_PER_FAULT = 40
"""Steps of the runs, for each fault of one of them: more than it takes to be met, to recover, and to be judged."""


def rows(folder: Path, names: list[str]) -> Iterator[Row]:
    """The row of each of these faults, as it is known."""
    inputs = write_inputs(folder / "inputs")
    on_one_run = [name for name in training.FAULTS if name in names]
    alone = [name for name in ALONE if name in names]
    broken = [name for name in pictures.FAULTS if name in names]
    if on_one_run or alone:
        steps = max(40, 200 * bool(training.ELASTIC in alone), STEPS_PER_FAULT * len(on_one_run))
        whole = TrainingRun(None, inputs, folder, "whole", training__steps=steps)
        whole.prepare()
        whole.start()  # it goes ahead on a Ray of its own; who compares waits for it
        try:
            yield from compared(inputs, folder, whole, on_one_run, alone)
        finally:
            whole.stop()
    if broken:
        with Machines(head_cpus=6) as machines:
            for name in broken:
                yield pictures.FAULTS[name](machines, inputs, folder)
    if preparations := [name for name in preparing.NAMES if name in names]:
        yield from preparing.faults(inputs, folder, preparations)
    if SOAK in names:
        yield from soak(folder / "soak")


def compared(
    inputs: Inputs, folder: Path, whole: TrainingRun, on_one_run: list[str], alone: list[str]
) -> Iterator[Row]:
    """The rows of faults of training, whose losses are compared with those of `whole`."""
    if on_one_run:
        with Machines(head_cpus=6) as machines:
            run = TrainingRun(machines, inputs, folder, "faults", training__steps=whole.job.training.steps)
            run.start()
            yield from training.disturb(run, whole, on_one_run)
            run.stop()
    for name in alone:
        if row := ALONE[name](inputs, folder, whole):
            yield row
        else:
            print(f"{name}: left out, this user may not mount a file system", flush=True)


def main() -> int:
    """Run the faults named on the command line, or all; 1 where any was not survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="FAULT", help=f"some of: {'; '.join(NAMES)}")
    parser.add_argument("--no-table", action="store_true", help="do not write docs/reliability.md")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; there are: {'; '.join(NAMES)}")
    failed = False
    with tempfile.TemporaryDirectory(prefix="mmray-faults-") as folder:
        for found in rows(Path(folder), arguments.names or NAMES):
            row = replace(found, outcome=found.outcome.replace(f"{folder}/", ""))
            print(table.markdown([row]).splitlines()[-1], flush=True)
            failed |= not row.holds
            if row.holds and not arguments.no_table:
                table.write([row])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
