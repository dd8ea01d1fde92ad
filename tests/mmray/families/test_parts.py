"""`Family.parts`: every weight of every model lies in exactly one part, and in the right one."""

import copy

import pytest
import torch

from mmray.errors import UserError
from mmray.families import FAMILIES, model_parts
from mmray.families.generic import Generic
from mmray.families.parts import Parts
from tests.mmray.families.small_models import small_model
from tests.mmray.families.zoo import ZOO


def family_class(member):
    served = [
        family
        for family in FAMILIES
        if member.model_type in family.model_types and member.processor in (None, *family.processor_classes)
    ]
    (found,) = served or [Generic]
    return found


@pytest.fixture(params=list(ZOO), scope="module")
def modelled(request, zoo_folder):
    """A member that needs no processor here, and its model."""
    member = ZOO[request.param]
    if member.missing_for_model:
        pytest.skip(f"{member.name} needs {', '.join(member.missing_for_model)}")
    return member, small_model(member.name, zoo_folder(member.name), member.attentions[0])


def parts_of(member, model):
    family = family_class(member)
    return family.parts(family.__new__(family), model)  # a family's parts need no processor


def test_every_parameter_lies_in_one_part(modelled):
    member, model = modelled
    names = parts_of(member, model).parameters(model)
    listed = [name for part in names.values() for name in part]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    assert len({id(model.get_parameter(name)) for name in listed}) == len(listed)
    assert all(names[part] for part in ("vision", "projector", "language", "embeddings"))


def test_a_model_alone_tells_its_parts(modelled):
    """Also where two families serve its type, as those of LLaVA and Pixtral."""
    member, model = modelled
    assert model_parts(model) == parts_of(member, model)


def test_the_embeddings_are_those_that_transformers_tells(modelled):
    member, model = modelled
    parts, names = parts_of(member, model), {id(weight): name for name, weight in model.named_parameters()}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert parts.part_of(names[id(module.weight)]) == "embeddings"
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for name in parts.parameters(model)["language"]:
        assert vocabulary not in model.get_parameter(name).shape, f"{name} is a table of tokens"


def test_text_runs_the_language_model_and_not_the_vision_tower(modelled):
    """By gradients, not by names: text alone needs all of the language model and nothing of the tower."""
    member, model = modelled
    names = parts_of(member, model).parameters(model)
    model = copy.deepcopy(model).requires_grad_(True)
    ids = torch.arange(3, 9)[None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    logits.pow(2).sum().backward()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert not reached & set(names["vision"] + names["audio"])
    seeing = [f".layers.{k}." for k in getattr(model.config.get_text_config(), "cross_attention_layers", ())]
    unreached = set(names["language"] + names["embeddings"]) - reached
    assert not [name for name in unreached if not any(part in name for part in (*member.unused, *seeing))]


def test_every_name_stands_for_something_in_some_model(zoo_folder):
    """A name that a release of transformers has changed would hold nothing, and say nothing."""
    for family in FAMILIES:
        members = [member for member in ZOO.values() if family_class(member) is family]
        if any(member.missing_for_model for member in members):
            continue
        models = [small_model(each.name, zoo_folder(each.name), each.attentions[0]) for each in members]
        present = {name for model in models for name, _ in (*model.named_modules(), *model.named_parameters())}
        named = {name for _, names in family.module_names.items() for name in names}
        assert not {name for name in named - present if not name.startswith(RARE)}, family.__name__


RARE = ("model.density_router", "model.audio_tower", "model.embed_audio", "model.language_model.embed_tokens_per_layer")
"""Modules that no small model of the zoo has."""


class Outside(torch.nn.Module):
    """A model with a weight that no part names."""

    def __init__(self):
        super().__init__()
        self.see = torch.nn.Linear(2, 2)
        self.write = torch.nn.Linear(2, 2)
        self.stray = torch.nn.Linear(2, 2)


def test_a_weight_of_no_part_is_told():
    parts = Parts(vision=("see",), projector=("see.bias",), language=("write",), embeddings=("write.bias",))
    with pytest.raises(UserError, match=r"Outside has the weight 'stray\.weight', which belongs to none"):
        parts.of(Outside())
    whole = Parts(vision=("see",), projector=("stray",), language=("write",), embeddings=("gone",))
    with pytest.raises(UserError, match=r"no weights in the parts that mmray names: embeddings"):
        whole.of(Outside())


def test_a_longer_name_takes_its_weights_from_a_shorter_one():
    parts = Parts(vision=("model.visual",), projector=("model.visual.merger",))
    assert parts.part_of("model.visual.merger.mlp.weight") == "projector"
    assert parts.part_of("model.visual.merger_norm.weight") == "vision"
    with pytest.raises(KeyError):
        parts.part_of("model.visuals.weight")


def test_a_model_that_transformers_cannot_take_apart_is_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(UserError, match="LlamaForCausalLM are its vision tower and its language model"):
        Generic.parts(Generic.__new__(Generic), AutoModelForCausalLM.from_config(config))
