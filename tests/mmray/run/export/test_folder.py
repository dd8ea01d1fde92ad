"""What an exported folder holds besides weights, and what is told where it cannot be written."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import urllib.request
from http.server import HTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from typer.testing import CliRunner

import mmray
from mmray.cli import app
from mmray.errors import UserError
from mmray.run.export import export_finished, export_model
from mmray.run.folder import RunFolder
from mmray.training.checkpoint import MODEL_FILE
from mmray.training.checksums import list_files, list_name
from mmray.training.saved_weights import needed_files
from tests.mmray.families.zoo import ZOO
from tests.mmray.preparing import contents
from tests.mmray.run.export.conftest import trained


@pytest.fixture(scope="module")
def case(make_case):
    """A tied model of stage 3 in bf16, whose run has one checkpoint."""
    case = make_case("gemma3", 3, "bf16")
    trained({1: [case]})
    return case


@pytest.fixture
def run(case, tmp_path):
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(case.run, tmp_path / "run"))


def checkpoint_of(run):
    (found,) = run.glob("checkpoint_*")
    return found


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_export_is_byte_equal(case, tmp_path):
    for name in ("first", "second"):
        export_model(str(case.run), str(tmp_path / name))
    first = files(tmp_path / "first")
    assert first == files(tmp_path / "second")
    assert {"config.json", "generation_config.json", "model.safetensors", "mmray.json", "README.md"} <= first.keys()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_gives(case, tmp_path, umask):
    """Also weights, which safetensors writes for the user alone."""
    before = os.umask(umask)
    try:
        export_model(str(case.run), str(tmp_path / "out"))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "mmray.json", "README.md"} <= modes.keys()
    assert set(modes.values()) == {0o666 & ~umask}


def test_tied_weights_stay_tied(case, tmp_path):
    export_model(str(case.run), str(tmp_path / "out"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert b"lm_head" not in (tmp_path / "out" / "model.safetensors").read_bytes()[:100_000]


def test_a_checkpoint_a_run_and_a_uri_give_the_same(case, tmp_path):
    remote = fsspec.filesystem("memory")
    remote.put(str(case.run), "memory://bucket/run", recursive=True)
    sources = (
        str(case.run),
        str(checkpoint_of(case.run)),
        "memory://bucket/run",
        f"memory://bucket/run/{checkpoint_of(case.run).name}",
    )
    for number, source in enumerate(sources):
        export_model(source, str(tmp_path / str(number)))
    export_model(sources[0], "memory://bucket/model")
    expected = files(tmp_path / "0")
    assert all(files(tmp_path / str(number)) == expected for number in range(1, len(sources)))
    assert {name: remote.cat(f"/bucket/model/{name}") for name in expected} == expected
    with pytest.raises(UserError, match="is an earlier export: give --replace"):
        export_model(sources[0], "memory://bucket/model")
    export_model(sources[0], "memory://bucket/model", replace=True)
    assert {name: remote.cat(f"/bucket/model/{name}") for name in expected} == expected


def test_the_model_in_a_remote_run_is_no_record_of_the_run(case):
    """Whoever follows the run does not download it."""
    remote = fsspec.filesystem("memory")
    remote.put(str(case.run), "memory://bucket/ended", recursive=True)
    exported = export_finished("memory://bucket/ended", case.model)
    assert exported.folder == "memory://bucket/ended/model"
    assert remote.exists("/bucket/ended/model/config.json")
    again = export_finished("memory://bucket/ended", case.model)
    assert (again.step, again.folder) == (exported.step, exported.folder)
    records = RunFolder("memory://bucket/ended").fetch()
    assert (records / "metrics.jsonl").exists()
    assert not (records / "model").exists()


def test_its_readme_s_lines_read_a_page(case, tmp_path, monkeypatch, capsys):
    export_model(str(case.run), str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "step 1",
        "bf16",
        "random weights",
        "pages.jsonl",
        "| rows | 4 |",
        "loss 2.5 over 1,234 tokens",
        "0.003",
    ):
        assert said in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(code.splitlines()) <= 20
    shutil.copy(case.prepared.parent / "wide.png", tmp_path / "out" / "page.png")
    monkeypatch.chdir(tmp_path / "out")
    names = {}
    exec(code.replace("max_new_tokens=512", "max_new_tokens=4"), names)
    assert names["inputs"]["input_ids"].shape[1] < names["output"].shape[1]
    assert capsys.readouterr().out.endswith("\n")


def test_a_prompt_is_refused_where_training_would_refuse_it(case, tmp_path):
    export_model(str(case.run), str(tmp_path / "out"))
    prompt, page = mmray.prompt(str(tmp_path / "out")), str(case.prepared.parent / "wide.png")
    for message, call in {
        "either text or messages": lambda: prompt(),
        "1 image placeholder but 0 images": lambda: prompt("<image>"),
        "0 image placeholders but 1 image": lambda: prompt("Total", images=[page]),
        "reads as structure": lambda: prompt("<end_of_turn>"),
        "already; end with the user's": lambda: prompt(
            messages=[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Anna."}]
        ),
    }.items():
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(UserError, match="no folder that mmray export wrote"):
        mmray.prompt(str(tmp_path))


def test_the_model_s_own_generation_settings_and_code_go_along(case, run, tmp_path):
    """`trust_remote_code`: a model class that lies in the folder of its configuration."""
    own = tmp_path / "own"
    shutil.copytree(case.processor, own)
    (own / "modeling_own.py").write_text(OWN_MODEL)
    config = ZOO["gemma3"].config(case.processor)
    config.architectures = ["OwnGemma"]
    config.auto_map = {"AutoModelForImageTextToText": "modeling_own.OwnGemma"}
    config.save_pretrained(own)
    (own / "generation_config.json").write_text('{"eos_token_id": [1, 106], "temperature": 0.1}')
    (own / "model-00001-of-00002.safetensors").write_bytes(b"weights of the base")
    settings = json.loads((checkpoint_of(run) / MODEL_FILE).read_text())
    settings["model"] |= {"config": str(own), "trust_remote_code": True, "processor": str(own)}
    (checkpoint_of(run) / MODEL_FILE).write_text(json.dumps(settings))
    out = tmp_path / "out"
    export_model(str(checkpoint_of(run)), str(out))
    for name in ("modeling_own.py", "generation_config.json"):
        assert (out / name).read_bytes() == (own / name).read_bytes()
    assert not (out / "model-00001-of-00002.safetensors").exists()
    model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    assert type(model).__name__ == "OwnGemma"
    assert AutoConfig.from_pretrained(out, trust_remote_code=True).auto_map


OWN_MODEL = """
from transformers import Gemma3ForConditionalGeneration


