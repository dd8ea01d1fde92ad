"""What docs/trust.md promises: no pickle, no code from data, no open door, no secret written down."""

import ast
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import mmray
from mmray.config.job import load_job
from mmray.errors import UserError
from mmray.families import load_processor
from mmray.families.processors import warn_of_remote_code
from mmray.images.size_cache import SizeCache, merge_sizes, read_sizes
from mmray.training.model import load_config
from mmray.training.settings import ModelSettings
from tests.mmray.preparing import Preparation, write_pictures, write_rows

ROOT = Path(mmray.__file__).parents[1]
MODULES = [path for room in ("mmray", "pipelines", "jobs") for path in sorted((ROOT / room).rglob("*.py"))]
SHIPPED = [
    ROOT / "cluster.yaml", ROOT / "cluster-gcp.yaml", ROOT / "README.md", ROOT / "Makefile",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(path for path in (ROOT / "jobs").iterdir() if path.suffix in (".py", ".yaml", ".ipynb")),
]  # fmt: skip

BETWEEN_PROCESSES = {
    "pipelines/dataset.py", "pipelines/evaluate.py", "pipelines/ingest.py", "jobs/train.py", "jobs/train_loop.py",
}  # fmt: skip
"""Where a job pickles a class of its own for its own actors and workers. Nothing of it is written or read."""

PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """The calls of a module, each with the name it calls: `torch.load`, `eval`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_is_pickled_but_between_the_processes_of_a_job() -> None:
    using = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if PICKLES & {name.split(".")[0] for name in names}:
                using.add(path.relative_to(ROOT).as_posix())
    assert using <= BETWEEN_PROCESSES


def test_files_are_loaded_without_code() -> None:
    """Tensors with weights_only, arrays without objects, YAML by a safe loader; nothing is evaluated, no shell."""
    for path in MODULES:
        for name, call in calls(path):
            options = {option.arg: ast.unparse(option.value) for option in call.keywords}
            where = f"{path}:{call.lineno}"
            if name.endswith("torch.load"):
                assert options.get("weights_only") == "True", where
            if name in ("np.load", "numpy.load"):
                assert options.get("allow_pickle", "False") == "False", where
            if name == "yaml.load":
                assert ast.unparse(call.args[1]) == "_Loader", where
            assert name not in ("eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load"), where
            assert options.get("shell", "False") == "False", where


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system [touch {}]", "!!python/name:os.system", "!!python/object/new:os.system []"]
)
def test_a_job_file_runs_nothing(tmp_path: Path, tag: str) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "job.yaml").write_text(f"name: {tag.format(ran)}\n")
    with pytest.raises(UserError, match="is not YAML: line 1, column 7: could not determine a constructor"):
        load_job(tmp_path / "job.yaml")
    with pytest.raises(UserError):
        load_job(ROOT / "jobs" / "demo.yaml", [f"name={tag.format(ran)}"])
    assert not ran.exists()


# ---- Code that comes with a model ----


def test_code_of_a_model_runs_only_where_the_job_says_so(
    processor_folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}})
    )
    (folder / "configuration_own.py").write_text(
        f"from transformers import PretrainedConfig\nopen({str(ran)!r}, 'w').close()\n"
        "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    with pytest.raises(UserError, match="cannot read a model configuration"):
        load_config(ModelSettings(path=str(folder)))
    assert not ran.exists()
    assert "trust_remote_code" not in caplog.text

    warn_of_remote_code.cache_clear()
    with caplog.at_level(logging.WARNING, "mmray"):
        load_config(ModelSettings(path=str(folder), trust_remote_code=True))
        load_config(ModelSettings(path=str(folder), trust_remote_code=True))
        load_processor(processor_folders["qwen2_vl"], trust_remote_code=True)
    assert ran.exists()
    assert caplog.text.count("WARNING: trust_remote_code is ON") == 2, "once for each source"


def test_no_shipped_job_trusts_code() -> None:
    for path in (ROOT / "jobs").glob("*.yaml"):
        assert not (yaml.safe_load(path.read_text()).get("model") or {}).get("trust_remote_code"), path


# ---- Doors ----


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_what_is_shipped_opens_no_door(path: Path) -> None:
    """Each Ray that is started asks for a token, and shows its dashboard to its own machine alone."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"dashboard[-_]host\W+(?!127\.0\.0\.1|localhost)[\w.:]", text)
    assert "RAY_AUTH_MODE=disabled" not in text
    if re.search(r"^\s*(- |\$ )?(\w+=\S+ )*ray start", text, flags=re.MULTILINE):
        assert "RAY_AUTH_MODE=token" in text


# ---- Secrets ----


def test_secrets_are_nowhere_in_what_preparing_writes_and_says(
    processors: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither those of the environment nor those that rows name."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "RAY_AUTH_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "hunter2")
    pictures = write_pictures(tmp_path / "pictures")
    rows: list[dict[str, Any]] = [{"id": f"{number}", "text": f"word {number}"} for number in range(4)]
    rows += [{"text": "<image> x", "images": [name]} for name in ("page.png", "s3://me:hunter2@bucket/a.png")]
    rows += [{"text": "<image> x", "images": ["s3://b/x?token=hunter2"]}, {"text": 7, "link": "ftp://a:hunter2@b/c"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"text": "ftp://a:hunter2@b/c", \n')
    dataset = {"files": str(tmp_path / "rows.jsonl"), "kind": "pretrain", "image_root": str(pictures)}
    made = Preparation(processors["qwen2_vl"], dataset)
    with caplog.at_level(logging.DEBUG):
        prepared = made.write(tmp_path / "prepared")
        cache = SizeCache(read_sizes(str(tmp_path / "cache")))
        cache.image_size(str(pictures / "page.png"))
        merge_sizes(str(tmp_path / "cache"), [cache.take_new()])
    facts = prepared.statistics
    assert facts["rejected_by_reason"] == {"bad_json": 1, "image_credentials": 2, "wrong_type": 1}
    told = json.dumps([prepared.manifest, prepared.rejected().to_pylist()])
    assert "ftp://a:…@b" in json.loads(json.dumps(prepared.rejected().to_pylist()[2]["row"]))
    written = [path for folder in ("prepared", "cache") for path in (tmp_path / folder).iterdir()]
    assert len(written) == 4
    assert "hunter2" not in told + caplog.text
    assert not [path for path in written if b"hunter2" in path.read_bytes()]
    assert not [path for path in written if path.read_bytes()[:1] == b"\x80"], "a pickle begins so"
