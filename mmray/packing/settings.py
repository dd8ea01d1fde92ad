"""The `packing` part of the job file."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmray.base.settings import Settings

CHUNK_ROWS = 512
"""Rows in one encoder call: enough that starting a call costs nothing, few enough that two actors both have work."""


class PackingSettings(Settings):
    """How samples are packed into bins."""

    mode: Literal["bins", "equal_cost", "none"] = "bins"
    """`bins`: samples share as few bins as hold them. `equal_cost`: samples of all shapes share bins that take equally
    long by the costs of `balance`, for runs with few bins per worker. `none`: each sample has a bin of its own, for
    models that cannot tell samples of one row apart; training.micro_batch_bins must then stay 1."""

    token_capacity: Annotated[int, Field(gt=0)]
    """Most tokens in a bin. A longer row is rejected whole, never cut."""

    visual_capacity: Annotated[int, Field(gt=0)]
    """Most visual tokens (tokens that carry image features) in a bin, which limits how much the vision tower processes
    at once."""

    window_rows: Annotated[int, Field(gt=0)] = 8192
    """Number of rows that are packed together. Larger windows fill bins a little better and use more memory. At most
    512, or a multiple of 512."""

    bucket_fill: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Samples are first packed with others of the same image shape. Bins at least this full are kept; samples of
    emptier bins are repacked together, whatever their shape. 0 never mixes shapes."""

    @model_validator(mode="after")
    def _shapes_are_mixed(self) -> "PackingSettings":
        if self.mode == "equal_cost" and self.bucket_fill != type(self).model_fields["bucket_fill"].default:
            raise ValueError("mode equal_cost packs samples of all shapes together: leave out bucket_fill")
        return self

    @model_validator(mode="after")
    def _whole_chunks(self) -> "PackingSettings":
        if self.window_rows > CHUNK_ROWS and self.window_rows % CHUNK_ROWS:
            raise ValueError(f"window_rows {self.window_rows} is above {CHUNK_ROWS} and no multiple of it")
        return self

    @property
    def chunk_rows(self) -> int:
        """Number of rows in one encoder call."""
        return min(self.window_rows, CHUNK_ROWS)
