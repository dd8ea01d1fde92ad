"""The `packing` part of the job file."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmray.base.settings import Settings

CHUNK_ROWS = 512
"""Rows one encoder call takes: enough that starting a call costs nothing, few enough that two actors both have work."""


class PackingSettings(Settings):
    """How samples are put together into bins."""

    mode: Literal["bins", "equal_cost", "none"] = "bins"
    """`bins`: samples share bins, as few as hold them. `equal_cost`: samples of all shapes share bins that take alike
    long, by the costs of `balance`: for few bins a worker. `none`: a bin for each sample, for models that cannot tell
    samples of one row apart; leave training.micro_batch_bins at 1 then."""

    token_capacity: Annotated[int, Field(gt=0)]
    """Most tokens of a bin. A longer row is rejected whole, never cut."""

    visual_capacity: Annotated[int, Field(gt=0)]
    """Most visual tokens (tokens that carry image features) of a bin: what the vision tower can hold at once."""

    window_rows: Annotated[int, Field(gt=0)] = 8192
    """Rows packed together. Larger windows fill bins a little better and take more memory. Up to 512, or a multiple
    of 512."""

    bucket_fill: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Samples of one image shape are packed together first; bins filled to this part of a capacity are kept, the
    samples of the others are packed again with those of all shapes. 0 never mixes shapes."""

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
        return min(self.window_rows, CHUNK_ROWS)
