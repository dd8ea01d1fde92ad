"""A prepared dataset: a folder with `bins-*.parquet`, `rejected.parquet` and, written last, `manifest.json`.

While a prepare runs, the folder holds `plan.json` (what is being prepared) and one pair of files per finished window;
a second run of the same job makes only the windows that are missing. The manifest is the commit: a folder without one
is not a prepared dataset.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmray.errors import UserError
from mmray.images import TilingPolicy
from mmray.prepared.fingerprint import differences, fingerprint
from mmray.prepared.loads import Loads
from mmray.prepared.schema import FORMAT_VERSION, REJECTED
from mmray.prepared.window import BINS_PER_ROW_GROUP, Window
from mmray.storage import Folder

MANIFEST, PLAN, REJECTED_FILE = "manifest.json", "plan.json", "rejected.parquet"
_OWN_PREFIXES = ("bins-", "window-", "rejected-")
_HALF_WRITTEN = (".bins-", ".window-", ".rejected")
"""What a process that was killed while writing leaves (`Folder.writing`)."""


def bins_name(window: int) -> str:
    """The file of a window's bins."""
    return f"bins-{window:05d}.parquet"


def part_names(window: int) -> tuple[str, str]:
    """The rejected rows and the statistics of a window, kept until the manifest is written."""
    return f"rejected-{window:05d}.part", f"window-{window:05d}.json"


@dataclass(frozen=True)
class Bin:
    """One bin. input_ids: int32 [L], the samples one after another; given: bool [L] or empty; images: a dict each, as
    in `schema.IMAGES`."""

    index: int
    bucket: str
    visual_tokens: int
    trained_tokens: int
    input_ids: np.ndarray
    sample_lengths: np.ndarray
    sample_ids: list[str]
    sample_sources: list[str]
    sample_rules: np.ndarray
    given: np.ndarray
    images: list[dict[str, Any]]


class PreparedDataset:
    """Read access to a prepared dataset. Raises UserError when the folder has no manifest."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._folder = Folder(path)
        if not self._folder.exists(MANIFEST):
            started = " (a prepare was begun here but did not finish)" if self._folder.exists(PLAN) else ""
            raise UserError(f"{path} is no prepared dataset{started}: it has no {MANIFEST}. Run jobs/prepare.py first")
        self.manifest: dict[str, Any] = _read_json(self._folder, MANIFEST)
        if self.manifest.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path} has format {self.manifest.get('format_version')}, this mmray reads {FORMAT_VERSION}; "
                "prepare it anew"
            )
        self._first_bin = np.cumsum([0] + [shard["bins"] for shard in self.manifest["shards"]])
        self._open_file = functools.lru_cache(maxsize=128)(self._parquet_file)
        self._file_loads = functools.lru_cache(maxsize=256)(lambda file: Loads.from_footer(self._open_file(file)))

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

    def __len__(self) -> int:
        return int(self._first_bin[-1])

    def __repr__(self) -> str:
        return f"PreparedDataset({self.path!r}, bins={len(self)}, fingerprint={self.fingerprint!r})"

    def bin(self, index: int) -> Bin:
        """Bin number `index`, from 0. Reads its row group."""
        if not 0 <= index < len(self):
            raise IndexError(f"bin {index} of a prepared dataset with {len(self)} bins")
        shard = int(np.searchsorted(self._first_bin, index, side="right")) - 1
        within = index - int(self._first_bin[shard])
        group = self._open_file(shard).read_row_group(within // BINS_PER_ROW_GROUP)
        return _to_bin(index, group.slice(within % BINS_PER_ROW_GROUP, 1))

    def column(self, name: str) -> np.ndarray:
        """A column of counts (`num_tokens`, `visual_tokens`, `trained_tokens`) for all bins, in order."""
        tables = [self._open_file(shard).read([name]) for shard in range(len(self.manifest["shards"]))]
        return np.concatenate([table[name].to_numpy() for table in tables]) if tables else np.zeros(0, dtype=np.int32)

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

    def _parquet_file(self, shard: int) -> pq.ParquetFile:
        return pq.ParquetFile(self._folder.open(self.manifest["shards"][shard]["file"]))


def window_bins(window: Window) -> list[Bin]:
    """The bins of a window that was not written."""
    table = pq.read_table(pa.BufferReader(window.bins))
    return [_to_bin(index, table.slice(index, 1)) for index in range(table.num_rows)]


def _to_bin(index: int, row: pa.Table) -> Bin:
    def array(name: str, dtype: Any) -> np.ndarray:
        values = row[name].combine_chunks().flatten()
        return values.to_numpy(zero_copy_only=False).astype(dtype, copy=False)

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
        given=array("given", np.bool_),
        images=row["images"][0].as_py(),
    )


class PreparedWriter:
    """Writes a prepared dataset window by window; windows may come from any process, in any order."""

    def __init__(self, path: str) -> None:
        self._folder = Folder(path)
        self.path = path

    def is_finished(self, record: dict[str, Any]) -> bool:
        """True when the folder already holds the result for this record. Raises UserError when it holds another's."""
        for name in (MANIFEST, PLAN):
            if self._folder.exists(name) and self._fingerprint_in(name) != fingerprint(record):
                raise UserError(_other_result(self.path, _read_json(self._folder, name), record))
        return self._folder.exists(MANIFEST)

    def begin(self, record: dict[str, Any]) -> set[int]:
        """Note what is being prepared; returns the windows that an earlier run finished."""
        self._folder.create()
        if not self._folder.exists(PLAN):
            self.clear()  # files of a window count only under the plan they were made for
        self._folder.write(PLAN, _json({"fingerprint": fingerprint(record), "record": record}))
        names = self._folder.names()
        for name in names:
            if name.startswith(_HALF_WRITTEN):
                self._folder.remove(name)
        stems = (name.removeprefix("window-").removesuffix(".json") for name in names if name.startswith("window-"))
        return {int(stem) for stem in stems}

    def write_window(self, number: int, window: Window) -> None:
        """Commit one window; its statistics are written last and mark it finished."""
        rejected, statistics = part_names(number)
        self._folder.write(bins_name(number), window.bins)
        self._folder.write(rejected, window.rejected)
        self._folder.write(statistics, _json(window.statistics))

    def finish(
        self, record: dict[str, Any], num_windows: int, *, tiling: TilingPolicy, capacities: tuple[int, int],
        facts: dict[str, Any],
    ) -> PreparedDataset:  # fmt: skip
        """Join the rejected rows, check that nothing disappeared, write the manifest. facts: what else it shall say."""
        parts = [json.loads(self._folder.read(part_names(number)[1])) for number in range(num_windows)]
        statistics = add_statistics(parts, capacities)
        if statistics["rows_read"] != statistics["rows_packed"] + statistics["rows_rejected"]:
            raise RuntimeError(f"rows were lost while preparing {self.path}: {statistics}")
        with self._folder.writing(REJECTED_FILE) as file, pq.ParquetWriter(file, REJECTED) as writer:
            for number in range(num_windows):
                with self._folder.open(part_names(number)[0]) as part:
                    writer.write_table(pq.read_table(part))
        manifest = {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint(record),
            "content": joined_content(part["content"] for part in parts),
            "record": record,
            "tiling": tiling.model_dump(mode="json"),
            "shards": [{"file": bins_name(number), "bins": part["bins"]} for number, part in enumerate(parts)],
            "statistics": statistics,
            **facts,
        }
        self._folder.write(MANIFEST, _json(manifest))
        for name in [PLAN] + [name for number in range(num_windows) for name in part_names(number)]:
            self._folder.remove(name)
        return PreparedDataset(self.path)

    def _fingerprint_in(self, name: str) -> str:
        return str(_read_json(self._folder, name).get("fingerprint"))

    def clear(self) -> None:
        """Delete what mmray wrote, finished or not, and nothing else in the folder.

        A stop in between leaves no manifest and no window that counts as finished.
        """
        names = [name for name in self._folder.names() if name == REJECTED_FILE or name.startswith(_OWN_PREFIXES)]
        names.sort(key=lambda name: not name.startswith("window-"))
        for name in (MANIFEST, *names, PLAN):
            if self._folder.exists(name):
                self._folder.remove(name)


