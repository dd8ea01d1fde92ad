"""What a bin costs to train on, and the `balance` part of the job file.

Equal work is made inside a global batch, whose bins are those of the plain shuffled order: a fair sample of the data.
`across_batches` makes it by choosing which bins form a batch, and the model learns far worse for it (docs/training.md).

A cost is a number of text tokens: 1 is what one token takes in the linear layers of the language model. The rest is
counted in multiply-adds and divided by that, since the backward pass doubles all of them alike. Tokens alone are not
enough: bins packed to the same 16,384 tokens differ by a factor of two in time, by the pages among them.

| part | grows with | multiply-adds, d layers of width h |
| --- | --- | --- |
| linear layers | tokens | d (2 h² + 2 h·kv + 3 h·m), m the width of a gated MLP: the unit |
| attention | tokens of each sample, squared | d·h (queries by keys, weights by values; half of both is masked) |
| logits | trained tokens | h·vocabulary |
| vision tower | visual tokens | p patches in each: p·d (4 h² + 2 h·m), and the projector to the language model |
| its attention | visual tokens of each tile, squared | p²·2 d·h (nothing is masked) |

Counts of multiply-adds (Kaplan et al., "Scaling Laws for Neural Language Models", 2020, table 1) stand for time; where
a model's kernels are far from that, put measured numbers in the job file.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from mmray.base.settings import Settings
from mmray.schedule.loads import Loads


class BalanceSettings(Settings):
    """How ranks are given equal work. The costs' defaults are Qwen2-VL-2B's."""

    across_batches: bool | None = None
    """true: bins of many global batches are sorted by cost and cut into batches of like cost, which the model learns
    worse from: a step holds pages alone, the next text alone. false: which bins form a batch is chance; they are dealt
    to ranks by cost. null: true where a setting is given that only sorting has (`window_batches`, `tolerance`,
    `group_bins`, `one_shape_per_batch`), else false; and a run goes on as it began."""

    window_batches: Annotated[int, Field(gt=0)] = 64
    """Across batches: global batches' worth of bins, consecutive in the shuffled order, that are sorted by cost and cut
    into batches of like cost. More: closer costs. The same files are read either way."""

    tolerance: Annotated[float, Field(ge=0)] = 0.05
    """Across batches: costs closer than this part count as equal, and chance decides. 0 sorts strictly: batches of a
    small data set then hold the same bins in every epoch."""

    group_bins: Annotated[int, Field(gt=0)] | None = None
    """Across batches: bins of like cost that stay together in a global batch, which then mixes
    global_batch_bins / group_bins costs; ranks are equal while the workers times training.micro_batch_bins divide it.
    null: the whole global batch is of like cost, and ranks are equal whatever their number."""

    one_shape_per_batch: bool = False
    """Across batches: all bins of a global batch share one visual shape (bucket), for models compiled for fixed shapes.
    A window's leftovers of all shapes, less than a batch of each, are batches of their own, sorted by shape."""

    token_pair: Annotated[float, Field(ge=0)] = 3.3e-5
    """Attention: cost of a sample, per token squared. Qwen2-VL-2B: 1,536 / 46.8 million."""

    whole_row_attention: bool | None = None
    """Attention works through all pairs of tokens in a bin and masks most of them: cost is then twice token_pair per
    token of the bin, squared. null: true with model.attention sdpa and eager, false with flash_attention_2, which
    leaves masked pairs out."""

    trained_token: Annotated[float, Field(ge=0)] = 0.18
    """Logits: cost per trained token. Qwen2-VL-2B: 1,536 · 151,936 / (28 · 46.8 million)."""

    visual_token: Annotated[float, Field(ge=0)] = 1.9
    """Vision tower: cost per visual token, beside the token's own. Qwen2-VL: 32 layers of width 1,280 over 4 patches,
    2,551 million with the projector, to 1,310 million."""

    visual_pair: Annotated[float, Field(ge=0)] = 1e-3
    """Attention in the vision tower: cost of a tile, per visual token squared. Qwen2-VL: 16 · 2 · 32 · 1,280 to 1,310
    million. 0.1 for each of a tile's 324 tokens, 8 for each of a page's 8,000. 0 where the processor splits pages
    itself, which count as one tile here."""

    @model_validator(mode="after")
    def _sorting_is_meant(self) -> "BalanceSettings":
        if self.across_batches is False and (names := self._of_sorting()):
            raise ValueError(
                f"{names[0]} sorts bins across global batches: set across_batches: true, or leave out {names[0]}"
            )
        return self

    def _of_sorting(self) -> list[str]:
        """The settings that only sorting across batches has, where they differ from their defaults."""
        names = ("window_batches", "tolerance", "group_bins", "one_shape_per_batch")
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

    @property
    def sorts_batches(self) -> bool:
        """Whether a new run sorts bins across global batches."""
        return bool(self._of_sorting()) if self.across_batches is None else self.across_batches

    def across(self, across_batches: bool) -> "BalanceSettings":
        """The settings with across_batches decided."""
        return self.model_copy(update={"across_batches": across_batches})

    def order_record(self) -> dict[str, Any] | None:
        """What of the settings decides which bins form a global batch, as plain JSON; None: nothing of them does."""
        return self.model_dump(exclude={"across_batches"}) if self.sorts_batches else None

    def for_attention(self, implementation: str) -> "BalanceSettings":
        """The settings with whole_row_attention decided. implementation: as in `model.attention`."""
        if self.whole_row_attention is not None:
            return self
        return self.model_copy(update={"whole_row_attention": implementation != "flash_attention_2"})

    def cost_record(self) -> dict[str, Any]:
        """The settings that say what a bin costs, as plain JSON."""
        names = {"token_pair", "whole_row_attention", "trained_token", "visual_token", "visual_pair"}
        return self.model_dump(include=names)

    def sample_costs(self, samples: Loads) -> tuple[np.ndarray, float]:
        """What each sample adds to the cost of its bin, float64 [n], and what the bin costs beside per token squared.

        samples: their loads, as if each had a bin of its own.
        """
        costs, pair_cost = self.costs(samples), 2.0 * self.token_pair if self.whole_row_attention else 0.0
        return costs - pair_cost * samples.tokens.astype(np.float64) ** 2, pair_cost

    def costs(self, loads: Loads) -> np.ndarray:
        """The cost of each bin, float64 [n]. Elementwise on purpose: the same on every machine, which a BLAS is not."""
        if self.whole_row_attention is None:
            raise ValueError("whole_row_attention is not decided; use for_attention")
        pairs = 2.0 * loads.tokens.astype(np.float64) ** 2 if self.whole_row_attention else loads.sample_pairs
        return (
            loads.tokens
            + self.token_pair * pairs
            + self.trained_token * loads.trained_tokens
            + self.visual_token * loads.visual_tokens
            + self.visual_pair * loads.visual_pairs
        )


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The dimensions of a stack of transformer layers. kv: width of keys (and of values), hidden without grouping."""

    count: int
    hidden: int
    intermediate: int
    kv: int
    gated: bool
    """The MLP has a gate: three matrices, not two."""

    @property
    def linear(self) -> int:
        """Multiply-adds of one token in the matrices of all layers."""
        mlp = (3 if self.gated else 2) * self.hidden * self.intermediate
        return self.count * (2 * self.hidden**2 + 2 * self.hidden * self.kv + mlp)


def cost_settings(
    text: Layers, vision: Layers, *, vocabulary: int, patches_per_token: int, projector: int
) -> dict[str, float]:
    """The four costs of `BalanceSettings` for a model, from its dimensions.

    patches_per_token: patches of the vision tower that become one visual token; projector: multiply-adds of one visual
    token between tower and language model.
    """
    unit = text.linear
    return {
        "token_pair": text.count * text.hidden / unit,
        "trained_token": text.hidden * vocabulary / unit,
        "visual_token": (patches_per_token * vision.linear + projector) / unit,
        "visual_pair": patches_per_token**2 * 2 * vision.count * vision.hidden / unit,
    }