class OwnGemma(Gemma3ForConditionalGeneration):
    pass
"""


# ---- Mistakes ----


def refusal(*arguments, **options):
    with pytest.raises(UserError) as caught:
        export_model(*map(str, arguments), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_checkpoint_is_told(run, tmp_path):
    out = tmp_path / "out"
    assert "holds no checkpoint" in refusal(tmp_path / "nothing", out)
    assert "no checkpoint of step 7; it has those of steps 1" in refusal(run, out, step=7)
    assert "is the checkpoint of step 1" in refusal(checkpoint_of(run), out, step=7)
    state = checkpoint_of(run) / "training_state.json"
    state.write_text(state.read_text().replace("}", ""))
    assert "is whole" in refusal(run, out)
    assert not out.exists()


def test_damaged_weights_are_told(run, tmp_path):
    """A byte of the weights is another: the file's size is right."""
    names = [path.name for path in (checkpoint_of(run) / "deepspeed").iterdir()]
    for name in needed_files(names, zero_stage=3, masters=False):
        path = checkpoint_of(run) / "deepspeed" / name
        sound = path.read_bytes()
        path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        assert f"deepspeed/{name} was changed" in refusal(checkpoint_of(run), tmp_path / "out")
        path.write_bytes(sound)
    assert list(tmp_path.glob("*out*")) == []