def joined_content(windows: Iterable[str]) -> str:
    """What the bins of all windows are known by."""
    return hashlib.blake2b("".join(windows).encode(), digest_size=8).hexdigest()


def add_statistics(parts: Iterable[dict[str, Any]], capacities: tuple[int, int]) -> dict[str, Any]:
    """Sum the statistics of windows; fill is the part of all bins' capacity that holds tokens."""
    total: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for part in parts:
        reasons.update(part["rejected_by_reason"])
        total.update({key: value for key, value in part.items() if isinstance(value, int)})
    room = max(total["bins"], 1)
    keys = ("rows_read", "rows_packed", "rows_rejected", "bins", "bins_at_least", "tokens", "visual_tokens",
            "trained_tokens", "images")  # fmt: skip
    return {
        **{key: total[key] for key in keys},
        "rejected_by_reason": dict(sorted(reasons.items())),
        "token_fill": round(total["tokens"] / (room * capacities[0]), 4),
        "visual_fill": round(total["visual_tokens"] / (room * capacities[1]), 4),
    }


def _other_result(path: str, found: dict[str, Any], record: dict[str, Any]) -> str:
    lines = differences(found.get("record"), json.loads(_json(record)))
    shown = "\n  ".join(lines[:8] + ([f"and {len(lines) - 8} more"] if len(lines) > 8 else []))
    return (
        f"{path} was prepared from other input (fingerprint {found.get('fingerprint')}, this job has "
        f"{fingerprint(record)}):\n  {shown}\nChoose another output.prepared, or run jobs/prepare.py with --replace "
        "to delete the old one"
    )


def _read_json(folder: Folder, name: str) -> dict[str, Any]:
    try:
        value = json.loads(folder.read(name))
    except ValueError as error:
        raise UserError(f"{folder.path(name)} is not JSON: {error}; delete the folder and prepare it anew") from error
    if not isinstance(value, dict):
        raise UserError(f"{folder.path(name)} was not written by mmray; choose another folder")
    return value


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n").encode()
