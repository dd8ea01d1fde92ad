"""A prepared dataset: a folder with `bins-*.parquet`, `rejected.parquet` and, written last, `manifest.json`.

The manifest is the commit: a folder without one is not a prepared dataset, and a file that it does not name is no part
of it. How the folder comes about: `writer.py`.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmray.display.notebook import Fact, Segment, card
from mmray.errors import UserError
from mmray.images import TilingPolicy
from mmray.images.header import IMAGE_READING
from mmray.images.source import one_line
from mmray.prepared.schema import FORMAT_VERSION, READ_VERSIONS
from mmray.prepared.window import BINS_PER_ROW_GROUP, Window
from mmray.schedule.loads import Loads
from mmray.storage import Folder

MANIFEST, PLAN, REJECTED_FILE = "manifest.json", "plan.json", "rejected.parquet"
MOST_SHOWN_SAMPLES = 60
"""Samples of a bin that a notebook shows to scale."""


@dataclass(frozen=True)
class Bin:
    """One bin. input_ids: int32 [L], the samples one after another; sample_sets: int32 [samples], the number of each
    sample's set in the split, -1 in datasets of version 2; given: bool [L] or empty; images: a dict each, as in
    `schema.IMAGES`."""

    index: int
    bucket: str
    visual_tokens: int
    trained_tokens: int
    input_ids: np.ndarray
    sample_lengths: np.ndarray
    sample_ids: list[str]
    sample_sources: list[str]
    sample_rules: np.ndarray
    sample_sets: np.ndarray
    given: np.ndarray
    images: list[dict[str, Any]]

    def _repr_html_(self) -> str:
        """Its counts, and its samples to scale, those with images in another colour."""
        with_images = {image["sample"] for image in self.images}
        whole, shown = max(len(self.input_ids), 1), self.sample_lengths.tolist()[:MOST_SHOWN_SAMPLES]
        strip = [
            Segment(length / whole, "visual" if number in with_images else "tokens", f"{name[:80]}: {length:,} tokens")
            for number, (name, length) in enumerate(zip(self.sample_ids, shown))
        ]
        if rest := int(self.sample_lengths[MOST_SHOWN_SAMPLES:].sum()):
            strip.append(Segment(rest / whole, "grey", f"the other samples: {rest:,} tokens"))
        count = len(self.sample_ids)
        return card(
            f"Bin {self.index:,}: {count:,} {'sample' if count == 1 else 'samples'}",
            f"bucket {self.bucket}",
            [
                Fact("tokens", f"{len(self.input_ids):,}"),
                Fact("visual tokens", f"{self.visual_tokens:,}", self.visual_tokens / whole, "visual"),
                Fact("trained tokens", f"{self.trained_tokens:,}", self.trained_tokens / whole, "good"),
                Fact("images", f"{len(self.images):,}"),
                Fact("samples", ", ".join(name[:80] for name in self.sample_ids[:5]) + (", …" if count > 5 else "")),
            ],
            strip=strip,
        )


class PreparedDataset:
    """Read access to a prepared dataset. Raises UserError when the folder has no manifest."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._folder = Folder(path)
        if not self._folder.exists(MANIFEST):
            raise UserError(f"{path} is no prepared dataset: it has no {MANIFEST}. {self._remedy()}")
        self.manifest: dict[str, Any] = read_json(self._folder, MANIFEST)
        if self.manifest.get("format_version") not in READ_VERSIONS:
            raise UserError(
                f"{path} has format {self.manifest.get('format_version')}, this mmray reads {FORMAT_VERSION}; "
                "prepare it anew"
            )
        self._first_bin = np.cumsum([0] + [shard["bins"] for shard in self.manifest["shards"]])
        self._open_file = functools.lru_cache(maxsize=128)(self._parquet_file)
        self._file_loads = functools.lru_cache(maxsize=256)(lambda file: Loads.from_footer(self._open_file(file)))

    def _remedy(self) -> str:
        """What to do where a folder holds something else."""
        inside = [name for name in ("train", "eval") if Folder(f"{self.path.rstrip('/')}/{name}").exists(MANIFEST)]
        if inside:
            return f"It holds {' and '.join(inside)}: give {self.path.rstrip('/')}/{inside[0]}"
        if self._folder.exists("metrics.jsonl"):
            return f"It is the folder of a training run: mmray report {self.path} shows it"
        begun = "A prepare was begun here but did not finish; run" if self._folder.exists(PLAN) else "Run"
        return f"{begun} jobs/prepare.py first"

    @property
    def fingerprint(self) -> str:
        """Of what was prepared and of what came out of it: a training order belongs to both. The same rows and
        settings give other bins where an image's size has changed since."""
        return f"{self.manifest['fingerprint']}-{self.manifest['content']}"

    @property
    def statistics(self) -> dict[str, Any]:
        return dict(self.manifest["statistics"])

    @property
    def tiling(self) -> TilingPolicy:
        """The tiling policy the samples were measured with, as resolved for the family."""
        return TilingPolicy.model_validate(self.manifest["tiling"])

    @property
    def is_read_otherwise(self) -> bool:
        """Whether an earlier mmray measured its images and reads the size of some otherwise (`IMAGE_READING`)."""
        return bool(self.statistics["images"]) and self.manifest.get("image_reading", 1) < IMAGE_READING

    def __len__(self) -> int:
        return int(self._first_bin[-1])

    def check_has_bins(self) -> None:
        """Raise UserError where there is no bin to train on."""
        if not len(self):
            raise UserError(f"{self.path} has no bins: every row was rejected, see its rejected.parquet")

    def __repr__(self) -> str:
        return f"PreparedDataset({self.path!r}, bins={len(self)}, fingerprint={self.fingerprint!r})"

    def _repr_html_(self) -> str:
        facts, packing = self.statistics, self.manifest["record"]["packing"]
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in list(facts["rejected_by_reason"].items())[:8])
        fills = [
            Fact(name, f"{facts[key]:.1%} of {packing[capacity]:,} a bin", facts[key], colour)
            for name, key, capacity, colour in (
                ("fill, tokens", "token_fill", "token_capacity", "tokens"),
                ("fill, visual tokens", "visual_fill", "visual_capacity", "visual"),
            )
        ]
        trained = facts["trained_tokens"] / max(facts["tokens"], 1)
        return card(
            f"Prepared dataset: {len(self):,} bins",
            self.path,
            [
                Fact("rows", f"{facts['rows_packed']:,} packed of {facts['rows_read']:,} read"),
                Fact("rejected", reasons or "none"),
                *fills,
                Fact("trained tokens", f"{trained:.1%} of {facts['tokens']:,} tokens", trained, "good"),
                Fact("bins", f"{facts['bins']:,}, at least {facts['bins_at_least']:,} needed"),
                Fact("images", f"{facts['images']:,}"),
                Fact("fingerprint", self.fingerprint),
            ],
        )

    def bin(self, index: int) -> Bin:
        """Bin number `index`, from 0. Reads its row group."""
        if not 0 <= index < len(self):
            raise IndexError(f"bin {index} of a prepared dataset with {len(self)} bins")
        shard = int(np.searchsorted(self._first_bin, index, side="right")) - 1
        within = index - int(self._first_bin[shard])
        group = self._open_file(shard).read_row_group(within // BINS_PER_ROW_GROUP)
        return _to_bin(index, group.slice(within % BINS_PER_ROW_GROUP, 1))

    def bins(self, first: int, stop: int) -> Iterator[Bin]:
        """The bins [first, stop), in order. Reads each row group once."""
        group_place, group = (-1, -1), None
        for index in range(first, stop):
            shard = int(np.searchsorted(self._first_bin, index, side="right")) - 1
            within = index - int(self._first_bin[shard])
            place = shard, within // BINS_PER_ROW_GROUP
            if group is None or place != group_place:
                group_place, group = place, self._open_file(shard).read_row_group(place[1])
            yield _to_bin(index, group.slice(within % BINS_PER_ROW_GROUP, 1))

    def column(self, name: str) -> np.ndarray:
        """A column of counts (`num_tokens`, `visual_tokens`, `trained_tokens`) for all bins, in order."""
        tables = [self.read_file(shard, [name]) for shard in range(len(self.manifest["shards"]))]
        return np.concatenate([table[name].to_numpy() for table in tables]) if tables else np.zeros(0, dtype=np.int32)

    @property
    def files(self) -> dict[int, range]:
        """The numbers of the files that have bins, each with its bins."""
        borders = enumerate(pairwise(self._first_bin.tolist()))
        return {file: range(first, stop) for file, (first, stop) in borders if stop > first}

    def read_file(self, file: int, columns: list[str]) -> pa.Table:
        """Columns (of `schema.BINS`; `images.list.element.width` for one inside a list) of the bins of a file."""
        return self._open_file(file).read(columns)

    def loads(self, bins: np.ndarray) -> Loads:
        """What bins cost, in the order given; bins: int64 [n], at least one. Reads the footers of their files, each
        once while it is among the last 256."""
        files = np.searchsorted(self._first_bin, bins, side="right") - 1
        order = np.argsort(files, kind="stable")
        distinct, counts = np.unique(files, return_counts=True)
        ends = counts.cumsum()
        parts = [
            self._file_loads(int(file)).take(bins[order[end - count : end]] - self._first_bin[file])
            for file, count, end in zip(distinct, counts, ends, strict=True)
        ]
        return Loads.joined(parts).take(np.argsort(order))

    def rejected(self) -> pa.Table:
        """The rejected rows (`schema.REJECTED`)."""
        with self._folder.open(REJECTED_FILE) as file:
            return pq.read_table(file)

    def rejected_parts(self) -> Iterator[pa.Table]:
        """The rejected rows in parts of some thousand, for when there may be millions."""
        with self._folder.open(REJECTED_FILE) as file:
            opened = pq.ParquetFile(file)
            for part in range(opened.num_row_groups):
                yield opened.read_row_group(part)

    def _parquet_file(self, shard: int) -> pq.ParquetFile:
        name = self.manifest["shards"][shard]["file"]
        try:
            return pq.ParquetFile(self._folder.open(name), pre_buffer=True)  # a row group in one request or two
        except (FileNotFoundError, pa.ArrowException) as error:
            raise UserError(
                f"{self._folder.path(name)}, which {MANIFEST} names, cannot be read: {one_line(error)}; copy the "
                "dataset anew, or prepare it anew with --replace"
            ) from error


def window_bins(window: Window) -> list[Bin]:
    """The bins of a window that was not written."""
    table = pq.read_table(pa.BufferReader(window.bins))
    return [_to_bin(index, table.slice(index, 1)) for index in range(table.num_rows)]


def _to_bin(index: int, row: pa.Table) -> Bin:
    def array(name: str, dtype: Any) -> np.ndarray:
        values = row[name].combine_chunks().flatten()
        return values.to_numpy(zero_copy_only=False).astype(dtype, copy=False)

    samples, tells_sets = len(row["sample_ids"][0]), "sample_sets" in row.column_names
    return Bin(
        index=index,
        bucket=row["bucket"][0].as_py(),
        visual_tokens=row["visual_tokens"][0].as_py(),
        trained_tokens=row["trained_tokens"][0].as_py(),
        input_ids=array("input_ids", np.int32),
        sample_lengths=array("sample_lengths", np.int32),
        sample_ids=row["sample_ids"][0].as_py(),
        sample_sources=row["sample_sources"][0].as_py(),
        sample_rules=array("sample_rules", np.int8),
        sample_sets=array("sample_sets", np.int32) if tells_sets else np.full(samples, -1, dtype=np.int32),
        given=array("given", np.bool_),
        images=row["images"][0].as_py(),
    )


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """A JSON object that mmray wrote. Raises UserError for anything else."""
    try:
        value = json.loads(folder.read(name))
    except ValueError as error:
        raise UserError(f"{folder.path(name)} is not JSON: {error}; delete the folder and prepare it anew") from error
    if not isinstance(value, dict):
        raise UserError(f"{folder.path(name)} was not written by mmray; choose another folder")
    return value
