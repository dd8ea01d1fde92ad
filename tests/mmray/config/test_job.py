"""The job file: good ones are read, and every mistake is one line that says where, what was found and what fits."""

import copy
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from mmray.config.job import Job, load_job
from mmray.errors import UserError
from mmray.images import TilingPolicy
from mmray.loss.settings import RoleLoss

LEAST = """
name: small
model: {config: {model_type: qwen2_vl}, processor: some/processor}
data:
  train:
    - {files: rows.jsonl, kind: pretrain}
packing: {token_capacity: 4096, visual_capacity: 2048}
training: {steps: 10}
output: {prepared: out/prepared, run: out/run}
"""

FULL = """
name: full
model: {path: org/model, attention: eager, seed: 3}
data:
  train:
    - files: [a.jsonl, "b*.parquet"]
      kind: pretrain
      image_root: s3://bucket/pages
      columns: {text: markdown}
      placeholder: "[img]"
      add_eos: false
    - {files: c.jsonl, kind: chat, format: jsonl}
  eval:
    - {files: d.jsonl, kind: tokenized}
  on_bad_row: error
images:
  buckets:
    - {max_ratio: 1.2, grid: [3, 2]}
    - {grid: [2, 3]}
  tile_size: [448, 448]
  overview:
    - {max_ratio: 1, size: [448, 336]}
    - {size: [336, 448]}
  labels: true
packing: {token_capacity: 8192, visual_capacity: 6144, window_rows: 1024}
loss:
  roles: [assistant, tool]
  boundaries:
    - {role: tool, start: "<tool>", end: null}
training:
  epochs: 1.5
  learning_rate: 1e-5
  eval_every_steps: 50
  deepspeed: {zero_optimization: {reduce_scatter: true}}
resources: {workers: 4, gpu_share: 0.25, use_gpu: true}
output: {prepared: /data/prepared/, run: runs/full}
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "job.yaml"


@pytest.fixture
def load(path):
    """A function that writes a job file and reads it."""

    def load(content, *overrides):
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return load_job(path, overrides)

    return load


@pytest.fixture
def mistakes(load, path):
    """A function that gives the lines of the error of a job file: the least one with a place in it changed."""

    def mistakes(place, value, base=LEAST):
        content = yaml.safe_load(base) if isinstance(base, str) else copy.deepcopy(base)
        *parents, last = [int(part) if part.isdigit() else part for part in place.split(".")]
        node = content
        for parent in parents:
            node = node[parent] if isinstance(node, list) else node.setdefault(parent, {})
        node[last] = value
        with pytest.raises(UserError) as caught:
            load(content)
        first, *lines = str(caught.value).split("\n")
        assert first == f"job file {path}: {len(lines)} mistake{'s' * (len(lines) > 1)}"
        assert all(line.startswith("  ") for line in lines)
        return [line.strip() for line in lines]

    return mistakes


# ---- Good files ----


def test_the_least_job_file_has_defaults_for_the_rest(load):
    job = load(LEAST)
    assert job.images == TilingPolicy()
    assert job.loss == "sampled"
    assert job.resources.workers == 1
    assert job.data.train[0].image_root is None
    assert job.prepared_path("train") == f"{Path.cwd()}/out/prepared/train"


@pytest.mark.parametrize("word", ["sampled", "all"])
def test_the_loss_may_be_a_word(load, word):
    assert load(LEAST + f"loss: {word}\n").loss == word


def test_the_loss_may_be_that_of_roles(load):
    job = load(FULL)
    assert isinstance(job.loss, RoleLoss)
    assert (job.loss.roles, job.loss.train_on_eos, job.loss.boundaries[0].end) == (("assistant", "tool"), "turn", None)
    assert load(LEAST, "loss.train_on_eos=last").loss == RoleLoss(train_on_eos="last")
    assert load(LEAST, "loss={roles: [], allow_empty: true}").loss.roles == ()


def test_a_full_job_file_is_read(load):
    job = load(FULL)
    assert job.data.train[0].column("text") == "markdown"
    assert job.data.train[0].image_root == "s3://bucket/pages"
    assert [bucket.size for bucket in job.images.overview_buckets] == [(448, 336), (336, 448)]
    assert job.training.learning_rate == 1e-5  # which YAML alone takes for text
    assert job.training.deepspeed == {"zero_optimization": {"reduce_scatter": True}}
    assert job.prepared_path("eval") == "/data/prepared/eval"
    with pytest.raises(ValueError, match="frozen"):
        job.name = "other"


def test_what_is_read_can_be_written_and_read_again(load):
    job = load(FULL)
    assert load(job.model_dump(mode="json")) == job


def test_the_caches_are_off_unless_asked_for(load):
    job = load(LEAST)
    assert job.data.size_cache is None
    assert job.resources.tile_cache is None


def test_the_places_of_caches_are_made_absolute(load):
    job = load(LEAST, "data.size_cache=out/sizes.parquet", "resources.tile_cache={folder: tiles, max_gigabytes: 0.5}")
    assert job.data.size_cache == f"{Path.cwd()}/out/sizes.parquet"
    assert job.resources.tile_cache.folder == f"{Path.cwd()}/tiles"
    assert job.resources.tile_cache.max_bytes == 500_000_000
    assert load(LEAST, "data.size_cache=s3://bucket/sizes").data.size_cache == "s3://bucket/sizes"


def test_a_tilde_is_the_home_folder(load, monkeypatch):
    """As everywhere: not a folder of that name below the current one."""
    monkeypatch.setenv("HOME", "/home/me")
    job = load(LEAST, "output.run=~/run", "output.prepared=~/prepared")
    assert (job.output.run, job.output.prepared) == ("/home/me/run", "/home/me/prepared")


@pytest.mark.parametrize("name", ["run", "prepared"])
def test_outputs_are_named(load, name):
    """An empty name would be the current folder, and all that lies there."""
    with pytest.raises(UserError, match=f"output.{name}: is empty: name a folder"):
        load(LEAST, f"output.{name}=''")


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("resource", "resource: unknown key; did you mean 'resources'?"),
        ("training.step", "training.step: unknown key; did you mean 'steps'?"),
        ("model.procesor", "model.procesor: unknown key; did you mean 'processor'?"),
        ("data.on_badrow", "data.on_badrow: unknown key; did you mean 'on_bad_row'?"),
        ("data.train.0.imageroot", "data.train.0.imageroot: unknown key; did you mean 'image_root'?"),
        ("images.tile_sizes", "images.tile_sizes: unknown key; did you mean 'tile_size'?"),
        ("output.zzz", "output.zzz: unknown key; known keys: prepared, run, export"),
    ],
)
def test_an_unknown_key_is_told_with_its_path_and_the_nearest_name(mistakes, place, line):
    assert mistakes(place, 1) == [line]


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("data.train.1.colums", "data.train.1.colums: unknown key; did you mean 'columns'?"),
        ("data.eval.0.kinds", "data.eval.0.kinds: unknown key; did you mean 'kind'?"),
        ("images.buckets.0.maxratio", "images.buckets.0.maxratio: unknown key; did you mean 'max_ratio'?"),
        ("images.overview.1.sizes", "images.overview.1.sizes: unknown key; did you mean 'size'?"),
        ("loss.boundaries.0.ends", "loss.boundaries.0.ends: unknown key; did you mean 'end'?"),
        ("loss.rolse", "loss.rolse: unknown key; did you mean 'roles'?"),
    ],
)
def test_an_unknown_key_inside_lists_and_choices_is_told_alone(mistakes, place, line):
    """Also where a value may be of two kinds: only the kind that was meant is spoken of."""
    assert mistakes(place, 1, FULL) == [line]


@pytest.mark.parametrize("key", ["name", "model", "data", "packing", "training", "output"])
def test_each_missing_part_is_told(load, key):
    content = yaml.safe_load(LEAST)
    del content[key]
    with pytest.raises(UserError, match=rf"\n  {key}: required and not given$"):
        load(content)


def test_all_mistakes_are_told_at_once(load):
    with pytest.raises(UserError) as caught:
        load("nam: x\npacking: {token_capacity: 0}\n")
    lines = str(caught.value).split("\n")
    assert lines[0].endswith(": 8 mistakes")
    assert "  nam: unknown key; did you mean 'name'?" in lines
    assert "  packing.visual_capacity: required and not given" in lines
    assert "  packing.token_capacity: Input should be greater than 0 (found 0)" in lines


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        ("packing.token_capacity", "many", "Input should be a valid integer, unable to parse string as an integer"),
        ("packing.token_capacity", 10.5, "Input should be a valid integer, got a number with a fractional part"),
        ("packing.bucket_fill", 2, "Input should be less than or equal to 1"),
        ("data.train.0.kind", "chatt", "Input should be 'pretrain', 'chat' or 'tokenized'"),
        ("data.train.0.files", [], "Value should have at least 1 item after validation, not 0"),
        ("data.train.0.files", 7, "must be a list"),
        ("data.train", [], "Tuple should have at least 1 item after validation, not 0"),
        ("data", None, "must be keys with values"),
        ("name", ["a"], "Input should be a valid string"),
        ("resources.gpu_share", 0.5, "Input should be less than 0.5"),
        ("output.prepared", ["x" * 200], "Input should be a valid string"),
        ("loss", "sampeld", "Input should be 'sampled', 'all' or keys such as roles:"),
        ("loss", ["assistant"], "Input should be 'sampled', 'all' or keys such as roles:"),
        ("loss", None, "Input should be 'sampled', 'all' or keys such as roles:"),
        ("loss.roles", "assistant", "must be a list"),
        ("loss.train_on_eos", "first", "Input should be 'turn', 'all', 'last' or 'none'"),
    ],
)
def test_a_wrong_value_is_told_with_what_was_found(mistakes, place, value, line):
    assert mistakes(place, value) == [f"{place}: {line} (found {value!r:.80})"]


def test_of_a_group_in_a_wrong_place_the_content_is_not_repeated(mistakes):
    assert mistakes("data.train", {"files": "a", "kind": "chat"}) == ["data.train: must be a list"]


def test_a_value_of_neither_kind_is_told_for_both(mistakes):
    assert mistakes("training.deepspeed", 7) == [
        "training.deepspeed: Input should be a valid dictionary (found 7)",
        "training.deepspeed: Input should be a valid string (found 7)",
    ]


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        ("training.epochs", 2, "training: give exactly one of steps and epochs; both given"),
        ("model.path", "org/model", "model: give exactly one of path (trained weights) and config (random weights)"),
        ("images.overlap", 0.1, "images: overlap: without effect, as pages are not cut; remove, or set preset"),
        ("images", {"grid": [2, 2], "preset": "ocr_pages"}, "images: preset and grid exclude each other; keep one"),
        ("packing.window_rows", 700, "packing: window_rows 700 is above 512 and no multiple of it"),
        ("training.eval_every_steps", 5, "job: training.eval_every_steps is set but data.eval has no rows"),
        (
            "data.train.0.columns",
            {"txt": "a"},
            "data.train.0: columns: 'txt' is not a field of pretrain rows; they have",
        ),
        ("data.train.0.placeholder", "", "data.train.0: placeholder must not be empty"),
        (
            "resources.tile_cache",
            {"folder": "s3://bucket/tiles", "max_gigabytes": 1},
            "resources.tile_cache.folder: give a folder on each machine's own disk, not a URI (found 's3://bucket/tiles')",
        ),
        ("resources.tile_cache", {"folder": "/tiles"}, "resources.tile_cache.max_gigabytes: required and not given"),
        ("loss.roles", [], "loss: roles: [] trains nothing; name a role, or set allow_empty: true"),
    ],
)
def test_settings_that_contradict_each_other_are_told(mistakes, place, value, line):
    (told,) = mistakes(place, value)
    assert told.startswith(line)


# ---- YAML ----


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name: [", "is not YAML: line 1, column 8"),
        ("name: a\n  b: c\n", "is not YAML: line 2, column 4: mapping values are not allowed here"),
        ("name: a\nmodel: {}\nname: b\n", "is not YAML: line 3, column 1: the key 'name' is written twice"),
        ("model:\n  path: a\n  path: b\n", "line 3, column 3: the key 'path' is written twice"),
        ("name: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("name: \x07", "is not YAML: "),
        ("", "the top of the file must be keys such as model: and data:"),
        ("- a\n- b\n", "the top of the file must be keys"),
        ("just text", "the top of the file must be keys"),
    ],
)
def test_what_is_no_yaml_or_no_job_is_one_line(load, path, content, words):
    with pytest.raises(UserError) as caught:
        load(content)
    message = str(caught.value)
    assert message.startswith(f"job file {path}")
    assert words in message
    assert "\n" not in message


def test_anchors_and_merged_keys_work(load):
    merged = FULL.replace("packing: {", "packing: &p {").replace("loss:", "loss:\n  train_on_eos: all")
    assert load(merged).loss.train_on_eos == "all"
    twice = LEAST.replace("kind: pretrain}", "kind: pretrain}\n  eval:\n    - {<<: *set, files: other.jsonl}").replace(
        "- {files", "- &set {files"
    )
    job = load(twice)
    assert (job.data.eval[0].kind, job.data.eval[0].files[0][-11:]) == ("pretrain", "other.jsonl")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"job file .*nowhere\.yaml: there is none in .*; check the path") as error:
        load_job(tmp_path / "nowhere.yaml")
    assert f" in {tmp_path};" in str(error.value)
    with pytest.raises(UserError, match="Is a directory"):
        load_job(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UserError, match="is not YAML"):
        load_job(tmp_path / "latin.yaml")


# ---- --set ----


def test_settings_can_be_changed_from_the_command_line(load):
    job = load(
        LEAST,
        "training.steps=99",
        "training.learning_rate=2e-4",
        "data.train.0.files=[x.jsonl, y.jsonl]",
        "data.train.0.kind=chat",
        "resources.workers=3",
        "model.config.hidden_size=64",
        "images={grid: [2, 2], tile_size: [56, 56]}",
        "name=a=b",
        "loss.boundaries=null",
    )
    assert (job.training.steps, job.training.learning_rate, job.resources.workers) == (99, 2e-4, 3)
    assert [Path(file).name for file in job.data.train[0].files] == ["x.jsonl", "y.jsonl"]
    assert job.data.train[0].kind == "chat"
    assert job.model.config == {"model_type": "qwen2_vl", "hidden_size": 64}
    assert job.images.grid == (2, 2)
    assert job.name == "a=b"


def test_a_part_left_empty_in_the_file_can_be_set_inside(load):
    assert load(LEAST + "resources:\n", "resources.workers=3").resources.workers == 3
    assert load(LEAST.replace("- {files: rows.jsonl, kind: pretrain}", "-"), "data.train.0={files: a, kind: chat}")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.steps", "write key.path=value"),
        ("=5", "write key.path=value"),
        ("training.steps=[", "the value is not YAML"),
        ("images={grid: 1, grid: 2}", "the key 'grid' is written twice"),
        ("name.inner=5", "name is 'small', it has no keys inside"),
        ("training.steps.inner=5", "steps is 10, it has no keys inside"),
        ("data.train.0.kind.inner=5", "kind is 'pretrain', it has no keys inside"),
        ("data.train.1.kind=chat", "'1' is no place of a list with 1 entries"),
        ("data.train.first.kind=chat", "'first' is no place of a list"),
        ("data.train.-1=5", "'-1' is no place of a list"),
    ],
)
def test_a_wrong_override_is_one_line_that_quotes_it(load, override, words):
    with pytest.raises(UserError) as caught:
        load(LEAST, override)
    assert f"--set {override!r}" in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_entries_of_a_list_have_no_keys_inside(load):
    listed = LEAST.replace("files: rows.jsonl", "files: [rows.jsonl]")
    with pytest.raises(UserError, match="it has no keys inside"):
        load(listed, "data.train.0.files.0.name=5")


def test_an_unknown_key_of_an_override_is_told_like_one_of_the_file(load):
    with pytest.raises(UserError, match=r"training\.step: unknown key; did you mean 'steps'\?"):
        load(LEAST, "training.step=5")


# ---- The schema ----


def test_every_setting_is_described():
    """The docstring under each field is its documentation, in editors too."""
    schema = Job.model_json_schema()
    found = 0
    for name, part in [("Job", schema), *schema["$defs"].items()]:
        assert part["additionalProperties"] is False, name
        for key, setting in part["properties"].items():
            found += 1
            group = schema["$defs"][setting["$ref"].split("/")[-1]] if "$ref" in setting else {}
            description = setting.get("description") or group.get("description", "")
            assert len(description) > 10, f"{name}.{key} has no description"
    assert found > 60


def test_every_group_of_settings_is_described():
    for name, part in Job.model_json_schema()["$defs"].items():
        assert part.get("description"), name
        assert part["description"] != BaseModel.__doc__


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            "{steps: 9, parts: {vision: frozn}}",
            "training.parts.vision: Input should be 'frozen' or keys such as learning",
        ),
        (
            "{steps: 9, parts: {vision: {learning_rat: 1}}}",
            "training.parts.vision.learning_rat: unknown key; did you mean",
        ),
        ("{steps: 9, stages: [{steps: 3}]}", "training.stages.0.parts: required and not given"),
        ("{steps: 9, optimizer: muon}", "optimizer: muon needs muon_learning_rate"),
        ("{steps: 9, muon_momentum: 0.9}", "muon_momentum belongs to optimizer: muon, and the optimizer is adamw"),
        ("{steps: 9, decay_steps: 3}", "decay_steps belongs to schedule: wsd, and the schedule is cosine"),
        ("{steps: 9, schedule: wsd}", "schedule: wsd needs decay_steps"),
        ("{steps: 9, schedule: wsd, decay_steps: 3, warmup_ratio: 0.1}", "takes warmup_steps, not warmup_ratio"),
        (
            "{steps: 9, optimizer: adamw_8bit}\nresources: {workers: [1, 2]}",
            "an elastic run cannot train with optimizer",
        ),
    ],
)
def test_a_mistake_in_what_is_trained_is_one_line(tmp_path: Path, training: str, message: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(LEAST.replace("{steps: 10}", training))
    with pytest.raises(UserError) as raised:
        load_job(file)
    assert str(raised.value).count("\n") == 1
    assert message in str(raised.value)
