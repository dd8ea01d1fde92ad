"""Frozen parts, stages and optimizers in the engine, on real process groups, saved and resumed by other numbers of
ranks around the borders of stages."""

from typing import Any

import pytest

from tests.mmray.training import part_scenarios
from tests.mmray.training.part_scenarios import BY_OPTIMIZER, CASES, LAST_STEP, RESUMED_AT, TRAINED
from tests.mmray.training.ranks import RankGroup
from tests.mmray.training.test_engine import column

Results = dict[str, list[dict[Any, Any]]]


def case_name(case: Any) -> str:
    return f"{case[0]}-{case[1]}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("parts")
    done: Results = {"two": RankGroup(2, part_scenarios.two_ranks, folder).results()}
    done["three"] = RankGroup(3, part_scenarios.three_ranks, folder).results()
    done["one"] = RankGroup(1, part_scenarios.one_rank, folder).results()
    return done


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_each_stage_moves_its_weights_and_nothing_else(results: Results, case: Any) -> None:
    """Frozen weights stay equal to the bit, through the borders too."""
    history = results["two"][0][case]
    assert len(history) == LAST_STEP
    for number, step in enumerate(history):
        wanted = TRAINED[number // 2 * 2]
        assert {name for name in step["trained"] if not any(part in name for part in wanted)} == set()
        assert set(step["moved"]) <= set(step["trained"])
        if case[1] == "fp32":  # a small step is lost in bf16, whose masters move
            assert set(step["moved"]) == set(step["trained"])
        assert [step.get("kept")] == ([True] if number in (1, 3) else [None])
    assert results["two"][1][case] == history


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_stages_resume_with_other_numbers_of_ranks_around_a_border(results: Results, case: Any) -> None:
    """Two ranks saved before, at and after the first border; three went on from each, beyond the next border; one did
    the last stage from what three saved."""
    whole = results["two"][0][case]
    loss_tolerance, norm_tolerance = (1e-6, 1e-5) if case[1] == "fp32" else (1e-3, 1e-2)
    resumed = {(step, 3): results["three"][0][case, step] for step in RESUMED_AT[case]}
    resumed |= {(4, 1): results["one"][0][case]}
    for (done, _), steps in resumed.items():
        expected = whole[done : done + len(steps)]
        assert len(steps) >= 1
        assert column(steps, "loss") == pytest.approx(column(expected, "loss"), rel=loss_tolerance), done
        assert column(steps, "grad_norm") == pytest.approx(column(expected, "grad_norm"), rel=norm_tolerance), done
        assert column(steps, "stage") == column(expected, "stage")
        for step, other in zip(steps, expected, strict=True):
            assert set(step["trained"]) == set(other["trained"])
            assert set(step["moved"]) <= set(step["trained"])


def test_zero_stages_agree_on_stages_of_training(results: Results) -> None:
    runs = results["two"][0]
    for stage in (1, 2, 3):
        assert column(runs[stage, "fp32"], "loss") == pytest.approx(column(runs[0, "fp32"], "loss"), rel=1e-5)
        assert column(runs[stage, "fp32"], "grad_norm") == pytest.approx(column(runs[0, "fp32"], "grad_norm"), rel=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != 3], ids=case_name)
def test_adam_counts_the_updates_of_what_stays_and_of_what_is_new(results: Results, case: Any) -> None:
    """From the count it corrects its running means: one that is off would show in no resume, but in every step."""
    counts = column(results["two"][0][case], "updates")
    assert counts[0] == {"merger": 1}
    assert counts[2] == {"merger": 3, "layers": 1, "norm": 1, "embed_tokens": 1}
    assert counts[5] == {"merger": 6, "layers": 4, "norm": 4, "blocks": 2, "patch_embed": 2}
    assert column(results["three"][0][case, 2], "updates") == counts[2:4]
    assert column(results["one"][0][case], "updates") == counts[4:]


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_frozen_parts_cost_no_gradient_and_no_state(results: Results, case: Any) -> None:
    costs = results["one"][0]["costs", case]
    assert costs["with gradient"] == []
    assert 0 < costs["trained"] < 0.3 * costs["all"]
    assert 2 * costs["trained"] <= costs["states"] <= 2 * costs["trained"] + 64  # and padding


def test_a_longer_run_goes_on_from_the_stable_phase(results: Results) -> None:
    longer = results["one"][0]["longer"]
    assert longer["resumed"] == longer["whole"][3:]
    assert [rate for _, rate in longer["whole"]] == pytest.approx([3e-3] * 7 + [1.5e-3])
    assert "step-4-of-1 lies in the decay of the learning rate, which began after step 3" in longer["in decay"]


@pytest.fixture(scope="module")
def by_optimizer(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("optimizers")
    two = RankGroup(2, part_scenarios.optimizers, folder).results()
    return {"two": two, "one": RankGroup(1, part_scenarios.optimizers_alone, folder).results()}


@pytest.mark.parametrize(("name", "case"), BY_OPTIMIZER, ids=str)
def test_an_optimizer_trains_and_resumes(by_optimizer: Results, name: str, case: Any) -> None:
    history, resumed = by_optimizer["two"][0][name, case], by_optimizer["two"][0]["resumed", name, case]
    for step in history:
        assert set(step["moved"]) <= set(step["trained"])
        if case[1] == "fp32":
            assert set(step["moved"]) == set(step["trained"])
    assert column(resumed, "loss") == pytest.approx(column(history[2:], "loss"), rel=1e-6)
    alone = by_optimizer["one"][0][name, case]
    if case[0] == 0:
        assert column(alone, "loss") == pytest.approx(column(history[2:], "loss"), rel=1e-5)
    else:
        assert f"was written by 2 workers, and this run has 1 worker; that cannot be with optimizer {name}" in alone


def test_muon_is_the_same_at_all_zero_stages_that_it_may_run_at(by_optimizer: Results) -> None:
    """DeepSpeed orthogonalises whole gradients before it cuts them into shards."""
    plain, *sharded = (by_optimizer["two"][0]["muon", (stage, "fp32")] for stage in (0, 1, 2))
    for history in sharded:
        assert column(history, "loss") == pytest.approx(column(plain, "loss"), rel=1e-5)


def test_another_optimizer_is_refused_by_name(by_optimizer: Results) -> None:
    assert (
        "was written by optimizer muon, and this run has adamw, which cannot use its states"
        in (by_optimizer["one"][0]["another"])
    )
