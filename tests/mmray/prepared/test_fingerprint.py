"""The fingerprint of a prepare: another for whatever changes its result, the same for whatever does not."""

import copy
import json
import os
from typing import Any

import pytest

from mmray.errors import UserError
from mmray.loss.settings import RoleLoss
from mmray.packing.settings import PackingSettings
from mmray.prepared.fingerprint import check_settings, differences, fingerprint, processor_record
from mmray.rows.settings import DatasetSettings
from tests.mmray.preparing import Preparation, write_rows

FILES = {"rows.jsonl": [{"id": "a", "text": "hello"}], "more.jsonl": [{"id": "b", "text": "there"}]}


@pytest.fixture
def make(tmp_path, processors):
    """A function that makes the record of a job, with changes to its settings."""
    for name, rows in FILES.items():
        write_rows(tmp_path / name, rows)
        os.utime(tmp_path / name, (10, 10))

    def make(processor=processors["qwen2_vl"], packing=None, tiling=None, loss="sampled", data=None, **dataset):
        dataset = {"files": [str(tmp_path / name) for name in FILES], "kind": "pretrain"} | dataset
        settings = {"token_capacity": 64, "visual_capacity": 32} | (packing or {})
        return Preparation(
            processor, dataset, packing=PackingSettings(**settings), tiling=tiling,
            loss=loss, **{"max_image_pixels": 1000} | (data or {}),
        ).record  # fmt: skip

    return make


TILED = {"grid": (2, 2), "tile_size": (56, 56)}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"packing": {"token_capacity": 63}}, ["packing.token_capacity: 64 -> 63"]),
        ({"packing": {"visual_capacity": 31}}, ["packing.visual_capacity"]),
        ({"packing": {"window_rows": 512}}, ["packing.window_rows"]),
        ({"packing": {"bucket_fill": 0.5}}, ["packing.bucket_fill"]),
        ({"tiling": TILED}, ["tiling.grid", "tiling.tile_size", "tiling.patch_multiple"]),
        ({"loss": "all"}, ["loss: 'sampled' -> 'all'"]),
        ({"loss": RoleLoss()}, ["loss: 'sampled' -> {'roles': ['assistant']"]),
        ({"data": {"max_image_pixels": 999}}, ["max_image_pixels: 1000 -> 999"]),
        ({"data": {"image_frames": "reject"}}, ["image_frames: 'first' -> 'reject'"]),
        ({"data": {"duplicate_ids": "reject"}}, ["duplicate_ids: 'keep' -> 'reject'"]),
        ({"kind": "chat"}, ["datasets[0].kind"]),
        ({"image_root": "/elsewhere"}, ["datasets[0].image_root"]),
        ({"columns": {"text": "markdown"}}, ["datasets[0].columns.text: None -> 'markdown'"]),
        ({"placeholder": "[img]"}, ["datasets[0].placeholder"]),
        ({"add_eos": False}, ["datasets[0].add_eos"]),
    ],
)
def test_each_setting_changes_it_and_is_named(make, changes, named):
    before, after = make(), make(**changes)
    assert fingerprint(before) != fingerprint(after)
    lines = differences(before, after)
    for name in named:
        assert any(line.startswith(name) for line in lines), lines
    assert len({line.split(":")[0].split("[")[0].split(".")[0] for line in lines}) == 1  # nothing else differs


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train_on_eos": "none"}, "loss.train_on_eos: 'turn' -> 'none'"),
        ({"train_on_inputs": True}, "loss.train_on_inputs: False -> True"),
        ({"roles": ["user"]}, "loss.roles[0]: 'assistant' -> 'user'"),
        ({"boundaries": [{"role": "assistant", "start": "A:"}]}, "loss.boundaries: None -> [{'role': 'assistant'"),
        ({"allow_empty": True}, "loss.allow_empty: False -> True"),
    ],
)
def test_each_part_of_the_loss_changes_it_and_is_named(make, changes, line):
    before, after = make(loss=RoleLoss()), make(loss=RoleLoss.model_validate(changes))
    assert fingerprint(before) != fingerprint(after)
    (told,) = differences(before, after)
    assert told.startswith(line)


def test_the_same_job_has_the_same_fingerprint(make):
    assert make() == make()
    assert fingerprint(make()) == fingerprint(json.loads(json.dumps(make())))
    assert len(fingerprint(make())) == 16


def test_files_change_it_by_place_size_and_time(make, tmp_path):
    before = make()
    os.utime(tmp_path / "more.jsonl", (11, 11))
    touched = make()
    assert differences(before, touched)[0].startswith("files[1]: ")
    with (tmp_path / "more.jsonl").open("a") as file:
        file.write(" ")
    os.utime(tmp_path / "more.jsonl", (11, 11))
    grown = make()
    assert differences(touched, grown)[0].startswith("files[1]: ")
    fewer = make(files=[str(tmp_path / "rows.jsonl")])
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    os.utime(tmp_path / "moved.jsonl", (10, 10))
    moved = make(files=[str(tmp_path / "moved.jsonl")])
    records = [before, touched, grown, fewer, moved]
    assert len(set(map(fingerprint, records))) == len(records)


