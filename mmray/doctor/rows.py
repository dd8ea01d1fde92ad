"""What the first rows of each set show: that they can be read, are as long as the processor says, and train."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from rich.console import Console

from mmray.batch import Place, mask, render
from mmray.config import Job
from mmray.doctor.findings import Finding, failed, not_applicable, passed
from mmray.errors import UserError
from mmray.families import Family
from mmray.images import TilingPolicy
from mmray.inspect.terminal import is_plain, legend, print_sample
from mmray.inspect.view import view_samples
from mmray.masks.labels import IGNORE_INDEX
from mmray.masks.settings import allows_empty, label_maker
from mmray.prepared.dataset import window_bins
from mmray.prepared.window import pack_window, samples_table
from mmray.rows.encode import Encoder, RejectedRow, Sample
from mmray.rows.files import Piece, plan_chunks, source_files
from mmray.rows.preflight import check_first_rows, first_rows, sample_labels
from mmray.rows.read import RawRow

DECODED_ROWS = 8
MAX_TOO_LARGE = 0.05
"""Part of the first rows that may fit no bin: more is a capacity chosen wrongly, not a few odd rows."""
TOO_LARGE = ("too_long", "too_many_visual_tokens")


@dataclass
class FirstRows:
    """The first rows of one of a job's splits, encoded."""

    job: Job
    split: str
    family: Family
    policy: TilingPolicy

    @cached_property
    def encoder(self) -> Encoder:
        job = self.job.model_copy(update={"data": self.job.data.model_copy(update={"on_bad_row": "reject"})})
        return Encoder(job.data, getattr(job.data, self.split), self.family, self.policy, job.packing, loss=job.loss)

    @cached_property
    def pieces(self) -> list[Piece]:
        """Of the first file of each set: the others need not be read through."""
        files = {file.dataset: file for file in reversed(source_files(getattr(self.job.data, self.split)))}
        packing = self.job.packing
        chunks = plan_chunks(
            [files[number] for number in sorted(files)],
            window_rows=packing.window_rows, chunk_rows=packing.chunk_rows,
        )  # fmt: skip
        return [piece for chunk in chunks for piece in chunk.pieces]

    @cached_property
    def raw(self) -> list[list[RawRow]]:
        """As they were read, of each set."""
        return [first_rows(self.pieces, number) for number in range(len(self.encoder.datasets))]

    @cached_property
    def results(self) -> list[list[Sample | RejectedRow]]:
        """As they were encoded, of each set."""
        return [self.encoder.encode(rows) for rows in self.raw]

    def samples(self) -> list[Sample]:
        return [result for results in self.results for result in results if isinstance(result, Sample)]

    def preview(self, console: Console) -> None:
        """Print the shortest of the good rows, what trains coloured."""
        samples = self.samples()
        if not samples:
            return
        shortest = min(samples, key=lambda sample: len(sample.input_ids))
        (shown,) = window_bins(
            pack_window(samples_table([shortest]), self.job.packing, label_maker(self.job.loss, self.family), 0, True)
        )
        roles, (view,) = view_samples(shown, self.family, self.job.loss)
        print_sample(console, f"the shortest of the first rows: {view.id}", view, roles)
        console.print(legend(is_plain(console)), "")

    def name(self, number: int) -> str:
        return f"data.{self.split}[{number}] ({self.encoder.datasets[number].kind})"


def examine_rows(rows: FirstRows) -> Iterator[Finding]:
    """Every check of the first rows of a split. Raises UserError where they cannot be read at all."""
    yield from _readable(rows)
    yield _capacities(rows)
    yield _template(rows)
    yield _loss(rows)
    if rows.samples():
        yield from _trained(rows)
        yield _lengths(rows)


