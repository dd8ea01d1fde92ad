"""The loss of 2,048 trained tokens of a vocabulary of 151,936: peak memory and time of forward and backward.

Against the way mmray went before: the head makes the logits of all tokens, and the loss makes fp32 copies of them in
chunks, which its backward pass makes again (torch's checkpointing). Hidden states and head have the width of
Qwen2-VL-2B, whose vocabulary it is. Both ways give the same loss and gradients, or the benchmark fails. Peak memory is
what torch holds at most beside hidden states and head, the gradients of both included; it and the CPU time of one
thread are of the same pass, in fp32. On a GPU the dtype is bf16 and the time the clock's.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.bench_lengths import one_thread
from benchmarks.bench_step import peak_bytes
from benchmarks.common import Result
from mmray.training.head_loss import HeadLoss
from mmray.training.token_losses import Objective, TrainedTokens

TOKENS, WIDTH, VOCABULARY = 2_048, 1_536, 151_936
CHUNK_ELEMENTS = 2**26
"""fp32 logits that existed at once."""
SCALE = 1 / TOKENS
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Measured:
    """One pass. peak_bytes: beside what existed before; gradients: of hidden states and head."""

    loss: float
    gradients: tuple[Tensor, Tensor]
    peak_bytes: int
    seconds: float


def all_at_once(hidden: Tensor, head: torch.nn.Linear, targets: Tensor) -> Tensor:
    """The loss by the logits of all tokens."""
    rows = CHUNK_ELEMENTS // VOCABULARY
    total = torch.zeros((), device=hidden.device)
    for part, part_targets in zip(head(hidden).split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(_chunk_sum, part, part_targets, use_reentrant=False, preserve_rng_state=False)
    return total


def _chunk_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def in_chunks(hidden: Tensor, head: torch.nn.Linear, targets: Tensor) -> Tensor:
    """The loss as mmray trains it."""
    return HeadLoss(TrainedTokens(targets), Objective(), SCALE).of_hidden(hidden, head)


def measured(way: Callable[[Tensor, torch.nn.Linear, Tensor], Tensor], tokens: int) -> Measured:
    """Forward and backward of a way, on the GPU where there is one."""
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(device, dtype).requires_grad_()
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * WIDTH**-0.5)
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator).to(device)
    losses, seconds = [], []

    def work() -> None:
        if gpu:
            torch.cuda.synchronize()
        clock = time.perf_counter if gpu else time.process_time
        began = clock()
        loss = way(hidden, head, targets)
        (loss * SCALE).backward()
        losses.append(float(loss.detach()) * SCALE)
        seconds.append(clock() - began)

    for _ in range(5 if gpu else 1):
        hidden.grad = head.weight.grad = None
        peak = peak_bytes(work)
    assert hidden.grad is not None
    assert head.weight.grad is not None
    return Measured(losses[0], (hidden.grad, head.weight.grad), peak, min(seconds))


def run() -> list[Result]:
    with one_thread():
        before, now = measured(all_at_once, TOKENS), measured(in_chunks, TOKENS)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(now.gradients, before.gradients)]
    tolerance = 1e-2 if torch.cuda.is_available() else TOLERANCE
    if not (abs(now.loss / before.loss - 1) < TOLERANCE and max(errors) < tolerance):
        raise AssertionError(f"the two ways are not the same: {now.loss} and {before.loss}, gradients differ {errors}")
    data = f"{TOKENS:,} trained tokens, width {WIDTH:,}, {VOCABULARY:,} words"
    where = "on the GPU, bf16" if torch.cuda.is_available() else "of one CPU thread, fp32"
    equal = f"gradients differ by {errors[0]:.0e} (hidden states) and {errors[1]:.0e} (head)"
    gradient = now.gradients[1].nbytes / 1e9
    return [
        Result(
            name=f"peak memory of the loss, in chunks against all logits at once: {data}",
            ratio=now.peak_bytes / before.peak_bytes,
            explanation=f"{now.peak_bytes / 1e9:.2f} GB against {before.peak_bytes / 1e9:.2f}, of which {gradient:.2f} "
            "are the gradient of the head in both",
            goal=0.35,
            lower_is_better=True,
        ),
        Result(
            name=f"time of the loss, in chunks against all logits at once: {data}",
            ratio=now.seconds / before.seconds,
            explanation=f"{now.seconds:.1f} s against {before.seconds:.1f} {where}; {equal}",
            goal=1.1,
            lower_is_better=True,
        ),
    ]
