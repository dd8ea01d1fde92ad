"""Reads a prepared dataset: a folder with `bins-*.parquet`, `rejected.parquet` and, written last, `manifest.json`.

The manifest is the commit: a folder without one is not a prepared dataset, and a file that it does not name is not part
of it. `writer.py` writes the folder.
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

from mmray.base.words import counted, one_line
from mmray.display.notebook import Fact, Segment, card
from mmray.errors import UserError
from mmray.images import TilingPolicy
from mmray.images.header import IMAGE_READING
from mmray.prepared.sample_columns import BINS_PER_ROW_GROUP
from mmray.prepared.schema import FORMAT_VERSION, READ_VERSIONS
from mmray.prepared.window import Window
from mmray.schedule.loads import Loads
from mmray.storage import Folder

MANIFEST, PLAN, REJECTED_FILE = "manifest.json", "plan.json", "rejected.parquet"
MOST_SHOWN_SAMPLES = 60
"""Number of samples of a bin that a notebook draws to scale."""


@dataclass(frozen=True)
class Bin:
    """One bin: samples that are packed together.

    input_ids: int32 [L], the tokens of the samples, one sample after another.
    sample_sets: int32 [samples], number of each sample's data set in the split; -1 in datasets of version 2.
    given_mask: bool [L], the tokens that rows with LossRule.GIVEN mark as trained on; empty without such rows.
    images: one dict for each image, as in `schema.IMAGES`.
    """

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
    given_mask: np.ndarray
    images: list[dict[str, Any]]

    def _repr_html_(self) -> str:
        """A card with its counts, and its samples drawn to scale, those with images in another colour."""
        with_images = {image["sample"] for image in self.images}
        whole, shown = max(len(self.input_ids), 1), self.sample_lengths.tolist()[:MOST_SHOWN_SAMPLES]
        strip = [
            Segment(length / whole, "visual" if number in with_images else "tokens", f"{name[:80]}: {length:,} tokens")
            for number, (name, length) in enumerate(zip(self.sample_ids, shown))
        ]
        if hidden_tokens := int(self.sample_lengths[MOST_SHOWN_SAMPLES:].sum()):
            strip.append(Segment(hidden_tokens / whole, "grey", f"the other samples: {hidden_tokens:,} tokens"))
        count = len(self.sample_ids)
        return card(
            f"Bin {self.index:,}: {counted(count, 'sample')}",
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
    """Gives read access to a prepared dataset. Raises UserError when the folder has no manifest."""

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

    def __reduce__(self) -> tuple[type["PreparedDataset"], tuple[str]]:
        """Travels to other processes as its path, and is opened there anew."""
        return type(self), (self.path,)

    def _remedy(self) -> str:
        """The remedy for a folder without a manifest, by what it holds instead."""
        inside = [name for name in ("train", "eval") if Folder(f"{self.path.rstrip('/')}/{name}").exists(MANIFEST)]
        if inside:
            return f"It holds {' and '.join(inside)}: give {self.path.rstrip('/')}/{inside[0]}"
        if self._folder.exists("metrics.jsonl"):
            return f"It is the folder of a training run: mmray report {self.path} shows it"
        begun = "A prepare was begun here but did not finish; run" if self._folder.exists(PLAN) else "Run"
        return f"{begun} jobs/prepare.py first"

    @property
    def fingerprint(self) -> str:
        """Identifies both the inputs and the bins made of them; a training order is valid only for both.

        The bins of equal rows and settings differ when an image's size has changed in between.
        """
        return f"{self.manifest['fingerprint']}-{self.manifest['content']}"

    @property
    def record(self) -> dict[str, Any]:
        """Everything that the dataset depends on (`fingerprint.prepare_record`)."""
        return dict(self.manifest["record"])

    @property
    def num_sets(self) -> int:
        """Number of sets of rows that samples name; 1 in format 2, whose samples name none."""
        return len(self.record["datasets"]) if self.manifest["format_version"] > 2 else 1

    @property
    def statistics(self) -> dict[str, Any]:
        """Counts of rows, bins and tokens (`writer.add_statistics`)."""
        return dict(self.manifest["statistics"])

    @property
    def tiling(self) -> TilingPolicy:
        """The tiling policy that samples were measured with, as resolved for the family."""
        return TilingPolicy.model_validate(self.manifest["tiling"])

    @property
    def is_read_otherwise(self) -> bool:
        """True when an earlier mmray, which reads some sizes otherwise, measured its images (`IMAGE_READING`)."""
        return bool(self.statistics["images"]) and self.manifest.get("image_reading", 1) < IMAGE_READING

    def __len__(self) -> int:
        return int(self._first_bin[-1])

    def check_has_bins(self) -> None:
        """Raise UserError when there is no bin to train on."""
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
            f"Prepared dataset: {counted(len(self), 'bin')}",
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
        """Read bin number `index`, from 0; reads its whole row group. Raises IndexError for a number out of range."""
        if not 0 <= index < len(self):
            raise IndexError(f"bin {index} of a prepared dataset with {counted(len(self), 'bin')}")
        shard = int(np.searchsorted(self._first_bin, index, side="right")) - 1
        within = index - int(self._first_bin[shard])
        group = self._open_file(shard).read_row_group(within // BINS_PER_ROW_GROUP)
        return _to_bin(index, group.slice(within % BINS_PER_ROW_GROUP, 1))

    def bins(self, first: int, stop: int) -> Iterator[Bin]:
        """Yield the bins `first` to `stop` - 1 in order; reads each row group once."""
        group_place, group = (-1, -1), None
        for index in range(first, stop):
            shard = int(np.searchsorted(self._first_bin, index, side="right")) - 1
            within = index - int(self._first_bin[shard])
            place = shard, within // BINS_PER_ROW_GROUP
            if group is None or place != group_place:
                group_place, group = place, self._open_file(shard).read_row_group(place[1])
            yield _to_bin(index, group.slice(within % BINS_PER_ROW_GROUP, 1))

    def column(self, name: str) -> np.ndarray:
        """Read a column of counts for all bins, in order: `num_tokens`, `visual_tokens` or `trained_tokens`."""
        tables = [self.read_file(shard, [name]) for shard in range(len(self.manifest["shards"]))]
        return np.concatenate([table[name].to_numpy() for table in tables]) if tables else np.zeros(0, dtype=np.int32)

    @property
    def files(self) -> dict[int, range]:
        """The bin numbers in each file that has bins, by the number of the file."""
        borders = enumerate(pairwise(self._first_bin.tolist()))
        return {file: range(first, stop) for file, (first, stop) in borders if stop > first}

    def read_file(self, file: int, columns: list[str]) -> pa.Table:
        """Read columns of the bins in one file.

        columns: names of `schema.BINS`; `images.list.element.width` names a field inside a list.
        """
        return self._open_file(file).read(columns)

    def loads(self, bins: np.ndarray) -> Loads:
        """Read the loads of bins, in the order of `bins`, from file footers; the last 256 footers are cached.

        bins: bin numbers, int64 [n], at least one.
        """
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
        """Read all rejected rows (`schema.REJECTED`)."""
        with self._folder.open(REJECTED_FILE) as file:
            return pq.read_table(file)

    def rejected_parts(self) -> Iterator[pa.Table]:
        """Yield the rejected rows in parts of some thousand rows, since there may be millions."""
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
    """The bins of a window in memory, without writing it to a file."""
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
        given_mask=array("given", np.bool_),
        images=row["images"][0].as_py(),
    )


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """Read a JSON object that mmray wrote. Raises UserError for anything else."""
    try:
        value = json.loads(folder.read(name))
    except ValueError as error:
        raise UserError(f"{folder.path(name)} is not JSON: {error}; delete the folder and prepare it anew") from error
    if not isinstance(value, dict):
        raise UserError(f"{folder.path(name)} was not written by mmray; choose another folder")
    return value