def _readable(rows: FirstRows) -> Iterator[Finding]:
    for number, results in enumerate(rows.results):
        bad = [result for result in results if isinstance(result, RejectedRow)]
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(row.reason for row in bad).items())
        found = f"{rows.name(number)}: {len(results) - len(bad)} of the first {len(results)} rows are good"
        if not bad:
            yield passed("rows", found)
        elif len(bad) < len(results) and rows.job.data.on_bad_row == "reject":
            yield passed("rows", f"{found}; {reasons}, for example {bad[0].source}: {bad[0].message}")
        else:
            yield failed("rows", f"{found}; {reasons}", f"{bad[0].source}: {bad[0].message}")


def _capacities(rows: FirstRows) -> Finding:
    check, packing = "capacities", rows.job.packing
    large = [
        result
        for results in rows.results
        for result in results
        if isinstance(result, RejectedRow) and result.reason in TOO_LARGE
    ]
    samples = rows.samples()
    if len(large) > MAX_TOO_LARGE * (len(large) + len(samples)):
        found = f"{len(large)} of the first {len(large) + len(samples)} rows of data.{rows.split} fit no bin"
        return failed(check, f"{found}: {large[0].source}", large[0].message)
    if not samples:
        return not_applicable(check, "no good row")
    tokens = max(len(sample.input_ids) for sample in samples)
    visual = max(sample.visual_tokens for sample in samples)
    return passed(
        check,
        f"the longest of the first rows of data.{rows.split} has {tokens:,} of {packing.token_capacity:,} tokens, the "
        f"most visual tokens are {visual:,} of {packing.visual_capacity:,}"
        + (f"; {len(large)} fit no bin and will be rejected: {large[0].source}, {large[0].message}" if large else ""),
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
        sources = check_first_rows(rows.encoder, labels, rows.pieces, split=rows.split, loss=rows.job.loss)
    except UserError as error:
        return failed("loss", str(error))
    said = "; ".join(f"{rows.name(number)}: {source}" for number, source in enumerate(sources))
    return passed("loss", f"every marker is found, tokens train by {said}")


def _trained(rows: FirstRows) -> Iterator[Finding]:
    labels = label_maker(rows.job.loss, rows.family)
    for number, results in enumerate(rows.results):
        samples = [result for result in results if isinstance(result, Sample)]
        if not samples:
            continue
        made = sample_labels(samples, labels)
        trained, tokens = sum(int((each != IGNORE_INDEX).sum()) for each in made), sum(map(len, made))
        found = f"{rows.name(number)}: {trained / tokens:.1%} of {tokens:,} tokens in {len(samples)} rows train"
        if trained or allows_empty(rows.job.loss):
            yield passed("trained tokens", found)
        else:
            yield failed("trained tokens", found, "see `loss` in the job file, and the rows' roles or labels")


def _lengths(rows: FirstRows) -> Finding:
    """Tokens by sizes against the real processor, and image features of the decoded pictures against tokens."""
    check = "exact lengths"
    good = [
        [row for row, result in zip(raw, results, strict=True) if isinstance(result, Sample)]
        for raw, results in zip(rows.raw, rows.results, strict=True)
    ]
    picked = [row for raw in good for row in raw[: max(1, DECODED_ROWS // len(good))]]
    try:
        samples = rows.encoder.encode(picked, verify=range(len(picked)))
        labels = label_maker(rows.job.loss, rows.family)
        window = pack_window(samples_table(samples), rows.job.packing, labels, rows.family.sample_gap, True)
        for number, each in enumerate(window_bins(window)):
            rendered = render([each], Place(0, 0, number), rows.family, rows.policy)
            mask(rendered, rows.family, labels, torch.device("cpu"))
    except UserError as error:
        return failed(check, str(error))
    pictures = sum(len(sample.images) for sample in samples if isinstance(sample, Sample))
    return passed(
        check,
        f"{len(picked)} rows of data.{rows.split} have the tokens of {type(rows.family.processor).__name__}; their "
        f"{pictures} pictures, decoded, have the features that the tokens ask for",
    )
