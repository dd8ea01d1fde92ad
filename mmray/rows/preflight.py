"""Checks the first rows of each data set before any actor starts.

They reveal what hours of training would not: a marker that is never found, a template that marks nothing, a data set of
which no token is trained on. Only a few rows are read, so that a mistake costs seconds; a rare role may be missing from
them by chance, so the message says how many rows were examined.
"""

import logging
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

from mmray.errors import UserError
from mmray.families import Family
from mmray.loss.labels import LabelMaker
from mmray.loss.roles import RoleBoundary
from mmray.loss.rules import IGNORE_INDEX, LossRule
from mmray.loss.settings import SAMPLED_ROLE, RoleLoss, allows_empty
from mmray.loss.sources import LossSource, label_maker
from mmray.loss.turns import opened_turns
from mmray.rows.columns import columns_problem, watched_columns
from mmray.rows.encode import Encoder
from mmray.rows.files import Piece
from mmray.rows.read import RawRow, read_piece
from mmray.rows.rejections import SetRows
from mmray.rows.sample import Sample
from mmray.rows.settings import DatasetSettings

FIRST_ROWS = 64
HEAD_TOKENS = 48

log = logging.getLogger("mmray")


def check_first_rows(
    encoder: Encoder, job_labels: LabelMaker, pieces: Sequence[Piece], *, split: str, some_good: bool = False
) -> list[LossSource]:
    """Checks the first rows of each data set and logs the source of its loss; returns these sources in order.

    job_labels: the label maker of the job's `loss`.
    pieces: the pieces of all rows, in order.
    split: `train` or `eval`.
    some_good: whether a data set whose first rows are all rejected is an error; otherwise it is not checked.

    Raises UserError, with the beginning of a row as the tokenizer reads it, for a data set whose first rows lack the
    markers of a role to train on, or have no token to train on, and for one that names a column they do not have.
    """
    for number, (dataset, source) in enumerate(zip(encoder.datasets, encoder.sources, strict=True)):
        name = set_name(split, number, dataset)
        rows = first_rows(pieces, number)
        if some_good:
            SetRows.of(encoder.encode(rows, compare=False)).check_some_good(name)
        # Without comparing rows with their messages: wrong boundaries are wrong in every row.
        samples = [row for row in encoder.encode(rows, compare=False) if isinstance(row, Sample)]
        check_columns(name, dataset, rows, samples)
        labels = job_labels if dataset.loss is None else label_maker(dataset.loss, encoder.family)
        loss = encoder.losses[number]
        first_samples = _FirstSamples(name, samples, encoder.family)
        has_turns = source in (LossSource.MESSAGES, LossSource.ROLES)
        has_turns = has_turns and not (isinstance(loss, RoleLoss) and not _teaches_to_stop(loss))
        open_ends = first_samples.open_ends(labels, encoder.ending_token_ids) if samples and has_turns else ""
        log.info("%s: loss on %s%s", name, described(source, labels, encoder.ending_token_ids), open_ends)
        if not samples:
            continue
        if source is LossSource.ROLES and isinstance(loss, RoleLoss) and loss.boundaries is not None:
            first_samples.check_own_markers(labels)
        elif source.rule == LossRule.ROLES:
            first_samples.check_markers(labels)
        if not allows_empty(loss):
            first_samples.check_trained(labels)
    return encoder.sources


def check_columns(name: str, dataset: DatasetSettings, rows: Sequence[RawRow], samples: Sequence[Sample]) -> None:
    """Raises UserError for a data set that names a column which none of its first rows has (`mmray.rows.columns`)."""
    values = [row.value for row in rows if isinstance(row.value, dict)]
    present_columns = {column for value in values for column in watched_columns(value, dataset)}
    images = sum(len(sample.images) for sample in samples)
    problem = columns_problem(name, dataset.model_dump(mode="json"), images, present_columns) if values else None
    if problem:
        raise UserError(problem)


