"""Rows of a job file, looked at before anything is prepared."""

import json
import re

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from mmray.cli import app
from mmray.config.job import load_job
from mmray.errors import UserError
from mmray.inspect.rows import JobRows
from mmray.synthetic.models import small_config
from tests.mmray.preparing import chat, write_rows

ROWS = [
    chat("<image>Who?", "Anna.", id="good", images=["page.png"]),
    {"id": "bad", "messages": [{"role": "user", "content": "Who?", "mood": "sad"}]},
    chat("Who?", "Bert.", "And?", "Carl.", id="two"),
    chat("Who?", id="silent"),
]


@pytest.fixture
def job_file(tmp_path, processor_folders):
    Image.new("RGB", (60, 40), (255, 0, 0)).save(tmp_path / "page.png")
    folder = processor_folders["qwen2_vl"]
    documents = [{"id": "page", "text": "A page."}]
    content = {
        "name": "look",
        "model": {
            "config": json.loads(json.dumps(small_config("qwen2_vl", folder).to_dict(), default=str)),
            "processor": str(folder),
        },
        "data": {
            "train": [
                {"files": write_rows(tmp_path / "pages.jsonl", documents), "kind": "pretrain"},
                {"files": write_rows(tmp_path / "chats.jsonl", ROWS), "kind": "chat"},
            ],
        },
        "packing": {"token_capacity": 1024, "visual_capacity": 512},
        "training": {"steps": 1},
        "output": {"prepared": str(tmp_path / "prepared"), "run": str(tmp_path / "run")},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "job.yaml"


def run(*arguments):
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_rows_as_json(job_file):
    lines = [json.loads(line) for line in run(job_file, "--rows", 9, "--json").splitlines()]
    assert [(line["set"], line["id"]) for line in lines] == [
        ("train.0", "page"), ("train.1", "good"), ("train.1", "bad"), ("train.1", "two"), ("train.1", "silent"),
    ]  # fmt: skip
    good = lines[1]
    trained = [piece for piece in good["pieces"] if piece["trained"]]
    assert trained == [{"text": "Anna.<|im_end|>", "trained": True, "role": "assistant", "message": 1}]
    outside = [piece for piece in good["pieces"] if piece["message"] is None]
    assert {piece["role"] for piece in outside} == {None}
    (user,) = [piece["text"] for piece in good["pieces"] if piece["message"] == 0]
    assert user.endswith("Who?<|im_end|>")
    ((image,), _) = good["images"], good["rejected"]
    assert (image["width"], image["height"], image["source"].endswith("page.png")) == (60, 40, True)
    assert f"[{image['tokens']} × <|image_pad|>]" in "".join(piece["text"] for piece in good["pieces"])
    assert lines[2] == {
        "id": "bad", "set": "train.1", "pieces": [], "images": [],
        "rejected": {"reason": "unknown_field", "message": lines[2]["rejected"]["message"]},
    }  # fmt: skip
    assert lines[4]["rejected"]["reason"] == "nothing_trained"
    assert [piece["trained"] for piece in lines[0]["pieces"]] == [False, True]  # the first token never trains


def test_one_row_and_one_set(job_file):
    (line,) = run(job_file, "--id", "two", "--json").splitlines()
    assert [piece["message"] for piece in json.loads(line)["pieces"] if piece["trained"]] == [1, 3]
    assert len(run(job_file, "--rows", 2, "--set", "train.1", "--json").splitlines()) == 2
    with pytest.raises(UserError, match="no row has the id 'nobody'"):
        list(JobRows(load_job(job_file)).with_id("nobody"))
    with pytest.raises(UserError, match=r"the job's sets of rows are train\.0, train\.1"):
        list(JobRows(load_job(job_file)).first(1, "train.7"))


def test_rows_in_the_terminal_and_as_a_page(job_file, tmp_path):
    shown = run(job_file, "--rows", 3)
    for text in ("train.1: good", "⟦Anna.<|im_end|>⟧", "rejected, unknown_field: message 0 has the key 'mood'"):
        assert text in shown.replace("\n", "").replace("  ", "") or text in shown
    run(job_file, "--rows", 3, "--html", tmp_path / "rows.html")
    page = re.sub(r"<[^>]*>", "", (tmp_path / "rows.html").read_text())  # each token has a tag of its own
    assert "Anna." in page
    assert "unknown_field" in page


@pytest.mark.parametrize("arguments", [(), ("--rows", 1, "--id", "a"), ("--rows", 1, "--bin", 2)])
def test_options_that_do_not_go_together(job_file, arguments):
    with pytest.raises(UserError):
        run(job_file, *arguments)
