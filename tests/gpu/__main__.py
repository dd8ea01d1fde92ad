"""`python -m tests.gpu`: in ten minutes, whether mmray is right on this machine's GPUs, and how fast.

Its output is one table of Markdown, for benchmarks/GPU.md. Without a GPU the parts that a CPU can do are done, and the
others are said to be skipped.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.__main__ import machine
from tests.gpu.checks import CHECKS
from tests.gpu.place import Place, markdown, result


def main(arguments: list[str]) -> int:
    """Runs the checks that are named, or all; 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="CHECK", help="parts of names of checks; none: all")
    parser.add_argument("--out", type=Path, help="file to which the table is added, such as benchmarks/GPU.md")
    options = parser.parse_args(arguments)
    chosen = [check for check in CHECKS if not options.names or any(name in check.name for name in options.names)]
    rows = []
    with tempfile.TemporaryDirectory(prefix="mmray-gpu-") as folder:
        place = Place.here(Path(folder))
        if not place.gpus:
            print("no GPU here: what a CPU can do is done, the rest is skipped", file=sys.stderr)
        for check in chosen:
            began = time.monotonic()
            rows.append(result(check, place))
            print(f"{rows[-1].state:8} {check.name} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
        count = f"{place.gpus} × {place.name}" if place.gpus > 1 else place.name
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    table = markdown(rows, f"{count}{cuda}; {machine()} {time.strftime('%Y-%m-%d')}.")
    print(table)
    if options.out:
        with options.out.open("a") as file:
            file.write(f"\n{table}")
    return int(any(row.state == "FAILED" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
