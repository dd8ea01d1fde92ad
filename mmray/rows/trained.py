"""Determines the letters of a rendered conversation to train on from its messages, for any setting of `loss`.

A setting trains on the turns of some roles; flags of messages and parts, `turns`, `reasoning` and `train_on_eos`
restrict that. In an assistant's turn the text that the model would write is trained on, from behind the generation
prompt to the stop token. In another role's turn its texts are trained on.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from mmray.loss.settings import SAMPLED_ROLE, Loss, RoleLoss, TrainOnEos
from mmray.rows.skeleton import Leaf
from mmray.rows.templates import RenderedChat
from mmray.rows.turns import Run

Span = tuple[int, int]

_EMPTY_THOUGHT = re.compile(r"\s*(<think>)?\s*</think>\s*|\s*<\|channel>thought\s*<channel\|>\s*")


class TrainedText(NamedTuple):
    """The trained spans of a text, each [start, stop) in letters, in order.

    spans: the spans to train on.
    whole: for every trained turn, the span from where the model begins to write to behind its stop token, with the
        parts that are not trained on.
    ends: the stop tokens that are trained on.
    last_is_open: whether the last message is the assistant's, is trained on, and is not followed by a stop token.
    """

    spans: tuple[Span, ...]
    whole: tuple[Span, ...]
    ends: tuple[Span, ...]
    last_is_open: bool


def trained_text(rendered: RenderedChat, loss: Loss) -> TrainedText:
    """Determines the letters to train on. loss: `sampled`, or the turns of some roles."""
    setting = loss if isinstance(loss, RoleLoss) else RoleLoss()
    runs = list(rendered.plan.runs)
    messages = rendered.chat.messages
    chosen = _chosen(rendered, setting)
    with_text = [run.message for run in runs if run.message in chosen and run.first >= 0 and _has_text(rendered, run)]
    spans: list[Span] = []
    whole: list[Span] = []
    ends: list[Span] = []
    last = max(chosen, default=-1)
    ending = [n for n, run in enumerate(runs) if run.message == max(with_text, default=-1)]
    for number, run in enumerate(runs):
        start, stop, *end = (rendered.filled.place(place) for place in (run.start, run.stop, *run.end))
        trains = run.message in chosen
        if trains:
            taken = list(_taken_out(rendered, run, setting, (start, stop), is_last=run.message == last))
            spans += _without((start, stop), taken)
            whole.append((start, end[1]))
        else:
            spans += _of_parts(rendered, run, trains=True)
        if _end_trains(setting.train_on_eos, trains, is_last=bool(ending) and number == ending[-1]) and end[1] > end[0]:
            spans.append((end[0], end[1]))
            ends.append((end[0], end[1]))
    final = len(messages) - 1
    behind = [run for run in runs if run.message == final]
    is_open = (
        final in chosen
        and messages[final].role == SAMPLED_ROLE
        and bool(behind)
        and behind[-1].end[0] == behind[-1].end[1]
    )
    return TrainedText(tuple(sorted(spans)), tuple(whole), tuple(ends), is_open)


def _chosen(rendered: RenderedChat, setting: RoleLoss) -> set[int]:
    """Returns the numbers of the messages to train on."""
    messages = rendered.chat.messages
    of_roles = [number for number, message in enumerate(messages) if message.role in setting.roles]
    if setting.turns == "last":
        of_roles = of_roles[-1:]
    kept = {number for number in of_roles if messages[number].trains is not False}
    return kept | {number for number, message in enumerate(messages) if message.trains}


def _end_trains(train_on_eos: TrainOnEos, trains: bool, *, is_last: bool) -> bool:
    match train_on_eos:
        case "turn":
            return trains
        case "all":
            return True
        case "last":
            return trains and is_last
        case "none":
            return False


def _has_text(rendered: RenderedChat, run: Run) -> bool:
    return any(rendered.filled.texts[n].strip() for n in range(run.first, run.last + 1))


def _taken_out(rendered: RenderedChat, run: Run, setting: RoleLoss, span: Span, *, is_last: bool) -> Iterator[Span]:
    """Yields the spans of a trained turn that are not trained on."""
    if run.first < 0:
        return
    places = range(run.first, run.last + 1)
    leaves = [rendered.leaves[rendered.plan.skeleton.occurrences[place].leaf] for place in places]
    own_texts = [(leaf, rendered.span(place)) for leaf, place in zip(leaves, places) if leaf.message == run.message]
    message = rendered.chat.messages[run.message]
    yield from _of_parts(rendered, run, trains=False)
    thinks = any(leaf.kind == "thought" for leaf, _ in own_texts)
    if message.role != SAMPLED_ROLE:
        yield from _between(own_texts, span)
    elif thinks and (setting.reasoning == "none" or (setting.reasoning == "last" and not is_last)):
        yield from _thoughts(own_texts, span)
    elif not thinks and not setting.train_empty_thoughts:
        match = _EMPTY_THOUGHT.match(rendered.text, span[0], own_texts[0][1][0])
        if match:
            yield match.span()


def _thoughts(texts: Sequence[tuple[Leaf, Span]], span: Span) -> Iterator[Span]:
    """Yields the thoughts of a turn, each from behind the text before it to the beginning of the text behind it."""
    read, begin = span[0], None
    for leaf, (start, stop) in texts:
        if leaf.kind == "thought":
            begin = read if begin is None else begin
        elif begin is not None:
            yield (begin, start)
            begin = None
        read = stop
    if begin is not None:
        yield (begin, read)


def _of_parts(rendered: RenderedChat, run: Run, *, trains: bool) -> Iterator[Span]:
    """Yields the texts of those parts of a message whose own flag says so."""
    parts = rendered.chat.messages[run.message].parts
    flagged = [number for number, part in enumerate(parts) if part.trains is trains]
    leaves = []
    for place in range(run.first, run.last + 1) if flagged and run.first >= 0 else ():
        leaf = rendered.leaves[rendered.plan.skeleton.occurrences[place].leaf]
        if leaf.message == run.message and leaf.part in flagged:
            leaves.append((place, leaf))
    neighbours = groupby(enumerate(leaves), lambda entry: (entry[1][1].part, entry[1][0] - entry[0]))
    for (number, _), group in neighbours:
        of_part = [leaf for _, leaf in group]
        yield _with_marks(rendered, parts[number].text or "", of_part[0], of_part[-1])


def _with_marks(rendered: RenderedChat, text: str, first: tuple[int, Leaf], last: tuple[int, Leaf]) -> Span:
    """Returns the span of a part's text, with what else the part says around it, such as `<think>`, where the template
    writes that as it is. first, last: the part's first and last leaf with their places."""
    (start, _), (_, stop) = rendered.span(first[0]), rendered.span(last[0])
    before, behind = text.partition(first[1].text)[0], text.rpartition(last[1].text)[2]
    if rendered.text.endswith(before, 0, start):
        start -= len(before)
    if rendered.text.startswith(behind, stop):
        stop += len(behind)
    return start, stop


def _between(texts: Sequence[tuple[object, Span]], span: Span) -> Iterator[Span]:
    """Yields what a template writes between the texts of a message that is not the assistant's."""
    read = span[0]
    for _, (start, stop) in texts:
        if start > read:
            yield (read, start)
        read = stop


def _without(span: Span, taken: Sequence[Span]) -> list[Span]:
    """Returns the parts of a span outside the taken spans."""
    left, read = [], span[0]
    for start, stop in sorted(taken):
        if start > read:
            left.append((read, start))
        read = max(read, stop)
    return left + ([(read, span[1])] if span[1] > read else [])
