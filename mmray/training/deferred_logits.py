"""A model's forward pass up to its output head: logits that are described and not computed.

During the forward pass a stand-in takes the head's place. It returns `DeferredLogits`, which hold the hidden states and
write down what the model's class does to the logits afterwards, such as Gemma's soft cap or Granite's scale. So head
and steps can run later, for a few tokens at a time, with any model that treats each logit by itself. Where a class does
anything else, the logits are computed at that moment for all tokens, and the forward pass goes on with them: nothing
has to be known of a class in advance, and nothing is computed wrongly.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

ELEMENTWISE = frozenset(
    ("div", "true_divide", "__truediv__", "mul", "multiply", "__mul__", "__rmul__", "tanh", "float", "to", "contiguous")
)
"""Names of operations that treat each logit by itself, as long as all their other arguments are numbers or types."""

DESCRIPTIONS = frozenset(("__get__", "size", "dim", "is_floating_point", "__len__"))
"""Names of operations that ask for the shape, the type or the device and not for numbers."""


@dataclass(frozen=True)
class Step:
    """An operation on the logits: a function of torch, and its arguments after the logits."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self, logits: Tensor) -> Tensor:
        """The logits after the operation."""
        return self.function(logits, *self.arguments, **self.options)


@dataclass
class Head:
    """A model's output head whose work is deferred."""

    module: Any
    needed_by: str = ""
    """Name of the last operation that needed the logits of all tokens; "" for none."""


class DeferredLogits(Tensor):
    """Logits [..., vocabulary] that are not computed until something needs them."""

    hidden: Tensor
    """Hidden states that the head takes, [..., width]."""
    head: Head
    steps: tuple[Step, ...]
    """The operations on the head's output, in order."""
    computed: Tensor | None
    """The logits, once something needed them."""

    @staticmethod
    def of(hidden: Tensor, head: Head, dtype: torch.dtype, steps: tuple[Step, ...] = ()) -> "DeferredLogits":
        """The logits of some hidden states after some steps, which make them `dtype`."""
        shape = (*hidden.shape[:-1], head.module.out_features)
        logits: Any = Tensor._make_wrapper_subclass(DeferredLogits, shape, dtype=dtype, device=hidden.device)
        logits.hidden, logits.head, logits.steps, logits.computed = hidden, head, steps, None
        deferred: DeferredLogits = logits
        return deferred

    def compute(self, needed_by: str) -> Tensor:
        """The logits of all tokens. needed_by: name of the operation that needs them."""
        if self.computed is None:
            self.head.needed_by, logits = needed_by, self.head.module(self.hidden)
            for step in self.steps:
                logits = step(logits)
            self.computed = logits
        return self.computed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any | None = None) -> Any:
        """Describes or writes down the operation, or computes the logits and does it."""
        options, name = kwargs or {}, getattr(func, "__name__", str(func))
        logits = args[0] if args else None
        if isinstance(logits, DeferredLogits) and logits.computed is None:
            if name in DESCRIPTIONS:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **options)
            if name in ELEMENTWISE and not any(isinstance(value, Tensor) for value in (*args[1:], *options.values())):
                step = Step(func, tuple(args[1:]), dict(options))
                dtype = step(torch.empty(0, dtype=_dtype(logits), device=logits.hidden.device)).dtype
                return DeferredLogits.of(logits.hidden, logits.head, dtype, (*logits.steps, step))
        return func(*_computed(args, name), **_computed(options, name))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuses what went past `__torch_function__`: below autograd the gradients would be lost."""
        raise RuntimeError(f"{func} cannot be done with logits that are not computed")


@contextmanager
def deferred_head(model: PreTrainedModel) -> Iterator[Head | None]:
    """Lets a forward pass inside the block return deferred logits; gives the head, or None where it must run as it is.

    The stand-in has no weights, so ZeRO-3 gathers none for it.
    """
    module = model.get_output_embeddings()
    if module is None or not hasattr(module, "out_features"):
        yield None
        return
    head = Head(module)
    places = [
        (parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is module
    ]
    for parent, name in places:
        parent._modules[name] = _StandIn(head)
    try:
        yield head
    finally:
        for parent, name in places:
            parent._modules[name] = module


class _StandIn(torch.nn.Module):
    """Takes the head's place and keeps its input."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self._head = head

    def forward(self, hidden: Tensor) -> Tensor:
        return DeferredLogits.of(hidden, self._head, hidden.dtype)

    def __getattr__(self, name: str) -> Any:
        """Answers from the head what the model's class asks of it, such as the type of its weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_head"].module, name)


def _dtype(logits: DeferredLogits) -> torch.dtype:
    with torch._C.DisableTorchFunctionSubclass():
        return logits.dtype


def _computed(value: Any, needed_by: str) -> Any:
    """A value, also inside of lists, tuples and dictionaries, with logits in place of deferred ones."""
    if isinstance(value, DeferredLogits):
        return value.compute(needed_by)
    if isinstance(value, dict):
        return {key: _computed(part, needed_by) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_computed(part, needed_by) for part in value])
    return value
