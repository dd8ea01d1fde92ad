"""What an earlier mmray has written is used as it is, in `fixtures/`: each test says what a person would then do."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from jobs.training import check_old_chats
from mmray.config.compatibility import job_family
from mmray.config.job import Job, load_job
from mmray.errors import UserError
from mmray.images.size_cache import read_sizes
from mmray.loss.sources import label_maker
from mmray.prepared import PreparedDataset, PreparedWriter
from mmray.prepared.schema import FORMAT_VERSION
from mmray.prepared.versions import bin_labels
from mmray.run.checkpoints import newest_looking_whole
from mmray.run.export import export_model
from mmray.training.json_lines import read_json_lines
from tests.fixtures.f4b23e2.make import MODIFIED, machine
from tests.here import prepare_here, train_here
from tests.mmray.preparing import contents

F4B23E2 = Path(__file__).parent / "fixtures/f4b23e2/state"
SPLITS = ("train", "eval")

pytestmark = pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="its rows lie below /proc/self/cwd")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what revision f4b23e2 has left, as the current folder."""
    folder = tmp_path / "moved"
    shutil.copytree(F4B23E2, folder)
    set_times(folder)
    monkeypatch.chdir(folder)
    return folder


def set_times(folder: Path) -> None:
    """Give row files and images the times they had."""
    for path in (folder / "data").rglob("*"):
        os.utime(path, (MODIFIED, MODIFIED))


