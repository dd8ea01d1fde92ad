"""The samples and rejected rows of a window as flat columns, from which bins are cut (`window.py`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmray.errors import RowError
from mmray.loss.rules import IGNORE_INDEX, LossRule
from mmray.prepared.schema import BINS, IMAGES
from mmray.rows.duplicates import copy_id
from mmray.schedule.loads import Loads

if TYPE_CHECKING:  # it imports PyTorch, which reading a prepared dataset does without
    from mmray.loss.labels import LabelMaker

BINS_PER_ROW_GROUP = 8
"""Number of bins in a row group: reading one bin reads its whole group, and each group adds to the file's footer."""

NOTHING_TRAINED = RowError(
    "nothing_trained", "no token of the row is trained; see `loss` in the job file, and the row's roles or labels"
)


@dataclass(frozen=True)
class SampleColumns:
    """The columns of a window's samples as flat arrays, from which bins are cut."""

    row_ids: list[str]
    sources: list[str]
    messages: list[str | None]
    rows: list[str | None]
    ids: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    visual: np.ndarray
    visual_pairs: np.ndarray
    buckets: list[str | None]
    rules: np.ndarray
    reasons: list[str | None]
    images: list[Sequence[dict[str, Any]]]
    """The images of each row, without their bytes."""
    image_data: pa.ChunkedArray
    """The bytes of all images, row after row; null for an image that lies elsewhere."""
    given_mask: np.ndarray
    notes: list[Sequence[str]]
    watched: list[Sequence[str]]
    """The columns of each row by which its data set is judged."""
    datasets: np.ndarray
    copies: np.ndarray

    @classmethod
    def of(cls, table: pa.Table) -> "SampleColumns":
        ids = table["input_ids"].combine_chunks()
        lengths = ids.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        rules = table["rule"].combine_chunks().fill_null(0).to_numpy(zero_copy_only=False)
        given_mask = np.zeros(int(lengths.sum()), dtype=bool)
        flags = table["given"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        given_mask[np.repeat(rules == LossRule.GIVEN, lengths)] = flags
        return cls(
            row_ids=table["id"].to_pylist(),
            sources=table["source"].to_pylist(),
            messages=table["message"].to_pylist(),
            rows=table["row"].to_pylist(),
            ids=ids.flatten().to_numpy(),
            offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
            lengths=lengths,
            visual=table["visual_tokens"].combine_chunks().fill_null(0).to_numpy(zero_copy_only=False),
            visual_pairs=table["visual_pairs"].combine_chunks().fill_null(0).to_numpy(zero_copy_only=False),
            buckets=table["bucket"].to_pylist(),
            rules=rules,
            reasons=table["reason"].to_pylist(),
            images=_without_data(table["images"]),
            image_data=pc.struct_field(pc.list_flatten(table["images"]), "data"),
            given_mask=given_mask,
            notes=_lists(table["notes"]),
            watched=_lists(table["columns"]),
            datasets=table["dataset"].combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False),
            copies=table["copy"].combine_chunks().fill_null(0).to_numpy(zero_copy_only=False),
        )

    def unique_ids(self, bins: Sequence[Sequence[int]]) -> Iterator[str]:
        """Yields the ids of the bins' rows, by which duplicates are found; a copy of a row is no duplicate."""
        copies = self.copies.tolist()
        for index in chain.from_iterable(bins):
            copy = copies[index]
            yield copy_id(self.sources[index], copy) if copy else self.row_ids[index]

    def set_counts(
        self, bins: Sequence[Sequence[int]], rejected: Sequence[int], trained: np.ndarray
    ) -> dict[str, dict[str, int]]:  # fmt: skip
        """Rows, tokens and bins of each set of rows. A bin counts for each set that has a sample in it.

        bins: the samples of each bin; rejected: the rejected rows; trained: number of trained tokens of every row.
        """
        used = np.asarray([index for members in bins for index in members], dtype=np.int64)
        bin_of_sample = np.repeat(np.arange(len(bins)), [len(members) for members in bins])
        refused_sets = self.datasets[np.asarray(rejected, dtype=np.int64)]
        counts: dict[str, dict[str, int]] = {}
        for number in np.unique(self.datasets[self.datasets >= 0]).tolist():
            is_of_set = self.datasets[used] == number
            samples, refused = used[is_of_set], int((refused_sets == number).sum())
            firsts = int((self.copies[samples] == 0).sum())
            counts[str(number)] = {
                "rows_read": firsts + refused,
                "rows_packed": firsts,
                "rows_rejected": refused,
                "rows_repeated": len(samples) - firsts,
                "bins": len(np.unique(bin_of_sample[is_of_set])),
                "tokens": int(self.lengths[samples].sum()),
                "visual_tokens": int(self.visual[samples].sum()),
                "trained_tokens": int(trained[samples].sum()),
            }
        return counts

    def set_columns(self) -> dict[str, dict[str, Any]]:
        """The number of images, and the columns by which it is checked, of each set of rows (`mmray.rows.columns`)."""
        facts_of_sets: dict[str, dict[str, Any]] = {}
        for number, images, names in zip(self.datasets.tolist(), self.images, self.watched):
            if number < 0:
                continue
            facts = facts_of_sets.setdefault(str(number), {"images": 0, "columns": []})
            facts["images"] += len(images)
            facts["columns"] += [name for name in names if name not in facts["columns"]]
        return facts_of_sets

    def tokens(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def trained_tokens(self, labels: "LabelMaker") -> np.ndarray:
        """Number of trained tokens of every row, int64 [rows]; 0 for rejected rows."""
        blocks = [
            (int(self.offsets[index]) + image["first_token"], image["num_tokens"])
            for index, images in enumerate(self.images)
            for image in images
        ]
        label_ids = labels.of_arrays(self.ids, self.lengths, self.rules, self.given_mask, blocks)
        before = np.concatenate([[0], (label_ids != IGNORE_INDEX).cumsum()])
        return before[self.offsets[1:]] - before[self.offsets[:-1]]

    def loads(self, trained: np.ndarray) -> Loads:
        """Loads of every row, as if each had its own bin. trained: number of trained tokens, int64 [rows]."""
        return Loads(
            tokens=self.lengths,
            visual_tokens=self.visual.astype(np.int64),
            trained_tokens=trained,
            sample_pairs=self.lengths**2,
            visual_pairs=self.visual_pairs.astype(np.int64),
            bucket=np.asarray([str(bucket) for bucket in self.buckets], dtype=np.str_),
        )

    def bin(self, members: Sequence[int], trained: np.ndarray) -> dict[str, Any]:
        """The record of one bin (`schema.BINS`)."""
        starts = np.concatenate([[0], self.lengths[list(members)].cumsum()])
        buckets = {self.buckets[index] for index in members}
        images = [
            image | {"sample": number, "first_token": image["first_token"] + int(starts[number])}
            for number, index in enumerate(members)
            for image in self.images[index]
        ]
        any_given = bool((self.rules[list(members)] == LossRule.GIVEN).any())
        given_masks = [self.given_mask[self.offsets[index] : self.offsets[index + 1]] for index in members]
        return {
            "bucket": buckets.pop() if len(buckets) == 1 else "mixed",
            "num_tokens": int(starts[-1]),
            "visual_tokens": int(self.visual[list(members)].sum()),
            "trained_tokens": int(trained[list(members)].sum()),
            "input_ids": np.concatenate([self.tokens(index) for index in members]),
            "sample_lengths": self.lengths[list(members)],
            "sample_ids": [self.row_ids[index] for index in members],
            "sample_sources": [self.sources[index] for index in members],
            "sample_rules": self.rules[list(members)],
            "sample_sets": self.datasets[list(members)],
            "given": np.concatenate(given_masks) if any_given else [],
            "images": images,
        }

    def with_image_data(self, table: pa.Table, bins: Sequence[Sequence[int]]) -> Iterator[pa.Table]:
        """Yield the bins with the bytes of their images, a row group at a time: they are most of a window, and lie
        in memory once in the samples and once in the file that is written.

        table: the records of the bins (`bin`); bins: the samples of each.
        """
        if self.image_data.null_count == len(self.image_data):
            yield table
            return
        firsts = np.concatenate([[0], np.cumsum([len(images) for images in self.images])]).tolist()
        for start in range(0, len(bins), BINS_PER_ROW_GROUP):
            part = table.slice(start, BINS_PER_ROW_GROUP)
            members = chain.from_iterable(bins[start : start + BINS_PER_ROW_GROUP])
            places = [place for index in members for place in range(firsts[index], firsts[index + 1])]
            images = part["images"].combine_chunks()
            fields = dict(zip(IMAGES.value_type.names, images.flatten().flatten(), strict=True))
            # Arrow's `take` would first copy all chunks into one.
            fields["data"] = pa.array([self.image_data[place].as_py() for place in places], pa.large_binary())
            lists = pa.ListArray.from_arrays(
                np.concatenate([[0], images.value_lengths().to_numpy().cumsum()]).astype(np.int32),
                pa.StructArray.from_arrays(list(fields.values()), fields=list(IMAGES.value_type)),
            )
            yield part.set_column(part.schema.get_field_index("images"), BINS.field("images"), lists)

    def rejected(self, index: int) -> dict[str, Any]:
        reason, message = self.reasons[index], self.messages[index]
        if reason is None:
            reason, message = NOTHING_TRAINED.reason, NOTHING_TRAINED.message
        return {
            "id": self.row_ids[index], "reason": reason, "message": message, "source": self.sources[index],
            "row": self.rows[index],
        }  # fmt: skip


def _lists(column: pa.ChunkedArray, values: list[Any] | None = None) -> list[Sequence[Any]]:
    """The list of each row. Most are empty, and these are one object, which Python's collector need not visit.

    values: other values in the place of the column's.
    """
    values = pc.list_flatten(column).to_pylist() if values is None else values
    ends = np.cumsum(pc.list_value_length(column).fill_null(0).to_numpy()).tolist()
    return [values[start:stop] if stop > start else () for start, stop in pairwise([0, *ends])]


def _without_data(images: pa.ChunkedArray) -> list[Sequence[dict[str, Any]]]:
    """The images of each row (`schema.IMAGES`) without their bytes."""
    flat = pc.list_flatten(images)
    names = [name for name in IMAGES.value_type.names if name != "data"]
    return _lists(images, pa.table({name: pc.struct_field(flat, name) for name in names}).to_pylist())
