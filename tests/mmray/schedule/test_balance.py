"""What a bin costs: each coefficient counts, and the defaults are the arithmetic that the docstrings name."""

import itertools
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mmray.config.job import load_job
from mmray.errors import UserError
from mmray.schedule.balance import BalanceSettings, Layers, cost_settings
from mmray.schedule.loads import Loads

LOADS = Loads(
    tokens=np.asarray([1000, 1000]),
    visual_tokens=np.asarray([0, 400]),
    trained_tokens=np.asarray([900, 600]),
    sample_pairs=np.asarray([500_000, 1_000_000]),
    visual_pairs=np.asarray([0, 80_000]),
    bucket=np.asarray(["text", "2x3"]),
)
NOTHING = {"token_pair": 0, "trained_token": 0, "visual_token": 0, "visual_pair": 0}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [1000, 1000]),
        ({"trained_token": 0.5}, [1450, 1300]),
        ({"visual_token": 2}, [1000, 1800]),
        ({"visual_pair": 0.01}, [1000, 1800]),
        ({"token_pair": 1e-3}, [1500, 2000]),
        ({"token_pair": 1e-3, "whole_row_attention": True}, [3000, 3000]),
    ],
)
def test_each_part_counts(change, expected):
    settings = BalanceSettings(**{"whole_row_attention": False} | NOTHING | change)
    assert settings.costs(LOADS).tolist() == expected


def test_attention_that_masks_works_through_whole_rows():
    whole = {name: BalanceSettings().for_attention(name).whole_row_attention for name in ("sdpa", "eager")}
    assert whole == {"sdpa": True, "eager": True}
    assert BalanceSettings().for_attention("flash_attention_2").whole_row_attention is False
    assert BalanceSettings().for_attention("packed").whole_row_attention is False
    decided = BalanceSettings(whole_row_attention=False)
    assert decided.for_attention("sdpa") == decided
    with pytest.raises(ValueError, match="not decided"):
        BalanceSettings().costs(LOADS)


def test_batches_are_sorted_only_where_a_setting_asks_for_it():
    assert not BalanceSettings().sorts_batches
    assert not BalanceSettings(visual_token=3, window_batches=64).sorts_batches  # a value that is the default
    for asked in ({"across_batches": True}, {"window_batches": 8}, {"tolerance": 0}, {"group_bins": 2}):
        assert BalanceSettings(**asked).sorts_batches, asked
    assert BalanceSettings(one_shape_per_batch=True).sorts_batches


QWEN2_VL_TOWER = Layers(count=32, hidden=1280, intermediate=5120, kv=1280, gated=False)
MODELS = {
    "Qwen2-VL-2B": cost_settings(
        Layers(count=28, hidden=1536, intermediate=8960, kv=256, gated=True), QWEN2_VL_TOWER,
        vocabulary=151_936, patches_per_token=4, projector=5120 * 5120 + 5120 * 1536,
    ),
    "Qwen2-VL-7B": cost_settings(
        Layers(count=28, hidden=3584, intermediate=18944, kv=512, gated=True), QWEN2_VL_TOWER,
        vocabulary=152_064, patches_per_token=4, projector=5120 * 5120 + 5120 * 3584,
    ),
    "SmolVLM-256M": cost_settings(
        Layers(count=30, hidden=576, intermediate=1536, kv=192, gated=True),
        Layers(count=12, hidden=768, intermediate=3072, kv=768, gated=False),
        vocabulary=49_280, patches_per_token=16, projector=16 * 768 * 576,
    ),
}  # fmt: skip


def test_the_defaults_are_qwen2_vl_2b():
    defaults = BalanceSettings()
    for name, value in MODELS["Qwen2-VL-2B"].items():
        assert getattr(defaults, name) == float(f"{value:.2g}"), name


def test_the_page_has_the_costs_of_its_models():
    page = (Path(__file__).parents[3] / "docs/training.md").read_text()
    for model, costs in MODELS.items():
        (row,) = re.findall(rf"^\| {model}[^|]*\|(.*)\|$", page, flags=re.MULTILINE)
        assert [float(cell) for cell in row.split("|")] == [float(f"{value:.2g}") for value in costs.values()], model


def test_linear_layers_count_multiply_adds_of_their_matrices():
    layers = Layers(count=3, hidden=8, intermediate=20, kv=4, gated=True)
    matrices = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 20), (8, 20), (20, 8)]
    assert layers.linear == 3 * sum(rows * columns for rows, columns in matrices)
    assert replace(layers, gated=False).linear == 3 * sum(rows * columns for rows, columns in matrices[:-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_batches": 0}, "greater than 0"),
        ({"tolerance": -0.1}, "greater than or equal to 0"),
        ({"group_bins": 0}, "greater than 0"),
        ({"visual_token": -1}, "greater than or equal to 0"),
        ({"shape": 1}, "Extra inputs"),
        ({"across_batches": False, "tolerance": 0.1}, "tolerance sorts bins across global batches: set across_batches"),
        ({"across_batches": False, "one_shape_per_batch": True}, "or leave out one_shape_per_batch"),
    ],
)
def test_bad_settings_are_errors(settings, message):
    with pytest.raises(ValidationError, match=message):
        BalanceSettings(**settings)


JOB = """
name: small
model: {config: {model_type: qwen2_vl}, processor: some/processor}
data: {train: [{files: rows.jsonl, kind: pretrain}]}
packing: {token_capacity: 4096, visual_capacity: 2048}
training: {steps: 10, global_batch_bins: 12}
output: {prepared: out/prepared, run: out/run}
"""


def test_jobs_are_balanced_unless_they_say_null(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    assert load_job(path).balance == BalanceSettings()
    assert load_job(path, ["balance.tolerance=0.1", "balance.group_bins=4"]).balance == BalanceSettings(
        tolerance=0.1, group_bins=4
    )
    assert load_job(path, ["balance=null"]).balance is None
    with pytest.raises(UserError, match=r"balance\.group_bins \(5\) must divide training\.global_batch_bins \(12\)"):
        load_job(path, ["balance.group_bins=5"])
    with pytest.raises(UserError, match=r"balance\.visual_tokens: unknown key; did you mean 'visual_token'\?"):
        load_job(path, ["balance.visual_tokens=5"])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_joined_and_taken_loads_are_rows_of_the_parts(sizes, random):
    numbers = itertools.count()
    parts = []
    for size in [*sizes, 1]:
        rows = np.asarray([next(numbers) for _ in range(size)], dtype=np.int64)
        parts.append(Loads(*(rows * 10 + column for column in range(5)), bucket=rows.astype(np.str_)))
    joined = Loads.joined(parts)
    places = random.choices(range(len(joined)), k=6)
    taken = joined.take(np.asarray(places))
    for column, field in enumerate(fields(Loads)[:5]):
        assert getattr(taken, field.name).tolist() == [place * 10 + column for place in places]
    assert taken.bucket.tolist() == [str(place) for place in places]