def test_the_order_of_files_changes_it(make, tmp_path):
    names = [str(tmp_path / name) for name in FILES]
    assert fingerprint(make(files=names)) != fingerprint(make(files=names[::-1]))


# ---- The processor ----


def add_token(processor: Any) -> None:
    processor.tokenizer.add_tokens(["newtoken"])


def change_eos(processor: Any) -> None:
    processor.tokenizer.eos_token = "<|endoftext|>"


def change_bos(processor: Any) -> None:
    processor.tokenizer.bos_token = "<|endoftext|>"


def change_template(processor: Any) -> None:
    processor.chat_template += " "


def change_pixels(processor: Any) -> None:
    processor.image_processor.size = {"shortest_edge": 4 * 784, "longest_edge": 50 * 784}


def change_mean(processor: Any) -> None:
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]


@pytest.mark.parametrize("change", [add_token, change_eos, change_bos, change_template, change_pixels, change_mean])
def test_each_part_of_the_processor_changes_it(make, processors, change):
    processor = copy.deepcopy(processors["qwen2_vl"])
    before = make(processor)
    assert before == make()
    change(processor)
    after = make(processor)
    assert fingerprint(before) != fingerprint(after)
    assert all(line.startswith("processor.") for line in differences(before, after))


def test_tokens_of_a_tile_change_it(processors):
    processor = copy.deepcopy(processors["idefics3"])
    before = processor_record(processor)
    processor.image_seq_len += 1
    assert processor_record(processor) != before


def test_families_have_different_records(processors):
    records = [json.dumps(processor_record(processor)) for processor in processors.values()]
    assert len(set(records)) == len(records)


def test_using_a_processor_does_not_change_it(processors):
    """A call with padding or truncation leaves its settings in the tokenizer."""
    processor = copy.deepcopy(processors["qwen2_vl"])
    before = processor_record(processor)
    unused = processor.tokenizer.backend_tokenizer.to_str()
    processor(text=["one", "one and two"], padding=True, truncation=True, max_length=3)
    assert processor.tokenizer.backend_tokenizer.to_str() != unused
    assert processor_record(processor) == before


# ---- Afterwards ----


def test_a_job_is_compared_with_what_a_dataset_was_prepared_with(make, processors):
    record = json.loads(json.dumps(make(tiling=TILED)))
    job = Preparation(
        processors["qwen2_vl"], {"files": "gone.jsonl", "kind": "pretrain"}, tiling=TILED,
        packing=PackingSettings(token_capacity=64, visual_capacity=32),
    )  # fmt: skip
    now = {
        "processor": job.family.processor, "tiling": job.policy, "packing": job.packing, "loss": job.loss,
        "datasets": job.data.train, "data": job.data,
    }  # fmt: skip
    check_settings("some/folder", record, **now)  # the row files may be gone
    with pytest.raises(UserError) as caught:
        check_settings("some/folder", record, **now | {"loss": "all"})
    assert "some/folder was prepared with other settings" in str(caught.value)
    assert "loss: 'sampled' -> 'all'" in str(caught.value)
    with pytest.raises(UserError, match=r"processor\.class: 'Qwen2VLProcessor' -> 'Idefics3Processor'"):
        check_settings("some/folder", record, **now | {"processor": processors["idefics3"]})


def test_a_loss_of_a_set_that_is_no_longer_the_prepared_one_is_told(make, processors):
    chats, families = {"kind": "chat"}, Preparation(processors["qwen2_vl"], {"files": "rows.jsonl", "kind": "chat"})
    now = {
        "processor": families.family.processor, "tiling": families.policy, "loss": "sampled",
        "packing": PackingSettings(token_capacity=64, visual_capacity=32), "data": families.data,
    }  # fmt: skip
    own = DatasetSettings(files=("a",), kind="chat", loss=RoleLoss(turns="last"))
    job_wide = DatasetSettings(files=("a",), kind="chat")
    check_settings("some/folder", make(**chats, loss="sampled"), **now, datasets=[job_wide])
    with pytest.raises(UserError, match=r"datasets\[0\]\.loss: None -> \{.*'turns': 'last'"):
        check_settings("some/folder", make(**chats), **now, datasets=[own])
    prepared = Preparation(
        processors["qwen2_vl"], {"files": ["a"], "kind": "chat", "loss": {"turns": "last"}}, packing=now["packing"],
    )  # fmt: skip
    record = make(**chats) | {"datasets": [dataset.record() for dataset in prepared.data.train]}
    check_settings("some/folder", record, **now, datasets=[own])
    with pytest.raises(UserError, match=r"datasets\[0\]\.loss: \{.*'turns': 'last'.* -> None"):
        check_settings("some/folder", record, **now, datasets=[job_wide])


def test_differences_are_paths_with_both_values():
    old = {"a": {"b": [1, 2], "gone": 1}, "same": [1], "files": ["x"]}
    new = {"a": {"b": [1, 3], "new": 2}, "same": [1], "files": ["x", "y"]}
    assert differences(old, new) == [
        "a.b[1]: 2 -> 3",
        "a.gone: 1 -> None",
        "a.new: None -> 2",
        "files: ['x'] -> ['x', 'y']",
    ]
    assert differences(old, old) == []
    (line,) = differences({"a": "x" * 500}, {"a": "y"})
    assert len(line) < 150
