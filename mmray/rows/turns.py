"""Finds the turns of messages in the skeleton of a conversation.

The turn of the assistant begins where the model begins to write, and ends with the stop token behind the message's last
text; the turn of another role with the text that ends it by the family's boundaries.
"""

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from mmray.loss.settings import SAMPLED_ROLE
from mmray.rows.messages import Chat
from mmray.rows.skeleton import Leaf, Skeleton, Written

Place = tuple[int, int]
"""A place in a skeleton: the number of a piece of fixed text, and the number of letters before the place in it."""


class Run(NamedTuple):
    """A stretch of consecutive leaves of one message, with the text around them that belongs to the message.

    message: the number of the message.
    start: where the message begins; for the assistant, where the model begins to write.
    stop: where the message ends.
    end: the stop token, or the text that ends another role's turn, from its beginning to behind it; empty at `stop`
        where there is none. Between `stop` and the end of another role's turn a template may write tools.
    first, last: the first and last occurrence of a leaf; -1 for a message without text.
    """

    message: int
    start: Place
    stop: Place
    end: tuple[Place, Place]
    first: int
    last: int


class Beginning(NamedTuple):
    """The first messages of a conversation as the template writes them alone, with marks for their leaves.

    last: the leaf that stands last.
    tail: the text behind it.
    prompt: the text that `add_generation_prompt` adds; None where it changes the text before.
    """

    text: str
    last: int
    tail: str
    prompt: str | None


class PlainTurn(NamedTuple):
    """The text before an answer in the simplest conversation.

    opening: the text between the user's turn and the answer.
    header: the beginning of it that is never part of an answer.
    """

    opening: str
    header: str


class TurnTexts(Protocol):
    """The texts of a chat template between messages, by which turns are found."""

    @property
    def ends(self) -> re.Pattern[str]:
        """Matches the texts by which the model ends its turn."""

    @property
    def special_texts(self) -> re.Pattern[str]:
        """Matches the special tokens of the vocabulary that are not media tokens."""

    @property
    def units(self) -> re.Pattern[str]:
        """Matches the images that stand before a message's text."""

    @property
    def plain_turn(self) -> PlainTurn:
        """The text that the template writes before an answer in the simplest conversation."""

    def ends_of(self, role: str) -> re.Pattern[str]:
        """Matches the texts that end the turns of another role."""

    def beginning(self, chat: Chat, masked: Written, count: int, key: tuple[Any, ...]) -> Beginning | None:
        """Renders the first messages of a conversation alone; None where the template refuses them."""


def messages_of(leaves: Sequence[Leaf], skeleton: Skeleton) -> list[int | None]:
    """Returns the message of each occurrence. Only the first occurrence of a call's name belongs to the message that
    calls, because Gemma 4 also writes the name before the tool's answer."""
    messages: list[int | None] = []
    called: set[int] = set()
    for occurrence in skeleton.occurrences:
        leaf = leaves[occurrence.leaf]
        messages.append(None if occurrence.leaf in called else leaf.message)
        if leaf.kind == "call name":
            called.add(occurrence.leaf)
    return messages


