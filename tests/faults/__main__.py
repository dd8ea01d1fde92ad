"""`python -m tests.faults`: every fault, and the table of docs/reliability.md. `--help` names them."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import write_inputs
from tests.faults import pictures, preparing, table, training
from tests.faults.machines import Machines
from tests.faults.runs import TrainingRun
from tests.faults.soak import soak
from tests.faults.table import Row

SOAK = "soak"
NAMES = [*training.FAULTS, *training.OWN, *pictures.FAULTS, *preparing.NAMES, SOAK]
REFERENCE_STEPS = 500
"""Steps of the undisturbed run: more than the faults of one run take together."""


def rows(folder: Path, names: list[str]) -> Iterator[Row]:
    """The row of each of these faults, as it is known."""
    inputs = write_inputs(folder / "inputs")
    on_one_run = [name for name in training.FAULTS if name in names]
    alone = [name for name in training.OWN if name in names]
    broken = [name for name in pictures.FAULTS if name in names]
    if on_one_run or alone or broken:
        with Machines(head_cpus=6) as machines:
            whole = TrainingRun(machines, inputs, folder, "whole", training__steps=REFERENCE_STEPS)
            whole.prepare()
            whole.start()
            whole.finish()
            if on_one_run:
                run = TrainingRun(machines, inputs, folder, "faults", training__steps=REFERENCE_STEPS)
                run.start()
                yield from training.disturb(run, whole, on_one_run)
                assert run.driver is not None
                run.driver.kill()
            for name in broken:
                yield pictures.FAULTS[name](machines, inputs, folder)
        for name in alone:
            if row := training.OWN[name](inputs, folder, whole):
                yield row
            else:
                print(f"{name}: left out, this user may not mount a file system", flush=True)
    if preparations := [name for name in preparing.NAMES if name in names]:
        yield from preparing.faults(inputs, folder, preparations)
    if SOAK in names:
        yield from soak(folder / "soak")


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
        for row in rows(Path(folder), arguments.names or NAMES):
            print(table.markdown([row]).splitlines()[-1], flush=True)
            failed |= not row.holds
            if not arguments.no_table:
                table.write([row])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
