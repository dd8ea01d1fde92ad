"""Checks that a prepared dataset of an earlier version may be used, and that labels match the prepared counts.

Version 2 found the turns of chats by a scan for turn markers alone, and kept only role and content of a message. Its
other rows are equal to today's. A dataset does not hold what was left out of its chats, so their first rows are read
again: when other tokens of one of them would be trained on now, no new run begins on the dataset. A run that has begun
continues as it began, with the turn markers that its family had then (`run_labels`).
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from mmray.errors import UserError
from mmray.families import Family, Gemma4, GraniteDocling, Idefics3, Pixtral, Qwen2VL
from mmray.families.text_models import OnTextModel
from mmray.loss.labels import LabelMaker
from mmray.loss.rules import IGNORE_INDEX
from mmray.loss.settings import Loss, RoleLoss
from mmray.loss.sources import label_maker
from mmray.prepared.dataset import Bin, PreparedDataset
from mmray.prepared.schema import FORMAT_VERSION
from mmray.rows.encode import Encoder
from mmray.rows.files import first_piece, source_files
from mmray.rows.preflight import sample_labels
from mmray.rows.read import RawRow, read_piece
from mmray.rows.sample import RejectedRow

_BY_TURNS = ("roles", "template", "boundaries")
"""Loss sources of version 2 that depend on the turns of chats."""
_GAINED_TOOLS = (Qwen2VL, GraniteDocling, Idefics3, OnTextModel)
"""Families whose markers have turns of tools since version 3; among those on text models, Pixtral always had them."""
_CHECKED_BINS = 16
COMPARED_ROWS = 512
"""Number of rows of each set of chats that are encoded anew before a run begins on an earlier version's dataset."""


def old_chats(manifest: dict[str, Any]) -> list[int]:
    """The numbers of an earlier version's sets of chats of which other tokens might be trained on now."""
    if manifest["format_version"] == FORMAT_VERSION:
        return []
    kinds = [dataset["kind"] for dataset in manifest["record"]["datasets"]]
    sources = manifest.get("loss_sources") or ["roles"] * len(kinds)
    return [n for n, (kind, source) in enumerate(zip(kinds, sources)) if kind == "chat" and source in _BY_TURNS]


def run_labels(prepared: PreparedDataset, loss: Loss, family: Family) -> LabelMaker:
    """Build the label maker of a run on a prepared dataset: the one with which its trained tokens were counted.

    A mixture of datasets has today's label maker, with which each of them must have been counted, too.
    """
    labels = label_maker(loss, family)
    if prepared.manifest["format_version"] == FORMAT_VERSION:
        return labels
    if isinstance(family, Gemma4):
        return replace(labels, stop_token_ids=())
    has_own_boundaries = isinstance(loss, RoleLoss) and loss.boundaries is not None
    if has_own_boundaries or isinstance(family, Pixtral) or not isinstance(family, _GAINED_TOOLS):
        return labels
    return replace(labels, boundaries=tuple(boundary for boundary in labels.boundaries if boundary.role != "tool"))


def check_new_run(prepared: PreparedDataset, encoder: Encoder, loss: Loss) -> None:
    """Raise UserError when a new run on an earlier version's dataset would be trained on other tokens than now.

    encoder: the job's encoder for the same split. The first rows of each set of chats are encoded anew and compared;
    turn markers that the family did not have then are looked for in all bins.
    Also raises UserError when the row files are missing: then nothing shows that the labels are right.
    """
    labels, earlier = label_maker(loss, encoder.family), run_labels(prepared, loss, encoder.family)
    remedy = "prepare it anew (jobs/prepare.py --replace). A run that has begun on the dataset ends on it without that"
    for shown in prepared.bins(0, len(prepared)) if labels != earlier else ():
        if not np.array_equal(bin_labels(shown, labels), bin_labels(shown, earlier)):
            raise UserError(
                f"{prepared.path} was prepared by an earlier version, which knew fewer turns, and its bin "
                f"{shown.index} has other trained tokens now: {remedy}"
            )
    for number in old_chats(prepared.manifest):
        name = f"{prepared.path} was prepared by an earlier version, and of its set {number}"
        try:
            rows = _first_rows(encoder, number)
        except (UserError, OSError) as error:
            problem = f"the rows cannot be read to check which of their tokens are trained on ({error})"
            raise UserError(f"{name} {problem}: {remedy}") from error
        results = dict(zip((row.source for row in rows), encoder.encode(rows)))
        for source, ids, trained in _stored(prepared, earlier, set(results)):
            result = results[source]
            if isinstance(result, RejectedRow):
                raise UserError(f"{name} row {source} is refused now ({result.reason}: {result.message}): {remedy}")
            (new_labels,) = sample_labels([result], labels)
            if not np.array_equal(result.input_ids, ids) or not np.array_equal(new_labels != IGNORE_INDEX, trained):
                raise UserError(f"{name} row {source} has other trained tokens now: {remedy}")


