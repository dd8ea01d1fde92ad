"""The doctor's small copy of every kind of model: no check fails of a right one, and packing naively shows."""

import re

import pytest

from mmray.config.job import Job
from mmray.doctor import Status
from mmray.doctor.model import ACCUMULATION, CACHE, FRESH, LABELS, PACKED, PICTURES_SEEN, examine_model
from mmray.families import family_of, load_processor
from mmray.training.model import load_config
from tests.mmray.families.zoo import ZOO

MEMBERS = [name for name, member in ZOO.items() if not member.missing and not member.missing_for_model]
TOKENS = 256
"""Of a sample: as few as the sliding windows of the members that pack."""


@pytest.mark.parametrize("name", MEMBERS)
def test_no_check_of_the_model_fails(name, tmp_path):
    member = ZOO[name]
    member.write_processor(tmp_path)
    job = Job.model_validate(
        {
            "name": "zoo",
            "model": {
                "config": member.config(tmp_path).to_dict(), "processor": str(tmp_path), "dtype": "fp32",
                "attention": member.attentions[0],
            },
            "data": {"train": [{"files": "rows.jsonl", "kind": "pretrain"}]},
            "packing": {
                "mode": "none" if member.refuses else "bins", "token_capacity": TOKENS, "visual_capacity": TOKENS,
            },
            "training": {"epochs": 1, "global_batch_bins": 1, "learning_rate": 1e-3},
            "output": {"prepared": "prepared", "run": "run"},
        }
    )  # fmt: skip
    family = family_of(load_processor(tmp_path), model_type=member.model_type)
    found = list(examine_model(job, family, family.resolved_tiling(job.images), load_config(job.model)))
    assert [each.check for each in found] == [FRESH, CACHE, PICTURES_SEEN, LABELS, PACKED, ACCUMULATION]
    expected = Status.NOT_APPLICABLE if member.refuses else Status.PASS
    assert [each.status for each in found] == [*[Status.PASS] * 4, expected, expected], found
    if not member.refuses:
        naive = re.search(r"(\S+) if packed naively", found[4].detail)
        assert naive is not None
        assert float(naive[1]) > 0.1
