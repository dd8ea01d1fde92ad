"""The `evaluation`, `keep_best` and `early_stopping` parts of the job file."""

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator

from mmray.base.settings import Settings
from mmray.run.scoring.metrics import Normalisation

ReadingMetric = Literal["cer", "wer", "normalised_edit_distance", "exact_match", "length_ratio"]

READING_METRICS: tuple[ReadingMetric, ...] = ("cer", "wer", "normalised_edit_distance", "exact_match", "length_ratio")


class GenerateSettings(Settings):
    """How texts are generated, to compare them with the rows' own."""

    rows: Annotated[int, Field(ge=0)] = 64
    """Rows that each evaluation during training reads, the same ones every time, each set at its share. 0: none, only
    losses are computed."""

    turns: Literal["last", "all"] = "last"
    """Turns of the assistant that are read in a chat: the last one, or each of them after the turns before it."""

    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    """Tokens after which a text ends if the model does not end it. null: one and a half times the tokens of the row's
    own text, and 16 more."""

    batch_rows: Annotated[int, Field(gt=0)] = 16
    """Most rows that are generated at once, those of like length together. Models whose rows cannot be padded read one
    at a time."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Temperature of sampling. 0: greedy, the most likely token each time."""


class EvaluationSettings(Settings):
    """Evaluation during training, and what `jobs/evaluate.py` does."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations. null: only one, at the end of training; with a number there is one at the end,
    too."""

    sets: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    """Numbers of the sets of `data.eval`, from 0, that are read. null: all. The loss is computed on all of them."""

    generate: GenerateSettings = GenerateSettings()
    """How texts are generated."""

    prompt: str | None = None
    """Text with which `pretrain` rows are asked for, instead of what stands in them before their text. `<image>` stands
    for each image; without it the images come first. Special tokens in it are read as such. null: the row's images and
    what stands before its text."""

    metrics: Annotated[tuple[ReadingMetric, ...], Field(min_length=1)] = READING_METRICS
    """Metrics of generated texts that are written to metrics.jsonl and to trackers."""

    normalisation: Normalisation = Normalisation()
    """Differences between texts that do not count as errors."""

    @field_validator("sets")
    @classmethod
    def _names_each_set_once(cls, sets: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if sets is not None and len(set(sets)) < len(sets):
            raise ValueError(f"{list(sets)} names a set twice, whose rows would count twice; name each once")
        return sets


BestMetric = Literal[
    "eval_loss", "eval_cer", "eval_wer", "eval_normalised_edit_distance", "eval_exact_match", "eval_length_ratio"
]


class KeepBestSettings(Settings):
    """Keep the checkpoint of the best evaluation in addition to the latest ones."""

    metric: BestMetric = "eval_loss"
    """Value of an evaluation by which checkpoints are compared, as metrics.jsonl names it."""

    mode: Literal["min", "max"] | None = None
    """Direction of the metric: the smallest or the largest value is the best. null: the largest of `eval_exact_match`,
    the smallest of any other."""


class EarlyStoppingSettings(Settings):
    """End the run when evaluations no longer improve."""

    metric: BestMetric = "eval_loss"
    """Value of an evaluation that is watched, as metrics.jsonl names it."""

    mode: Literal["min", "max"] | None = None
    """Direction of the metric: the smallest or the largest value is the best. null: the largest of `eval_exact_match`,
    the smallest of any other."""

    patience: Annotated[int, Field(ge=1)] = 3
    """Evaluations in a row without an improvement after which the run ends."""

    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest change that counts as an improvement."""


def is_better(value: float, best: float | None, *, metric: str, mode: str | None, min_delta: float = 0.0) -> bool:
    """True if a value of a metric improves on the best one so far by more than `min_delta`; None: there is none yet.
    What is not a number improves on nothing."""
    if math.isnan(value):
        return False
    if best is None or math.isnan(best):
        return True
    largest = (mode or ("max" if metric == "eval_exact_match" else "min")) == "max"
    return value > best + min_delta if largest else value < best - min_delta
