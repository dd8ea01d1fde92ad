"""What `training.parts` and `training.stages` say of a model's weights, judged by names alone."""

from typing import Any

import pytest
from torch import nn

from mmray.errors import UserError
from mmray.training.model import empty_model
from mmray.training.part_report import stage_facts
from mmray.training.settings import TrainingSettings
from mmray.training.treatments import plain_name, stages_of, treatments, weight_groups, weight_names
from tests.mmray.training import tiny

UNTIED = {"config": tiny.TINY_QWEN2_VL | {"tie_word_embeddings": False}}
LAYERS = "model.language_model.layers"


@pytest.fixture(scope="module")
def model() -> Any:
    return empty_model(tiny.model_settings())


def groups_of(model: Any, parts: dict[str, Any] | None = None, stage: int = 0, **settings: Any) -> list[Any]:
    training = tiny.training_settings(parts=parts or {}, **settings)
    stages = stages_of(training, 6)
    return weight_groups(model, training, stages, stages[stage])


def test_without_parts_there_are_the_two_usual_groups(model: Any) -> None:
    decayed, plain = groups_of(model)
    weights = dict(model.named_parameters())
    assert list(decayed.names) == [name for name, weight in weights.items() if weight.dim() >= 2]
    assert list(plain.names) == [name for name, weight in weights.items() if weight.dim() == 1]
    assert (decayed.weight_decay, plain.weight_decay, decayed.learning_rate) == (0.1, 0.0, 3e-3)


@pytest.mark.parametrize(
    "parts",
    [
        {"vision": "frozen"},
        {"projector": {"learning_rate": 1e-5}, "language": {"weight_decay": 0.3}, "embeddings": "frozen"},
        {f"{LAYERS}.0.*": "frozen", f"{LAYERS}.1.*norm*": {"learning_rate": 1e-4}, "vision": {}},
    ],
)
def test_every_trained_weight_is_in_one_group_and_none_is_empty(model: Any, parts: dict[str, Any]) -> None:
    treated = treatments(model, stages_of(tiny.training_settings(parts=parts), 6)[0], tiny.training_settings())
    groups = groups_of(model, parts)
    grouped = [name for group in groups for name in group.names]
    assert all(group.names for group in groups)
    assert sorted(grouped) == sorted(name for name in treated if not treated[name].is_frozen)
    for group in groups:
        assert {treated[name].learning_rate for name in group.names} == {group.learning_rate}


