"""Checks which parts of the model are trained, how, and with which optimizer."""

from collections.abc import Iterator
from functools import partial

from mmray.config.job import Job
from mmray.doctor.findings import Finding, failed, guarded, not_applicable, passed
from mmray.errors import UserError
from mmray.training.deepspeed_config import deepspeed_config
from mmray.training.part_report import PartFacts, part_model, stage_facts
from mmray.training.treatments import Stage

CHECK, OPTIMIZER = "parts", "optimizer"


def examine_parts(job: Job) -> Iterator[Finding]:
    """Yield a finding for each stage of the training, and one for an optimizer besides AdamW; loads no weight."""
    if job.training.optimizer != "adamw":
        yield guarded(OPTIMIZER, partial(_optimizer, job))
    try:
        stages = list(stage_facts(part_model(job.model), job.model, job.training))
    except UserError as error:
        yield failed(CHECK, str(error))
        return
    except Exception:  # noqa: BLE001 (the code of any model is run)
        yield not_applicable(CHECK, "the model cannot be built from its configuration")
        return
    for stage, facts in stages:
        name = CHECK if len(stages) == 1 else f"{CHECK}, stage {stage.number + 1}"
        yield passed(name, _in_words(job, stage, facts, is_last=stage is stages[-1][0]))


def _optimizer(job: Job) -> Finding:
    deepspeed_config(job.model, job.training, world_size=1, grad_accumulation=1, load_universal=False)
    return passed(OPTIMIZER, f"{job.training.optimizer} goes with ZeRO, offloading and stages as they are set")


def _in_words(job: Job, stage: Stage, facts: list[PartFacts], *, is_last: bool) -> str:
    texts = "; ".join(fact.text for fact in facts)
    if stage.number == 0 and is_last:
        return texts
    steps = f"to step {stage.stop_step:,}" if not is_last or job.training.steps else "to the end"
    return f"from step {stage.first_step + 1:,} {steps}: {texts}"
