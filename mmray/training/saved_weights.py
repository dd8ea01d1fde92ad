"""The weights in a checkpoint's DeepSpeed files, whatever the ZeRO stage and the number of ranks, one at a time.

Up to stage 2 rank 0 saves the weights whole, in the dtype of training. Masters in fp32, of a bf16 training, lie in the
optimizer's files, a piece with each rank; so do all weights of stage 3. DeepSpeed's own `zero_to_fp32.py` joins these
all at once, which takes the memory of every group twice, and refuses the files that its BF16 optimizer writes. Here a
weight is put together when it is asked for: files are mapped, and mapped anew after READ_AT_ONCE bytes, so that what
was read does not stay in memory.

DeepSpeed loads its files with whatever code they name. Here they are read as tensors and plain values, with three small
classes of DeepSpeed's own besides: exporting a checkpoint runs no code from it.
"""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmray.base.words import one_line
from mmray.errors import UserError
from mmray.training.deepspeed_config import import_deepspeed

READ_AT_ONCE = 1 << 29
"""Bytes that are read from mapped files before they are mapped anew."""

_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt$")
_WHOLE = "mp_rank_00_model_states.pt"


@dataclass(frozen=True)
class _Piece:
    """A part of a weight: `count` numbers from `start` on, in a flat tensor of the optimizer state in a file."""

    file: str
    group: int
    start: int
    count: int


