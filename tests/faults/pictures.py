"""Pictures that break while a run trains on them."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from mmray.prepared import PreparedDataset
from mmray.training.json_lines import read_json_lines
from tests.conftest import Inputs
from tests.faults.machines import Machines, OneMachine
from tests.faults.runs import TrainingRun
from tests.faults.table import Row
from tests.here import prepare_here


def with_own_pictures(
    machines: Machines | OneMachine, inputs: Inputs, folder: Path, name: str, **changes: object
) -> TrainingRun:
    """A run over a copy of the pages, prepared while they are sound."""
    own = Inputs(folder / name / "inputs", inputs.rows, inputs.rejects)
    shutil.copytree(inputs.folder, own.folder)
    settings = {"training__steps": 20, "resources": {"workers": 2, "encode_actors": 2}, **changes}
    run = TrainingRun(machines, own, folder, name, output__prepared=str(folder / name / "prepared"), **settings)
    for split in ("train", "eval"):
        if getattr(run.job.data, split):
            prepare_here(run.job, split)
    return run


def pages(run: TrainingRun) -> list[Path]:
    """The files of the run's pictures that train."""
    dataset = run.batches.dataset
    bins = (dataset.bin(number) for number in range(len(dataset)))
    return sorted({Path(image["uri"]) for each in bins for image in each.images})


def some_break(machines: Machines | OneMachine, inputs: Inputs, folder: Path) -> Row:
    """Three pictures: one truncated, one of another size, one gone."""
    run = with_own_pictures(machines, inputs, folder, "some-break", data__max_skipped_share=1.0)
    broken = break_some(run)
    run.start()
    run.finish()
    return judged(run, broken, "one truncated, one of another size, one deleted after preparing", "nothing")


def break_some(run: TrainingRun) -> set[str]:
    """Truncate one of its pictures, replace one by another size, delete one; their names."""
    truncated, changed, gone, *_ = pages(run)
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 2])
    Image.new("RGB", (70, 50)).save(changed)
    gone.unlink()
    return {str(path) for path in (truncated, changed, gone)}


def judged(run: TrainingRun, broken: set[str], what: str, redone: str) -> Row:
    """Samples with one of these pictures, and no others, have no weight in any step, and are listed."""
    steps = [line["step"] for line in run.metrics]
    expected = [samples_with(broken, run.batches.dataset, run.batches.order.bins(step - 1)) for step in steps]
    listed = [line for line in read_json_lines(run.run / "skipped.jsonl") if line["split"] == "train"]
    audit = run.audit()
    counted = [line["skipped_samples"] for line in run.metrics]
    reasons = sorted({line["reason"] for line in listed})
    holds = counted == expected and len(listed) == sum(expected) > 0 and audit.lost == audit.doubled == 0
    return Row(
        "pictures break during a run", what, audit.lost, audit.doubled, redone,
        f"{'' if holds else 'FAILED: '}the run goes on; {len(listed)} times a sample without weight, as many as the "
        f"schedule holds, each listed ({', '.join(reasons)})",
    )  # fmt: skip


def samples_with(broken: set[str], dataset: PreparedDataset, bins: Iterable[int | None]) -> int:
    """How many samples of these bins have one of these pictures."""
    found = (dataset.bin(number) for number in bins if number is not None)
    return len({(each.index, image["sample"]) for each in found for image in each.images if image["uri"] in broken})


def all_gone(machines: Machines | OneMachine, inputs: Inputs, folder: Path) -> Row:
    """The pictures' folder is not mounted."""
    run = with_own_pictures(machines, inputs, folder, "all-gone", training__max_failures=0)
    root = pages(run)[0].parent
    root.rename(root.with_name("unmounted"))
    code = run.start().wait()
    assert run.driver is not None
    errors = [line for line in run.driver.output.splitlines() if line.startswith("error:")]
    message = errors[-1] if errors else run.driver.output[-300:]
    holds = code != 0 and "max_skipped_share" in message and "image_missing" in message
    return Row(
        "all pictures are gone", "the folder of the pictures renamed, as if not mounted", 0, 0, "nothing",
        f"{'' if holds else 'FAILED: '}exit code {code} at step {run.step}: {message[:160]}…",
    )  # fmt: skip


FAULTS: dict[str, Callable[[Machines | OneMachine, Inputs, Path], Row]] = {
    "pictures break during a run": some_break,
    "all pictures are gone": all_gone,
}
