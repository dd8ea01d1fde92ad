"""A check, from names and shapes alone, that the files of a model hold its weights.

transformers draws weights that a file lacks at random, leaves out those it does not know, and goes on; under ZeRO-3 it
does not even look at what is left over. So the headers of the files (some kilobytes of many gigabytes) are put through
transformers' own loading first, into a model without memory: its renamings, merged experts, tied weights and what each
class leaves out on purpose are those of the real load, whatever the ZeRO stage.
"""

import fnmatch
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig, _get_resolved_checkpoint_files
from transformers.utils import logging as transformers_logging

from mmray.base.words import one_line
from mmray.errors import UserError

PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
"""Stored types whose numbers are the weights themselves, by their names in safetensors."""
SHOWN = 6
"""The most groups of names in a message; names that differ in numbers alone are one group."""
_NUMBER = re.compile(r"\.\d+(?=\.|$)")
ADAPTER_PREFIX = "base_model.model."


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a file: its shape, and the name of its type in safetensors, such as BF16."""

    shape: tuple[int, ...]
    dtype: str


class UnknownWeights(Exception):
    """Raised where the contents of the files cannot be known from here; the message says why."""


@dataclass(frozen=True)
class Fit:
    """The result of comparing the weights in files with a model. Names are the model's, after transformers'
    renaming."""

    missing: list[str]
    """Weights that are in no file: they would be drawn at random."""
    unexpected: list[str]
    """Weights in a file that have no place in the model: they would be left out."""
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Weights of another shape: (in the files, in the model)."""
    unmergeable: list[str]
    """Weights that are merged from several in the files, which do not fit together."""
    codes: list[str]
    """Weights of the model that are real numbers, and are stored as integers or in 8 bits: codes without their
    scales."""


def stored_weights(path: str, *, download: bool) -> dict[str, StoredWeight]:
    """The weights in the files of a folder or hub name, by name, read from their headers.

    download: whether to fetch files of a hub name that are not here, as loading the model would; otherwise the hub is
    asked for their headers.
    Raises UserError for files that cannot be read, UnknownWeights where the hub does not answer.
    """
    try:
        files = _files(path, local_only=not download)
    except OSError as error:
        if not download and not Path(path).is_dir():
            return _hub_weights(path)
        raise UserError(f"cannot find the weights of {path}: {error}") from error
    stored: dict[str, StoredWeight] = {}
    for file in files:
        try:
            stored |= _file_weights(file)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"cannot read the weights in {file}: {error}; copy the file anew") from error
    return stored


def weight_files(path: str) -> list[str]:
    """The files with the weights of a folder or hub name that are on this machine. Raises UserError for none."""
    try:
        return _files(path, local_only=True)
    except OSError as error:
        raise UserError(f"cannot find the weights of {path}: {error}") from error


