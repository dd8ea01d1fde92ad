"""Run every `benchmarks/bench_*.py` and write `benchmarks/RESULTS.md`.

    python -m benchmarks                 # all, and the file
    python -m benchmarks masks packing   # some, on the terminal only

Each module has `run() -> list[Result]`. Exit code 1 if a goal is missed.
"""

import importlib
import os
import platform
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import Result

FOLDER = Path(__file__).parent


def main(wanted: list[str]) -> int:
    names = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    if unknown := set(wanted) - set(names):
        print(f"no benchmark is named {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        return 2
    sections = {}
    for name in wanted or names:
        started = time.perf_counter()
        sections[name] = importlib.import_module(f"benchmarks.bench_{name}").run()
        print(f"## {name} ({time.perf_counter() - started:.0f} s)\n\n{as_table(sections[name])}\n", flush=True)
    if not wanted:
        page = FOLDER / "RESULTS.md"
        page.write_text(as_page(sections) + kept_sections(page.read_text(), names))
    return 0 if all(result.is_met for results in sections.values() for result in results) else 1


def as_page(sections: dict[str, list[Result]]) -> str:
    head = (
        "# Measured\n\n"
        "Written by `make bench`. Each line is a ratio between two ways on the same data in one process.\n\n"
        f"{machine()}\n"
    )
    return head + "".join(f"\n## {name}\n\n{as_table(results)}\n" for name, results in sections.items())


def kept_sections(page: str, names: list[str]) -> str:
    """The sections of an earlier page that no benchmark of this run writes: those of `benchmarks.learning`."""
    sections = page.split("\n## ")[1:]
    return "".join(f"\n## {section}" for section in sections if section.split("\n", 1)[0] not in names)


def as_table(results: list[Result]) -> str:
    lines = ["| what | ratio | goal | met | explanation |", "| --- | ---: | ---: | --- | --- |"]
    for result in results:
        goal = met = ""
        if result.goal is not None:
            goal = f"{'≤' if result.lower_is_better else '≥'} {rounded(result.goal)}"
            met = "yes" if result.is_met else "**no**"
        lines.append(f"| {result.name} | {rounded(result.ratio)} | {goal} | {met} | {result.explanation} |")
    return "\n".join(lines)


def rounded(number: float) -> str:
    """Three digits, more only before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def machine() -> str:
    """The processor, its cores, a GPU where there is one, and the versions that matter."""
    parts = [f"{processor()}, {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return "; ".join([*parts, f"Python {platform.python_version()}", f"torch {torch.__version__}"]) + "."


def processor() -> str:
    """The model's name; what /proc/cpuinfo says on Linux, where platform knows only the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
