"""What `ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml` uploads, by Ray's own packing."""

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from ray._private.runtime_env.packaging import create_package
from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

from tests.conftest import ROOT

PLANTED = {
    "rows.jsonl": 10, "more/rows.jsonl.gz": 10, "more/part-0.parquet": 10, "shards/000.tar": 10, "jobs/pages.csv": 10,
    "pages/a.png": 10, "pages/b.JPG": 10, "pages/c.tiff": 10, "mmray/page.webp": 10, "scans.pdf": 10,
    "demo_out/prepared/train/manifest.json": 10, "runs/a/metrics.json": 10, "runs/a/weights.bin": 10,
    ".venv/bin/python": 10, ".venv-new/bin/python": 10, ".git/index": 10, ".cache/x.py": 10,
    "jobs/__pycache__/x.pyc": 10,
    "private/weights.bin": 50 << 20,
}  # fmt: skip
"""Files, with their bytes, that a checkout may hold beside what it is made of. The last is in .gitignore."""

OWN = ["my_jobs/job.yaml", "my_jobs/processor/tokenizer.json", "jobs/mine.yaml"]
"""Files of a user that a job may well need."""


def packed(checkout: Path, package: Path) -> list[str]:
    """The names in the package that the client of `ray job submit` makes of a checkout."""
    environment = yaml.safe_load((checkout / "jobs" / "runtime_env.yaml").read_text())

    def upload(folder: str, excludes: Sequence[str], is_file: bool = False) -> None:
        create_package(folder, package, include_gitignore=True, excludes=list(excludes))

    upload_working_dir_if_needed(environment | {"working_dir": str(checkout)}, include_gitignore=True, upload_fn=upload)
    with zipfile.ZipFile(package) as files:
        return files.namelist()


def test_code_and_job_files_travel_and_no_data(tmp_path: Path) -> None:
    checkout, package = tmp_path / "checkout", tmp_path / "package.zip"
    ignored = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", "demo_out", "*.egg-info")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    (checkout / ".gitignore").open("a").write("/private/\n")
    needed = {
        str(path.relative_to(checkout))
        for room in ("mmray", "pipelines", "jobs")
        for path in (checkout / room).rglob("*")
        if path.is_file() and path.suffix != ".ipynb"
    }
    for name, size in (PLANTED | dict.fromkeys(OWN, 10)).items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(b"x" * size)

    names = set(packed(checkout, package))
    assert needed | set(OWN) <= names
    assert not names & set(PLANTED)
    assert not [name for name in names - needed - set(OWN) if "/" in name], "only what jobs need, and files at the top"
    assert package.stat().st_size < 4 << 20, "Ray sends it to every node before work starts"