def test_a_folder_that_is_taken_is_kept(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for replace in (False, True):
        assert "is there already and holds no mmray.json, so it is no earlier export" in refusal(
            run, out, replace=replace
        )
    assert contents(out) == {"thesis.tex": b"years of work"}
    export_model(str(run), str(tmp_path / "model"))
    assert "is an earlier export: give --replace to replace it" in refusal(run, tmp_path / "model")
    (tmp_path / "model" / "mine.txt").write_text("a note")
    export_model(str(run), str(tmp_path / "model"), replace=True)
    assert not (tmp_path / "model" / "mine.txt").exists()


@pytest.mark.parametrize("how", ["empty", "dot", "home", "uri", "link"])
def test_a_folder_is_kept_however_it_is_named(run, tmp_path, monkeypatch, how):
    """What is looked at is what would be replaced."""
    out = tmp_path / "work"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    (tmp_path / "link").symlink_to(out)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(out)
    name = {"empty": "", "dot": ".", "home": "~/work", "uri": f"file://{out}", "link": str(tmp_path / "link")}[how]
    for replace in (False, True):
        with pytest.raises(UserError, match=r"work is there already and holds no mmray\.json"):
            export_model(str(run), name, replace=replace)
    assert contents(out) == {"thesis.tex": b"years of work"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "run", "work"]


def test_what_came_while_an_export_ran_is_kept(run, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def comes_meanwhile(*arguments):
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
        return "read me"

    monkeypatch.setattr("mmray.run.export.model.readme", comes_meanwhile)
    assert "is there already and holds no mmray.json" in refusal(run, out)
    assert contents(out) == {"thesis.tex": b"years of work"}
    assert not list(tmp_path.glob(".out.*"))


def test_an_export_replaces_the_folder_that_a_link_names(run, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for replace in (False, True):
        export_model(str(run), str(tmp_path / "link"), replace=replace)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "config.json").exists()


def test_a_processor_that_has_changed_is_told(case, run, tmp_path):
    changed = Path(shutil.copytree(case.processor, tmp_path / "processor"))
    (changed / "chat_template.jinja").write_text("{{ messages }}")
    settings = json.loads((checkpoint_of(run) / MODEL_FILE).read_text())
    settings["model"]["processor"] = str(changed)
    (checkpoint_of(run) / MODEL_FILE).write_text(json.dumps(settings))
    message = refusal(checkpoint_of(run), tmp_path / "out")
    assert "is not the one that the data was prepared with: chat_template" in message


def test_a_checkpoint_that_names_no_model_takes_the_job_s(case, run, tmp_path):
    (checkpoint_of(run) / MODEL_FILE).unlink()
    for listed in (checkpoint_of(run) / "files").iterdir():
        content = json.loads(listed.read_text())
        content.pop(MODEL_FILE, None)
        listed.write_text(json.dumps(content))
    assert "give --job JOB.yaml" in refusal(run, tmp_path / "out")
    export_model(str(run), str(tmp_path / "out"), settings=case.model)
    export_model(str(case.run), str(tmp_path / "named"))
    assert contents(tmp_path / "out")["model.safetensors"] == contents(tmp_path / "named")["model.safetensors"]
    other = case.model.model_copy(update={"config": ZOO["gemma3"].config(case.processor).to_dict()})
    other.config["vision_config"]["num_hidden_layers"] += 1
    assert "does not hold the weights of the model that" in refusal(run, tmp_path / "other", settings=other)


def test_a_full_disk_is_one_line(case, tmp_path):
    """Files of more than 10,000 bytes cannot be written in that process."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # noqa: E731
    command = [sys.executable, "-c", IGNORING + "from mmray.cli import main; main()", "export", str(case.run), "out"]
    done = subprocess.run(command, cwd=tmp_path, preexec_fn=limit, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert re.search(r"^error: out: File too large; free some space there", done.stderr, re.M)
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


IGNORING = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "


# ---- The command ----


def test_the_command(case, tmp_path):
    done = CliRunner().invoke(app, ["export", str(case.run), str(tmp_path / "out"), "--dtype", "fp32", "--step", "1"])
    assert done.exit_code == 0, done.output
    assert f"{tmp_path / 'out'}: step 1, fp32, " in done.output
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float32
    for words, name in (([str(case.run), ""], "OUT"), ((["", str(tmp_path / "other")]), "RUN")):
        refused = CliRunner().invoke(app, ["export", *words])
        assert str(refused.exception) == f"{name} is empty: name a folder"


def test_it_needs_no_ray(case, tmp_path):
    code = (
        "import sys; sys.modules['ray'] = None\nfrom mmray.run.export import export_model\n"
        f"print(export_model({str(case.run)!r}, {str(tmp_path / 'out')!r}))"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert (tmp_path / "out" / "config.json").exists()


# ---- docs/export.md ----

DOCS = Path(__file__).parents[4] / "docs/export.md"


def test_the_lines_of_the_docs_read_a_page(case, tmp_path, monkeypatch, capsys):
    export_model(str(case.run), str(tmp_path / "out" / "model"))
    shutil.copy(case.prepared.parent / "wide.png", tmp_path / "page.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    assert len(blocks) == 3
    for code in blocks[:2]:
        names = {}
        exec(code.replace("max_new_tokens=512", "max_new_tokens=4"), names)
        assert names["inputs"]["input_ids"].shape[0] == 1
    assert capsys.readouterr().out.endswith("\n")
    served = {"__name__": "serve"}
    exec(blocks[2].replace("max_new_tokens=512", "max_new_tokens=4"), served)
    inputs = served["prompt"]("<image>\n", images=["page.png"])
    output = served["model"].generate(**inputs, max_new_tokens=4, do_sample=False)
    expected = served["prompt"].decode(output[0, inputs["input_ids"].shape[1] :])
    with HTTPServer(("127.0.0.1", 0), served["Read"]) as server:
        Thread(target=server.handle_request, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        with urllib.request.urlopen(address, data=Path("page.png").read_bytes()) as answer:
            assert answer.read().decode() == expected


def test_every_file_of_the_docs_is_written(case, tmp_path):
    export_model(str(case.run), str(tmp_path / "out"))
    for name in ("config.json", "generation_config.json", "mmray.json", "README.md", "model.safetensors"):
        assert (tmp_path / "out" / name).exists()
        assert f"`{name}`" in DOCS.read_text() or name == "model.safetensors"


def test_code_in_a_checkpoint_does_not_run(run, tmp_path):
    """Where its list of files was written anew too, as who can write there can."""
    trap = tmp_path / "it ran"
    (weights,) = (checkpoint_of(run) / "deepspeed").glob("*_model_states.pt")
    torch.save({"module": Trap(str(trap))}, weights)
    shutil.rmtree(checkpoint_of(run) / "files")
    listed = list_files(checkpoint_of(run))
    (checkpoint_of(run) / "files").mkdir()
    (checkpoint_of(run) / list_name(0)).write_text(listed)
    assert "cannot be read" in refusal(checkpoint_of(run), tmp_path / "out")
    assert not trap.exists()
    torch.load(weights, weights_only=False)
    assert trap.exists()


class Trap:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)
