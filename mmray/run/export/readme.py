"""The README.md of an exported folder: where the model comes from, and lines that read a page with it."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mmray.families import Family
from mmray.run.export.sidecar import Sidecar
from mmray.run.export.source import SourceCheckpoint
from mmray.training.settings import TrainingSettings

MOST_SETS = 20
"""The most datasets that the README lists."""

SHOWN_SETTINGS = (
    "learning_rate", "schedule", "warmup_steps", "warmup_ratio", "weight_decay", "global_batch_bins", "zero_stage",
    "steps", "epochs", "seed",
)  # fmt: skip

SHOWN_IF_SET = ("optimizer", "parts", "stages")
"""Settings that the README lists where they are not the default."""


def readme(checkpoint: SourceCheckpoint, sidecar: Sidecar, family: Family, adapter_of: str | None = None) -> str:
    """The text of the README. It does not say when or where it was exported, so a second export is equal.

    adapter_of: the base model of an adapter that is exported apart; None for a whole model.
    """
    prepared, known = checkpoint.prepared, checkpoint.settings
    sets = prepared["record"]["datasets"]
    environment = Environment(
        loader=PackageLoader("mmray.run.export", "templates"), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("export.md.jinja").render(
        checkpoint=checkpoint.name,
        sidecar=sidecar,
        is_tiled=family.tiled,
        is_chat="chat" in sidecar.kinds,
        is_pretrain="pretrain" in sidecar.kinds,
        model=known and (known[0].path or "random weights"),
        settings=_shown(known[1]) if known else {},
        rows=prepared.get("rows"),
        sets=[{"kind": dataset["kind"], "files": dataset["files"]} for dataset in sets[:MOST_SETS]],
        more_sets=max(0, len(sets) - MOST_SETS),
        evaluation=checkpoint.evaluation,
        adapter_of=adapter_of,
        adapter=checkpoint.adapter,
    )


def _shown(training: TrainingSettings) -> dict[str, Any]:
    values = training.model_dump(mode="json", exclude_none=True)
    unusual = training.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    shown = {name: values[name] for name in SHOWN_SETTINGS if name in values}
    return shown | {name: unusual[name] for name in SHOWN_IF_SET if name in unusual}
