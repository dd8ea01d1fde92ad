"""The notebook is run from a clean kernel, as its reader runs it: on the session's Ray, cell by cell to the end."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from jobs import demo
from tests.conftest import ROOT, RayHead

NOTEBOOK = ROOT / "jobs/driver.ipynb"
CELL_SECONDS = 1200


def outputs(notebook: nbformat.NotebookNode, source: str, kind: str = "text/html") -> list[str]:
    """What the one cell with these words shows, of one kind."""
    (cell,) = [each for each in notebook.cells if each.cell_type == "code" and source in each.source]
    return [each.data[kind] for each in cell.outputs if kind in each.get("data", {})]


def test_no_outputs_are_kept() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


def test_the_notebook_runs_to_its_end(
    ray_head: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """On the demo's pages and a tenth of its numbers."""
    monkeypatch.setattr(demo, "NUMBERS", demo.NUMBERS // 10)
    monkeypatch.chdir(tmp_path)
    demo.write_inputs()
    for name in ("mmray", "pipelines", "jobs"):
        (tmp_path / name).symlink_to(ROOT / name)  # its demo_out is made beside these, and not in the checkout
    for name, value in ray_head.environment.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()

    kinds = {output.output_type for cell in notebook.cells for output in cell.get("outputs", [])}
    assert "error" not in kinds
    progress, dataset = outputs(notebook, "prepare_splits(job, ")[-3::2]
    assert re.search(r"<progress max=\"1\" value=\"1.0\"></progress> demo: preparing eval", progress)
    assert "Prepared dataset: " in dataset
    (strip,) = outputs(notebook, "prepared.bin(0)")[:1]
    assert 'class="strip"' in strip
    (page,) = outputs(notebook, "show_bin(prepared")
    assert page.count("data:image/jpeg;base64,") >= 2
    assert "class=&quot;trained&quot;" in page
    assert len(outputs(notebook, "plt.subplots", "image/png")) == 1
    first, longer = (outputs(notebook, source)[0] for source in ("train(job, open", "train(longer, open"))
    assert "Run: 6 steps, finished" in first
    assert first.count("<title>step ") == 6
    assert "Run: 12 steps, finished" in longer
    assert "resumed" in longer
    (cell,) = [each for each in notebook.cells if "run.history" in each.source]
    told = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    assert re.search(r"start at step 0 .*\n(?:.*\n)*resume at step 6 on 2 workers checkpoint_\S*0006", told)
    assert told.count("finish at step") == 2
