"""Finds what a chat template writes around the texts of a conversation, with marks in place of the texts.

A conversation's texts (contents, thoughts, names and arguments of calls) are its leaves. The template is run once on
the same conversation with a mark for each leaf; its output is a skeleton: fixed text and places of leaves. Marks are
found exactly, where searching for words would fail: two messages may share words, and a user may type what a template
writes. A mark also shows how the template changes its leaf: it may strip blanks, or escape quotes as in JSON. A
skeleton filled with the leaves must equal the template's output for the conversation itself, letter by letter.
Otherwise the template depends on what the texts say, and the row is rejected.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from mmray.loss.settings import SAMPLED_ROLE
from mmray.rows.messages import Chat, Message

Kind = Literal["content", "thought", "call name", "arguments", "id"]

_PADDED, _BARE = "zqx", "zqn"
"""First letters of marks: of those with blanks and quotes around them, which show changes, and of those of names."""
_BLANK = "\u2003"
_PAD = 5 * "\n" + _BLANK
"""Text before a mark, and reversed behind it: more line breaks than templates write, and an unusual blank."""
_PROBE = '"\u00e9'
_LEAST_ID = 9
"""Length from which ids of calls are leaves; shorter ones are structure, because some templates require nine
letters."""


@dataclass(frozen=True)
class Leaf:
    """One text of a conversation.

    message: the number of its message; None for an id, which may stand in several messages.
    part: the number of its content part; -1 for a text that is in none.
    is_required: whether a row is incomplete without this text.
    """

    message: int | None
    kind: Kind
    text: str
    part: int = -1
    is_required: bool = True


@dataclass(frozen=True)
class Change:
    """How a template changes a leaf: by encoding it as a string of JSON, and by stripping its beginning and end."""

    encoding: Literal["none", "json", "ascii"]
    left: Literal["kept", "lines", "cut"]
    right: Literal["kept", "lines", "cut"]

    def __call__(self, text: str) -> str:
        if self.left != "kept":
            text = text.lstrip() if self.left == "cut" else text.lstrip("\n")
        if self.right != "kept":
            text = text.rstrip() if self.right == "cut" else text.rstrip("\n")
        return text if self.encoding == "none" else json.dumps(text, ensure_ascii=self.encoding == "ascii")[1:-1]


_CUTS: tuple[tuple[Literal["kept", "lines", "cut"], str], ...] = (("kept", _PAD), ("lines", _BLANK), ("cut", ""))
_AS_IT_IS = Change("none", "kept", "kept")


def _changes() -> Iterator[tuple[Change, str, str]]:
    """Yields each change with what it leaves before and behind a mark."""
    encodings: tuple[Literal["none", "json", "ascii"], ...] = ("none", "json", "ascii")
    for encoding in encodings:
        for left, before in _CUTS:
            for right, behind in ((name, pad[::-1]) for name, pad in _CUTS):
                whole = Change(encoding, "kept", "kept")
                yield Change(encoding, left, right), whole(before), whole(_PROBE + behind)


_CHANGES = tuple(sorted(_changes(), key=lambda entry: -len(entry[1]) - len(entry[2])))


@dataclass(frozen=True)
class Written:
    """A conversation in the form that chat templates read.

    keys: for each message, everything on which its skeleton depends.
    marks: the mark of each leaf, used where leaves are masked.
    """

    messages: list[dict[str, Any]]
    leaves: tuple[Leaf, ...]
    keys: tuple[tuple[Any, ...], ...]
    marks: tuple[str, ...]


class Writer:
    """Writes conversations in the form that a template reads.

    words: matches what the template searches for in texts; these words stay in the skeleton, and the text between them
        becomes leaves.
    """

    def __init__(self, words: re.Pattern[str], forms: "Forms", *, masked: bool, blanks: bool) -> None:
        """Prepares to write one conversation.

        masked: whether each leaf is replaced by a mark.
        blanks: whether an empty message is a leaf too.
        """
        self._words, self._forms, self._masked, self._blanks = words, forms, masked, blanks
        self._leaves: list[Leaf] = []
        self._marks: list[str] = []
        self._ids: dict[str, str] = {}

    def write(self, chat: Chat) -> Written:
        messages, keys = [], []
        for number, message in enumerate(chat.messages):
            key: list[Any] = [message.role]
            messages.append(self._message(number, message, key))
            keys.append(tuple(key))
        return Written(messages, tuple(self._leaves), tuple(keys), tuple(self._marks))

    def _message(self, number: int, message: Message, key: list[Any]) -> dict[str, Any]:
        written: dict[str, Any] = {"role": message.role, "content": self._content(number, message, key)}
        if message.thought:
            key.append("thought")
            written["reasoning_content"] = self._text(self._words.split(message.thought), number, "thought", key)
        for name, value in message.extra:
            key.append(name)
            written[name] = self._id(value, key) if name == "tool_call_id" else self._constant(value, key)
        if message.calls:
            key.append("calls")
            written["tool_calls"] = [self._call(number, call, key) for call in message.calls]
        return written

    def _call(self, number: int, call: Any, key: list[Any]) -> dict[str, Any]:
        key.append("call")
        arguments: Any = self._value(call.arguments, number, key)
        if self._forms.wants_argument_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {"name": self._leaf(Leaf(number, "call name", call.name), key, bare=True), "arguments": arguments}
        head = {} if call.id is None else {"id": self._id(call.id, key)}
        return head | {"type": "function", "function": function}

    def _value(self, value: Any, number: int, key: list[Any]) -> Any:
        """Writes arguments with each text and number in them as a leaf."""
        if isinstance(value, dict):
            key.append("{")
            written = {}
            for name, entry in value.items():
                key.append(name)
                written[name] = self._value(entry, number, key)
            key.append("}")
            return written
        if isinstance(value, list):
            key.append("[")
            entries = [self._value(entry, number, key) for entry in value]
            key.append("]")
            return entries
        if isinstance(value, str):
            return self._text(self._words.split(value), number, "arguments", key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return self._number(value, number, key)
        return self._constant(value, key)

    def _number(self, value: int | float, number: int, key: list[Any]) -> int | float:
        key.append(type(value).__name__)
        place = len(self._leaves)
        self._leaves.append(Leaf(number, "arguments", json.dumps(value)))
        marked = 731_900_000_000 + place * 100 + 37
        masked: int | float = marked if isinstance(value, int) else marked + 0.5
        self._marks.append(json.dumps(masked))
        return masked if self._masked else value

    def _content(self, number: int, message: Message, key: list[Any]) -> Any:
        is_blank = not (message.thought or message.calls or message.text.strip())
        if is_blank and self._blanks and not any(part.is_image for part in message.parts):
            key.append("blank")
            text = self._leaf(Leaf(number, "content", message.text, 0, is_required=False), key)
            return self._of_form(text, message, number)
        entries: list[dict[str, str]] = []
        pieces = [self._words.split(part.text or "") for part in message.parts]
        thoughts = _thoughts(pieces) if message.role == SAMPLED_ROLE else frozenset()
        for place, part in enumerate(message.parts):
            if part.text is None:
                key.append("image")
                entries.append({"type": "image"})
            else:
                key.append("text")
                text = self._text(pieces[place], number, "content", key, place, thoughts)
                entries.append({"type": "text", "text": text})
        text_only = all(entry["type"] == "text" for entry in entries)
        is_joined = self._forms.of(message.role) == {str} or message.role in self._forms.single
        if message.is_text or (text_only and is_joined):
            return self._of_form("".join(entry["text"] for entry in entries), message, number)
        key.append("parts")
        return entries

    def _of_form(self, text: str, message: Message, number: int) -> Any:
        return [{"type": "text", "text": text}] if self._forms.of(message.role) == {list} else text

    def _text(
        self, pieces: Sequence[str], number: int, kind: Kind, key: list[Any], part: int = -1,
        thoughts: Collection[tuple[int, int]] = (),
    ) -> str:  # fmt: skip
        """Writes a text that is split at the template's words. thoughts: as `_thoughts` returns them."""
        written = []
        for place, piece in enumerate(pieces):
            if not piece:
                continue
            if not piece.strip() or self._words.fullmatch(piece):
                key.append(piece)
                written.append(piece)
            else:
                leaf_kind: Kind = "thought" if (part, place) in thoughts else kind
                written.append(self._leaf(Leaf(number, leaf_kind, piece, part), key))
        return "".join(written)

    def _leaf(self, leaf: Leaf, key: list[Any], *, bare: bool = False) -> str:
        """Writes a leaf or its mark. bare: whether the mark has no blanks and quotes around it, as names require."""
        key.append(("leaf", leaf.kind))
        mark = f"{_BARE if bare else _PADDED}{len(self._leaves):05d}xqz"
        self._leaves.append(leaf)
        self._marks.append(mark)
        if not self._masked:
            return leaf.text
        return mark if bare else f"{_PAD}{mark}{_PROBE}{_PAD[::-1]}"

    def _id(self, value: str, key: list[Any]) -> str:
        if len(value) < _LEAST_ID or not value.isascii():
            return str(self._constant(value, key))
        if value not in self._ids:
            self._ids[value] = f"i{len(self._leaves):05d}".ljust(len(value), "q")
            self._leaves.append(Leaf(None, "id", value, is_required=False))
            self._marks.append(self._ids[value])
        key.append(self._ids[value])
        return self._ids[value] if self._masked else value

    def _constant(self, value: Any, key: list[Any]) -> Any:
        key.append((type(value).__name__, value))
        return value


