"""Defines the base of every part of the job file: frozen, no unknown keys, meanings written under each field.

The docstring under a field is its description in the JSON Schema (`mmray schema`) and in error messages, so a
setting is documented exactly once.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

RowKind = Literal["pretrain", "chat", "tokenized"]
"""The kind of a row: text, a chat, or ready-made token ids (`DatasetSettings.kind`)."""


class Settings(BaseModel):
    """A group of settings. Immutable; unknown keys are errors; field docstrings are the documentation."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )
