"""Packs one window of rows: from encoded samples to the Parquet bytes of its bins.

Packing is pure: equal samples give equal bytes, so a window can be made again anywhere. Samples are first packed with
others of the same image shape. Bins filled to `bucket_fill` are kept; the samples of emptier bins are packed again,
whatever their shape. Bins keep the order in which they were made, or are put into random order: the schedule shuffles
blocks of neighbouring bins, and a random order gives each block its share of every kind of bin.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmray.packing.equal_cost import CostedSamples, pack_equal_cost, planned_bin_cost
from mmray.packing.pack import lower_bound, pack_2d
from mmray.packing.settings import PackingSettings
from mmray.prepared.sample_columns import BINS_PER_ROW_GROUP, SampleColumns
from mmray.prepared.schema import BINS, REJECTED, SAMPLES
from mmray.rows.duplicates import id_hashes
from mmray.rows.rejections import SetRows
from mmray.rows.sample import RejectedRow, Sample
from mmray.schedule.loads import Loads
from mmray.schedule.schedule import mix_many

if TYPE_CHECKING:  # it imports PyTorch, which reading a prepared dataset does without
    from mmray.loss.labels import LabelMaker

EXAMPLES = 5
"""Number of example places that statistics name of each kind."""

SampleCosts = Callable[[Loads], tuple[np.ndarray, float]]
"""Computes the costs of samples, as `BalanceSettings.sample_costs` does."""


@dataclass(frozen=True)
class Window:
    """A packed window.

    bins, rejected: bytes of the Parquet files; statistics: counts that add up over windows; id_hashes: hashes of the
    sample ids in the order of bins (`rows.duplicates`).
    """

    bins: bytes
    rejected: bytes
    statistics: dict[str, Any]
    id_hashes: bytes = b""


def samples_table(
    rows: Sequence[Sample | RejectedRow], datasets: Sequence[int] | None = None, copies: Sequence[int] | None = None
) -> pa.Table:
    """Encoded rows as the Arrow table (`schema.SAMPLES`) that the packer takes.

    datasets: the set of each row; copies: how often each row was taken before, default: never.
    """

    def record(row: Sample | RejectedRow, dataset: int, copy: int) -> dict[str, Any]:
        if isinstance(row, RejectedRow):
            return {
                "id": row.id, "source": row.source, "reason": row.reason, "message": row.message, "row": row.row,
                "images": [], "columns": row.columns, "dataset": dataset, "copy": copy,
            }  # fmt: skip
        return {
            "id": row.id, "source": row.source, "rule": int(row.rule), "bucket": row.bucket,
            "visual_tokens": row.visual_tokens, "visual_pairs": row.visual_pairs, "input_ids": row.input_ids,
            "given": row.given_mask, "notes": row.notes, "columns": row.columns,
            "dataset": dataset, "copy": copy,
            "images": [
                {
                    "uri": image.uri or None, "data": image.data, "width": width, "height": height, "sample": 0,
                    "first_token": int(start), "num_tokens": int(count),
                }
                for image, (width, height), (start, count) in zip(row.images, row.sizes, row.blocks)
            ],
        }  # fmt: skip

    sets = [row.dataset for row in rows] if datasets is None else datasets
    taken_before = [0] * len(rows) if copies is None else copies
    records = [record(row, number, copy) for row, number, copy in zip(rows, sets, taken_before, strict=True)]
    return pa.Table.from_pylist(records, schema=SAMPLES)


def pack_window(
    samples: pa.Table, packing: PackingSettings, labels: "LabelMaker", sample_gap: int = 0, allow_empty: bool = False,
    *, mixed: bool = False, sample_costs: SampleCosts | None = None, bin_cost: float | None = None,
) -> Window:  # fmt: skip
    """Pack a window's samples into bins; deterministic to the byte.

    samples: `schema.SAMPLES`, in row order.
    sample_gap: number of tokens between the samples of a bin (`Family.sample_gap`).
    allow_empty: pack samples without a trained token too; else they are rejected.
    mixed: put the bins into a random order, always the same for equal samples.
    sample_costs: computes the costs of samples; required to pack to equal cost.
    bin_cost: the cost of a bin, by the dataset's first window; None: it is chosen by these samples.
    """
    columns = SampleColumns.of(samples)
    trained = columns.trained_tokens(labels)
    usable = [
        index for index, reason in enumerate(columns.reasons) if reason is None and (allow_empty or trained[index])
    ]
    used = np.asarray(usable, dtype=np.int64)
    if packing.mode == "equal_cost" and usable:
        samples_of_bins = costed(columns.loads(trained).take(used), packing, sample_gap, sample_costs)
        bin_cost = planned_bin_cost(samples_of_bins) if bin_cost is None else bin_cost
        packed = pack_equal_cost(samples_of_bins, bin_cost)
    else:
        packed = pack_by_bucket(
            columns.lengths[used], columns.visual[used], [columns.buckets[index] for index in usable], packing,
            sample_gap,
        )  # fmt: skip
    bins = [[usable[number] for number in members] for members in packed]
    if mixed:
        bins = [bins[number] for number in _drawn_order(len(bins), seed=int(columns.lengths.sum()))]
    table = pa.Table.from_pylist([columns.bin(members, trained) for members in bins], schema=BINS)
    digest = _content_digest(table)
    bins_file = _parquet(
        _digested(columns.with_image_data(table, bins), digest), BINS, BINS_PER_ROW_GROUP,
        Loads.of(table, [int(columns.visual_pairs[list(members)].sum()) for members in bins]).to_footer(),
    )  # fmt: skip
    # A row that is taken again is rejected, or noted, with its first copy alone.
    is_first = columns.copies == 0
    unusable = sorted(set(range(samples.num_rows)) - set(usable))
    unusable = [index for index in unusable if is_first[index]]
    rejected = pa.Table.from_pylist([columns.rejected(index) for index in unusable], schema=REJECTED)
    statistics = {
        "rows_read": int(is_first.sum()),
        "rows_packed": int(is_first[used].sum()),
        "rows_rejected": rejected.num_rows,
        "rows_repeated": int((~is_first[used]).sum()),
        "rejected_by_reason": dict(sorted(Counter(rejected["reason"].to_pylist()).items())),
        "content": digest.hexdigest(),
        "bins": len(bins),
        "bins_at_least": lower_bound(
            columns.lengths[used], columns.visual[used],
            token_capacity=packing.token_capacity, visual_capacity=packing.visual_capacity,
        ),
        "tokens": int(columns.lengths[used].sum()),
        "visual_tokens": int(columns.visual[used].sum()),
        "trained_tokens": int(trained[used].sum()),
        "images": sum(len(columns.images[index]) for index in usable),
        "sets": _by_set(samples["dataset"].to_pylist(), is_first, dict(zip(unusable, rejected.to_pylist()))),
        "set_counts": columns.set_counts(bins, unusable, trained),
        "set_columns": columns.set_columns(),
        **({} if bin_cost is None else {"bin_cost": bin_cost}),
        **_image_notes([(columns.sources[i], columns.notes[i]) for i in usable if is_first[i]]),
    }  # fmt: skip
    ids = id_hashes(columns.unique_ids(bins))
    return Window(bins_file, _parquet([rejected], REJECTED, 1024, {}), statistics, ids)


def _drawn_order(count: int, seed: int) -> list[int]:
    """The numbers 0 to count - 1 in a random order that never changes between versions of numpy."""
    draws = mix_many(mix_many(np.arange(1, count + 1, dtype=np.uint64)) ^ np.uint64(seed))
    return np.argsort(draws, kind="stable").tolist()


def _by_set(
    datasets: Sequence[int | None], is_first: np.ndarray, rejected: Mapping[int, dict[str, Any]]
) -> dict[str, Any]:
    """Counts of each set's rows (`SetRows`), by the number of the set as a JSON key.

    is_first: whether each row is taken for the first time, bool [rows]; rejected: records of the rejected rows, by
    index.
    """
    read = Counter(number for number, first in zip(datasets, is_first.tolist()) if first)
    sets = {str(number): SetRows(count) for number, count in read.items() if number is not None}
    for index, record in rejected.items():
        if (number := datasets[index]) is not None:
            sets[str(number)].reject(record["reason"], record["source"], record["message"])
    return {number: counts.to_json() for number, counts in sets.items()}


def _image_notes(noted: Sequence[tuple[str, Sequence[str]]]) -> dict[str, Any]:
    """Counts of the images with each note, and the places of a few such rows. noted: (place, notes) of rows."""
    counts = Counter(note for _, notes in noted for note in notes)
    examples = {note: [place for place, notes in noted if note in notes][:EXAMPLES] for note in sorted(counts)}
    return {"image_notes": dict(sorted(counts.items())), "examples": examples}


def _content_digest(bins: pa.Table) -> "hashlib.blake2b":
    """Begin the hash of the contents of bins (`schema.BINS`), which is not that of a file's bytes: tokens, samples and
    rules. `_digested` adds the images."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("input_ids", "sample_lengths", "sample_rules", "given"):
        column = bins[name].combine_chunks()
        for part in (column.value_lengths(), column.flatten()):
            digest.update(part.to_numpy(zero_copy_only=False).tobytes())
    return digest


def _digested(parts: Iterable[pa.Table], digest: "hashlib.blake2b") -> Iterator[pa.Table]:
    """Yield parts of a table of bins, each once its samples' ids and its images are in the digest."""
    for part in parts:
        for ids, images in zip(part["sample_ids"], part["images"]):
            digest.update(repr(ids.as_py()).encode())
            for image in images.as_py():
                digest.update(image.pop("data") or b"")
                digest.update(repr(sorted(image.items())).encode())
        yield part


def costed(
    samples: Loads, packing: PackingSettings, sample_gap: int, sample_costs: SampleCosts | None
) -> CostedSamples:
    """The samples of a window with their costs.

    samples: the loads of samples, as if each had its own bin; sample_costs: computes their costs.
    """
    if sample_costs is None:
        raise ValueError("packing to equal cost needs to know what samples cost")
    return CostedSamples(
        samples.tokens + sample_gap,
        samples.visual_tokens,
        *sample_costs(samples),
        token_capacity=packing.token_capacity + sample_gap,  # no gap after the last sample
        visual_capacity=packing.visual_capacity,
    )


def pack_by_bucket(
    lengths: np.ndarray, visual: np.ndarray, buckets: Sequence[str | None], packing: PackingSettings, sample_gap: int
) -> list[list[int]]:
    """Pack samples into bins: full bins of each bucket, in the order of bucket names, then bins of the leftovers.

    lengths, visual: tokens and visual tokens of each sample, int64 [n]; buckets: the image shape of each sample.
    Returns the bins as lists of sample numbers.
    """
    if packing.mode == "none":
        return [[index] for index in range(len(lengths))]

    def pack(indices: Sequence[int]) -> list[list[int]]:
        chosen = np.asarray(indices, dtype=np.int64)
        packed = pack_2d(
            lengths[chosen] + sample_gap,
            visual[chosen],
            token_capacity=packing.token_capacity + sample_gap,  # no gap after the last sample
            visual_capacity=packing.visual_capacity,
        )
        return [[int(chosen[number]) for number in members] for members in packed]

    def fill(members: Sequence[int]) -> float:
        tokens, images = lengths[list(members)].sum(), visual[list(members)].sum()
        return float(max(tokens / packing.token_capacity, images / packing.visual_capacity))

    kept: list[list[int]] = []
    leftovers: list[int] = []
    of_bucket: dict[str, list[int]] = {}
    for index, bucket in enumerate(buckets):
        of_bucket.setdefault(str(bucket), []).append(index)
    for _, indices in sorted(of_bucket.items()):
        for members in pack(indices):
            if fill(members) >= packing.bucket_fill:
                kept.append(members)
            else:
                leftovers += members
    return kept + (pack(sorted(leftovers)) if leftovers else [])


def _parquet(parts: Iterable[pa.Table], schema: pa.Schema, row_group_size: int, footer: dict[bytes, bytes]) -> bytes:
    """Write a file of the parts of a table. Each part but the last has a multiple of `row_group_size` rows."""
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(part, row_group_size=row_group_size)
        writer.add_key_value_metadata(footer)
    return buffer.getvalue()
