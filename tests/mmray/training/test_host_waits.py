"""A step waits for its device at most twice in mmray's own frames: for its loss, and for the gradients' norm.

Counted are the operations whose result a GPU would have to hand to the host, by what torch dispatches while a step
runs, and the innermost frame that is not torch's. What DeepSpeed and transformers do in theirs is theirs.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mmray
from tests.mmray.training import scenarios, tiny
from tests.mmray.training.ranks import RankGroup

HERE = str(Path(mmray.__file__).parent)
TORCH = str(Path(torch.__file__).parent)
WAITING = {
    "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.bincount", "aten._unique2", "aten.equal",
    "aten.unique_consecutive", "aten.unique_dim", "aten.is_nonzero",
}  # fmt: skip
MICRO_BATCHES = 2


def frame() -> str | None:
    """The innermost frame outside torch and this file, as `file:line`, where it is mmray's."""
    at = sys._getframe(1)
    while at.f_back is not None and at.f_code.co_filename.startswith((TORCH, __file__, "<")):
        at = at.f_back
    name = at.f_code.co_filename
    return f"{name.removeprefix(HERE)}:{at.f_lineno}" if name.startswith(HERE) else None


class Dispatched(TorchDispatchMode):
    """Notes each operation of mmray's frames that a GPU would make the host wait for."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).rpartition(".")[0]
        masked = name in ("aten.index", "aten.index_put_", "aten.index_put") and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        unsized = name == "aten.repeat_interleave" and kwargs.get("output_size") is None
        if (name in WAITING or masked or unsized) and (where := frame()):
            self.waits.append(f"{name.removeprefix('aten.')} {where}")
        return func(*args, **kwargs)


class Called(TorchFunctionMode):
    """Notes calls that read a tensor without an operation on a CPU."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.cpu) and (where := frame()):
            self.waits.append(f"{func.__name__} {where}")
        return func(*args, **(kwargs or {}))


def waits_of(work: Callable[[], object]) -> list[str]:
    waits: list[str] = []
    with Called(waits), Dispatched(waits):
        work()
    return waits


def waits_of_steps(rank: int, world_size: int) -> dict[scenarios.Case, list[str]]:
    """The waits of a step of several micro-batches, by ZeRO stage and dtype."""
    found = {}
    for case in ((1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")):
        engine = scenarios.build(case, MICRO_BATCHES)
        batches = [tiny.micro_batches(tiny.global_batch(step), rank, world_size, MICRO_BATCHES) for step in range(2)]
        engine.step(batches[0])
        found[case] = waits_of(lambda engine=engine, batch=batches[1]: engine.step(batch))
        engine.close()
    return found


def test_a_step_waits_twice() -> None:
    (found,) = RankGroup(1, waits_of_steps).results()
    for case, waits in found.items():
        assert len(waits) == 2, f"stage {case[0]}, {case[1]}: {waits}"
        assert all("/training/engine.py" in wait for wait in waits), waits


@pytest.mark.parametrize(
    "work",
    [
        lambda values: values.nonzero(), lambda values: values[values > 0], lambda values: values.sum().item(),
        lambda values: values.tolist(), lambda values: float(values.sum()), lambda values: bool(values.any()),
        lambda values: values.bincount(), lambda values: torch.repeat_interleave(values, values),
        lambda values: values.cpu(),
    ],
)  # fmt: skip
def test_what_waits_is_counted(work: Callable[[torch.Tensor], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """By this counter, were it in mmray."""
    monkeypatch.setattr(sys.modules[__name__], "HERE", str(Path(pytest.__file__).parent.parent))
    values = torch.tensor([0, 1, 2])
    assert len(waits_of(lambda: work(values))) == 1
    assert waits_of(lambda: values[torch.tensor([1])] + values.sum()) == []
