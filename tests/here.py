"""Preparing without Ray, whose actors take 20 s of CPU time to start: for tests that need what is prepared and do not
ask how, and as what a prepare on Ray is compared with."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa
import pytest

import pipelines.prepare
from mmray.config import Job
from mmray.errors import UserError
from mmray.images.size_cache import SizeCache
from mmray.prepared import PreparedDataset
from mmray.rows.files import Chunk
from pipelines.dataset import ERROR
from pipelines.prepare import EncodeChunk, KeptSizes, PackWindow, _from_buffer, prepare


def prepare_here(job: Job, split: str = "train", **options: Any) -> PreparedDataset:
    """All of `prepare` but its graph: the work of its actors is done in this process, chunk by chunk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.prepare, "_run", run_here)
        return prepare(job, split, **options)[0]


def run_here(job: Job, split: str, token: str, chunks: list[Chunk], sizes: KeptSizes | None = None) -> Iterator[int]:
    """As `pipelines.prepare._run`, which it stands for."""
    encode, pack = EncodeChunk(job, split), PackWindow(job, split, token)
    if sizes:
        encode.sizes = SizeCache(sizes.known)
    for _, each in groupby(chunks, key=lambda chunk: chunk.window):
        window = list(each)
        packed = pack(pa.concat_tables(pa.table(encode({"chunk": [chunk]})) for chunk in window))
        if sizes:
            sizes.measured += map(_from_buffer, packed["sizes"][0].as_py())
        if packed[ERROR][0]:
            raise UserError(packed[ERROR][0])
        yield sum(chunk.num_rows for chunk in window)
