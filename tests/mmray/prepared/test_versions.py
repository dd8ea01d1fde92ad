"""A dataset of an earlier version whose labels would now be others is refused before the first step."""

import json

import pytest

from mmray.errors import UserError
from mmray.families.qwen2_vl import Qwen2VL
from mmray.loss.settings import RoleLoss
from mmray.loss.sources import label_maker
from mmray.packing.settings import PackingSettings
from mmray.prepared import PreparedDataset
from mmray.prepared.versions import check_labels
from tests.mmray.preparing import Preparation, write_rows

ROWS, WITH_A_TOOL = 60, 35
"""One row among many, at a place where a look at sixteen bins does not find it."""


class Earlier(Qwen2VL):
    """The family as it was before its boundaries had turns of tools."""

    @property
    def role_markers(self):
        return tuple(marker for marker in super().role_markers if marker.role != "tool")


@pytest.mark.parametrize("eos", ["all", "turn"])
def test_one_bin_with_other_trained_tokens_is_found(processors, tmp_path, eos):
    tokenize = processors["qwen2_vl"].tokenizer
    rows = []
    for number in range(ROWS):
        role = "tool" if number == WITH_A_TOOL else "user"
        text = f"<|im_start|>{role}\n{(9 * ROWS + number) * 'a '}<|im_end|>\n<|im_start|>assistant\nAnna.<|im_end|>"
        rows.append({"input_ids": tokenize(text)["input_ids"]})
    loss = RoleLoss(train_on_eos=eos)
    files = write_rows(tmp_path / "rows.jsonl", rows)
    length = max(len(row["input_ids"]) for row in rows)
    packing = PackingSettings(token_capacity=length, visual_capacity=64)
    earlier = Preparation(
        Earlier(processors["qwen2_vl"]), {"files": files, "kind": "tokenized"}, packing=packing, loss=loss
    )
    earlier.write(tmp_path / "prepared")
    manifest = json.loads((tmp_path / "prepared/manifest.json").read_text())
    del manifest["labels"]
    (tmp_path / "prepared/manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    prepared = PreparedDataset(str(tmp_path / "prepared"))
    assert len(prepared) == ROWS
    check_labels(prepared, label_maker(loss, earlier.family))
    now = label_maker(loss, Qwen2VL(processors["qwen2_vl"]))
    if eos == "turn":
        check_labels(prepared, now)
    else:
        with pytest.raises(UserError, match=rf"bin {WITH_A_TOOL} has other trained tokens .*prepare it anew"):
            check_labels(prepared, now)
