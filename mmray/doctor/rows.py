"""Checks the first rows of each set: that they can be read, have the processor's lengths, and are trained on."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from rich.console import Console

from mmray.base.words import counted
from mmray.batches.micro_batch import Place, mask, render
from mmray.batches.render import SkippedSample, skipped_from_array
from mmray.config.job import Job
from mmray.doctor.findings import Finding, failed, guarded, not_applicable, passed
from mmray.errors import UserError
from mmray.families import Family
from mmray.images import TilingPolicy
from mmray.inspect.terminal import is_plain, legend, print_sample
from mmray.inspect.view import view_samples
from mmray.loss.rules import IGNORE_INDEX
from mmray.loss.settings import allows_empty
from mmray.loss.sources import LossSource, label_maker
from mmray.prepared.dataset import window_bins
from mmray.prepared.window import pack_window, samples_table
from mmray.rows.count import count_rows
from mmray.rows.encode import Encoder
from mmray.rows.files import Piece, SourceFile, first_piece, source_files
from mmray.rows.preflight import FIRST_ROWS, check_first_rows, first_rows, sample_labels, set_name
from mmray.rows.read import RawRow
from mmray.rows.rejections import SetRows, too_many
from mmray.rows.sample import RejectedRow, Sample

LENGTHS = "exact lengths"
DECODED_ROWS = 8
COUNT_SECONDS = 10.0
"""Longest time that counting rows takes."""
SHOWN_SETS = 3
"""Number of sets of which a row is printed."""
TRAINED_PARTS = {
    LossSource.EVERY_TOKEN: "every token is trained on",
    LossSource.ROW: "each row's own mask or labels",
    LossSource.MESSAGES: "what the assistant says, by the messages",
    LossSource.ANSWER: "what follows each row's prompt",
    LossSource.ROLES: "the markers of the roles, all found",
}
TOO_LARGE = ("too_long", "too_many_visual_tokens")


@dataclass
class FirstRows:
    """The first rows of one of a job's splits, encoded."""

    job: Job
    split: str
    family: Family
    policy: TilingPolicy
    positions: int | None = None
    """The model's `max_position_embeddings`; None when it has none."""

    @cached_property
    def encoder(self) -> Encoder:
        data, job = self.job.data, self.job
        return Encoder(
            data.lenient, data.splits[self.split], self.family, self.policy, job.packing, loss=job.loss
        )  # fmt: skip

    @cached_property
    def files(self) -> list[list[SourceFile]]:
        """The files of each set."""
        files = source_files(self.job.data.splits[self.split])
        return [[file for file in files if file.dataset == number] for number in range(len(self.encoder.datasets))]

    @cached_property
    def pieces(self) -> list[Piece]:
        """The pieces of files that hold the first rows of each set; nothing else need be read."""
        return [piece for files in self.files for piece in self._first_pieces(files)]

    def _first_pieces(self, files: Sequence[SourceFile]) -> list[Piece]:
        pieces: list[Piece] = []
        rows = 0
        for file in files:
            piece = first_piece(file, FIRST_ROWS)
            pieces += [piece] if piece.num_rows else []
            rows += piece.num_rows
            if rows >= FIRST_ROWS:
                break
        return pieces

    @cached_property
    def raw(self) -> list[list[RawRow]]:
        """The first rows of each set, as read."""
        return [first_rows(self.pieces, number) for number in range(len(self.encoder.datasets))]

    @cached_property
    def results(self) -> list[list[Sample | RejectedRow]]:
        """The first rows of each set, as encoded."""
        return [self.encoder.encode(rows) for rows in self.raw]

    def samples(self) -> list[Sample]:
        """The good first rows of all sets."""
        return [sample for number in range(len(self.results)) for sample in self.good(number)]

    def good(self, number: int) -> list[Sample]:
        """The good first rows of a set."""
        return [result for result in self.results[number] if isinstance(result, Sample)]

    def stops(self, number: int, bad: int) -> bool:
        """True when preparing would stop at a set with `bad` bad ones among its first rows (`rows.rejections`), if its
        other rows are alike. All rows are counted only when the share among the first rows is too large."""
        looked_at, max_share = len(self.results[number]), self.job.data.max_rejected_share
        if not bad or bad == looked_at:
            return bad > 0
        if bad <= max_share * looked_at:
            return False
        rows = count_rows(self.files[number], COUNT_SECONDS).rows
        return too_many(bad / looked_at * rows, rows, max_share)

    def preview(self, console: Console) -> None:
        """Print one good row of median length from some sets, chats first, with trained text coloured."""
        numbers = [number for number in range(len(self.results)) if self.good(number)]
        numbers.sort(key=lambda number: self.encoder.datasets[number].kind != "chat")
        labels = label_maker(self.job.loss, self.family)
        for number in numbers[:SHOWN_SETS]:
            by_length = sorted(self.good(number), key=lambda sample: len(sample.input_ids))
            typical = by_length[(len(by_length) - 1) // 2]
            alone = self.job.packing.model_copy(update={"mode": "none"})
            (shown,) = window_bins(pack_window(samples_table([typical]), alone, labels, 0, True))
            roles, (view,) = view_samples(shown, self.family, self.job.loss, labels)
            print_sample(console, f"a typical one of the first rows of {self.name(number)}: {view.id}", view, roles)
        if numbers:
            console.print(legend(is_plain(console)), "")

    def name(self, number: int) -> str:
        return set_name(self.split, number, self.encoder.datasets[number])


def examine_rows(rows: FirstRows) -> Iterator[Finding]:
    """Yield the findings on the first rows of a split. Raises UserError when they cannot be read at all."""
    yield from _readable(rows)
    yield _capacities(rows)
    yield _template(rows)
    yield _loss(rows)
    if rows.samples():
        yield from _trained(rows)
        yield guarded(LENGTHS, lambda: _lengths(rows))


def _readable(rows: FirstRows) -> Iterator[Finding]:
    for number, results in enumerate(rows.results):
        counts = SetRows.of(results)
        bad = counts.rejected.total()
        detail = f"{rows.name(number)}: {len(results) - bad} of the first {counted(len(results), 'row')} are good"
        if not results:
            yield failed(
                "rows", f"{rows.name(number)}: its files hold no rows", f"see data.{rows.split}[{number}].files"
            )
        elif not bad:
            yield passed("rows", detail)
        elif rows.job.data.on_bad_row == "error":
            yield failed("rows", f"{detail}; {counts.reasons}", "mend them, or set data.on_bad_row: reject")
        elif rows.stops(number, bad):
            allowed = f"preparing stops at more than {rows.job.data.max_rejected_share:.1%} (data.max_rejected_share)"
            yield failed("rows", f"{detail}; {counts.reasons}", f"mend them; {allowed}")
        else:
            yield passed("rows", f"{detail}; {counts.reasons}")


def _capacities(rows: FirstRows) -> Finding:
    check, packing = "capacities", rows.job.packing
    of_sets = [
        [result for result in results if isinstance(result, RejectedRow) and result.reason in TOO_LARGE]
        for results in rows.results
    ]
    large = [result for results in of_sets for result in results]
    samples = rows.samples()
    looked_at = sum(map(len, rows.results))
    beyond = sum(len(sample.input_ids) > (rows.positions or math.inf) for sample in samples)
    longer = f"; {beyond} rows have more tokens than the model's {rows.positions:,} positions" if beyond else ""
    first = f"the first {counted(looked_at, 'row')} of data.{rows.split}"
    part = f"{len(large)} of {first}, {len(large) / max(1, looked_at):.1%},"
    if large and rows.job.data.on_bad_row == "error":
        return failed(check, f"{part} fit no bin, and on_bad_row is error: {large[0].source}", large[0].message)
    if any(rows.stops(number, len(results)) for number, results in enumerate(of_sets)):
        return failed(check, f"{part} fit no bin: {large[0].source}", large[0].message)
    if not samples:
        return not_applicable(check, "no good row")
    tokens = max(len(sample.input_ids) for sample in samples)
    visual = max(sample.visual_tokens for sample in samples)
    return passed(
        check,
        f"the longest of the first rows of data.{rows.split} has {tokens:,} of {packing.token_capacity:,} tokens, the "
        f"most visual tokens are {visual:,} of {packing.visual_capacity:,}; "
        + (
            f"{part} fit no bin and will be rejected: {large[0].source}, {large[0].message}"
            if large
            else f"all of {counted(looked_at, 'row')} fit"
        )
        + longer,
    )


def _template(rows: FirstRows) -> Finding:
    check = "chat template"
    chats = [number for number, dataset in enumerate(rows.encoder.datasets) if dataset.kind == "chat"]
    if not chats:
        return not_applicable(check, f"data.{rows.split} has no chat rows")
    for number in chats:
        refused = [row for row in rows.results[number] if isinstance(row, RejectedRow) and row.reason == "template"]
        if refused and not any(isinstance(result, Sample) for result in rows.results[number]):
            return failed(check, f"{rows.name(number)}: {refused[0].source}: {refused[0].message}", "mend the template")
    return passed(check, "renders " + ", ".join(map(rows.name, chats)))


def _loss(rows: FirstRows) -> Finding:
    try:
        labels = label_maker(rows.job.loss, rows.family)
        sources = check_first_rows(rows.encoder, labels, rows.pieces, split=rows.split)
    except UserError as error:
        return failed("loss", str(error))
    judged = [bool(rows.good(number)) for number in range(len(sources))]
    detail = "; ".join(
        f"{rows.name(number)}: {source}, {TRAINED_PARTS[source] if judged[number] else 'not judged: no good row'}"
        for number, source in enumerate(sources)
    )
    return passed("loss", detail) if any(judged) else not_applicable("loss", detail)


def _trained(rows: FirstRows) -> Iterator[Finding]:
    labels = label_maker(rows.job.loss, rows.family)
    for number in range(len(rows.results)):
        samples = rows.good(number)
        if not samples:
            continue
        label_arrays = sample_labels(samples, labels)
        trained, tokens = (
            sum(int((label_ids != IGNORE_INDEX).sum()) for label_ids in label_arrays),
            sum(map(len, label_arrays)),
        )
        detail = (
            f"{rows.name(number)}: {trained / tokens:.1%} of {tokens:,} tokens in {len(samples)} rows are trained on"
        )
        if trained or allows_empty(rows.job.loss):
            yield passed("trained tokens", detail)
        else:
            yield failed("trained tokens", detail, "see `loss` in the job file, and the rows' roles or labels")


def _lengths(rows: FirstRows) -> Finding:
    """Compare tokens counted from sizes with the real processor's, and features of decoded pictures with tokens."""
    good = [
        [row for row, result in zip(raw, results, strict=True) if isinstance(result, Sample)]
        for raw, results in zip(rows.raw, rows.results, strict=True)
    ]
    picked = [row for raw in good for row in raw[: max(1, DECODED_ROWS // len(good))]]
    ready_made = sum(rows.encoder.datasets[row.dataset].kind == "tokenized" for row in picked)
    compared = len(picked) - ready_made
    samples = rows.encoder.encode(picked, verify=range(len(picked)))
    broken = _undecodable(rows, samples)
    with_pictures = sum(bool(sample.images) for sample in samples if isinstance(sample, Sample))
    note = f"{len(broken)} of {counted(len(picked), 'row')} of data.{rows.split} have a broken picture, such as "
    if broken and (rows.job.data.on_bad_row == "error" or len(broken) == with_pictures):
        return failed(LENGTHS, f"{note}{broken[0]}", "store them anew; `mmray verify` with the job lists all of them")
    pictures = sum(len(sample.images) for sample in samples if isinstance(sample, Sample))
    facts = [f"{compared} rows of data.{rows.split} have the tokens of {type(rows.family.processor).__name__}"]
    facts += [f"{ready_made} tokenized rows of data.{rows.split} are taken as they are"]
    facts = facts[: 1 + bool(ready_made)][not compared :]
    if pictures:
        facts.append(f"{counted(pictures, 'picture')} decoded, with the features that the tokens ask for")
    if broken:
        facts.append(f"{note}{broken[0]}: training leaves them out of the loss; `mmray verify` lists all of them")
    return passed(LENGTHS, "; ".join(facts)) if compared else not_applicable(LENGTHS, "; ".join(facts))


def _undecodable(rows: FirstRows, samples: Sequence[Sample | RejectedRow]) -> list[SkippedSample]:
    """The samples with pictures that cannot be decoded. Raises UserError where image features do not match tokens."""
    labels = label_maker(rows.job.loss, rows.family)
    packing = rows.job.packing.model_copy(update={"mode": "none"})
    problems = []
    for sample_bin in window_bins(pack_window(samples_table(samples), packing, labels, allow_empty=True)):
        rendered = render([sample_bin], Place(0, 0, 0), rows.family, rows.policy, on_bad_row="reject")
        mask(rendered, rows.family, labels, torch.device("cpu"))
        problems += skipped_from_array(rendered.problems)
    return problems
