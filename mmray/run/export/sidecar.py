"""`mmray.json` beside exported weights: where they come from, and how to prompt them as in training."""

import json
from typing import Any, Literal

from pydantic import ValidationError

from mmray.base.settings import RowKind, Settings
from mmray.base.words import one_line
from mmray.errors import UserError
from mmray.images import TilingPolicy
from mmray.storage import Folder

SIDECAR = "mmray.json"
Dtype = Literal["bf16", "fp32"]


class Sidecar(Settings):
    """The content of `mmray.json`."""

    format_version: int = 1
    """Version of this file."""

    mmray: str
    """Version of mmray that wrote the export."""

    model_type: str
    """`config.model_type` of the model."""

    dtype: Dtype
    """Type of the exported weights."""

    step: int
    """Optimizer steps after which the weights were saved."""

    tiling: TilingPolicy
    """How pages were cut into tiles, as resolved for the model's family."""

    processor_call: dict[str, Any]
    """Arguments with which the processor takes each tile as it is, without resizing or splitting it again."""

    kinds: tuple[RowKind, ...]
    """Kinds of the rows that the model was trained on."""

    prepared: str
    """Path or URI of the prepared dataset."""

    fingerprint: str
    """Fingerprint of the prepared dataset."""

    def text(self) -> str:
        """The file's content."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


def read_sidecar(folder: str) -> Sidecar:
    """The `mmray.json` of an exported folder, by path or URI. Raises UserError where there is none."""
    try:
        return Sidecar.model_validate(json.loads(Folder(folder).read(SIDECAR)))
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {SIDECAR}: it is no folder that mmray export wrote") from error
    except (OSError, ValueError, ValidationError) as error:
        raise UserError(f"{folder}/{SIDECAR} cannot be read: {one_line(error)}; export the model anew") from error
