"""Adapters in the engine: equal losses with any number of ranks, and checkpoints that belong to one base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmray.training.adapter import is_adapter
from mmray.training.model import build_model
from tests.mmray.training import adapter_scenarios as scenarios
from tests.mmray.training import tiny
from tests.mmray.training.adapter_scenarios import DROPPING, EQUAL, LAST_STEP, SAVED_AT
from tests.mmray.training.ranks import RankGroup
from tests.mmray.training.test_engine import column, merge


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    build_model(tiny.model_settings()).save_pretrained(folder / "model")
    build_model(tiny.model_settings(seed=2)).save_pretrained(folder / "other")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, list[dict[Any, Any]]]:
    done = {"two": RankGroup(2, scenarios.two_ranks, folder).results()}
    for name in (*(case.name for case in [*EQUAL, DROPPING]), "plain"):
        merge(folder / name)
    again = RankGroup(2, scenarios.resumed, folder)
    done["three"] = RankGroup(3, scenarios.three_ranks, folder).results()
    done["again"] = again.results()
    done["one"] = RankGroup(1, scenarios.one_rank, folder).results()
    return done


@pytest.mark.parametrize("case", [*EQUAL, DROPPING], ids=lambda case: case.name)
def test_the_same_number_of_ranks_continues_exactly(results, case) -> None:
    """Dropout too: each rank's random numbers go on."""
    whole, again = results["two"][0][case], results["again"][0][case]
    assert again == whole[SAVED_AT:]
    losses = column(whole, "loss")
    assert len({round(loss, 6) for loss in losses}) == LAST_STEP


@pytest.mark.parametrize("case", EQUAL, ids=lambda case: case.name)
def test_two_ranks_then_three_then_one_give_equal_losses(results, case) -> None:
    whole = results["two"][0][case]
    other = results["three"][0][case] + results["one"][0][case]
    assert len(other) == LAST_STEP - SAVED_AT
    for found, expected in zip(other, whole[SAVED_AT:], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6 if case.dtype == "fp32" else 1e-3)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4 if case.dtype == "fp32" else 5e-2)


@pytest.mark.parametrize("case", EQUAL, ids=lambda case: case.name)
def test_parts_give_rates_beside_an_adapter(results, case) -> None:
    steps = results["two"][0][case] + results["three"][0][case] + results["one"][0][case]
    ratios = [{part: rate / step["learning_rate"] for part, rate in step["rates_by_part"].items()} for step in steps]
    assert ratios == [{} if case.rate is None else {"projector": pytest.approx(case.rate / 3e-3)}] * len(steps)


def test_dropout_changes_the_losses(results) -> None:
    plain = next(case for case in EQUAL if vars(case) == vars(DROPPING) | {"dropout": 0.0, "in_files": False})
    assert results["two"][0][plain][0]["loss"] == pytest.approx(results["two"][0][DROPPING][0]["loss"], rel=1e-5)
    assert column(results["two"][0][plain], "loss")[2] != column(results["two"][0][DROPPING], "loss")[2]


def test_the_first_loss_is_the_base_s(results) -> None:
    two = results["two"][0]
    lora, sharded = EQUAL[0], EQUAL[4]
    assert two["first", lora] == two["base", lora]
    assert two["first", sharded] == two["base", sharded]
    for case in EQUAL:
        close = 1e-6 if case.dtype == "fp32" and not case.quantize else 1e-2
        assert two["first", case] == pytest.approx(two["base", lora], rel=close)


@pytest.mark.parametrize("case", EQUAL, ids=lambda case: case.name)
def test_steps_move_exactly_what_is_trained(results, case) -> None:
    """And the optimizer has states of nothing else: its shards are padded to equal lengths."""
    trained, moved, states, sizes = results["two"][0]["weights", case]
    assert moved == trained
    whole = {name for name in trained if not is_adapter(name)}
    assert whole == {
        f"model.visual.merger.{name}" for name in ("ln_q.weight", "ln_q.bias", "mlp.0.weight", "mlp.0.bias",
                                                    "mlp.2.weight", "mlp.2.bias")
    }  # fmt: skip
    assert {name.split(".")[1] for name in trained} == {"language_model", "visual"}
    assert sizes / 2 <= states < sizes / 2 + 300


@pytest.mark.parametrize("case", EQUAL, ids=lambda case: case.name)
def test_a_checkpoint_holds_no_frozen_weight_that_lies_in_files(results, folder, case) -> None:
    trained = results["two"][0]["weights", case][0]
    held: set[str] = set()
    for file in (folder / case.name / "deepspeed").glob("*model_states.pt"):
        state = torch.load(file, map_location="cpu", weights_only=False)
        held |= {name for name, weight in state["module"].items() if weight.numel() or case.stage < 3}
        held |= set(state.get("frozen_param_fragments") or ()) | {n for g in state["param_shapes"] for n in g}
    if case.in_files:
        assert held == trained
    else:
        assert held > trained
        assert "model.language_model.embed_tokens.weight" in held
    record = json.loads((folder / case.name / "adapter.json").read_text())
    assert (set(record["base"] or ()) == {"model.safetensors", "config.json"}) is case.in_files


def test_another_adapter_or_base_is_refused_with_what_differs(results) -> None:
    refusals = results["one"][0]["refusals"]
    for name, said in {
        "rank": "training.adapter.rank was 4, is 8",
        "parts": "training.adapter.parts was ('language', 'vision'), is ('language',)",
        "no adapter": "holds an adapter (training.adapter: lora of rank 4); set it back",
        "no adapter before": "is of a training without an adapter; remove training.adapter",
        "other model": "was trained with another model.path and model.config, and its weights do not fit this one: ",
        "other base": "belongs to another base model: model.safetensors differ",
        "random base": "the base was files (model.path)",
    }.items():
        assert said in refusals[name], name
        assert "\n" not in refusals[name]
    assert results["one"][0]["other dropout"] == SAVED_AT + 1
