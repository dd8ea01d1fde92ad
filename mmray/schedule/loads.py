"""Stores the counts that the cost of each bin is computed from, in the footer of its bins file.

A schedule that balances ranks needs a few numbers of some thousand bins at once, from files that may be in an object
store. Columns of them would be spread over the whole file, between the tokens: a thousand small reads. The footer comes
with the one read that opens the file: the counts add 33 kB for 1,600 bins to the 375 kB of the footer, and opening and
decoding take 4 ms a file on a local disk, against 26 ms with columns.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KEY = b"mmray.loads"


@dataclass(frozen=True)
class Loads:
    """Counts of n bins: each field is int64 [n], `bucket` is str [n]."""

    tokens: np.ndarray
    visual_tokens: np.ndarray
    trained_tokens: np.ndarray
    sample_pairs: np.ndarray  # sum over the bin's samples of tokens squared: the work of attention
    visual_pairs: np.ndarray  # sum over the bin's tiles of visual tokens squared: attention in the vision tower
    bucket: np.ndarray  # the image shape its samples share, `mixed` or `text`

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, places: np.ndarray) -> Self:
        """The loads at some places, int64 [m], in their order."""
        return type(self)(*(getattr(self, field.name)[places] for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence["Loads"]) -> Self:
        """Join loads, one part after the other. parts: at least one."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    @classmethod
    def of(cls, bins: pa.Table, visual_pairs: Sequence[int]) -> Self:
        """Count the loads of a table of bins (`schema.BINS`). visual_pairs: one number for each bin."""
        lengths = bins["sample_lengths"].combine_chunks()
        squares = np.concatenate([[0], (lengths.flatten().to_numpy().astype(np.int64) ** 2).cumsum()])
        starts = np.concatenate([[0], lengths.value_lengths().to_numpy(zero_copy_only=False).cumsum()]).astype(np.int64)
        return cls(
            tokens=bins["num_tokens"].to_numpy().astype(np.int64),
            visual_tokens=bins["visual_tokens"].to_numpy().astype(np.int64),
            trained_tokens=bins["trained_tokens"].to_numpy().astype(np.int64),
            sample_pairs=np.diff(squares[starts]),
            visual_pairs=np.asarray(visual_pairs, dtype=np.int64),
            bucket=np.asarray(bins["bucket"].to_pylist(), dtype=np.str_),
        )

    def to_footer(self) -> dict[bytes, bytes]:
        """Encode the loads as key-value metadata of a Parquet file."""
        table = pa.table({field.name: getattr(self, field.name) for field in fields(self)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
        return {KEY: base64.b64encode(sink.getvalue())}

    @classmethod
    def from_footer(cls, file: pq.ParquetFile) -> Self:
        """Decode the loads that `to_footer` encoded."""
        table = pa.ipc.open_stream(base64.b64decode(file.metadata.metadata[KEY])).read_all()
        columns = {field.name: table[field.name].to_numpy() for field in fields(cls)}
        return cls(**columns | {"bucket": columns["bucket"].astype(np.str_)})
