"""The `mmray` command: what it prints, and that a mistake is one line on stderr and exit code 2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mmray
from mmray import cli
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.run.metrics import MetricsLog
from mmray.run.tracking import TrackedRun
from tests.mmray.looking import name_processor
from tests.mmray.preparing import PACKING, Preparation, write_rows


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the command; returns exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["mmray", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capsys.readouterr()
        return caught.value.code or 0, output.out, output.err

    return run


@pytest.fixture
def prepared(tmp_path, processors):
    """A prepared dataset in a folder whose name looks like markup."""
    rows = [{"id": "good", "text": "hello there"}, {"id": "bad", "text": ""}, {"id": "worse"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    preparation = Preparation(processors["qwen2_vl"], {"files": (path,), "kind": "pretrain"}, packing=PACKING)
    return preparation.write(tmp_path / "out [red]x[/red] [/]")


def cells(output):
    """label -> value of a printed table of two columns; lines without a label are left out."""
    lines = [[word.strip() for word in line.strip("│┃").split("│")] for line in output.splitlines() if "│" in line]
    return {line[0]: line[1] for line in lines if line[0]}


def check_error(result, *words):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


def test_schema_is_that_of_the_job_file(run):
    code, out, _ = run("schema")
    assert code == 0
    assert json.loads(out) == Job.model_json_schema()


def test_report_of_a_prepared_dataset(run, prepared):
    code, out, _ = run("report", prepared.path)
    assert code == 0
    assert prepared.path in out.replace("\n", "")
    table = cells(out)
    assert table["rows"] == "3 read = 1 packed + 2 rejected"
    assert (table["empty_text"], table["missing_column"]) == ("1", "1")
    assert "rows.jsonl:2: text is empty" in "".join(line.strip("│┃ ") for line in out.splitlines()).replace("│", "")
    assert table["bins"] == "1 (at least 1 needed)"
    assert table["tokens"] == str(prepared.statistics["tokens"])
    assert table["fill"] == f"{prepared.statistics['token_fill']:.1%} of tokens, 0.0% of visual tokens"
    assert table["fingerprint"] == prepared.fingerprint


def write_metrics(folder, *losses):
    log = MetricsLog(TrackedRun("test", folder), 0)
    for step, loss in enumerate(losses, start=1):
        log.write(step, epoch=0, loss=loss, tokens=1000, step_seconds=0.5, data_wait_seconds=0.1)
        log.write(step, eval_loss=loss * 2, **({} if step == 1 else {"eval_cer": loss / 10}))
    log.close()
    return folder


def test_report_of_a_run(run, tmp_path):
    code, out, _ = run("report", write_metrics(tmp_path / "run [/]", 4.0, 3.0, 2.5))
    assert code == 0
    assert "run [/]" in out
    table = cells(out)
    assert (table["steps"], table["loss"], table["eval loss"]) == ("3", "4.0000 -> 2.5000", "8.0000 -> 5.0000")
    assert table["eval CER"] == "0.3000 -> 0.2500"
    assert "eval WER" not in table
    assert (table["tokens"], table["tokens per second"]) == ("3,000", "2,000")
    assert table["waiting for data"] == "0.3 s beside 1.5 s of steps"


def test_report_of_a_run_that_diverged(run, tmp_path):
    code, out, _ = run("report", write_metrics(tmp_path, 4.0, float("nan")))
    assert code == 0
    assert cells(out)["loss"] == "4.0000 -> not finite"


def test_report_of_a_run_before_its_first_step(run, tmp_path):
    check_error(run("report", write_metrics(tmp_path)), "no step is finished yet")


def test_report_writes_a_page(run, prepared, tmp_path):
    file = tmp_path / "[bold]page.html"
    for path, title in ((prepared.path, "prepared dataset"), (write_metrics(tmp_path / "run", 4.0, 3.0), "run")):
        code, out, _ = run("report", path, "--html", file)
        assert code == 0
        assert out == f"{file}: {file.stat().st_size / 1000:.1f} kB\n"
        assert f"<title>{title} {path}</title>" in file.read_text(encoding="utf-8")
    check_error(run("report", prepared.path, "--html", tmp_path), str(tmp_path), "Is a directory", "the name of a file")
    check_error(run("report", prepared.path, "--html", file, "--job", tmp_path / "no.yaml"), "no.yaml", "there is none")


def test_report_of_neither(run, tmp_path):
    check_error(run("report", tmp_path), str(tmp_path), "no prepared dataset", "jobs/prepare.py")
    check_error(run("report", tmp_path / "nowhere"), "nowhere")
    check_error(run("report", "nosuchscheme://x"), "nosuchscheme://x")


def test_inspect_shows_a_bin(run, prepared, processor_folders):
    code, out, _ = run("inspect", prepared.path)
    assert code == 0
    assert out.startswith("bin      0 of 1   bucket text")
    assert "hello there" not in out
    code, out, _ = run("inspect", prepared.path, "--bin", 0, "--processor", processor_folders["qwen2_vl"])
    assert code == 0
    assert " there<|im_end|>⟧" in out  # printed into a pipe: brackets for colours


def test_inspect_takes_the_processor_of_the_manifest(run, prepared, processor_folders):
    name_processor(prepared, processor_folders["qwen2_vl"], "qwen2_vl")
    code, out, _ = run("inspect", prepared.path)
    assert code == 0
    assert " there<|im_end|>⟧" in out


def test_inspect_writes_a_page(run, prepared, processor_folders, tmp_path):
    name_processor(prepared, processor_folders["qwen2_vl"], "qwen2_vl")
    file = tmp_path / "[bold]page.html"
    code, out, _ = run("inspect", prepared.path, "--html", file)
    assert code == 0
    assert out == f"{file}: bin 0, {file.stat().st_size / 1000:.1f} kB\n"
    page = file.read_text(encoding="utf-8")
    assert ">&lt;|im_end|&gt;</span>" in page
    assert "out [red]x[/red] [/]</title>" in page


def test_inspect_where_no_page_can_be_written(run, prepared, processor_folders, tmp_path):
    check_error(run("inspect", prepared.path, "--html", tmp_path / "p.html"), "does not name its processor")
    processor = ("--processor", processor_folders["qwen2_vl"])
    refused = run("inspect", prepared.path, *processor, "--html", tmp_path)
    check_error(refused, str(tmp_path), "Is a directory", "the name of a file")


def test_inspect_makes_the_folder_of_a_page(run, prepared, processor_folders, tmp_path):
    page = tmp_path / "no" / "p.html"
    assert run("inspect", prepared.path, "--processor", processor_folders["qwen2_vl"], "--html", page)[0] == 0
    assert "<title>" in page.read_text()


def test_inspect_runs_code_of_a_processor_only_when_asked(run, prepared, monkeypatch):
    asked = []

    def load(source, *, trust_remote_code):
        asked.append(trust_remote_code)
        raise UserError("not here")

    monkeypatch.setattr("mmray.inspect.view.load_processor", load)
    check_error(run("inspect", prepared.path, "--processor", "x"), "not here")
    check_error(run("inspect", prepared.path, "--processor", "x", "--trust-remote-code"), "not here")
    assert asked == [False, True]


def test_inspect_of_what_is_not_there(run, prepared, tmp_path, processor_folders):
    check_error(run("inspect", tmp_path / "nowhere"), "no prepared dataset")
    check_error(run("inspect", prepared.path, "--bin", 1), "there is no bin 1")
    check_error(run("inspect", prepared.path, "--processor", tmp_path), "no processor could be loaded")
    check_error(run("inspect", prepared.path, "--processor", processor_folders["smolvlm"]), "is not the processor")


@pytest.mark.parametrize("arguments", [["nocommand"], ["report"], ["inspect", "x", "--bin", "first"]])
def test_a_wrong_command_line_is_explained(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert "Usage:" in err


def test_help_names_the_commands(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in ("schema", "report", "inspect"))


def test_version(run):
    assert run("--version") == (0, f"mmray {mmray.__version__}\n", "")


@pytest.mark.parametrize("module", ["mmray", "mmray.cli"])
def test_as_a_module(module):
    """`python -m` does what the command does, a wrong word included."""
    ends = [
        subprocess.run([sys.executable, "-m", module, word], capture_output=True, text=True, check=False)
        for word in ("--version", "reprot")
    ]
    assert [end.returncode for end in ends] == [0, 2]
    assert ends[0].stdout == f"mmray {mmray.__version__}\n"
    assert "reprot" in ends[1].stderr


def test_prepare_train_and_evaluate_are_the_jobs_of_the_checkout(run, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr("os.execv", lambda program, words: (started.append(words), sys.exit(0)))
    checkout = Path(mmray.__file__).parents[1]
    for name in ("prepare", "train", "evaluate"):
        assert run(name, "job.yaml", "--set", "a=1", "--help")[0] == 0
        script = checkout / "jobs" / f"{name}.py"
        assert script.exists()
        assert started.pop() == [sys.executable, str(script), "job.yaml", "--set", "a=1", "--help"]
    monkeypatch.setattr(mmray, "__file__", str(tmp_path / "site-packages" / "mmray" / "__init__.py"))
    check_error(run("train", "job.yaml"), "python jobs/train.py job.yaml", "checkout")
    assert not started


def test_a_folder_of_prepared_datasets_or_a_run_says_what_is_inside(run, prepared, tmp_path):
    outer = tmp_path / "prepared"
    outer.mkdir()
    shutil.copytree(prepared.path, outer / "train")
    for command in ("report", "inspect"):
        check_error(run(command, outer), "It holds train", f"{outer}/train")
    check_error(run("inspect", write_metrics(tmp_path / "run", 3.0)), "training run", f"mmray report {tmp_path}/run")


def test_estimate_compares_policies_in_one_table(run, inputs, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(inputs.job(tmp_path)))
    code, out, _ = run("estimate", path, "--try", "packing.token_capacity=1024", "--try", "packing.token_capacity=100")
    assert code == 0
    rows = cells(out)
    assert list(rows)[-3:] == ["the job as it is", "packing.token_capacity=1024", "packing.token_capacity=100"]
    assert "71 rows; estimated from 71 of them" in out
    code, out, err = run("estimate", path, "--try", "packing.tokens=1")
    assert (code, out) == (2, "")
    assert "--try 'packing.tokens=1': " in err
    assert "packing.tokens: unknown key" in err