def _first_rows(encoder: Encoder, number: int) -> list[RawRow]:
    files = [file for file in source_files(encoder.datasets) if file.dataset == number]
    pieces = (first_piece(file, COMPARED_ROWS) for file in files)
    return list(islice((row for piece in pieces for row in read_piece(piece)), COMPARED_ROWS))


def _stored(
    prepared: PreparedDataset, labels: LabelMaker, sources: set[str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (place of its row, token ids, which tokens are trained on) of the stored samples of some rows."""
    for file, bins in prepared.files.items():
        places = prepared.read_file(file, ["sample_sources"])["sample_sources"].to_pylist()
        for index in (bins[n] for n, names in enumerate(places) if not sources.isdisjoint(names)):
            shown = prepared.bin(index)
            trained, start = bin_labels(shown, labels) != IGNORE_INDEX, 0
            for source, length in zip(shown.sample_sources, shown.sample_lengths.tolist()):
                if source in sources:
                    yield source, shown.input_ids[start : start + length], trained[start : start + length]
                start += length


def labels_record(labels: LabelMaker, sources: list[str]) -> dict[str, Any]:
    """The record of what a dataset's labels depend on besides its rows, as plain JSON.

    sources: the loss source of each set.
    """
    record: dict[str, Any] = {"media": sorted(labels.media_token_ids)}
    if "roles" in sources:
        record |= {
            "boundaries": [
                [
                    boundary.role,
                    list(boundary.start),
                    list(boundary.end),
                    boundary.include_start,
                    boundary.include_end,
                    boundary.until_next,
                ]
                for boundary in labels.boundaries
            ],
            "roles": sorted(labels.roles_to_train),
            "train_on_eos": labels.train_on_eos,
        }
    return record


def check_labels(prepared: PreparedDataset, labels: LabelMaker) -> None:
    """Raise UserError when training would make other labels than were counted when preparing.

    A dataset without a record of its labels is tested instead: its bins are labelled.
    """
    recorded = prepared.manifest.get("labels")
    if recorded is not None:
        now = labels_record(labels, prepared.manifest["loss_sources"])
        wrong = sorted(key for key in recorded.keys() | now.keys() if recorded.get(key) != now.get(key))
        if wrong:
            raise UserError(
                f"{prepared.path}: this version of mmray chooses the tokens to train on in another way than the one "
                f"that prepared it ({', '.join(wrong)} of the model family): "
                "prepare it anew (jobs/prepare.py --replace)"
            )
        return
    for shown in _bins_to_check(prepared):
        if trained_tokens(shown, labels) != shown.trained_tokens:
            raise UserError(
                f"{prepared.path}: bin {shown.index} has other trained tokens than were counted when preparing (loss): "
                "prepare it anew (jobs/prepare.py --replace)"
            )


def _bins_to_check(prepared: PreparedDataset) -> Iterator[Bin]:
    """Yields the bins whose trained tokens are counted before a run.

    Where turns were found by boundaries, these are all bins: a model family's boundaries have become more, and the
    samples that have the new ones may be few. Elsewhere some bins show a difference.
    """
    count = len(prepared)
    sources = prepared.manifest.get("loss_sources") or ["roles"]
    if set(sources).intersection(_BY_TURNS):
        yield from prepared.bins(0, count)
        return
    for number in sorted({place * count // _CHECKED_BINS for place in range(_CHECKED_BINS)} if count else ()):
        yield prepared.bin(number)


def trained_tokens(shown: Bin, labels: LabelMaker) -> int:
    """Number of tokens of a bin that are trained on."""
    return int((bin_labels(shown, labels) != IGNORE_INDEX).sum())


def bin_labels(shown: Bin, labels: LabelMaker) -> np.ndarray:
    """Make the labels of a bin as training does, int64 [L]."""
    blocks = [(image["first_token"], image["num_tokens"]) for image in shown.images]
    given_mask = shown.given_mask if len(shown.given_mask) else shown.input_ids < 0
    return labels.of_arrays(shown.input_ids, shown.sample_lengths, shown.sample_rules, given_mask, blocks)
