"""Bins packed to equal cost keep every law of packing, and take alike long."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.config.job import Job
from mmray.packing.equal_cost import (
    DRAWN_BINS,
    LEAST_SAMPLES,
    MAX_BIN_RATIO,
    MAX_COST_RATIO,
    CostedSamples,
    expected_costliest,
    pack_equal_cost,
    planned_bin_cost,
)
from mmray.packing.pack import pack_2d
from mmray.packing.settings import PackingSettings
from mmray.prepared.dataset import window_bins
from mmray.prepared.fingerprint import prepare_record
from mmray.prepared.window import pack_window, samples_table
from mmray.schedule.balance import BalanceSettings
from mmray.schedule.loads import Loads
from tests.mmray.prepared.test_window import LABELS, sample

sizes = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 30)), max_size=60)


@given(sizes, st.sampled_from([0.0, 0.02]), st.randoms(use_true_random=False))
def test_every_sample_is_in_one_bin_within_both_capacities(rows, pair_cost, random):
    tokens, visual = (np.asarray([row[side] for row in rows], dtype=np.int64) for side in (0, 1))
    costs = np.asarray([random.uniform(1, 100) for _ in rows])
    samples = CostedSamples(tokens, visual, costs, pair_cost, 60, 40)
    bin_cost = random.uniform(0.1, 2) * planned_bin_cost(samples) if rows else 1.0
    bins = pack_equal_cost(samples, bin_cost)
    assert sorted(itertools.chain(*bins)) == list(range(len(rows)))
    assert all(tokens[members].sum() <= 60 and visual[members].sum() <= 40 for members in bins)
    assert [members[0] for members in bins] == sorted(members[0] for members in bins)
    assert all(members == sorted(members) for members in bins)
    assert bins == pack_equal_cost(samples, bin_cost)


@given(st.integers(1, 500), st.sampled_from([0.0, 0.02]), st.integers(0, 99))
def test_the_number_of_bins_of_a_cost_is_the_inverse_of_the_cost(num_bins, pair_cost, seed):
    rng = np.random.default_rng(seed)
    samples = CostedSamples(rng.integers(1, 99, 50), np.zeros(50), rng.uniform(1, 9, 50), pair_cost, 100, 0)
    assert samples.num_bins(samples.bin_cost(num_bins)) == num_bins


def test_a_sample_over_a_capacity_is_an_error():
    with pytest.raises(ValueError, match="item 1: tokens is 61"):
        pack_equal_cost(CostedSamples(np.asarray([1, 61]), np.asarray([0, 0]), np.ones(2), 0.0, 60, 4), 1.0)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_the_costliest_of_some_drawn_bins_is_their_mean_over_all_draws(costs):
    """Against every way to draw three, with putting back."""
    draws = [max(drawn) for drawn in itertools.product(costs, repeat=3)]
    assert expected_costliest(np.asarray(costs, dtype=np.float64), 3) == pytest.approx(np.mean(draws))


def pages_and_texts(rng, count=6000):
    """Half pages of 500 to 4,000 visual tokens with little text, half texts of 500 to 9,000 tokens."""
    visual = np.where(rng.random(count) < 0.5, rng.integers(500, 4000, count), 0)
    tokens = np.where(visual > 0, visual + rng.integers(50, 600, count), rng.integers(500, 9000, count))
    return Loads(tokens, visual, tokens - visual, tokens**2, visual**2, np.full(count, "any"))


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_bins_take_alike_long(attention):
    samples, balance = pages_and_texts(np.random.default_rng(0)), BalanceSettings().for_attention(attention)
    costs, pair_cost = balance.sample_costs(samples)
    capacities = {"token_capacity": 16384, "visual_capacity": 12288}

    def of_bins(bins):
        members = [np.asarray(each) for each in bins]
        columns = [getattr(samples, name) for name in ("tokens", "visual_tokens", "trained_tokens")]
        columns += [samples.sample_pairs, samples.visual_pairs]
        sums = [np.asarray([column[each].sum() for each in members]) for column in columns]
        return balance.costs(Loads(*sums, bucket=np.full(len(bins), "any")))

    fewest = pack_2d(samples.tokens, samples.visual_tokens, **capacities)
    costed = CostedSamples(samples.tokens, samples.visual_tokens, costs, pair_cost, **capacities)
    bins = pack_equal_cost(costed, planned_bin_cost(costed))
    before, after = of_bins(fewest), of_bins(bins)
    rng = np.random.default_rng(1)
    slowest = [
        np.mean([rng.choice(each, DRAWN_BINS).max() for _ in range(2000)]) / each.mean() for each in (before, after)
    ]
    assert slowest[0] > 1.15
    assert slowest[1] < MAX_COST_RATIO + 0.01
    assert len(bins) <= MAX_BIN_RATIO * len(fewest)
    assert slowest[1] * after.sum() < 0.9 * slowest[0] * before.sum()  # time of an epoch of steps of 8


def few_sizes(rng, count=2 * LEAST_SAMPLES):
    sizes = np.asarray([[5462, 2731], [4097, 2049], [8200, 100], [300, 4000], [3300, 1700], [2800, 1400]])
    tokens, visual = sizes[rng.integers(0, len(sizes), count)].T
    return Loads(tokens, visual, np.maximum(tokens - visual, 0), tokens**2, visual**2, np.full(count, "any"))


def test_bins_of_all_windows_cost_alike():
    """Rows of six sizes, by the cost of whichever window is the first: over all windows together the costliest of some
    bins is hardly over the mean. Windows that choose for themselves choose costs that are some percent apart."""
    balance, rng = BalanceSettings().for_attention("flash_attention_2"), np.random.default_rng(0)
    windows = [
        CostedSamples(samples.tokens, samples.visual_tokens, *balance.sample_costs(samples), 24576, 16384)
        for samples in (few_sizes(rng) for _ in range(4))
    ]

    def inequality(costs_of_windows):
        bins = [pack_equal_cost(window, cost) for window, cost in zip(windows, costs_of_windows)]
        costs = [[window.costs[members].sum() for members in each] for window, each in zip(windows, bins)]
        all_costs = np.concatenate(costs)
        return expected_costliest(all_costs) / all_costs.mean()

    planned = [planned_bin_cost(window) for window in windows]
    shared = [inequality([cost] * len(windows)) for cost in planned]
    assert max(shared) < 1.1, shared
    assert np.mean(shared) < 1.07, shared


def test_the_cost_of_a_bin_is_that_of_its_samples_together():
    samples = pages_and_texts(np.random.default_rng(2), 5)
    for attention in ("sdpa", "flash_attention_2"):
        balance = BalanceSettings().for_attention(attention)
        costs, pair_cost = balance.sample_costs(samples)
        columns = (samples.tokens, samples.visual_tokens, samples.trained_tokens)
        sums = [np.asarray([column.sum()]) for column in (*columns, samples.sample_pairs, samples.visual_pairs)]
        (whole,) = balance.costs(Loads(*sums, bucket=np.asarray(["any"])))
        assert costs.sum() + pair_cost * samples.tokens.sum() ** 2 == pytest.approx(whole)


def test_a_window_is_packed_by_the_costs_of_its_rows():
    """Eight pages and eight texts of as many tokens: alike bins hold two of each, and neither capacity asks for it."""
    rows = [sample(number, text=4, visual=12) for number in range(8)]
    rows += [sample(number, text=16) for number in range(8, 16)]
    balance = BalanceSettings(visual_token=5).for_attention("sdpa")
    packing = PackingSettings(token_capacity=64, visual_capacity=64, mode="equal_cost")
    bins = window_bins(pack_window(samples_table(rows), packing, LABELS, sample_costs=balance.sample_costs))
    assert [each.visual_tokens for each in bins] == [24] * 4
    apart = window_bins(pack_window(samples_table(rows), packing.model_copy(update={"mode": "bins"}), LABELS))
    assert sorted(each.visual_tokens for each in apart) == [0, 0, 48, 48]
    with pytest.raises(ValueError, match="needs to know what samples cost"):
        pack_window(samples_table(rows), packing, LABELS)


JOB = {
    "name": "small",
    "model": {"config": {"model_type": "qwen2_vl"}, "processor": "some/processor", "attention": "sdpa"},
    "data": {"train": [{"files": "rows.jsonl", "kind": "pretrain"}]},
    "packing": {"token_capacity": 4096, "visual_capacity": 2048, "mode": "equal_cost"},
    "training": {"steps": 10, "global_batch_bins": 12},
    "output": {"prepared": "out/prepared", "run": "out/run"},
}


def test_costs_count_only_where_bins_are_packed_to_them(processors):
    job = Job.model_validate(JOB)
    assert job.packing_costs == job.balance.for_attention("sdpa")
    plain = Job.model_validate(JOB | {"packing": {"token_capacity": 4096, "visual_capacity": 2048}})
    assert plain.packing_costs is None

    def record(job, costs):
        return prepare_record(
            files=[], datasets=[], data=job.data, processor=processors["qwen2_vl"], tiling=job.images,
            packing=job.packing, loss=job.loss, costs=costs,
        )  # fmt: skip

    costs = job.packing_costs.cost_record()
    assert costs.keys() == BalanceSettings.model_fields.keys() - {
        *("across_batches", "window_batches", "tolerance", "group_bins", "one_shape_per_batch"),
    }  # fmt: skip
    assert record(job, costs)["costs"] == costs
    assert "costs" not in record(plain, costs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"balance": None}, "packs by the costs of balance: take balance: null out"),
        ({"balance": {"one_shape_per_batch": True}}, "leave out balance.one_shape_per_batch"),
        ({"packing": JOB["packing"] | {"bucket_fill": 0.5}}, "leave out bucket_fill"),
    ],
)
def test_settings_that_contradict_equal_cost_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Job.model_validate(JOB | change)
