"""Writes a prepared dataset, window by window, from several processes, safe against interruption.

    plan.json                          what is being prepared, and the token of this attempt
    bins-00012-3f2a9c1b.parquet        the bins of a window; named by its bytes, so it is never another one's
    rejected-00012-07d1e2aa.part       its rejected rows, until they are joined
    window-00012-<token>.json          its commit: names and sizes of these two files, its counts

A window counts once its commit exists and its files have the sizes that the commit names. A commit belongs to the plan
whose token is in its name: actors that outlive a killed driver may go on writing into the folder of a run that has
begun anew, whose token differs, so that nothing of theirs is used. What they write for the same plan is equal to what
the new run writes. The manifest is written last and names every file that counts; then all others are removed.
"""

import base64
import contextlib
import hashlib
import json
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmray.base.ahead import in_order
from mmray.errors import UserError
from mmray.images import TilingPolicy
from mmray.images.header import IMAGE_READING
from mmray.prepared.dataset import MANIFEST, PLAN, REJECTED_FILE, PreparedDataset, read_json
from mmray.prepared.fingerprint import differences, fingerprint
from mmray.prepared.schema import FORMAT_VERSION, REJECTED
from mmray.prepared.window import EXAMPLES, Window
from mmray.rows.columns import columns_problem
from mmray.rows.dealing import dealt_like
from mmray.rows.duplicates import HASH_BYTES, DuplicateIds
from mmray.storage import Folder, explained

_COMMIT_PREFIX = "window-"
_OWN_PREFIXES = ("bins-", _COMMIT_PREFIX, "rejected-", ".bins-", f".{_COMMIT_PREFIX}", ".rejected")
"""Prefixes of the files that mmray writes; with a dot: files left by a process killed in `Folder.writing`."""

_READERS = 16
"""Number of threads that read commits: in object storage each commit is a request."""
_REJECTED_BYTES = 16 << 20
"""Size in bytes at which collected rejected rows are written as a row group."""


class WindowWriter:
    """Commits windows of one plan. Several actors may write the same window."""

    def __init__(self, path: str, token: str) -> None:
        """token: token of the plan (`PreparedWriter.begin`)."""
        self._folder, self._token = Folder(path), token

    def write(self, number: int, window: Window) -> None:
        """Commit one window. Raises UserError when its files cannot be written."""
        bins = f"bins-{number:05d}-{_hash(window.bins)}.parquet"
        rejected = f"rejected-{number:05d}-{_hash(window.rejected)}.part"
        commit = {
            "files": {bins: len(window.bins), rejected: len(window.rejected)},
            "bins_file": bins,
            "rejected_file": rejected,
            "statistics": window.statistics,
            "id_hashes": base64.b64encode(window.id_hashes).decode(),
        }
        with explained(self._folder.uri):
            self._folder.write(bins, window.bins)
            self._folder.write(rejected, window.rejected)
            self._folder.write(_commit_name(number, self._token), _json(commit))