_OPENS_THOUGHT = ("<think>", "<|channel>")
_CLOSES_THOUGHT = ("</think>", "<channel|>")


def _thoughts(parts: Sequence[Sequence[str]]) -> frozenset[tuple[int, int]]:
    """Finds the thoughts that are typed in a message: what stands between `<think>` and `</think>`, or before the first
    `</think>` without `<think>`, as models answer whose prompt ends with `<think>`.

    parts: the texts of the parts, split at the template's words.

    Returns the number of the part and of the piece in it, for each piece of a thought.
    """
    if len(parts) == 1 and len(parts[0]) == 1:
        return frozenset()
    pieces = [(part, place, piece) for part, texts in enumerate(parts) for place, piece in enumerate(texts)]
    marks = (piece for _, _, piece in pieces if piece in _OPENS_THOUGHT or piece in _CLOSES_THOUGHT)
    is_open = next(marks, None) in _CLOSES_THOUGHT
    thoughts = set()
    for part, place, piece in pieces:
        if piece in _OPENS_THOUGHT or piece in _CLOSES_THOUGHT:
            is_open = piece in _OPENS_THOUGHT
        elif is_open:
            thoughts.add((part, place))
    return frozenset(thoughts)


def masked_tools(tools: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Returns tools with a mark for each name and description of a function and each name of its parameters, and the
    text for which each mark stands."""
    texts: dict[str, str] = {}

    def mark(text: Any) -> Any:
        if not isinstance(text, str) or not text.strip():
            return text
        texts[name := f"{_BARE}{len(texts):05d}tool"] = text
        return name

    def function(value: dict[str, Any]) -> dict[str, Any]:
        masked: dict[str, Any] = {}
        for key, entry in value.items():
            if key in ("name", "description"):
                masked[key] = mark(entry)
            elif isinstance(entry, dict) and isinstance(entry.get("properties"), dict):
                renamed = {name: mark(name) for name in entry["properties"]}
                masked[key] = entry | {"properties": {renamed[name]: of for name, of in entry["properties"].items()}}
            else:
                masked[key] = entry
        return masked

    return [
        tool | {"function": function(tool["function"])} if isinstance(tool.get("function"), dict) else function(tool)
        for tool in tools
    ], texts


@dataclass
class Forms:
    """The forms of content that a template accepts, by role, and the form of arguments."""

    by_role: dict[str, set[type]]
    single: set[str]
    """Roles of which the template writes only the first text part."""
    wants_argument_text: bool = False
    """True if the template expects arguments as JSON text instead of an object."""

    def of(self, role: str) -> set[type]:
        return self.by_role.get(role, {str, list})


@dataclass(frozen=True)
class Occurrence:
    """A leaf at one of its places in a skeleton, with the template's change."""

    leaf: int
    change: Change


@dataclass(frozen=True)
class Skeleton:
    """Fixed text and leaves in alternation: piece, occurrence, piece, …, piece."""

    pieces: tuple[str, ...]
    occurrences: tuple[Occurrence, ...]
    broken: bool = False
    """True if a mark stands in the output in a form that no known change produces."""

    def filled(self, leaves: Sequence[Leaf]) -> "FilledSkeleton":
        texts = [occurrence.change(leaves[occurrence.leaf].text) for occurrence in self.occurrences]
        return FilledSkeleton(self, tuple(texts))


@dataclass(frozen=True)
class FilledSkeleton:
    """A skeleton with the texts of a conversation."""

    skeleton: Skeleton
    texts: tuple[str, ...]

    @cached_property
    def text(self) -> str:
        pieces = self.skeleton.pieces
        joined = [pieces[0]]
        for text, piece in zip(self.texts, pieces[1:]):
            joined += (text, piece)
        return "".join(joined)

    @cached_property
    def piece_starts(self) -> list[int]:
        """The index of the first character of each piece."""
        starts, place = [0], 0
        for piece, text in zip(self.skeleton.pieces, self.texts):
            place += len(piece) + len(text)
            starts.append(place)
        return starts

    def place(self, place: tuple[int, int]) -> int:
        """Converts a place in the skeleton (number of a piece, letters before it in the piece) to one in the text."""
        return self.piece_starts[place[0]] + place[1]


def skeleton_of(text: str, marks: Sequence[str]) -> Skeleton:
    """Parses what a template wrote for a masked conversation into a skeleton."""
    if not marks:
        return Skeleton((text,), ())
    numbers = {mark: number for number, mark in enumerate(marks)}
    pieces: list[str] = []
    occurrences: list[Occurrence] = []
    read, broken = 0, False
    for match in re.finditer("|".join(map(re.escape, sorted(marks, key=len, reverse=True))), text):
        mark = match.group()
        before, behind, change = "", "", _AS_IT_IS
        if mark.startswith(_PADDED):
            fitting = (
                known_change for known_change in _CHANGES
                if text.startswith(known_change[2], match.end()) and text.endswith(known_change[1], read, match.start())
            )  # fmt: skip
            known = next(fitting, None)
            broken |= known is None
            change, before, behind = known or (change, before, behind)
        pieces.append(text[read : match.start() - len(before)])
        occurrences.append(Occurrence(numbers[mark], change))
        read = match.end() + len(behind)
    pieces.append(text[read:])
    return Skeleton(tuple(pieces), tuple(occurrences), broken)
