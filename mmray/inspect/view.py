"""Computes the view of one bin: samples, the turns of roles in them, and the mark of each token.

Terminal and web page show the same view. Its labels are those of training: made by the same label maker, built from
the loss setting that the dataset was prepared with.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby
from typing import Any

import numpy as np
import torch

from mmray.base.words import counted
from mmray.errors import UserError
from mmray.families import Family, family_of, load_processor
from mmray.inspect.text import token_texts
from mmray.loss.labels import LabelMaker, segment_ids
from mmray.loss.roles import RoleBoundary, role_keep_mask
from mmray.loss.rules import IGNORE_INDEX, LossRule
from mmray.loss.settings import Loss, RoleLoss, loss_of_record
from mmray.loss.sources import label_maker
from mmray.prepared import Bin, PreparedDataset
from mmray.prepared.fingerprint import differences, processor_record
from mmray.prepared.versions import run_labels


class Mark(StrEnum):
    """The part that a token has in the loss."""

    TRAINED = "trained"
    CONTEXT = "context"
    """Text that the model reads and is not trained on."""
    MEDIA = "media"
    """Part of an image: never trained on."""


@dataclass(frozen=True)
class Piece:
    """A unit that is shown as one: a token, the tokens of one character, or a run of one media token.

    start: place of its first token in the sample; text: decoded text; for a run, that of one token.
    """

    start: int
    token_ids: tuple[int, ...]
    text: str
    mark: Mark
    is_run: bool = False

    @property
    def label(self) -> str:
        """Its text; for a run, with the number of tokens: `[48 × <|image_pad|>]`."""
        return f"[{len(self.token_ids):,} × {self.text}]" if self.is_run else self.text


@dataclass(frozen=True)
class Turn:
    """A stretch of a sample from the start marker to the end marker of a role; role None: text between turns."""

    role: str | None
    pieces: tuple[Piece, ...]

    @property
    def stretches(self) -> Iterator[tuple[Mark, list[Piece]]]:
        """Its pieces, grouped by mark."""
        return ((mark, list(pieces)) for mark, pieces in groupby(self.pieces, lambda piece: piece.mark))


@dataclass(frozen=True)
class SampleView:
    """One sample of a bin.

    rule: name of its LossRule; start: place of its first token in the bin; images: as in `prepared.schema.IMAGES`;
    trained: number of trained tokens, None without a processor; turns: empty without a processor.
    """

    id: str
    source: str
    rule: str
    start: int
    num_tokens: int
    image_tokens: int
    trained: int | None
    images: tuple[dict[str, Any], ...]
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class BinView:
    """One bin. token_capacity, visual_capacity: capacities of every bin; roles: all roles that may have turns."""

    path: str
    index: int
    num_bins: int
    bucket: str
    num_tokens: int
    visual_tokens: int
    trained_tokens: int
    token_capacity: int
    visual_capacity: int
    loss: str
    roles: tuple[str, ...]
    samples: tuple[SampleView, ...]

    @property
    def problem(self) -> str | None:
        """One line about why training would stop at this bin; None when it would not."""
        counts = [sample.trained for sample in self.samples if sample.trained is not None]
        if not counts or sum(counts) == self.trained_tokens:
            return None
        return (
            f"{sum(counts):,} tokens are trained on, {self.trained_tokens:,} were counted when preparing: training "
            "will stop here. Prepare it anew with --replace"
        )


def view_bin(prepared: PreparedDataset, number: int, family: Family | None) -> BinView:
    """Compute the view of a bin of a prepared dataset.

    family: from `family_of_prepared`; None: counts alone. Raises UserError for a bin that does not exist.
    """
    if not 0 <= number < len(prepared):
        bins = counted(len(prepared), "bin")
        raise UserError(f"{prepared.path} has {bins}, counted from 0; there is no bin {number}")
    record, shown = prepared.manifest["record"], prepared.bin(number)
    loss = loss_of_record(record["loss"])
    roles: tuple[str, ...] = ()
    samples = tuple(_counts(shown))
    if family is not None:
        roles, samples = view_samples(shown, family, loss, run_labels(prepared, loss, family))
    return BinView(
        path=prepared.path,
        index=number,
        num_bins=len(prepared),
        bucket=shown.bucket,
        num_tokens=len(shown.input_ids),
        visual_tokens=shown.visual_tokens,
        trained_tokens=shown.trained_tokens,
        token_capacity=record["packing"]["token_capacity"],
        visual_capacity=record["packing"]["visual_capacity"],
        loss=_described(loss, prepared),
        roles=roles,
        samples=samples,
    )


def view_samples(
    shown: Bin, family: Family, loss: Loss, labels: LabelMaker
) -> tuple[tuple[str, ...], tuple[SampleView, ...]]:
    """Compute the roles that may have turns, and the samples of a bin with their turns."""
    boundaries = turn_boundaries(loss, family)
    roles = tuple(dict.fromkeys(boundary.role for boundary in boundaries))
    return roles, tuple(_with_turns(tuple(_counts(shown)), shown, family, loss, labels, boundaries))


def family_of_prepared(
    prepared: PreparedDataset, processor: str | None = None, *, trust_remote_code: bool = False
) -> Family | None:
    """Load the family of a prepared dataset; None when neither the caller nor the dataset names its processor.

    processor: folder or hub name; default: where it was when the dataset was prepared.

    Raises UserError for a processor that cannot be loaded, and for another one than the dataset's.
    """
    source = processor or prepared.manifest.get("processor_source")
    if source is None:
        return None
    try:
        loaded = load_processor(source, trust_remote_code=trust_remote_code)
    except UserError as error:
        if processor is not None:
            raise
        raise UserError(f"{error}. {prepared.path} was prepared with it; say where it is now: --processor") from error
    lines = differences(prepared.manifest["record"]["processor"], processor_record(loaded))
    if lines:
        raise UserError(f"{source} is not the processor that {prepared.path} was prepared with: {'; '.join(lines)}")
    return family_of(loaded, tiled=prepared.tiling.is_tiled, model_type=prepared.manifest.get("model_type"))


def turn_boundaries(loss: Loss, family: Family) -> tuple[RoleBoundary, ...]:
    """The role boundaries that delimit turns, of all roles: the job's, else the family's."""
    job_boundaries = loss.boundaries if isinstance(loss, RoleLoss) else None
    return label_maker(RoleLoss(roles=(), boundaries=job_boundaries, allow_empty=True), family).boundaries


def _described(loss: Loss, prepared: PreparedDataset) -> str:
    """The loss setting as in the job file, and the loss source of each set of rows."""
    setting = loss if isinstance(loss, str) else json.dumps(loss.model_dump(mode="json", exclude_defaults=True))
    sources = prepared.manifest.get("loss_sources", ())
    return f"{setting} (by {', '.join(sources)})" if sources else setting


def _counts(shown: Bin) -> Iterator[SampleView]:
    """Yield the samples of a bin with their counts, without turns."""
    start = 0
    for number, num_tokens in enumerate(shown.sample_lengths.tolist()):
        images = tuple(image for image in shown.images if image["sample"] == number)
        yield SampleView(
            id=shown.sample_ids[number],
            source=shown.sample_sources[number],
            rule=LossRule(int(shown.sample_rules[number])).name.lower(),
            start=start,
            num_tokens=num_tokens,
            image_tokens=sum(image["num_tokens"] for image in images),
            trained=None,
            images=images,
        )
        start += num_tokens


def _with_turns(
    samples: Sequence[SampleView], shown: Bin, family: Family, loss: Loss, labels: LabelMaker,
    boundaries: Sequence[RoleBoundary],
) -> Iterator[SampleView]:  # fmt: skip
    blocks = [(image["first_token"], image["num_tokens"]) for image in shown.images]
    given_mask = shown.given_mask if len(shown.given_mask) else np.zeros(len(shown.input_ids), dtype=bool)
    label_ids = labels.of_arrays(shown.input_ids, shown.sample_lengths, shown.sample_rules, given_mask, blocks)
    trained = label_ids != IGNORE_INDEX
    marks = np.asarray([Mark.CONTEXT, Mark.MEDIA, Mark.TRAINED], dtype=object)[
        np.where(trained, 2, _is_media(shown, family))
    ]
    roles, turns = _roles_and_turns(shown, boundaries)
    for number, sample in enumerate(samples):
        tokens = slice(sample.start, sample.start + sample.num_tokens)
        pieces = view_pieces(shown.input_ids[tokens].tolist(), marks[tokens].tolist(), turns[tokens].tolist(), family)
        if _is_document(shown.sample_rules[number], loss):
            sample_turns = [Turn(None, tuple(pieces))]
        else:
            sample_turns = _turns(pieces, turns[tokens], roles)
        yield replace(sample, trained=int(trained[tokens].sum()), turns=tuple(sample_turns))


def _is_media(shown: Bin, family: Family) -> np.ndarray:
    """Marks the tokens of images, bool [L]: media tokens, and labels and line breaks between them."""
    media = np.isin(shown.input_ids, family.media_token_ids)
    for image in shown.images:
        media[image["first_token"] : image["first_token"] + image["num_tokens"]] = True
    return media


def _is_document(rule: int, loss: Loss) -> bool:
    """True when a sample is certainly not a chat: all of it is trained on, and chats are not. It has no turns then."""
    chats_train_whole = loss == "all" or (isinstance(loss, RoleLoss) and loss.train_on_inputs)
    return rule == LossRule.ALL and not chats_train_whole


def _roles_and_turns(shown: Bin, boundaries: Sequence[RoleBoundary]) -> tuple[list[str | None], np.ndarray]:
    """The role of each turn, and the number of each token's turn, int64 [L].

    A stretch between turns counts as a turn of the role None.
    """
    ids = torch.from_numpy(shown.input_ids.astype(np.int64))
    segments = segment_ids(torch.from_numpy(shown.sample_lengths.astype(np.int64)))
    names = list(dict.fromkeys(boundary.role for boundary in boundaries))
    whole = [replace(boundary, include_start=True) for boundary in boundaries]
    inner = [replace(boundary, include_start=False) for boundary in boundaries]

    def stretches(of: list[RoleBoundary], roles: list[str]) -> np.ndarray:
        return role_keep_mask(ids, of, roles_to_train=roles, segment_ids=segments).numpy()

    role = np.full(len(ids), -1)
    for number, name in enumerate(names):
        role[stretches(whole, [name])] = number
    starts = (role >= 0) & ~stretches(inner, names)
    changes = np.diff(role, prepend=-2) != 0
    changes |= starts & ~np.concatenate([[False], starts[:-1]])
    return [names[number] if number >= 0 else None for number in role[changes].tolist()], changes.cumsum() - 1


def view_pieces(ids: list[int], marks: list[Mark], turns: list[int], family: Family) -> list[Piece]:
    """Cut one sample into pieces. No piece holds tokens of two marks or two turns."""
    media, pieces = set(family.media_token_ids), []

    def decode(token_ids: list[int]) -> str:
        return str(family.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    start = 0
    repeated = [(token_id, turn) if token_id in media else None for token_id, turn in zip(ids, turns)]
    for repeats, group in groupby(range(len(ids)), lambda place: repeated[place]):
        run = [ids[place] for place in group]
        stop = start + len(run)
        if repeats is not None:
            text = family.tokenizer.convert_ids_to_tokens(run[0])
            pieces.append(Piece(start, tuple(run), str(text), marks[start], is_run=len(run) > 1))
        else:
            for count, text in token_texts(run, decode, before=ids[max(start - 1, 0) : start]):
                kinds = set(zip(marks[start : start + count], turns[start : start + count]))
                if len(kinds) == 1:
                    pieces.append(Piece(start, tuple(ids[start : start + count]), text, marks[start]))
                else:
                    pieces += [
                        Piece(place, (ids[place],), decode([ids[place]]), marks[place])
                        for place in range(start, start + count)
                    ]
                start += count
        start = stop
    return pieces


def _turns(pieces: Sequence[Piece], turns: np.ndarray, roles: Sequence[str | None]) -> list[Turn]:
    """Group pieces into the turns of a sample; blank text between turns joins the turn before it.

    turns: number of the turn of each token of the sample.
    """
    merged: list[Turn] = []
    for number, group in groupby(pieces, lambda piece: int(turns[piece.start])):
        turn = Turn(roles[number], tuple(group))
        is_gap = turn.role is None and all(not piece.text.strip() for piece in turn.pieces)
        if merged and is_gap:
            merged[-1] = replace(merged[-1], pieces=merged[-1].pieces + turn.pieces)
        else:
            merged.append(turn)
    return merged