def test_a_pattern_comes_before_a_part(model: Any) -> None:
    groups = groups_of(model, {"vision": "frozen", "model.visual.blocks.1.*": {"learning_rate": 1e-6}})
    vision = [group for group in groups for name in group.names if name.startswith("model.visual.blocks")]
    assert {name for group in vision for name in group.names} == {
        name for name, _ in model.named_parameters() if name.startswith("model.visual.blocks.1.")
    }
    assert {group.learning_rate for group in vision} == {1e-6}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"visoin": "frozen"}, r"training\.parts: 'visoin' is no part .* nearest: vision"),
        ({"audio": "frozen"}, r"a Qwen2VLForConditionalGeneration has no part audio"),
        ({"model.visual.block.*": "frozen"}, r"matches no weight .*; nearest: model\.visual\.blocks\."),
        ({"model.visual.blocks.0": "frozen"}, r"is a module and no weight; write model\.visual\.blocks\.0\.\* for all"),
        ({"vision": "frozen", "model.visual.*": {}}, r"vision has no weight that no pattern takes.*leave vision out"),
        (
            {"*.layers.0.*": "frozen", "*norm*": {}},
            r"layers\.0\.input_layernorm\.weight is treated differently by '\*\.layers\.0\.\*' and by '\*norm\*'",
        ),
        (
            {"lm_head.weight": "frozen"},
            (
                r"lm_head\.weight and model\.language_model\.embed_tokens\.weight are tied, one weight, and the first "
                r"is frozen, the second trained with learning_rate 0\.003"
            ),
        ),
        ({"*": "frozen"}, r"training\.parts freezes every weight of the model: nothing would be trained"),
        (dict.fromkeys(("vision", "projector", "language", "embeddings"), "frozen"), "freezes every weight"),
    ],
)
def test_what_fits_no_weight_is_refused(model: Any, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        groups_of(model, parts)


def test_an_untied_head_may_be_frozen_alone() -> None:
    groups = groups_of(empty_model(tiny.model_settings(**UNTIED)), {"lm_head.weight": "frozen"})
    names = {name for group in groups for name in group.names}
    assert "lm_head.weight" not in names
    assert "model.language_model.embed_tokens.weight" in names


def test_the_place_of_a_mistake_is_named(model: Any) -> None:
    with pytest.raises(UserError, match=r"training\.stages\.0\.parts: a Qwen2VL.* has no part audio"):
        groups_of(model, stages=[{"steps": 2, "parts": {"audio": "frozen"}}])


def test_groups_tell_since_when_their_weights_are_trained(model: Any) -> None:
    rest = dict.fromkeys(("vision", "language", "embeddings"), "frozen")
    stages = [{"steps": 1, "parts": rest}, {"steps": 1, "parts": {"vision": "frozen", "projector": "frozen"}}]
    since = [
        {
            name.split(".")[2]: group.since
            for group in groups_of(model, {}, number, stages=stages, warmup_steps=0)
            for name in group.names
        }
        for number in range(3)
    ]
    assert since[0] == {"merger": 0}
    assert since[1] == {"layers": 1, "norm": 1, "embed_tokens": 1}
    merger = [
        g for g in groups_of(model, {}, 2, stages=stages, warmup_steps=0) if any(".merger." in name for name in g.names)
    ]
    assert {group.since for group in merger} == {2}
    assert {n for g in merger for n in g.names} == {
        n for n, _ in model.named_parameters() if n.startswith("model.visual")
    }


def test_what_the_model_itself_does_not_train_is_in_no_group() -> None:
    model = empty_model(tiny.model_settings())
    for name, weight in model.named_parameters():
        weight.requires_grad_("visual" in name)
    assert all("visual" in name for group in groups_of(model, {"language": "frozen"}) for name in group.names)
    with pytest.raises(UserError, match="leaves no weight to train"):
        groups_of(model, {"vision": "frozen", "projector": "frozen"})
    with pytest.raises(UserError, match=r"language is given settings, .* the adapter does not touch it"):
        groups_of(model, {"language": {"learning_rate": 1e-4}})


def test_weights_of_an_adapter_are_treated_as_those_that_they_adapt() -> None:
    layer = f"{LAYERS}.0.self_attn.q_proj"
    for adapted in (
        "lora_A.default.weight",
        "lora_B.default.weight",
        "lora_magnitude_vector.default",
        "base_layer.weight",
    ):
        assert plain_name(f"{layer}.{adapted}") == f"{layer}.weight"
    assert plain_name("model.visual.merger.modules_to_save.default.mlp.0.bias") == "model.visual.merger.mlp.0.bias"
    assert plain_name("model.visual.merger.original_module.mlp.0.bias") == "model.visual.merger.mlp.0.bias"
    import peft

    model = empty_model(tiny.model_settings())
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=r".*(q_proj|attn\.qkv)"), model)
    parts = {"vision": "frozen", f"{LAYERS}.1.*.q_proj.weight": {"learning_rate": 1e-4}}
    groups = groups_of(model, parts)
    rates = {name: group.learning_rate for group in groups for name in group.names}
    assert rates == {
        f"{LAYERS}.{number}.self_attn.q_proj.lora_{matrix}.default.weight": rate
        for number, rate in ((0, 3e-3), (1, 1e-4))
        for matrix in "AB"
    }
    with pytest.raises(UserError, match=r"vision is frozen, and training.adapter trains .*qkv\.weight; leave"):
        groups_of(model, parts, adapter={})


def test_names_of_tied_weights_are_told_together() -> None:
    model = nn.Module()
    model.one, model.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    model.two.weight = model.one.weight
    assert weight_names(model) == {"one.weight": ["one.weight", "two.weight"]}


def test_facts_of_parts_count_weights_and_states(model: Any) -> None:
    training = TrainingSettings(steps=2, parts={"vision": "frozen", "projector": {"learning_rate": 1e-3}})
    ((_, facts),) = stage_facts(model, tiny.model_settings(dtype="bf16"), training)
    by_name = {fact.name: fact for fact in facts}
    assert set(by_name) == {"vision", "projector", "language", "embeddings"}
    assert sum(fact.weights for fact in facts) == sum(weight.numel() for weight in model.parameters())
    assert by_name["vision"].state_bytes == by_name["vision"].trained == 0
    assert by_name["projector"].state_bytes == 12 * by_name["projector"].weights  # two means and a copy in fp32
    assert by_name["vision"].text.endswith("weights, frozen")
    assert "learning_rate 0.001" in by_name["projector"].text


def test_muon_takes_the_matrices_of_layers(model: Any) -> None:
    groups = groups_of(model, optimizer="muon", muon_learning_rate=0.02)
    by_muon = {name for group in groups if group.by_muon for name in group.names}
    weights = dict(model.named_parameters())
    assert by_muon == {
        name for name, weight in weights.items() if weight.dim() >= 2 and "embed" not in name and "lm_head" not in name
    }
    assert len(by_muon) < len(weights)
    model.model.visual.convolution = nn.Conv2d(3, 4, 2, device="meta")
    convolution = "model.visual.convolution"
    with pytest.raises(
        UserError, match=rf"{convolution}\.weight of the shape \[4, 3, 2, 2\] is a convolution; freeze it"
    ):
        groups_of(model, optimizer="muon", muon_learning_rate=0.02)
    groups_of(model, {f"{convolution}.*": "frozen"}, optimizer="muon", muon_learning_rate=0.02)