def _files(path: str, *, local_only: bool) -> list[str]:
    """The files that transformers would load. Raises UserError for a list of files that cannot be read."""
    try:
        files, _ = _get_resolved_checkpoint_files(
            path, variant=None, gguf_file=None, use_safetensors=None, user_agent=None, is_remote_code=False,
            download_kwargs={"local_files_only": local_only},
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # of JSON, and of what is in it
        raise UserError(
            f"the list of the files of {path} (*.index.json) cannot be read: {one_line(error)}; copy it anew"
        ) from error
    return files or []


def _file_weights(file: str) -> dict[str, StoredWeight]:
    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: StoredWeight(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    state: dict[str, Tensor] = torch.load(file, map_location="meta", weights_only=True)
    return {name: StoredWeight(tuple(weight.shape), _dtype_name(weight.dtype)) for name, weight in state.items()}


def _dtype_name(dtype: torch.dtype) -> str:
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def _hub_weights(name: str) -> dict[str, StoredWeight]:
    try:
        files = get_safetensors_metadata(name).files_metadata.values()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UnknownWeights(f"{name} is not on this machine, and the hub does not tell: {reason:.200}") from error
    return {
        tensor: StoredWeight(tuple(info.shape), info.dtype) for file in files for tensor, info in file.tensors.items()
    }


def fit(make_empty: Callable[[], PreTrainedModel], stored: Mapping[str, StoredWeight]) -> Fit:
    """Compares stored weights with a model. make_empty: makes the model on the meta device."""
    model = make_empty()
    real = {name for name, weight in model.state_dict().items() if weight.is_floating_point()}
    weights_fit = _fit(model, stored)
    plain = {name: weight for name, weight in stored.items() if weight.dtype in PLAIN_DTYPES}
    if len(plain) == len(stored):
        return weights_fit
    of_plain = _fit(make_empty(), plain)  # which lacks those of other types, under the model's names
    lacking = {*of_plain.missing, *of_plain.unmergeable} - {*weights_fit.missing, *weights_fit.unmergeable}
    return replace(weights_fit, codes=sorted(lacking & real))


def _fit(empty: PreTrainedModel, stored: Mapping[str, StoredWeight]) -> Fit:
    """Compares names and shapes with a model on the meta device, which is filled with them and of no further use."""
    state = {name: torch.empty(weight.shape, device="meta") for name, weight in stored.items()}
    conversions: Any = get_model_conversion_mapping(empty, None, None)
    config = LoadStateDictConfig(device_map={"": "meta"}, dtype=torch.float32, weight_mapping=conversions)
    with _no_progress_bar():
        info, _ = empty._load_pretrained_model(empty, state, None, config)
    empty.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    empty._adjust_missing_and_unexpected_keys(info)
    broken = set(info.conversion_errors)
    return Fit(
        missing=sorted(info.missing_keys - broken),
        unexpected=sorted(info.unexpected_keys),
        mismatched={
            name: (tuple(stored_shape), tuple(wanted)) for name, stored_shape, wanted in sorted(info.mismatched_keys)
        },
        unmergeable=sorted(broken),
        codes=[],
    )


def check_fit(path: str, weights_fit: Fit, allowed: Sequence[str]) -> str:
    """Checks that weights fit. Returns a text on those that `allowed` (`model.allow_missing`) lets pass; "" for none.

    Raises UserError naming every weight of `path` that does not fit.
    """
    missing, unexpected = (_without(names, allowed) for names in (weights_fit.missing, weights_fit.unexpected))
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing from the files, which would be drawn at random: {listed(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} in the files that the model does not have: {listed(unexpected)}")
    if weights_fit.mismatched:
        shapes = [f"{list(stored)} instead of {list(wanted)}" for stored, wanted in weights_fit.mismatched.values()]
        problems.append(f"{len(shapes)} of another shape: {listed(list(weights_fit.mismatched), shapes)}")
    if weights_fit.unmergeable:
        problems.append(
            f"{len(weights_fit.unmergeable)} whose parts do not go together: {listed(weights_fit.unmergeable)}"
        )
    if weights_fit.codes:
        problems.append(
            f"{len(weights_fit.codes)} stored as integers or in 8 bits without what turns them into weights: "
            f"{listed(weights_fit.codes)}"
        )
    if problems:
        remedy = "give whole files of this model, or, where it is meant, name the weights in model.allow_missing"
        if any(name.startswith(ADAPTER_PREFIX) for name in unexpected):
            remedy = "these are an adapter's names (PEFT): merge it into its base model and give the merged one"
        elif weights_fit.codes:
            remedy = "the files are quantised and config.json does not say how: give the model in bf16, fp16 or fp32"
        elif not missing and not unexpected:
            remedy = "config.json or the files are another model's: give those that belong together"
        raise UserError(f"the weights of {path} do not fit its model: {'; '.join(problems)}. Remedy: {remedy}")
    exempt = [
        f"{len(names)} {said}: {listed(names)}"
        for names, said in ((weights_fit.missing, "drawn at random"), (weights_fit.unexpected, "left out"))
        if names
    ]
    return "; ".join(exempt)


def check_patterns(allowed: Sequence[str], names: Collection[str]) -> None:
    """Raises UserError for a pattern of `model.allow_missing` that matches no weight, in the model or in its files."""
    for pattern in allowed:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"model.allow_missing: {pattern!r} is the name of no weight, in the model or in its files")


def _without(names: Sequence[str], allowed: Sequence[str]) -> list[str]:
    return [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed)]


def listed(names: Sequence[str], said: Sequence[str] = ()) -> str:
    """Names in one line; those that differ in numbers alone as one pattern. said: a text for each name."""
    patterns = [_NUMBER.sub(".*", name) for name in names]
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, key in zip(names, zip(patterns, said) if said else zip(patterns), strict=True):
        groups.setdefault(key, []).append(name)
    shown = [
        " ".join([of_group[0] if len(of_group) == 1 else f"{pattern} ({len(of_group)} times)", *more])
        for (pattern, *more), of_group in groups.items()
    ]
    num_more = sum(map(len, list(groups.values())[SHOWN:]))
    return ", ".join(shown[:SHOWN]) + (f", and {num_more} more" if num_more else "")


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
