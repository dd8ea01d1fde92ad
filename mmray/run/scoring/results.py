"""The results of an evaluation: one line for each text that was read, and the metrics over them.

evaluations/00000800/metrics.json          metrics of all rows, by set, source file and shape bucket; bad rows
evaluations/00000800/predictions.parquet   a row for each text: reference, prediction, scores
evaluations/00000800/report.html           the page for people
evaluations/00000800/parts/                batches that are done, while an evaluation runs
"""

import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.run.scoring.metrics import RowScores, Scores

EVALUATIONS_FOLDER = "evaluations"
METRICS, PREDICTIONS, REPORT, PARTS = "metrics.json", "predictions.parquet", "report.html", "parts"

SHOWN_BAD_ROWS = 1000
"""Bad rows that metrics.json names; it counts all."""

RESULTS = pa.schema(
    [
        ("number", pa.int64()),  # position of its row among all rows
        ("id", pa.string()),
        ("source", pa.string()),  # file:line of its row
        ("set", pa.string()),
        ("bucket", pa.string()),  # image shape of its row
        ("turn", pa.int32()),  # number of the answer in its row, from 0; null where nothing was read
        ("reference", pa.string()),
        ("prediction", pa.string()),
        ("stopped", pa.bool_()),  # the model ended the text by itself
        ("predicted_tokens", pa.int32()),
        ("characters", pa.int32()),  # of the reference, normalised, as all counts below
        ("predicted_characters", pa.int32()),
        ("character_errors", pa.int32()),
        ("words", pa.int32()),
        ("word_errors", pa.int32()),
        ("exact", pa.bool_()),
        ("cer", pa.float64()),  # null for an empty reference
        ("loss_sum", pa.float64()),  # nats, over the trained tokens of its row; with the row's first text only
        ("trained_tokens", pa.int32()),
        ("picture", pa.binary()),  # JPEG of its first image, for rows that the report shows
    ]
)
"""Columns of predictions.parquet."""


@dataclass(frozen=True)
class BadRow:
    """A row that is not evaluated, or not read: its reason as in docs/rows.md, and one line for a person."""

    id: str
    source: str
    set: str
    reason: str
    message: str


@dataclass(frozen=True)
class RowResult:
    """The result of a model on one text of a row (columns of RESULTS). A text's fields are None where none was read."""

    number: int
    id: str
    source: str
    set: str
    bucket: str
    loss_sum: float | None
    trained_tokens: int
    turn: int | None = None
    reference: str | None = None
    prediction: str | None = None
    stopped: bool | None = None
    predicted_tokens: int | None = None
    scores: RowScores | None = None
    picture: bytes | None = None

    @property
    def cer(self) -> float | None:
        """Character errors over the reference's characters; None where nothing was read or the reference is empty."""
        return None if self.scores is None else self.scores.cer

    @property
    def file(self) -> str:
        """The file of its row."""
        return self.source.rpartition(":")[0]

    def record(self, *, with_picture: bool) -> dict[str, Any]:
        """The row of a table with the columns of RESULTS."""
        scores = self.scores
        counts = {} if scores is None else asdict(scores)
        values = {name: getattr(self, name) for name in RESULTS.names if hasattr(self, name)}
        exact = counts.pop("is_exact", None)
        return values | counts | {"exact": exact, "picture": self.picture if with_picture else None}

    @classmethod
    def of(cls, record: dict[str, Any]) -> "RowResult":
        """The result of a row of a table."""
        scores = None
        if record["turn"] is not None:
            names = ("characters", "predicted_characters", "character_errors", "words", "word_errors")
            scores = RowScores(**{name: record[name] for name in names}, is_exact=record["exact"])
        own_names = (name for name in cls.__dataclass_fields__ if name != "scores")
        return cls(**{name: record[name] for name in own_names}, scores=scores)


def to_parquet(results: Sequence[RowResult], shown: Iterable[int] | None = None, **metadata: Any) -> bytes:
    """The results as a Parquet file. shown: positions of results whose pictures are kept; None: all."""
    chosen = range(len(results)) if shown is None else set(shown)
    records = [result.record(with_picture=place in chosen) for place, result in enumerate(results)]
    table = pa.Table.from_pylist(records, schema=RESULTS)
    if metadata:
        table = table.replace_schema_metadata({"mmray": json.dumps(metadata)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes) -> tuple[list[RowResult], dict[str, Any]]:
    """The results in a Parquet file, and what `to_parquet` was given beside them."""
    table = pq.read_table(pa.BufferReader(data))
    metadata = (table.schema.metadata or {}).get(b"mmray", b"{}")
    return [RowResult.of(record) for record in table.to_pylist()], json.loads(metadata)


def summary(results: Sequence[RowResult]) -> dict[str, Any]:
    """The metrics over some results, all micro-averaged."""
    read = [result for result in results if result.scores is not None]
    trained = sum(result.trained_tokens for result in results if result.loss_sum is not None)
    loss = sum(result.loss_sum for result in results if result.loss_sum is not None) / trained if trained else None
    scores = asdict(Scores.of(result.scores for result in read if result.scores is not None))
    texts = scores.pop("rows")
    return {
        "rows": len({result.number for result in results}),
        "loss": loss,
        "perplexity": None if loss is None else math.exp(min(loss, 700)),
        "trained_tokens": trained,
        "texts": texts,
        **scores,
        "not_stopped": sum(not result.stopped for result in read),
    }


def metrics(results: Sequence[RowResult], bad: Sequence[BadRow], **described: Any) -> dict[str, Any]:
    """The content of metrics.json. described: what was evaluated, and how."""

    def by(key: Callable[[RowResult], str]) -> dict[str, Any]:
        groups: dict[str, list[RowResult]] = {}
        for result in results:
            groups.setdefault(key(result), []).append(result)
        return {name: summary(groups[name]) for name in sorted(groups)}

    return {
        **described,
        "all": summary(results),
        "by_set": by(lambda result: result.set),
        "by_file": by(lambda result: result.file),
        "by_bucket": by(lambda result: result.bucket),
        "bad_rows": {
            "count": len(bad),
            "by_reason": dict(sorted(Counter(row.reason for row in bad).items())),
            "rows": [asdict(row) for row in bad[:SHOWN_BAD_ROWS]],
        },
    }


@dataclass(frozen=True)
class ShownRows:
    """Positions of the results that a report shows: the worst, the median and the best rows by CER."""

    worst: tuple[int, ...]
    median: tuple[int, ...]
    best: tuple[int, ...]

    @classmethod
    def of(cls, results: Sequence[RowResult], each_kind: int = 8) -> "ShownRows":
        """The rows to show, in order of their CER; no row is in two of the groups."""
        order = sorted(
            (place for place, result in enumerate(results) if result.cer is not None),
            key=lambda place: (-(results[place].cer or 0.0), results[place].number, results[place].turn or 0),
        )
        worst, rest = order[:each_kind], order[each_kind:]
        best, rest = list(reversed(rest[max(0, len(rest) - each_kind) :])), rest[: max(0, len(rest) - each_kind)]
        middle = max(0, (len(rest) - each_kind) // 2)
        return cls(tuple(worst), tuple(rest[middle : middle + each_kind]), tuple(best))

    @property
    def all(self) -> tuple[int, ...]:
        """The positions of all three groups."""
        return (*self.worst, *self.median, *self.best)
