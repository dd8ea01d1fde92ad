"""Export of a checkpoint to a folder that transformers loads, with all that prompting as in training needs."""

from mmray.run.export.model import ExportedModel, export_finished, export_model
from mmray.run.export.sidecar import Sidecar, read_sidecar

__all__ = ["ExportedModel", "Sidecar", "export_finished", "export_model", "read_sidecar"]
