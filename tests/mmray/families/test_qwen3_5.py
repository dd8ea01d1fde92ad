"""Qwen3.5 with the kernels that let it pack: stand-ins of plain torch that keep samples apart as the real ones say they
do, found and called by transformers' own code."""

import dataclasses
import functools
import importlib
import sys
import types

import pytest
import torch
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from mmray.families import family_of
from mmray.families.qwen3_5 import missing_kernels
from mmray.packing.settings import PackingSettings
from tests.mmray.families.small_models import small_model
from tests.mmray.families.test_packed_equals_unpacked import (
    CHATS,
    PAGES,
    PICTURES,
    Case,
    check_equal,
    error,
    logits_of,
)
from tests.mmray.families.zoo import ZOO
from tests.mmray.noise import noise
from tests.mmray.preparing import Preparation, write_rows

NAMES = ["qwen3_5", "qwen3_5_moe"]
BOTH = ["flash-linear-attention", "causal-conv1d"]


def delta_rule(reference):
    """In the signature of flash-linear-attention's `chunk_gated_delta_rule`; the reference for each sample."""

    def chunk_gated_delta_rule(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
        cu_seqlens=None,
    ):  # fmt: skip
        sizes = [q.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
        pieces = zip(*(each.split(sizes, dim=1) for each in (q, k, v, g, beta)))
        rule = functools.partial(reference, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)
        return torch.cat([rule(*piece)[0] for piece in pieces], dim=1), None

    return chunk_gated_delta_rule


def convolution(reference):
    """In the signature of causal-conv1d's `causal_conv1d_fn`; the reference for each run of one number in `seq_idx`."""

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
        if seq_idx is None:
            return reference(x, weight, bias, activation)
        assert seq_idx.shape == (1, x.shape[2])
        assert seq_idx.dtype == torch.int32
        sizes = seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
        return torch.cat([reference(piece, weight, bias, activation) for piece in x.split(sizes, dim=2)], dim=2)

    return causal_conv1d_fn


def module(monkeypatch, name, **functions):
    made = types.ModuleType(name)
    vars(made).update(functions)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def install(monkeypatch):
    """A function: packages with these functions can be imported, and the model's file has looked for them."""

    def install(model_type, rule=delta_rule, conv=convolution):
        model_file = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
        references = {
            "torch_chunk_gated_delta_rule": ("chunk_gated_delta_rule", "fla"),
            "causal_conv1d_fn": ("causal_conv1d_fn", "causal_conv1d"),
        }
        plain = {name: getattr(model_file, name).__wrapped__ for name in references}
        if rule:
            module(monkeypatch, "fla")
            module(monkeypatch, "fla.ops")
            function = rule(plain["torch_chunk_gated_delta_rule"])
            module(monkeypatch, "fla.ops.gated_delta_rule", chunk_gated_delta_rule=function)
        if conv:
            module(monkeypatch, "causal_conv1d", causal_conv1d_fn=conv(plain["causal_conv1d_fn"]))
        for name, (function, package) in references.items():
            found = use_kernel_func_from_hub_with_fallback(function, package)(plain[name])
            monkeypatch.setattr(model_file, name, found)

    return install


@pytest.fixture(scope="module")
def packed_case(zoo_folder, zoo_processor, tmp_path_factory):
    """A function: samples of every layout of a model in one bin."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp("rows")
        for seed, (picture, size) in enumerate(PICTURES.items()):
            noise(size, seed).save(folder / picture)
        family = family_of(zoo_processor(name), model_type=name)
        chats = {"files": write_rows(folder / "chat.jsonl", CHATS), "kind": "chat"}
        pages = {"files": write_rows(folder / "pages.jsonl", PAGES), "kind": "pretrain", "add_eos": False}
        packing = PackingSettings(token_capacity=100_000, visual_capacity=100_000)
        preparation = Preparation(family, chats, pages, packing=packing)
        member = dataclasses.replace(ZOO[name], refuses=None)
        model = small_model(name, zoo_folder(name))
        return Case(member, model, preparation.family, folder, preparation.write(folder / "prepared"))

    return make


def problem(case):
    return case.family.packing_problem(case.model.config, sample_tokens=1000, row_tokens=1000)


@pytest.mark.parametrize("name", NAMES)
def test_with_both_kernels_a_bin_equals_its_samples(install, packed_case, name):
    case = packed_case(name)
    install(name)
    assert len(case.prepared) == 1
    assert problem(case) is None
    check_equal(case, 0)


@pytest.mark.parametrize("left_out", [("seq_idx",), ("cu_seq_lens_q",), ("seq_idx", "cu_seq_lens_q")])
@pytest.mark.parametrize("name", NAMES)
def test_with_one_of_both_inputs_samples_see_each_other(install, packed_case, name, left_out):
    case = packed_case(name)
    install(name)
    inputs = {key: value for key, value in case.inputs(case.micro_batch(0)).items() if key not in left_out}
    packed = logits_of(case.model, inputs)
    errors = [error(packed[where], logits_of(case.model, alone)) for alone, where in case.samples([0])]
    assert max(errors) > 0.1


@pytest.mark.parametrize("kernels", [{"rule": None}, {"conv": None}, {"rule": None, "conv": None}])
@pytest.mark.parametrize("name", NAMES)
def test_without_a_kernel_transformers_refuses_what_separates_samples(install, packed_case, name, kernels):
    case = packed_case(name)
    install(name, **kernels)
    with pytest.raises(ValueError, match="packed sequences"):
        logits_of(case.model, case.inputs(case.micro_batch(0)))


def test_what_is_missing_is_named(install):
    assert missing_kernels() == BOTH
    install("qwen3_5", conv=None)
    assert missing_kernels() == ["causal-conv1d"]
    install("qwen3_5", rule=None)
    assert missing_kernels() == []


def test_a_kernel_too_old_to_keep_samples_apart_is_missing(install):
    """transformers leaves out arguments that a function does not name."""
    install("qwen3_5", rule=lambda reference: lambda q, k, v, g, beta: None)
    assert missing_kernels() == ["flash-linear-attention"]


def test_a_package_that_fails_while_it_is_imported_is_missing(install, monkeypatch):
    install("qwen3_5")
    module(monkeypatch, "causal_conv1d", __getattr__=lambda name: 1 / 0)
    assert missing_kernels() == ["causal-conv1d"]


def test_without_linear_attention_nothing_is_missing(packed_case):
    case = packed_case("qwen3_5")
    assert "flash-linear-attention and causal-conv1d" in problem(case)
    text = case.model.config.text_config.to_dict() | {"layer_types": ["full_attention"] * 3}
    config = type(case.model.config)(text_config=text)
    assert case.family.packing_problem(config, sample_tokens=1000, row_tokens=1000) is None
