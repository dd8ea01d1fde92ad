"""docs/watching.md, followed literally: its tracker works, its settings are read."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

from mmray.run.tracking import TrackingSettings

ROOT = Path(__file__).resolve().parents[4]
PAGE = (ROOT / "docs" / "watching.md").read_text()

USE = """
import sys
from pathlib import Path
from mmray.run.tracking import TrackedRun, TrackingSettings
from mmray.run.metrics import MetricsLog

log = MetricsLog(TrackedRun("pages", Path(sys.argv[1])), 0, TrackingSettings(csv={}).trackers())
for step in (1, 2):
    log.write(step, loss=3.0 / step)
log.close()
"""


def test_the_trackers_of_the_page_are_settings() -> None:
    sections = [yaml.safe_load(text)["tracking"] for text in re.findall(r"^    tracking:\n(?:      .+\n)+", PAGE, re.M)]
    assert len(sections) == 2
    for section in sections:
        assert list(TrackingSettings.model_validate(section).trackers()) == ["wandb", "mlflow"]


def test_adding_a_tracker_is_what_the_page_says(tmp_path: Path) -> None:
    """In a copy of the library, with the page's file and line."""
    module, line = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    copy = tmp_path / "mmray"
    subprocess.run(["cp", "-r", str(ROOT / "mmray"), str(copy)], check=True)
    (copy / "run" / "tracking" / "csv.py").write_text(module)
    settings = copy / "run" / "tracking" / "settings.py"
    imported = "from mmray.run.tracking.base import TrackerSettings\n"
    text = settings.read_text().replace(imported, imported + "from mmray.run.tracking.csv import CsvSettings\n")
    before = "    def trackers("
    assert text.count(before) == 1
    settings.write_text(text.replace(before, f"{line}\n{before}"))
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path)],
        env={"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "numbers.csv").read_text() == "1,train/loss,3.0\n2,train/loss,1.5\n"