def set_name(split: str, number: int, dataset: DatasetSettings) -> str:
    """Returns the name of a data set in messages: `data.train[0] (chat)`."""
    return f"data.{split}[{number}] ({dataset.kind})"


def first_rows(pieces: Iterable[Piece], dataset: int) -> list[RawRow]:
    """Reads the first rows of one data set."""
    rows = (row for piece in pieces if piece.dataset == dataset for row in read_piece(piece))
    return list(islice(rows, FIRST_ROWS))


def sample_labels(samples: Sequence[Sample], labels: LabelMaker) -> list[np.ndarray]:
    """Computes the labels of each sample, int64 [n]."""
    lengths = np.asarray([len(sample.input_ids) for sample in samples])
    starts = lengths.cumsum() - lengths
    given_masks = [sample.given_mask if sample.rule == LossRule.GIVEN else sample.input_ids < 0 for sample in samples]
    joined_labels = labels.of_arrays(
        np.concatenate([sample.input_ids for sample in samples]),
        lengths,
        np.asarray([sample.rule for sample in samples]),
        np.concatenate(given_masks),
        np.concatenate([sample.blocks + [start, 0] for sample, start in zip(samples, starts)]),
    )
    return np.split(joined_labels, starts[1:])


def described(source: LossSource, labels: LabelMaker, ending_token_ids: Sequence[int]) -> str:
    """Describes what a source trains on, with the ids of its markers."""
    match source:
        case LossSource.EVERY_TOKEN:
            return "every token but media"
        case LossSource.ROW:
            return "what each row's sampled_mask or labels say"
        case LossSource.MESSAGES:
            return f"what the assistant says in each message, and what ends it: {list(ending_token_ids)}"
        case LossSource.ANSWER:
            return "what follows each row's prompt"
        case LossSource.ROLES:
            turns = "; ".join(_turns(labels, role) for role in labels.roles_to_train) or "no turns"
            return f"{turns} (train_on_eos: {labels.train_on_eos})"


def _turns(labels: LabelMaker, role: str) -> str:
    """Describes the turns of a role: `assistant turns, start [1, 3] or [1, 4], end [9]`."""
    role_boundaries = [boundary for boundary in labels.boundaries if boundary.role == role]
    starts = " or ".join(str(list(start)) for start in dict.fromkeys(boundary.start for boundary in role_boundaries))
    ends = " or ".join(dict.fromkeys(_end(boundary) for boundary in role_boundaries))
    return f"{role} turns, start {starts}, end {ends}"


def _end(boundary: RoleBoundary) -> str:
    if boundary.until_next:
        return "where the next turn starts"
    return str(list(boundary.end)) if boundary.end else "of the sample"


def _teaches_to_stop(loss: RoleLoss) -> bool:
    """Tells whether a setting trains on the ends of the assistant's turns."""
    return SAMPLED_ROLE in loss.roles and loss.train_on_eos != "none"