def job_of(**changes: Any) -> Job:
    """The job file's content, some settings changed."""
    return load_job("job.yaml", [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def same_numbers(lines: list[dict[str, Any]], first: int) -> None:
    """Steps are those that the run did, to the last bit where this machine computes as the one that wrote them. first:
    of the steps that were done again, which took another time."""
    expected = read_json_lines(F4B23E2 / "expected_metrics.jsonl")
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == list(range(1, 13))
    again = [ours["step"] for ours, theirs in zip(lines, expected) if ours["step_seconds"] != theirs["step_seconds"]]
    assert again == list(range(first, 13))
    recorded = json.loads((F4B23E2 / "machine.json").read_text())
    exact = all(recorded[name] == machine()[name] for name in ("cpu_capability", "torch"))
    for ours, theirs in zip(lines, expected, strict=True):
        for name in theirs.keys() - {"step_seconds", "data_wait_seconds"}:
            wanted = theirs[name] if exact else pytest.approx(theirs[name], rel=1e-5)
            assert ours[name] == wanted, (ours["step"], name)


def begin_as_it_was(folder: Path, split: str) -> None:
    """Begin to prepare into `anew` as it was then: rows of several files are dealt in another way since."""
    record = PreparedDataset(f"prepared/{split}").manifest["record"] | {"format_version": FORMAT_VERSION}
    PreparedWriter(str(folder / "anew" / split)).begin(record)


@pytest.mark.parametrize("split", SPLITS)
def test_a_prepared_dataset_is_up_to_date_for_its_job(state: Path, split: str) -> None:
    before = contents(state / "prepared" / split)
    dataset = prepare_here(job_of(), split)
    assert contents(state / "prepared" / split) == before
    assert dataset.fingerprint == PreparedDataset(str(F4B23E2 / "prepared" / split)).fingerprint


def same_bins(before: PreparedDataset, anew: PreparedDataset, job: Job) -> None:
    """Two datasets have the same samples in the same bins, with the same trained tokens. Format 3 also names each
    sample's set, and says of each token of a chat whether it is trained on."""
    labels = label_maker(job.loss, job_family(job))
    assert len(before) == len(anew)
    for number in range(len(before)):
        one, other = before.bin(number), anew.bin(number)
        assert (one.sample_ids, one.sample_sources, one.images) == (
            other.sample_ids,
            other.sample_sources,
            other.images,
        )
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.sample_lengths.tolist() == other.sample_lengths.tolist()
        assert bin_labels(one, labels).tolist() == bin_labels(other, labels).tolist()
        assert one.trained_tokens == other.trained_tokens
        assert (set(one.sample_sets.tolist()), min(other.sample_sets) >= 0) == ({-1}, True)


@pytest.mark.parametrize("split", SPLITS)
def test_its_rows_give_the_same_samples_and_rejected_rows(state: Path, split: str) -> None:
    begin_as_it_was(state, split)
    job = job_of(**{"output.prepared": "anew", "data.size_cache": None})
    dataset, earlier = prepare_here(job, split), PreparedDataset(f"prepared/{split}")
    same_bins(earlier, dataset, job)
    assert dataset.rejected().select(["id", "reason", "source"]) == earlier.rejected().select(
        ["id", "reason", "source"]
    )
    if split == "train":
        assert set(dataset.statistics["rejected_by_reason"]) == {
            *("bad_json", "image_missing", "image_unreadable", "placeholder_count", "too_long"),
        }  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
def test_an_old_size_cache_does_no_harm(state: Path, split: str) -> None:
    """Images are measured anew since more orientations count, and the cache is filled again."""
    assert len(read_sizes("sizes.parquet")) == 0
    begin_as_it_was(state, split)
    job = job_of(**{"output.prepared": "anew"})
    same_bins(PreparedDataset(f"prepared/{split}"), prepare_here(job, split), job)
    assert len(read_sizes("sizes.parquet")) > 0


def test_a_new_run_may_begin_on_chats_that_train_as_they_did(state: Path) -> None:
    check_old_chats(job_of(), "train", PreparedDataset("prepared/train"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": False}, "has other trained tokens now"),
        ({"mood": "sad"}, "is refused now \\(unknown_field: message 1 has the key 'mood'"),
    ],
)
def test_a_new_run_does_not_begin_on_chats_of_which_something_was_ignored(
    state: Path, change: dict[str, Any], words: str
) -> None:
    """A flag and a key that revision f4b23e2 passed over; it never said so, and the dataset does not tell."""
    lines = (state / "data/chat.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    row["messages"][1] |= change
    (state / "data/chat.jsonl").write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=f"of its set 1 row .*chat.jsonl:1 {words}.*--replace"):
        check_old_chats(job_of(), "train", PreparedDataset("prepared/train"))


def test_a_run_resumes_from_its_newest_checkpoint_with_the_same_numbers(state: Path) -> None:
    same_numbers(train_here(job_of(**{"resources.tile_cache": None}), ranks=2), first=11)


def test_a_run_resumes_from_its_oldest_checkpoint_beside_an_old_tile_cache(state: Path) -> None:
    """No image can be read any more, but all were cut when the run began."""
    recorded = json.loads((F4B23E2 / "machine.json").read_text())
    differing = [name for name in ("pillow", "jpeg", "libjpeg_turbo") if recorded[name] != machine()[name]]
    if differing:
        pytest.skip(f"a tile cache is of one version of {', '.join(differing)}")
    newest = newest_looking_whole(state / "run")
    assert newest is not None
    shutil.rmtree(newest)
    same_numbers(train_here(job_of(), ranks=2), first=6)


def test_a_checkpoint_is_exported_with_its_job(state: Path) -> None:
    """It does not say which model it is of; the weights are those that DeepSpeed wrote."""
    with pytest.raises(UserError, match=r"give --job JOB\.yaml"):
        export_model("run", "model-of-5", step=5)
    export_model("run", "model-of-5", step=5, settings=job_of().model)
    (saved,) = (state / "run").glob("checkpoint_00000005_*/deepspeed/mp_rank_00_model_states.pt")
    expected = torch.load(saved, weights_only=False)["module"]
    model = AutoModelForImageTextToText.from_pretrained("model-of-5", dtype="auto")
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_other_settings_are_refused_by_name(state: Path) -> None:
    with pytest.raises(UserError, match=r"packing\.token_capacity: 512 -> 600"):
        prepare_here(job_of(**{"packing.token_capacity": 600}))
