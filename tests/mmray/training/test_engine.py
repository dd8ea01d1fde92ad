"""The engine on real process groups: one loss for any split of a batch, and exact resumption.

All process groups start once for the module: a start costs seconds, a scenario a fraction of one.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmray.training.model import build_model
from tests.mmray.training import scenarios, tiny
from tests.mmray.training.ranks import RankGroup
from tests.mmray.training.scenarios import EXACT, LAST_STEP, SAVED_AT, checkpoint_name

BROKEN = "model.language_model.layers.1.mlp.down_proj.weight"
Results = dict[str, list[dict[Any, Any]]]  # by process group, then by rank


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder, shared = tmp_path_factory.mktemp("checkpoints"), tmp_path_factory.mktemp("shared [1+1]")
    model = build_model(tiny.model_settings())
    model.save_pretrained(folder / "model")
    with torch.no_grad():
        model.get_parameter(BROKEN)[3] = float("nan")
    model.save_pretrained(folder / "broken")
    done: Results = {"two": RankGroup(2, scenarios.two_ranks, folder).results()}
    for case in EXACT:
        merge(folder / checkpoint_name(case))
    resumed = RankGroup(2, scenarios.two_ranks_resumed, folder)
    done["three"] = RankGroup(3, scenarios.three_ranks, folder, new_python=True).results()
    done["two resumed"] = resumed.results()
    done["one"] = RankGroup(1, scenarios.one_rank, folder, shared).results()
    done["two at last"] = RankGroup(2, scenarios.two_ranks_at_last, folder, shared).results()
    for place in (shared, folder / "first", folder / "second"):
        assert not list(place.iterdir()), "conversions are temporary"
    return done


def merge(folder: Path) -> None:
    """Join the folders that ranks wrote, as Ray Train does; no file may come from two of them."""
    for part in sorted(folder.glob("of-rank-*")):
        for file in part.rglob("*"):
            target = folder / file.relative_to(part)
            assert not target.is_file(), f"two ranks wrote {target.name}"
            if file.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(file, target)
        shutil.rmtree(part)


def column(history: list[dict[str, float]], name: str) -> list[float]:
    return [step[name] for step in history]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("grad_accumulation", [1, 2, 4])
def test_a_split_of_the_global_batch_changes_nothing(results: Results, stage: int, grad_accumulation: int) -> None:
    whole = results["one"][0][0, 1]
    split = results["one"][0][stage, grad_accumulation]
    over_two = results["two"][0][stage, "fp32"][:2] if stage != 1 else results["two"][0]["stage 1"]
    for name in ("loss", "grad_norm"):
        assert column(split, name) == pytest.approx(column(whole, name), rel=1e-5)
        assert column(over_two, name) == pytest.approx(column(whole, name), rel=1e-5)
    assert column(split, "trained_tokens") == column(over_two, "trained_tokens") == [82, 82]


@pytest.mark.parametrize("case", EXACT, ids=checkpoint_name)
def test_ranks_report_the_same(results: Results, case: scenarios.Case) -> None:
    for name in ("loss", "grad_norm", "learning_rate", "trained_tokens", "tokens"):
        assert column(results["two"][0][case], name) == column(results["two"][1][case], name)
        assert column(results["three"][0][case], name) == column(results["three"][2][case], name)


def test_stages_agree(results: Results) -> None:
    runs = results["two"][0]
    for name in ("loss", "grad_norm"):
        for stage in (2, 3):
            assert column(runs[stage, "fp32"], name) == pytest.approx(column(runs[0, "fp32"], name), rel=1e-5)
        assert column(runs[3, "bf16"], name) == pytest.approx(column(runs[0, "bf16"], name), rel=2e-3)
    gathered = column(runs["gathered"], "loss")
    assert gathered == pytest.approx(column(runs[0, "fp32"], "loss")[:SAVED_AT], rel=1e-5)


def test_a_rank_with_text_alone_does_not_hang(results: Results) -> None:
    stepped, evaluated = results["two"][0]["text alone"]
    assert stepped == pytest.approx(evaluated, rel=1e-5)
    assert results["two"][1]["text alone"] == (stepped, evaluated)


@pytest.mark.parametrize(
    "name", [*(("uneven", stage) for stage in (0, 1, 2, 3)), ("uneven, adapted", 2), ("uneven, adapted", 3)]
)
def test_ranks_with_other_numbers_of_chunks_do_not_hang(results: Results, name: tuple[str, int]) -> None:
    """Nor is anything else than with one chunk for each row, also in the second step, which has seen the gradients."""
    whole, chunked = results["two"][0][name]
    assert results["two"][1][name] == [whole, chunked]
    for one, other in zip(whole, chunked, strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    assert whole[0][0] > whole[1][0]
    if name[0] == "uneven":
        assert whole == [pytest.approx(step, rel=1e-5) for step in results["two"][0]["uneven", 0][0]]


def test_label_smoothing_and_z_loss_are_means_over_the_global_batch(results: Results) -> None:
    """By two ranks as by one; `loss` is the cross-entropy, as in evaluation, and what is trained stands beside it."""
    over_two, whole = results["two"][0]["smoothed"], results["one"][0]["smoothed"]
    for name in ("loss", "smoothed_loss", "z_loss", "grad_norm"):
        assert column(over_two[:2], name) == pytest.approx(column(whole[:2], name), rel=1e-5)
    plain = results["one"][0][2, 1]
    assert whole[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    assert plain[0]["smoothed_loss"] is plain[0]["z_loss"] is None
    assert whole[0]["grad_norm"] != pytest.approx(plain[0]["grad_norm"], rel=1e-2)
    assert 0 < abs(whole[0]["smoothed_loss"] - whole[0]["loss"]) < 0.1
    assert whole[0]["z_loss"] == pytest.approx(math.log(160) ** 2, rel=0.05), "random weights: nearly even logits"
    assert over_two[2]["evaluated"] == pytest.approx(over_two[2]["step"], rel=1e-6), "loss, and token accuracy"


@pytest.mark.parametrize("case", EXACT, ids=checkpoint_name)
def test_a_step_that_trains_nothing_leaves_the_weights(results: Results, case: scenarios.Case) -> None:
    """With running means of earlier steps, and weight decay."""
    for rank in (0, 1):
        assert results["two"][rank]["nothing trained", case] == (True, 0.0, LAST_STEP + 1)


def test_a_loss_that_is_not_finite_stops_every_rank(results: Results) -> None:
    for rank in (0, 1):
        assert results["two"][rank]["not finite"].startswith("the loss of step 1 is nan; lower training.learning_rate")


def test_weights_that_are_not_finite_are_named(results: Results) -> None:
    for rank in (0, 1):
        assert results["two"][rank]["broken files"] == (
            f"the loss of step 1 is nan; 1 weights of the model have numbers that are not finite: {BROKEN}; begin from "
            "other files or an earlier checkpoint"
        )


@pytest.mark.parametrize("case", EXACT, ids=checkpoint_name)
def test_resume_continues_exactly(results: Results, case: scenarios.Case) -> None:
    for rank in (0, 1):
        whole = results["two"][rank][case][SAVED_AT:]
        resumed = results["two resumed"][rank][case]
        assert column(resumed, "loss") == pytest.approx(column(whole, "loss"), rel=1e-6)
        for name in ("learning_rate", "python", "numpy", "torch"):
            assert column(resumed, name) == column(whole, name)
    assert results["two resumed"][0][case][0]["torch"] != results["two resumed"][1][case][0]["torch"]


@pytest.mark.parametrize("case", EXACT, ids=checkpoint_name)
def test_resume_with_other_world_sizes(results: Results, case: scenarios.Case) -> None:
    """Two ranks saved after step 3, three do step 4, one step 5, two step 6."""
    whole = results["two"][0][case][SAVED_AT:LAST_STEP]
    chained = [step for ranks in ("three", "one", "two at last") for step in results[ranks][0][case]]
    loss_tolerance, norm_tolerance = (1e-6, 1e-5) if case[1] == "fp32" else (1e-3, 3e-3)
    assert column(chained, "loss") == pytest.approx(column(whole, "loss"), rel=loss_tolerance)
    assert column(chained, "grad_norm") == pytest.approx(column(whole, "grad_norm"), rel=norm_tolerance)


def test_a_checkpoint_that_does_not_fit_is_refused(results: Results) -> None:
    one = results["one"][0]
    assert one["no folder"].endswith("was written by 2 workers; to resume with 1, give a folder to convert it in")
    assert "was written with ZeRO stage 2 and fp32, this run has stage 2 and bf16" in one["other dtype"]
    assert "holds no readable checkpoint" in one["no checkpoint"]