class SavedWeights:
    """Read access to the weights below `folder`, the `deepspeed/` of a checkpoint."""

    def __init__(self, folder: Path, *, zero_stage: int, masters: bool) -> None:
        """Opens the files. masters: whether to read the fp32 masters, which a bf16 training keeps beside its weights.

        Raises UserError where files are missing or cannot be read.
        """
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns where it has to find that out
        import_deepspeed()
        self._files = _MappedFiles(folder)
        names = [path.name for path in folder.glob("*.pt")]
        self._model_files = sharded_files(names, "model") if zero_stage == 3 else [_WHOLE]
        optimizer_files = sharded_files(names, "optim") if reads_optimizer(zero_stage, masters=masters) else []
        if not set(self._model_files) <= set(names) or not self._model_files:
            raise UserError(f"{folder} holds no weights of ZeRO stage {zero_stage}: its files are {sorted(names)}")
        first = self._files[self._model_files[0]]
        self._shapes: dict[str, tuple[int, ...]] = {
            name: tuple(shape) for group in first["param_shapes"] or [] for name, shape in group.items()
        }
        self._frozen = {name: tuple(shape) for name, shape in (first["frozen_param_shapes"] or {}).items()}
        self._shared: dict[str, str] = dict(first["shared_params"] or {})
        self._zero_stage = zero_stage
        if zero_stage == 3:
            self._pieces = self._pieces_of_stage_3(optimizer_files)
        else:
            self._pieces = self._pieces_of_masters(optimizer_files)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A copy of a weight or buffer, by its name in the model; floating point numbers as `dtype`. Raises
        KeyError."""
        name = self._shared.get(name, name)
        if name in self._pieces:
            parts = [self._flat(piece.file, piece.group)[piece.start :][: piece.count] for piece in self._pieces[name]]
            return self._joined(parts, self._shapes[name], dtype)
        if name in self._frozen and self._zero_stage == 3:
            files = [self._files[file] for file in self._model_files]
            parts = [file["frozen_param_fragments"][name].flatten() for file in files]
            return self._joined(parts, self._frozen[name], dtype)
        saved: Tensor = self._files[self._model_files[0]]["module"][name]
        return self._joined([saved.flatten()], tuple(saved.shape), dtype)

    def __contains__(self, name: str) -> bool:
        """True if the checkpoint holds a weight or buffer."""
        name = self._shared.get(name, name)
        return name in self._pieces or name in self._frozen or name in self._files[self._model_files[0]]["module"]

    def optimizer_state(self) -> dict[str, Any]:
        """The state of the optimizer as torch writes it, of a checkpoint without shards (ZeRO stage 0)."""
        state: dict[str, Any] = self._files[self._model_files[0]]["optimizer"]
        return state

    def _joined(self, parts: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The pieces of a weight, copied one after another into a tensor of this shape; ranks pad their last piece."""
        is_float = parts[0].is_floating_point()
        whole = torch.empty(shape, dtype=dtype if is_float else parts[0].dtype)
        flat, filled = whole.view(-1), 0
        for part in parts:
            part = part[: flat.numel() - filled]
            flat[filled : filled + part.numel()] = part
            filled += part.numel()
        if filled != flat.numel():
            raise UserError(f"the checkpoint holds {filled:,} of the {flat.numel():,} numbers of a weight {shape}")
        self._files.count(sum(part.numel() * part.element_size() for part in parts))
        return whole

    def _flat(self, file: str, group: int) -> Tensor:
        state = self._files[file]["optimizer_state_dict"]
        flats = state["fp32_flat_groups" if self._zero_stage == 3 else "single_partition_of_fp32_groups"]
        flat: Tensor = flats[group]
        return flat

    def _pieces_of_masters(self, files: Sequence[str]) -> dict[str, list[_Piece]]:
        """The pieces of each weight at stages 1 and 2, where DeepSpeed records which rank has which part of it, in
        which group."""
        pieces: dict[str, list[_Piece]] = {}
        for file in files:
            mappings = self._files[file]["optimizer_state_dict"]["param_slice_mappings"]
            for group, mapping in enumerate(mappings):
                for name, place in mapping.items():
                    pieces.setdefault(name, []).append(_Piece(file, group, int(place.start), int(place.numel)))
        return pieces

    def _pieces_of_stage_3(self, files: Sequence[str]) -> dict[str, list[_Piece]]:
        """The pieces of each weight at stage 3, where each rank has an equal part of it, in the order of weights in a
        group."""
        pieces: dict[str, list[_Piece]] = {name: [] for name in self._shapes}
        for file in files:
            groups = self._files[file]["optimizer_state_dict"]["fp32_flat_groups"]
            ends = list(itertools.accumulate(int(flat.numel()) for flat in groups))
            start = 0
            for name, shape in self._shapes.items():
                stop = start + -(-torch.Size(shape).numel() // len(files))
                for group, (first, end) in enumerate(itertools.pairwise([0, *ends])):
                    if start < end and stop > first:
                        inside = max(start, first)
                        pieces[name].append(_Piece(file, group, inside - first, min(stop, end) - inside))
                start = stop
        return pieces


def needed_files(names: Sequence[str], *, zero_stage: int, masters: bool) -> list[str]:
    """The files in a checkpoint's `deepspeed/` that hold its weights. masters: as for `SavedWeights`."""
    models = sharded_files(names, "model") if zero_stage == 3 else [_WHOLE]
    return models + (sharded_files(names, "optim") if reads_optimizer(zero_stage, masters=masters) else [])


def reads_optimizer(zero_stage: int, *, masters: bool) -> bool:
    """True if the weights are read from the optimizer's files."""
    return zero_stage == 3 or (masters and zero_stage > 0)


def sharded_files(names: Sequence[str], kind: str) -> list[str]:
    """The files that each rank wrote, of kind `model` or `optim`, in the order of ranks."""
    ranks = {name: match for name in names if (match := _RANK.search(name)) and match[2] == kind}
    return sorted(ranks, key=lambda name: int(ranks[name][1]))


def _deepspeed_classes() -> list[Any]:
    """The classes that DeepSpeed's files hold besides tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


class _MappedFiles:
    """Files of torch that are memory-mapped when first used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mapped: dict[str, Any] = {}
        self._bytes = 0

    def __getitem__(self, name: str) -> Any:
        if name not in self._mapped:
            path = self._folder / name
            try:
                with torch.serialization.safe_globals(_deepspeed_classes()):
                    self._mapped[name] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:
                raise UserError(f"{path} cannot be read: {one_line(error)}; take another checkpoint") from error
        return self._mapped[name]

    def count(self, num_bytes: int) -> None:
        """Counts bytes that were read; after READ_AT_ONCE of them the files are mapped anew."""
        self._bytes += num_bytes
        if self._bytes > READ_AT_ONCE:
            self._mapped.clear()
            self._bytes = 0