class _FirstSamples:
    """Checks the samples of the first rows of one data set."""

    def __init__(self, name: str, samples: Sequence[Sample], family: Family) -> None:
        self.name, self.samples, self.family = name, samples, family

    def check_markers(self, labels: LabelMaker) -> None:
        for role in labels.roles_to_train:
            role_boundaries = [boundary for boundary in labels.boundaries if boundary.role == role]
            opened = [boundary for boundary in role_boundaries if self._has(boundary.start)]
            if not opened:
                self._refuse(
                    f"no turn of role {role!r} begins in {self._rows}: its start "
                    f"{self._markers(boundary.start for boundary in role_boundaries)} is never found. "
                    "Give its text in loss.boundaries, or train other roles"
                )
            ends = [boundary.end for boundary in opened]
            if all(ends) and not any(map(self._has, ends)):
                self._refuse(
                    f"no turn of role {role!r} ends in {self._rows}: its end {self._markers(ends)} is never found. "
                    "Give its text in loss.boundaries, or end: null for turns that go on to the sample's end"
                )

    def check_own_markers(self, labels: LabelMaker) -> None:
        """Raises UserError unless each boundary of the job that is trained on opens a turn, and its end closes one."""
        turns = [turn for sample in self.samples for turn in opened_turns(sample.input_ids, labels.boundaries)]
        for number, boundary in enumerate(labels.boundaries):
            if boundary.role not in labels.roles_to_train and labels.train_on_eos != "all":
                continue
            boundary_turns = [turn for turn in turns if turn.boundary == number]
            if not boundary_turns:
                start = self._markers([boundary.start])
                if self._has(boundary.start):
                    self._refuse(
                        f"the start {start} of role {boundary.role!r} opens no turn in {self._rows}: it stands inside "
                        "other turns alone, or another boundary of the same text wins. Mend or leave out this boundary"
                    )
                self._refuse(
                    f"no turn of role {boundary.role!r} begins in {self._rows}: its start {start} is never found. "
                    "Give its text in loss.boundaries, or leave out this boundary"
                )
            if boundary.end and not any(turn.is_closed for turn in boundary_turns):
                self._refuse(
                    f"no turn of role {boundary.role!r} ends in {self._rows}: its end {self._markers([boundary.end])} "
                    f"never follows its start {self._markers([boundary.start])}. Give its text in loss.boundaries, or "
                    "end: null for turns that go on to the sample's end"
                )

    def open_ends(self, labels: LabelMaker, ending_token_ids: Sequence[int]) -> str:
        """Describes missing stop tokens: `; 3 of 5 last turns end without a stop token`, or "" where none is missing.
        Where all are, nothing teaches the model to stop, and the text says so."""
        ends = {*ending_token_ids, self.family.tokenizer.eos_token_id}
        trained = [ids[ids != IGNORE_INDEX] for ids in sample_labels(self.samples, labels)]
        last = [self._last(ids) for ids in trained if len(ids)]
        missing = sum(token not in ends for token in last)
        silent = ": nothing teaches the model to stop" if missing == len(last) else ""
        return f"; {missing} of {len(last)} last turns end without a stop token{silent}" if missing else ""

    def _last(self, ids: np.ndarray) -> int:
        """Returns the last token that is not blank; templates write blanks behind an end."""
        decode = self.family.tokenizer.decode
        return next((token for token in reversed(ids.tolist()) if decode([token]).strip()), int(ids[-1]))

    def check_trained(self, labels: LabelMaker) -> None:
        if not any((row_labels != IGNORE_INDEX).any() for row_labels in sample_labels(self.samples, labels)):
            self._refuse(
                f"no token of {self._rows} is trained on; see `loss` in the job file, and the rows' roles or labels"
            )

    @property
    def _rows(self) -> str:
        return f"the first {len(self.samples)} good rows" if len(self.samples) > 1 else "the only good row looked at"

    def _has(self, marker: Sequence[int]) -> bool:
        return any(_holds(sample.input_ids, marker) for sample in self.samples)

    def _markers(self, markers: Iterable[Sequence[int]]) -> str:
        decode = self.family.tokenizer.decode
        return " or ".join(f"{decode(list(ids))!r} {list(ids)}" for ids in dict.fromkeys(map(tuple, markers)))

    def _refuse(self, problem: str) -> None:
        sample = self.samples[0]
        raise UserError(f"{self.name}: {problem}. Row {sample.id!r} begins {head(sample, self.family)!r}")


def head(sample: Sample, family: Family) -> str:
    """Decodes the beginning of a sample, with each run of a media token as one token."""
    ids = sample.input_ids
    repeats = np.isin(ids, family.media_token_ids)
    repeats[1:] &= ids[1:] == ids[:-1]
    repeats[:1] = False
    return str(family.tokenizer.decode(ids[~repeats][:HEAD_TOKENS], skip_special_tokens=False))


def _holds(ids: np.ndarray, marker: Sequence[int]) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(marker)) if len(ids) >= len(marker) else ids[:0, None]
    return bool((windows == np.asarray(marker)).all(axis=1).any())
