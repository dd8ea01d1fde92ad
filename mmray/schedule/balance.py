"""What a bin costs to train on, and the `balance` part of the job file.

A global batch holds the bins of the plain shuffled order, a fair sample of the data, and ranks get equal work by how
these bins are dealt to them. `across_batches` instead chooses which bins form a batch, and the model learns far worse
from such batches (docs/training.md).

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

LEAVES_PAIRS_OUT = ("packed", "flash_attention_2")
"""Values of `model.attention` with which no pair of tokens of two samples is computed."""


class BalanceSettings(Settings):
    """How ranks are given equal work. The defaults of the costs are those of Qwen2-VL-2B."""

    across_batches: bool | None = None
    """Sort the bins of many global batches by cost and cut them into batches of similar cost. true: sorting; the model
    learns worse from it, because one step holds only pages and the next only text. false: the bins of a batch are drawn
    at random, and dealt to ranks by cost. null: true if a setting of sorting is set (`window_batches`, `tolerance`,
    `group_bins`, `one_shape_per_batch`), else false; a resumed run continues as it began."""

    window_batches: Annotated[int, Field(gt=0)] = 64
    """Sorting across batches: number of global batches, consecutive in the shuffled order, whose bins are sorted by
    cost together. More batches give closer costs. The files read are the same either way."""

    tolerance: Annotated[float, Field(ge=0)] = 0.05
    """Sorting across batches: relative difference below which two costs count as equal, so that chance decides their
    order. 0 sorts strictly, which gives a small dataset the same batches in every epoch."""

    group_bins: Annotated[int, Field(gt=0)] | None = None
    """Sorting across batches: number of bins of similar cost that stay together in a global batch, which then mixes
    global_batch_bins / group_bins different costs. Ranks have equal work if the number of workers times
    training.micro_batch_bins divides it. null: all bins of a global batch have similar cost, and ranks have equal work
    whatever their number."""

    one_shape_per_batch: bool = False
    """Sorting across batches: give all bins of a global batch one visual shape (bucket), for models compiled for fixed
    shapes. The leftovers of each shape in a window, less than a batch, are collected into batches of their own, sorted
    by shape."""

    token_pair: Annotated[float, Field(ge=0)] = 3.3e-5
    """Attention: cost of a sample, per token squared. Qwen2-VL-2B: 1,536 / 46.8 million."""

    whole_row_attention: bool | None = None
    """Count attention over all pairs of tokens in a bin, most of which are masked: its cost is then twice token_pair
    times the squared number of tokens in the bin. null: false with packed attention and flash_attention_2, which leave
    masked pairs out, else true. packing.mode equal_cost reads model.attention as the job file has it, and null as
    sdpa."""

    trained_token: Annotated[float, Field(ge=0)] = 0.18
    """Logits: cost per trained token. Qwen2-VL-2B: 1,536 · 151,936 / (28 · 46.8 million)."""

    visual_token: Annotated[float, Field(ge=0)] = 1.9
    """Vision tower: cost per visual token, added to its cost as a token. Qwen2-VL: 2,551 million multiply-adds (32
    layers of width 1,280 over 4 patches, and the projector) / 1,310 million."""

    visual_pair: Annotated[float, Field(ge=0)] = 1e-3
    """Attention in the vision tower: cost of a tile, per visual token squared. Qwen2-VL: 16 · 2 · 32 · 1,280 / 1,310
    million, which adds 0.1 to each token of a tile of 324 and 8 to each of a page of 8,000. Set 0 where the processor
    splits pages itself, since each page counts as one tile here."""

    @model_validator(mode="after")
    def _sorting_is_meant(self) -> "BalanceSettings":
        if self.across_batches is False and (names := self._of_sorting()):
            raise ValueError(
                f"{names[0]} sorts bins across global batches: set across_batches: true, or leave out {names[0]}"
            )
        return self

    def _of_sorting(self) -> list[str]:
        """Names of the settings that only sorting across batches uses and that differ from their defaults."""
        names = ("window_batches", "tolerance", "group_bins", "one_shape_per_batch")
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

    @property
    def sorts_batches(self) -> bool:
        """True if a new run sorts bins across global batches."""
        return bool(self._of_sorting()) if self.across_batches is None else self.across_batches

    def across(self, across_batches: bool) -> "BalanceSettings":
        """Copy the settings with across_batches decided."""
        return self.model_copy(update={"across_batches": across_batches})

    def order_record(self) -> dict[str, Any] | None:
        """Return the settings that decide which bins form a global batch, as plain JSON; None without sorting."""
        return self.model_dump(exclude={"across_batches"}) if self.sorts_batches else None

    def for_attention(self, implementation: str) -> "BalanceSettings":
        """Copy the settings with whole_row_attention decided. implementation: that of the text layers, as
        `model.attention` names it."""
        if self.whole_row_attention is not None:
            return self
        return self.model_copy(update={"whole_row_attention": implementation not in LEAVES_PAIRS_OUT})

    def cost_record(self) -> dict[str, Any]:
        """Return the settings that decide what a bin costs, as plain JSON."""
        names = {"token_pair", "whole_row_attention", "trained_token", "visual_token", "visual_pair"}
        return self.model_dump(include=names)

    def sample_costs(self, samples: Loads) -> tuple[np.ndarray, float]:
        """Return the part of a bin's cost that is a sum over its samples, and the part that is not.

        samples: loads of n samples, as if each had a bin of its own. Returns what each sample adds to its bin's cost,
        float64 [n], and the cost of a bin per token squared (0 unless attention goes over the whole row).
        """
        costs, pair_cost = self.costs(samples), 2.0 * self.token_pair if self.whole_row_attention else 0.0
        return costs - pair_cost * samples.tokens.astype(np.float64) ** 2, pair_cost

    def costs(self, loads: Loads) -> np.ndarray:
        """Return the cost of each bin, float64 [n].

        Computed elementwise on purpose, so that the result is the same on every machine, unlike with BLAS.
        """
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
    """Dimensions of a stack of transformer layers. kv: width of keys and of values; equals hidden if not grouped."""

    count: int
    hidden: int
    intermediate: int
    kv: int
    gated: bool
    """The MLP has a gate, so three matrices instead of two."""

    @property
    def linear(self) -> int:
        """Number of multiply-adds of one token in the matrices of all layers."""
        mlp = (3 if self.gated else 2) * self.hidden * self.intermediate
        return self.count * (2 * self.hidden**2 + 2 * self.hidden * self.kv + mlp)


def cost_settings(
    text: Layers, vision: Layers, *, vocabulary: int, patches_per_token: int, projector: int
) -> dict[str, float]:
    """Compute the four costs of `BalanceSettings` for a model from its dimensions.

    text, vision: layers of the language model and of the vision tower. vocabulary: number of token ids.
    patches_per_token: patches of the vision tower that become one visual token. projector: multiply-adds of one visual
    token between tower and language model.
    """
    unit = text.linear
    return {
        "token_pair": text.count * text.hidden / unit,
        "trained_token": text.hidden * vocabulary / unit,
        "visual_token": (patches_per_token * vision.linear + projector) / unit,
        "visual_pair": patches_per_token**2 * 2 * vision.count * vision.hidden / unit,
    }
