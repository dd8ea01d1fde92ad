"""A dataset of an earlier version: a run that has begun on it keeps its labels, others are refused before step 1."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmray.batches import BatchMaker, BatchPlan
from mmray.batches.micro_batch import Place
from mmray.errors import UserError
from mmray.families.qwen2_vl import Qwen2VL
from mmray.loss.rules import IGNORE_INDEX
from mmray.loss.settings import RoleLoss
from mmray.loss.sources import label_maker
from mmray.packing.settings import PackingSettings
from mmray.prepared import PreparedDataset
from mmray.prepared.versions import check_labels, check_new_run, run_labels
from mmray.schedule import Schedule
from tests.mmray.preparing import Preparation, write_rows

ROWS, WITH_A_TOOL = 60, 35
"""One row among many, at a place where a look at sixteen bins does not find it."""


class Earlier(Qwen2VL):
    """The family as it was before its boundaries had turns of tools."""

    @property
    def role_markers(self):
        return tuple(marker for marker in super().role_markers if marker.role != "tool")


def of_version_2(prepared):
    """The dataset as version 2 would have it: without a record of its labels."""
    manifest = prepared.manifest.copy()
    del manifest["labels"]
    Path(prepared.path, "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    return PreparedDataset(prepared.path)


@pytest.mark.parametrize("eos", ["all", "turn"])
def test_a_run_goes_on_with_the_turns_of_its_time(processors, processor_folders, tmp_path, eos):
    """With `train_on_eos: all` the end of the one tool's turn would be trained on now, and was not then."""
    tokenize = processors["qwen2_vl"].tokenizer
    rows = []
    for number in range(ROWS):
        role = "tool" if number == WITH_A_TOOL else "user"
        text = f"<|im_start|>{role}\n{(9 * ROWS + number) * 'a '}<|im_end|>\n<|im_start|>assistant\nAnna.<|im_end|>"
        rows.append({"input_ids": tokenize(text)["input_ids"]})
    loss = RoleLoss(train_on_eos=eos)
    data = {"files": write_rows(tmp_path / "rows.jsonl", rows), "kind": "tokenized"}
    length = max(len(row["input_ids"]) for row in rows)
    packing = PackingSettings(token_capacity=length, visual_capacity=64)
    earlier = Preparation(Earlier(processors["qwen2_vl"]), data, packing=packing, loss=loss)
    prepared = of_version_2(earlier.write(tmp_path / "prepared"))
    assert len(prepared) == ROWS
    then, family = label_maker(loss, earlier.family), Qwen2VL(processors["qwen2_vl"])
    assert run_labels(prepared, loss, family) == then
    check_labels(prepared, run_labels(prepared, loss, family))

    plan = BatchPlan(
        prepared=(prepared.path,), processor=str(processor_folders["qwen2_vl"]), model_type=None,
        trust_remote_code=False, loss=loss, schedule=Schedule(ROWS, ROWS, seed=0, fingerprint="", shuffle=False),
        world_size=1, micro_batch_bins=ROWS,
    )  # fmt: skip
    batch = BatchMaker(plan).micro_batch(Place(0, 0, 0))
    counts = [prepared.bin(number).trained_tokens for number in range(ROWS)]
    assert np.count_nonzero(np.asarray(batch.labels) != IGNORE_INDEX) == sum(counts)

    now = Preparation(family, data, packing=packing, loss=loss)
    if eos == "turn":
        check_labels(prepared, now.labels)
        check_new_run(prepared, now.encoder, loss)
        return
    for check in (lambda: check_labels(prepared, now.labels), lambda: check_new_run(prepared, now.encoder, loss)):
        with pytest.raises(UserError, match=rf"bin {WITH_A_TOOL} has other trained tokens .*prepare it anew"):
            check()