class Turns:
    """Finds the turns of one form of conversation in its skeleton."""

    def __init__(
        self, template: TurnTexts, chat: Chat, masked: Written, skeleton: Skeleton, text: str, key: tuple[Any, ...]
    ) -> None:
        self.template, self.chat, self.masked, self.skeleton = template, chat, masked, skeleton
        self.text, self.key = text, key
        self._kinds = [_numbered_alike(repr(message_key)) for message_key in masked.keys]
        self._lengths: dict[tuple[str, ...], int] = {}
        self._message = messages_of(masked.leaves, skeleton)
        self._anchors = [number for number, message in enumerate(self._message) if message is not None]

    def find(self) -> tuple[tuple[Run, ...], tuple[int, ...]]:
        """Returns the runs in order, and the messages of the assistant whose turn was not found."""
        runs: list[Run] = []
        begun: set[int] = set()
        groups = [(message, list(group)) for message, group in groupby(self._anchors, lambda n: self._message[n])]
        for message, group in groups:
            assert message is not None
            runs.append(self._run(message, group[0], group[-1], is_first=message not in begun))
            begun.add(message)
        lost = []
        for number, message in enumerate(self.chat.messages):
            if message.role == SAMPLED_ROLE and number not in begun:
                run = self._silent(number)
                if run is None:
                    lost.append(number)
                else:
                    runs.append(run)
        return tuple(sorted(runs, key=lambda run: run.start)), tuple(lost)

    def _run(self, message: int, first: int, last: int, *, is_first: bool) -> Run:
        start: Place = (first, len(self.skeleton.pieces[first]))
        stop: Place = (last + 1, 0)
        before = max((n for n in self._anchors if n < first), default=-1)
        after = min((n for n in self._anchors if n > last), default=None)
        behind = _Gap(self.skeleton, self.masked.marks, last, after)
        if self.chat.messages[message].role != SAMPLED_ROLE:
            shown = self.template.units.search(_Gap(self.skeleton, self.masked.marks, before, first).text)
            if shown:
                start = _Gap(self.skeleton, self.masked.marks, before, first).place(shown.start())
            match = self.template.ends_of(self.chat.messages[message].role).search(behind.text)
            end = (behind.place(match.start()), behind.place(match.end())) if match else (stop, stop)
            return Run(message, start, stop, end, first, last)
        if is_first:
            gap = _Gap(self.skeleton, self.masked.marks, before, first)
            start = gap.place(self._once("before", message, gap.text, lambda: self._before(message, gap.text, before)))
        own_length = self._once("behind", message, behind.text, lambda: self._own_end(message, behind.text, after))
        match = self.template.ends.search(behind.text)
        if match is None:
            specials = list(self.template.special_texts.finditer(behind.text, 0, own_length))
            match = specials[-1] if specials else None
        stop, behind_end = map(behind.place, match.span() if match else (own_length, own_length))
        return Run(message, start, stop, (stop, behind_end), first, last)

    def _once(self, which: str, message: int, text: str, count: Callable[[], int]) -> int:
        """Returns the number of letters of a text that belong to a turn, or stand before it.

        It takes two renderings of the beginning of the conversation, so it is done once for all messages that have
        neighbours of the same kinds and the same text between them: otherwise the time for a conversation would grow
        with the square of its length, or with the cube where the template itself looks back.
        """
        kinds = [self._kinds[n] if 0 <= n < len(self._kinds) else "" for n in (message - 1, message, message + 1)]
        key = (which, *kinds, _numbered_alike(text))
        if key not in self._lengths:
            self._lengths[key] = count()
        return self._lengths[key]

    def _before(self, message: int, gap: str, before: int) -> int:
        """Counts the letters before a turn of the assistant that stand there before the model begins to write."""
        plain = self.template.plain_turn
        beginning = self.template.beginning(self.chat, self.masked, message, self.key) if message else None
        last = self.skeleton.occurrences[before].leaf if before >= 0 else -1
        if beginning and beginning.prompt is not None and beginning.last == last and gap.startswith(beginning.tail):
            opening = gap[len(beginning.tail) :]
            return len(beginning.tail) + prompt_length(beginning.prompt, opening, plain.header)
        if gap.endswith(plain.opening):
            return len(gap) - len(plain.opening) + len(plain.header)
        if plain.header and plain.header in gap:
            return gap.rindex(plain.header) + len(plain.header)
        return len(gap)

    def _own_end(self, message: int, behind: str, after: int | None) -> int:
        """Counts the letters behind a turn of the assistant that belong to the turn."""
        if after is None and message == len(self.chat.messages) - 1:
            return len(behind)
        through = self.template.beginning(self.chat, self.masked, message + 1, self.key)
        return len(through.tail) if through and behind.startswith(through.tail) else 0

    def _silent(self, message: int) -> Run | None:
        """Finds the turn of a message without text by comparing beginnings of the conversation; None where they do not
        show it."""
        before = self.template.beginning(self.chat, self.masked, message, self.key)
        through = self.template.beginning(self.chat, self.masked, message + 1, self.key)
        if before is None or through is None or before.last != through.last:
            return None
        anchor = max((n for n in self._anchors if self.skeleton.occurrences[n].leaf == through.last), default=-1)
        gap = _Gap(
            self.skeleton, self.masked.marks, anchor, min((n for n in self._anchors if n > anchor), default=None)
        )
        if not gap.text.startswith(through.tail) or not through.tail.startswith(before.tail):
            return None
        turn_text = through.tail[len(before.tail) :]
        begin = len(before.tail) + prompt_length(before.prompt or "", turn_text, self.template.plain_turn.header)
        match = self.template.ends.search(gap.text, begin)
        stop, ended = match.span() if match else (len(through.tail), len(through.tail))
        return Run(message, gap.place(begin), gap.place(stop), (gap.place(stop), gap.place(ended)), -1, -1)


_MARK_NUMBER = re.compile(r"(?<=zq[xn])\d{5}(?=xqz)|(?<=\bi)\d{5}(?=q*\b)")


def _numbered_alike(text: str) -> str:
    """Replaces the numbers of marks by zeros, so that texts are equal that differ in these alone."""
    return _MARK_NUMBER.sub("00000", text)


def prompt_length(prompt: str, opening: str, header: str | None) -> int:
    """Counts the letters before an answer that `add_generation_prompt` writes.

    header: `PlainTurn.header`; None while the header is being determined.

    A template that writes headers but no prompt cannot ask for an answer; its header is not part of one. Where the text
    has only a part of the prompt (the prompt fills in thoughts that this turn has in words, or has not), the model
    begins behind the header that every turn has.
    """
    if header is None:
        return _common(prompt, opening) if prompt else len(opening) * bool(opening.strip())
    common = _common(prompt, opening)
    return common if prompt and common == len(prompt) else _common(header, opening) or common


def _common(first: str, second: str) -> int:
    """Counts the letters that two texts have in common at their beginning."""
    number = 0
    for a, b in zip(first, second):
        if a != b:
            break
        number += 1
    return number


class _Gap:
    """The text of a skeleton between two of its occurrences, including the ids there, with its places."""

    def __init__(self, skeleton: Skeleton, marks: Sequence[str], first: int, last: int | None) -> None:
        """The gap goes from behind the occurrence `first` (-1: the beginning) up to `last` (None: the end)."""
        self._parts: list[tuple[int, str]] = []
        stop = len(skeleton.pieces) - 1 if last is None else last
        for number in range(first + 1, stop + 1):
            self._parts.append((number, skeleton.pieces[number]))
            if number < stop:
                self._parts.append((-1, marks[skeleton.occurrences[number].leaf]))
        self.text = "".join(text for _, text in self._parts)

    def place(self, letters: int) -> Place:
        """Returns the place behind a number of letters; inside a mark, the place before the mark."""
        before: Place = (self._parts[0][0], 0)
        for number, text in self._parts:
            if number >= 0:
                if letters <= len(text):
                    return number, max(letters, 0)
                before = (number, len(text))
            elif letters < len(text):
                return before
            letters -= len(text)
        return before


def text_between(skeleton: Skeleton, marks: Sequence[str], first: int, last: int | None) -> str:
    """Returns the text between two occurrences of a skeleton. first: -1 for the beginning; last: None for the end."""
    return _Gap(skeleton, marks, first, last).text
