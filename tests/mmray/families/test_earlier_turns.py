"""A run on a prepared dataset of version 2 has the turn markers of its time: those that revision f4b23e2 made."""

import json
from pathlib import Path

import pytest

from mmray.families.qwen2_vl import Qwen2VL
from mmray.loss.settings import Loss, RoleLoss
from mmray.prepared import PreparedDataset
from mmray.prepared.versions import run_labels
from tests.mmray.preparing import Preparation, write_rows

LABELS = json.loads((Path(__file__).parents[2] / "fixtures/f4b23e2/labels.json").read_text())
"""The boundaries and stop tokens of each member of the zoo, by `loss: sampled` and by roles, where the revision took
the setting."""


@pytest.fixture(scope="module")
def version_2(processors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("version-2")
    data = {"files": write_rows(folder / "rows.jsonl", [{"text": "a"}]), "kind": "pretrain"}
    manifest = Preparation(Qwen2VL(processors["qwen2_vl"]), data).write(folder / "prepared").manifest.copy()
    del manifest["labels"]
    (folder / "prepared/manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    return PreparedDataset(str(folder / "prepared"))


def test_every_family_has_the_turns_of_its_time(member, member_family, version_2):
    if member.name not in LABELS:
        pytest.skip("what it needs was not installed where its boundaries were written down")
    family = member_family()
    words = family.tokenizer.convert_ids_to_tokens
    losses: dict[str, Loss] = {"sampled": "sampled", "roles": RoleLoss()}
    for name, recorded in LABELS[member.name].items():
        maker = run_labels(version_2, losses[name], family)
        assert words(list(maker.stop_token_ids)) == recorded["stop"]
        assert recorded["boundaries"] == [
            [
                boundary.role,
                words(list(boundary.start)),
                words(list(boundary.end)),
                boundary.include_start,
                boundary.include_end,
                boundary.until_next,
            ]
            for boundary in maker.boundaries
        ]