class PreparedWriter:
    """Begins or continues a plan, and makes the dataset of its windows; the driver has one."""

    def __init__(self, path: str) -> None:
        self._folder = Folder(path)
        self.path = path
        self.token = ""
        """Token of the plan that `begin` wrote or continues."""

    def as_begun(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with rows dealt as in the folder, when an earlier version began or finished a plan there."""
        with explained(self.path):
            for name in (MANIFEST, PLAN):
                if self._folder.exists(name):
                    return dealt_like(record, self._read(name).get("record") or {})
        return record

    def is_finished(self, record: dict[str, Any]) -> bool:
        """True when the folder holds the result for this record. Raises UserError when it holds another's."""
        with explained(self.path):
            if self._folder.exists(MANIFEST) and self._is_of_version_2(self._read(MANIFEST), record):
                return True
            for name in (MANIFEST, PLAN):
                if self._folder.exists(name) and self._read(name).get("fingerprint") != fingerprint(record):
                    raise UserError(_other_result(self.path, self._read(name), record))
            return self._folder.exists(MANIFEST)

    def _is_of_version_2(self, manifest: dict[str, Any], record: dict[str, Any]) -> bool:
        """True when version 2 made the dataset from the same record. Training checks whether a run may begin on it."""
        return bool(manifest.get("fingerprint") == fingerprint(record | {"format_version": 2}))

    def tokens_per_row(self) -> list[float] | None:
        """The tokens per row of each set that the plan in the folder was made with; None where there is no plan."""
        with explained(self.path):
            return self._read(PLAN).get("tokens_per_row", []) if self._folder.exists(PLAN) else None

    def begin(self, record: dict[str, Any], tokens_per_row: Sequence[float] = ()) -> set[int]:
        """Write the plan or continue it; returns the windows that an earlier run of the same plan finished.

        tokens_per_row: mean number of tokens of the rows of each set, where it decides how many rows are taken.
        """
        with explained(self.path):
            self._folder.create()
            if not self._folder.exists(PLAN):
                if self._folder.exists(MANIFEST):
                    raise UserError(f"{self.path}: another run has just finished here; the same command finds it done")
                self.clear()  # files count only under the plan they were made for
                plan = {"fingerprint": fingerprint(record), "token": uuid.uuid4().hex[:12], "record": record}
                measured = {"tokens_per_row": list(tokens_per_row)} if tokens_per_row else {}
                self._folder.write(PLAN, _json(plan | measured))
            plan = self._read(PLAN)
            if plan.get("tokens_per_row", []) != list(tokens_per_row):
                raise UserError(f"{self.path}: another run has just begun here; run the same command again")
            self.token = str(plan.get("token"))
            sizes = self._folder.sizes()
            numbers = _committed(sizes, self.token)
            commits = self._commits(numbers)
        return {number for number, commit in zip(numbers, commits) if commit and _is_whole(commit, sizes)}

    def windows(self) -> WindowWriter:
        """Make the writer of windows for the plan that was begun."""
        return WindowWriter(self.path, self.token)

    def statistics(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Yield the statistics of committed windows, in order."""
        with explained(self.path):
            for commit in self._commits(numbers):
                yield commit.get("statistics", {})

    def finish(
        self, record: dict[str, Any], num_windows: int, *, tiling: TilingPolicy, capacities: tuple[int, int],
        facts: dict[str, Any], left_out: Sequence[int] = (),
    ) -> PreparedDataset:  # fmt: skip
        """Join the rejected rows, check that no row was lost, and write the manifest.

        capacities: (token_capacity, visual_capacity) of a bin; facts: further entries of the manifest; left_out: number
        of rows of each set that were not taken, () where all were.

        Returns the dataset, also when another run of the same job has finished it in between. Raises UserError when a
        run of another job uses the folder.
        """
        with explained(self.path):
            try:
                self._join(record, num_windows, tiling, capacities, facts, left_out)
            except FileNotFoundError:
                if not self.is_finished(record):
                    raise
            self.tidy()
        return PreparedDataset(self.path)

    def _join(
        self, record: dict[str, Any], num_windows: int, tiling: TilingPolicy, capacities: tuple[int, int],
        facts: dict[str, Any], left_out: Sequence[int],
    ) -> None:  # fmt: skip
        if self._read(PLAN).get("token") != self.token:
            raise UserError(
                f"{self.path}: another run of jobs/prepare.py has begun anew in this folder; wait for it, or give this "
                "job another output.prepared"
            )
        ids = _WindowIds(num_windows)
        shards: list[dict[str, Any]] = []
        contents: list[str] = []
        with self._folder.writing(REJECTED_FILE) as file, pq.ParquetWriter(file, REJECTED) as writer:
            rejected = _RejectedRows(writer)

            def joined() -> Iterator[dict[str, Any]]:
                """Yield the statistics of each window, and collect its other parts; one window is held at a time."""
                for commit in self._commits(range(num_windows)):
                    ids.add(base64.b64decode(commit["id_hashes"]))
                    with self._folder.open(commit["rejected_file"]) as part:
                        rejected.add(pq.read_table(part))
                    shards.append({"file": commit["bins_file"], "bins": commit["statistics"]["bins"]})
                    contents.append(commit["statistics"]["content"])
                    yield commit["statistics"]

            statistics = add_statistics(joined(), capacities)
            rejected.write()
            for number, set_facts in statistics["set_columns"].items():
                dataset = record["datasets"][int(number)]
                if problem := columns_problem(f"data set {number}", dataset, set_facts["images"], set_facts["columns"]):
                    raise UserError(f"{self.path}: {problem}")
            if statistics["rows_read"] != statistics["rows_packed"] + statistics["rows_rejected"]:
                raise RuntimeError(f"rows were lost while preparing {self.path}: {statistics}")
            _count_left_out(statistics, left_out)
        self._count_duplicates(statistics, ids, shards)
        manifest = {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint(record),
            "content": joined_content(contents),
            "record": record,
            "tiling": tiling.record(),
            "image_reading": IMAGE_READING,
            "shards": shards,
            "statistics": statistics,
            **facts,
        }
        self._folder.write(MANIFEST, _json(manifest))

    def _count_duplicates(
        self, statistics: dict[str, Any], ids: "_WindowIds", shards: Sequence[dict[str, Any]]
    ) -> None:  # fmt: skip
        """Add the number of samples with the id of an earlier one, and some such ids, to the statistics."""
        statistics["duplicate_ids"], places = ids.duplicates()
        ids_of_windows = {
            window: self._sample_ids(shards[window]["file"]) for window in {window for window, _ in places}
        }
        if places:
            examples = [ids_of_windows[window][place] for window, place in places]
            statistics["examples"]["duplicate_ids"] = list(dict.fromkeys(examples))

    def _sample_ids(self, bins_file: str) -> list[str]:
        """Read the ids of a window's samples, in the order of its bins."""
        with self._folder.open(bins_file) as file:
            column = pq.read_table(file, columns=["sample_ids"])["sample_ids"]
        return [row_id for members in column.to_pylist() for row_id in members]

    def clear(self) -> None:
        """Delete every file that mmray wrote, and no other file in the folder.

        A stop in between leaves no manifest and no window that counts as finished.
        """
        with explained(self.path):
            self._remove(MANIFEST, PLAN)
            self._folder.remove_files(self._own_files())

    def tidy(self) -> None:
        """Delete the files of mmray that a finished folder's manifest does not name: parts of windows, and leftovers of
        a stop or of a late writer."""
        with explained(self.path):
            kept = {REJECTED_FILE, *(shard["file"] for shard in self._read(MANIFEST)["shards"])}
            self._remove(PLAN)
            self._folder.remove_files(name for name in self._own_files() if name not in kept)

    def _own_files(self) -> list[str]:
        names = [name for name in self._folder.names() if name == REJECTED_FILE or name.startswith(_OWN_PREFIXES)]
        return sorted(names, key=lambda name: not name.startswith(_COMMIT_PREFIX))

    def _remove(self, *names: str) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._folder.remove(name)

    def _read(self, name: str) -> dict[str, Any]:
        return read_json(self._folder, name)

    def _commits(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Yield the commits of windows in order, read ahead; {} for a commit that is not whole JSON."""

        def read(number: int) -> dict[str, Any]:
            try:
                commit = json.loads(self._folder.read(_commit_name(number, self.token)))
            except ValueError:
                return {}
            return commit if isinstance(commit, dict) else {}

        return in_order(read, numbers, threads=_READERS, ahead=2 * _READERS)


class _WindowIds:
    """Collects the id hashes of windows in order, to find duplicates."""

    def __init__(self, num_windows: int) -> None:
        self._num_windows = num_windows
        self._ends: list[int] = []
        self._ids: DuplicateIds | None = None

    def add(self, hashes: bytes) -> None:
        """Add the hashes of the next window (`rows.duplicates.id_hashes`)."""
        count = len(hashes) // HASH_BYTES
        self._ids = self._ids or DuplicateIds(count * self._num_windows)
        self._ids.add(hashes)
        self._ends.append((self._ends[-1] if self._ends else 0) + count)

    def duplicates(self) -> tuple[int, list[tuple[int, int]]]:
        """Number of samples with the id of an earlier one, and (window, position) of the first such samples.

        A position is negative: it counts from the end of its window.
        """
        count, first = 0, np.zeros(0, dtype=np.int64)
        for positions in self._ids.later() if self._ids else ():
            count += len(positions)
            first = np.sort(np.concatenate([first, positions]))[:EXAMPLES]
        windows = np.searchsorted(self._ends, first, side="right").tolist()
        return count, [(window, position - self._ends[window]) for window, position in zip(windows, first.tolist())]


class _RejectedRows:
    """Collects rejected rows of windows and writes them as large row groups: with a row group for each window, the
    footer would be the largest part of the file."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._tables: list[pa.Table] = []
        self._bytes = 0

    def add(self, rows: pa.Table) -> None:
        if rows.num_rows:
            self._tables.append(rows)
            self._bytes += rows.nbytes
        if self._bytes > _REJECTED_BYTES:
            self.write()

    def write(self) -> None:
        if self._tables:
            self._writer.write_table(pa.concat_tables(self._tables))
        self._tables, self._bytes = [], 0


def _commit_name(window: int, token: str) -> str:
    return f"{_COMMIT_PREFIX}{window:05d}-{token}.json"


def _committed(names: Iterable[str], token: str) -> list[int]:
    """The numbers of the windows with a commit of the plan with this token, sorted."""
    matches = (re.fullmatch(rf"{_COMMIT_PREFIX}(\d+)-{re.escape(token)}\.json", name) for name in names)
    return sorted(int(match[1]) for match in matches if match)


def _is_whole(commit: dict[str, Any], sizes: Mapping[str, int]) -> bool:
    files = commit.get("files", {"": -1})
    return all(sizes.get(name) == size for name, size in files.items())


def joined_content(windows: Iterable[str]) -> str:
    """Hash the content hashes of all windows."""
    return hashlib.blake2b("".join(windows).encode(), digest_size=8).hexdigest()


def add_statistics(parts: Iterable[dict[str, Any]], capacities: tuple[int, int]) -> dict[str, Any]:
    """Sum the statistics of windows. Fill is the part of all bins' capacity that holds tokens."""
    total: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    sets: dict[str, dict[str, Any]] = {}
    counts_of_sets: dict[str, Counter[str]] = {}
    all_counted = True
    for part in parts:
        for number, set_counts in part.get("set_counts", {}).items():
            counts_of_sets.setdefault(number, Counter()).update(set_counts)
        all_counted &= "set_counts" in part  # an earlier mmray did not count tokens by sets
        for number, counts in part.get("set_columns", {}).items():
            set_facts = sets.setdefault(number, {"images": 0, "columns": []})
            set_facts["images"] += counts["images"]
            set_facts["columns"] = sorted({*set_facts["columns"], *counts["columns"]})
        reasons.update(part["rejected_by_reason"])
        notes.update(part["image_notes"])
        for name, places in part["examples"].items():
            examples[name] = (examples.get(name, []) + places)[:EXAMPLES]
        total.update({key: value for key, value in part.items() if isinstance(value, int)})
    room = max(total["bins"], 1)
    keys = ("rows_read", "rows_packed", "rows_rejected", "rows_repeated", "bins", "bins_at_least", "tokens",
            "visual_tokens", "trained_tokens", "images")  # fmt: skip
    return {
        **{key: total[key] for key in keys},
        "sets": _by_number(counts_of_sets) if all_counted else {},
        "set_columns": _by_number(sets),
        "rejected_by_reason": dict(sorted(reasons.items())),
        "image_notes": dict(sorted(notes.items())),
        "examples": examples,
        "token_fill": round(total["tokens"] / (room * capacities[0]), 4),
        "visual_fill": round(total["visual_tokens"] / (room * capacities[1]), 4),
    }


def _by_number(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Entries of sets, in the order of their numbers, as plain JSON."""
    return {number: dict(sets[number]) for number in sorted(sets, key=int)}


def _count_left_out(statistics: dict[str, Any], left_out: Sequence[int]) -> None:
    """Add the rows that were not taken to the statistics: they are rows of the files too, and are counted as read."""
    statistics["rows_left_out"] = sum(left_out)
    statistics["rows_read"] += sum(left_out)
    for number, counts in statistics["sets"].items():
        counts["rows_left_out"] = left_out[int(number)] if left_out else 0
        counts["rows_read"] += counts["rows_left_out"]


def _other_result(path: str, existing: dict[str, Any], record: dict[str, Any]) -> str:
    lines = differences(existing.get("record"), json.loads(_json(record)))
    shown = "\n  ".join(lines[:8] + ([f"and {len(lines) - 8} more"] if len(lines) > 8 else []))
    return (
        f"{path} was prepared from other input (fingerprint {existing.get('fingerprint')}, this job has "
        f"{fingerprint(record)}):\n  {shown}\nChoose another output.prepared, or run jobs/prepare.py with --replace "
        "to delete the old one"
    )


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=4).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n").encode()
