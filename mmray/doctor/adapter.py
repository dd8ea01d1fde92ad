"""Checks what an adapter touches in the job's model, and what it leaves as it is; loads no weight."""

import importlib.util

from mmray.config.job import Job
from mmray.doctor.findings import Finding, failed, passed
from mmray.families import model_parts
from mmray.training.adapter import Adapter, check_start
from mmray.training.model import empty_model
from mmray.training.part_report import part_model
from mmray.training.quantized import quantised_layers

CHECK = "adapter"


def examine_adapter(job: Job) -> Finding:
    """Check that the adapter's targets are in the model, and list them. Raises UserError where one is not."""
    settings = job.training.adapter
    assert settings is not None
    model, adapter = empty_model(job.model), Adapter.of(job.model, settings, None)
    for setting, package, extra in (
        ("training.adapter", "peft", "adapters"),
        ("model.quantize", "bitsandbytes", "bitsandbytes"),
    ):
        if importlib.util.find_spec(package) is None and (package == "peft" or job.model.quantize):
            return failed(CHECK, f"{setting} needs {package}, which is not installed", f"pip install 'mmray[{extra}]'")
    if settings.start_from is not None:
        check_start(part_model(job.model, job.training), adapter)
    quantised = f"; {len(quantised_layers(model))} linear layers are held in 4 bits" if job.model.quantize else ""
    kind = f"{settings.kind} of rank {settings.rank}"
    return passed(CHECK, f"{kind}; {adapter.targets.in_words(model, model_parts(model))}{quantised}")
