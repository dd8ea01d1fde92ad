"""Renders conversations with a processor's chat template, and finds where in the text each message stands.

The turn of a message follows from the template by rendering. The model begins to write behind what
`add_generation_prompt` writes after the messages before; it stops at the first stop token behind the message's last
text, also where the template leaves it to the next turn to write that token. Both are found in the skeleton of a
conversation (`mmray.rows.skeleton`), and remembered for all conversations of the same form: the same roles and kinds of
content, whatever the texts.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
from jinja2 import TemplateError, meta, nodes
from transformers.utils.chat_template_utils import render_jinja_template

from mmray.base.words import counted, one_line
from mmray.errors import RowError
from mmray.families import Family
from mmray.loss.sources import chat_template, ending_texts, marks_generated
from mmray.rows.messages import Call, Chat, Message, Part
from mmray.rows.skeleton import FilledSkeleton, Forms, Leaf, Skeleton, Writer, Written, masked_tools, skeleton_of
from mmray.rows.template_syntax import GenerationBlocks, texts_looked_for
from mmray.rows.turns import Beginning, PlainTurn, Run, Turns, messages_of, prompt_length, text_between

REMEMBERED_FORMS = 4096
"""The most forms of conversations, and of their beginnings, whose skeletons are remembered: some kilobytes each."""


@dataclass(frozen=True)
class Plan:
    """The properties of all conversations of one form.

    missing: the leaves that the template does not write.
    tools_without: what the template leaves out of the tools, in words; empty where it leaves out nothing.
    """

    skeleton: Skeleton
    runs: tuple[Run, ...]
    missing: tuple[int, ...]
    lost_messages: tuple[int, ...]
    """The messages of the assistant without text whose turn was not found."""
    tools_without: str


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text. generated: the spans that `{% generation %}` blocks wrote, [start, stop) in letters."""

    text: str
    chat: Chat
    leaves: tuple[Leaf, ...]
    plan: Plan
    filled: FilledSkeleton
    generated: tuple[tuple[int, int], ...]

    def span(self, occurrence: int) -> tuple[int, int]:
        """Returns the span, [start, stop) in letters, of an occurrence of a leaf."""
        start = self.filled.piece_starts[occurrence] + len(self.plan.skeleton.pieces[occurrence])
        return start, start + len(self.filled.texts[occurrence])


class ChatTemplate:
    """The chat template of a family's processor."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._marks_generated = marks_generated(family.processor)
        self._ends = _alternatives(sorted(ending_texts(family), key=len, reverse=True))
        self._ends_of: dict[str, re.Pattern[str]] = {}
        self._plan = functools.lru_cache(maxsize=REMEMBERED_FORMS)(self._make_plan)
        self._beginning = functools.lru_cache(maxsize=REMEMBERED_FORMS)(self._make_beginning)
        self._making: tuple[Chat, Written] | None = None

    # ---------------------------------------------------------------- rendering

    def render(self, chat: Chat, *, count_images: int) -> RenderedChat:
        """Renders a conversation and finds its messages in the text.

        count_images: the number of image parts of the chat.

        Raises RowError where the template refuses the conversation or drops images, and where messages cannot be found.
        """
        written = self._written(chat, _LOOKS[0], masked=False)
        text, generated = self.template_text(written.messages, chat)
        rendered_images = text.count(self.family.placeholder_unit)
        if rendered_images != count_images:
            raise RowError(
                "template",
                f"the chat template wrote {counted(rendered_images, 'image')} where the messages have "
                f"{counted(count_images, 'image part')}; "
                "put the images into user messages",
            )
        for look in _LOOKS:
            written = written if look is _LOOKS[0] else self._written(chat, look, masked=False)
            for is_fresh in (False, True)[: 1 + self._writes_the_date]:
                plan = self._known_plan(chat, written, look, is_fresh)
                filled = plan.skeleton.filled(written.leaves)
                if filled.text == text and not plan.skeleton.broken:
                    return RenderedChat(text, chat, written.leaves, plan, filled, generated)
        where = next((n for n, (a, b) in enumerate(zip(text, filled.text)) if a != b), min(len(text), len(filled.text)))
        raise RowError(
            "template",
            "the chat template writes these messages in another way than messages of the same form, so that it cannot "
            f"be told whose text is whose; at {text[max(where - 20, 0) : where + 40]!r}. Change what their text says "
            "there, or mend the template",
        )

    def prompt_text(self, chat: Chat) -> str:
        """Renders a conversation with the generation prompt. Raises RowError where the template refuses it."""
        return self.template_text(self._written(chat, _LOOKS[0], masked=False).messages, chat, prompt=True)[0]

    def plain_text(self, chat: Chat) -> str:
        """Renders a conversation to text only. Raises RowError where the template refuses it."""
        return self.template_text(self._written(chat, _LOOKS[0], masked=False).messages, chat)[0]

    def template_text(
        self, messages: list[dict[str, Any]], chat: Chat, *, prompt: bool = False
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Returns what the template writes, and the spans that its `{% generation %}` blocks wrote.

        Raises RowError where the template refuses the messages.
        """
        try:
            return self._rendered(messages, list(chat.tools), dict(chat.options), prompt)
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise RowError(
                "template",
                f"the chat template refuses the messages: {one_line(error)}; check the roles, their order and contents",
            ) from error

    def _rendered(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], options: dict[str, Any], prompt: bool
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Runs the template. The spans of `{% generation %}` blocks come from the function below
        `apply_chat_template`, which returns them only after it has run the images through the processor too."""
        processor = self.family.processor
        more: dict[str, Any] = options | ({"tools": tools} if tools else {})
        if prompt:
            more["add_generation_prompt"] = True
        if not self._marks_generated:
            return processor.apply_chat_template(messages, tokenize=False, **more), ()
        rendered: Any = render_jinja_template(
            [messages],
            chat_template=chat_template(processor),
            return_assistant_tokens_mask=True,
            **(processor.tokenizer.special_tokens_map | more),
        )
        (text,), (generated,) = rendered
        return text, tuple(generated)

    # ---------------------------------------------------------------- what the template reads

    @functools.cached_property
    def _writes_the_date(self) -> bool:
        return "strftime_now" in chat_template(self.family.processor)

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """The variables that the template reads and `chat_template_kwargs` may set."""
        names = meta.find_undeclared_variables(self._syntax) if self._syntax else set()
        return frozenset(names) - {"raise_exception", "strftime_now", "namespace", "dict", "range"}

    @functools.cached_property
    def _syntax(self) -> nodes.Template | None:
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", GenerationBlocks])
        try:
            return environment.parse(chat_template(self.family.processor))
        except jinja2.TemplateSyntaxError:  # each row will say so
            return None

    @functools.cached_property
    def _words(self) -> dict[bool, re.Pattern[str]]:
        """The words that the template searches for in texts, such as `</think>` or `/nothink`, with plain words (True)
        or without (False). Plain words are mostly names of keys, and with them few conversations have the same form."""
        constants = {constant.strip() for constant in texts_looked_for(self._syntax)} if self._syntax else set()
        constants = (constants | {"<think>", "</think>"}) - {""}
        marked = {constant for constant in constants if not constant.replace("_", "").isalnum()}
        return {is_wide: _split_at(words) for is_wide, words in ((False, marked), (True, constants))}

    @functools.cached_property
    def forms(self) -> Forms:
        """The forms of a text that the template accepts for each role (a string or a list of parts), and of arguments
        (an object or its JSON text)."""
        user, answer = Message("user", (Part("Who?"),), True), Message("assistant", (Part("I."),), True)
        call = Message("assistant", (), True, calls=(Call("call00001", "look", {"page": _PROBE}),))
        tool = Message("tool", (Part(_PROBE),), True, extra=(("tool_call_id", "call00001"),))
        tries: dict[str, list[tuple[list[Message], int]]] = {
            "system": [([_probe("system"), user, answer], 0), ([_probe("system"), user], 0)],
            "user": [([_probe("user"), answer], 0), ([_probe("user")], 0)],
            "assistant": [([user, _probe("assistant")], 1)],
            "tool": [([user, call, tool], 2), ([user, answer, tool], 2), ([user, call, tool, answer], 2)],
        }
        by_role: dict[str, set[type]] = {}
        both: tuple[type, ...] = (str, list)
        single: set[str] = set()
        for role, chats in tries.items():
            by_role[role] = {form for form in both for chat in chats if self._writes(*chat, form)}
            if list in by_role[role] and not any(self._writes(*chat, list, parts=2) for chat in chats):
                single.add(role)
        forms = Forms(by_role, single)
        forms.wants_argument_text = not self._writes_call([user, call, tool], forms)
        return forms

    def _writes(self, messages: Sequence[Message], place: int, form: type, parts: int = 1) -> bool:
        """Tells whether the template writes a message's text completely in a form of so many text parts."""
        written = []
        for number, message in enumerate(messages):
            content: Any = message.text
            if (form is list) if number == place else self._lists_only:
                content = [{"type": "text", "text": message.text}] * (parts if number == place else 1)
            entry: dict[str, Any] = {"role": message.role, "content": content} | dict(message.extra)
            if message.calls:
                entry["tool_calls"] = [_openai_call(call, call.arguments) for call in message.calls]
            written.append(entry)
        try:
            text, _ = self._rendered(written, [], {}, prompt=False)
        except Exception:  # noqa: BLE001, what a template does with a form it does not know is its own
            return False
        return text.count(_PROBE) >= parts and "'type'" not in text and '"type"' not in text.split(_PROBE)[0][-40:]

    @functools.cached_property
    def _lists_only(self) -> bool:
        user = [{"role": role, "content": _PROBE} for role in ("user", "assistant")]
        try:
            return self._rendered(user, [], {}, prompt=False)[0].count(_PROBE) < 2
        except Exception:  # noqa: BLE001
            return True

    def _writes_call(self, messages: Sequence[Message], forms: Forms) -> bool:
        """Tells whether the template writes arguments that are objects as JSON, and not as Python would."""
        written = Writer(self._words[False], forms, masked=False, blanks=False).write(Chat(tuple(messages)))
        try:
            text, _ = self._rendered(written.messages, [], {}, prompt=False)
        except Exception:  # noqa: BLE001
            return True
        return "{'page'" not in text

    # ---------------------------------------------------------------- plans

    def _written(self, chat: Chat, look: "Look", *, masked: bool) -> Written:
        return Writer(self._words[look.at_all_words], self.forms, masked=masked, blanks=look.at_blanks).write(chat)

    def _known_plan(self, chat: Chat, written: Written, look: "Look", is_fresh: bool) -> Plan:
        """Returns the plan of a conversation's form. is_fresh: whether to build it anew, for templates that write
        today's date."""
        key = (written.keys, look, repr(chat.tools), repr(chat.options))
        self._making = (chat, written)
        if is_fresh:
            self._plan.cache_clear()
            self._beginning.cache_clear()
        return self._plan(key)

    def _make_plan(self, key: tuple[Any, ...]) -> Plan:
        assert self._making is not None
        chat, _ = self._making
        masked = self._written(chat, key[1], masked=True)
        text, _ = self.template_text(masked.messages, chat)
        skeleton = skeleton_of(text, masked.marks)
        written_leaves = {occurrence.leaf for occurrence in skeleton.occurrences}
        missing = tuple(n for n, leaf in enumerate(masked.leaves) if leaf.is_required and n not in written_leaves)
        runs, lost = Turns(self, chat, masked, skeleton, text, key).find()
        return Plan(skeleton, runs, missing, lost, self._tools_without(masked, chat, text) if chat.tools else "")

    def _tools_without(self, masked: Written, chat: Chat, text: str) -> str:
        """Describes what the template leaves out of the tools: all of them, or a name, a description or a parameter's
        name."""
        tools, names = masked_tools(chat.tools)
        try:
            if self._rendered(masked.messages, [], dict(chat.options), prompt=False)[0] == text:
                return "the row's tools"
            written, _ = self._rendered(masked.messages, tools, dict(chat.options), prompt=False)
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError):
            return ""  # the template needs tools, or certain ones
        return next((f"{name!r:.60} of the row's tools" for mark, name in names.items() if mark not in written), "")

    def beginning(self, chat: Chat, masked: Written, count: int, key: tuple[Any, ...]) -> Beginning | None:
        """Renders the first messages of a conversation alone. key: the key of the whole conversation's plan."""
        self._making = (chat, masked)
        return self._beginning(key[0][:count], key[1:])

    def _make_beginning(self, keys: tuple[Any, ...], _other_keys: tuple[Any, ...]) -> Beginning | None:
        assert self._making is not None
        (chat, masked), count = self._making, len(keys)
        try:
            text, _ = self.template_text(masked.messages[:count], chat)
        except RowError:
            return None
        try:
            prompted, _ = self.template_text(masked.messages[:count], chat, prompt=True)
        except RowError:
            prompted = text
        skeleton = skeleton_of(text, masked.marks)
        anchors = [n for n, message in enumerate(messages_of(masked.leaves, skeleton)) if message is not None]
        last = skeleton.occurrences[anchors[-1]].leaf if anchors else -1
        tail = text_between(skeleton, masked.marks, anchors[-1] if anchors else -1, None)
        prompt = prompted[len(text) :] if prompted.startswith(text) else None
        return Beginning(text, last, tail, prompt)

    @functools.cached_property
    def plain_turn(self) -> PlainTurn:
        """The text that the template writes before an answer in the simplest conversation."""
        chat = Chat((Message("user", (Part("Who?"),), True), Message("assistant", (Part("I."),), True)))
        masked = self._written(chat, _LOOKS[0], masked=True)
        key = (masked.keys, _LOOKS[0], "plain", "")
        beginning = self.beginning(chat, masked, 1, key)
        try:
            text, _ = self.template_text(masked.messages, chat)
        except RowError:
            return PlainTurn("", "")
        skeleton = skeleton_of(text, masked.marks)
        places = [n for n, occurrence in enumerate(skeleton.occurrences) if occurrence.leaf == 1]
        if beginning is None or not places or beginning.prompt is None:
            return PlainTurn("", "")
        gap = text_between(skeleton, masked.marks, places[0] - 1, places[0])
        opening = gap.removeprefix(beginning.tail) if places[0] else gap
        return PlainTurn(opening, opening[: prompt_length(beginning.prompt, opening, None)])

    @property
    def ends(self) -> re.Pattern[str]:
        """Matches the texts by which the model ends its turn."""
        return self._ends

    def ends_of(self, role: str) -> re.Pattern[str]:
        """Matches the texts that end the turns of another role, by the family's boundaries."""
        if role not in self._ends_of:
            texts = {marker.end for marker in self.family.role_markers if marker.role == role and marker.include_end}
            self._ends_of[role] = _alternatives(sorted(texts - {""}, key=len, reverse=True))
        return self._ends_of[role]

    @functools.cached_property
    def units(self) -> re.Pattern[str]:
        """Matches the images that stand before a message's text."""
        return re.compile(rf"(?:{re.escape(self.family.placeholder_unit)}\s*)+$")

    @functools.cached_property
    def special_texts(self) -> re.Pattern[str]:
        """Matches the special tokens of the vocabulary that are not media tokens."""
        tokenizer = self.family.tokenizer
        media = set(self.family.media_token_ids)
        added = tokenizer.added_tokens_decoder.items()
        texts = [token.content for number, token in added if token.special and number not in media]
        return _alternatives(sorted((text for text in texts if text.strip()), key=len, reverse=True))


class Look(NamedTuple):
    """How the texts of a conversation are masked.

    at_blanks: whether a message without text has a mark too.
    at_all_words: whether plain words that the template searches for also stay unmasked.
    """

    at_blanks: bool
    at_all_words: bool


_LOOKS = (Look(True, False), Look(False, False), Look(True, True), Look(False, True))
"""The ways of masking in the order in which they are tried; the first works for most conversations."""


def _split_at(words: Iterable[str]) -> re.Pattern[str]:
    return re.compile(f"({_alternatives(sorted(words, key=len, reverse=True)).pattern})")


def _alternatives(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


_PROBE = "What does it say?"


def _probe(role: str) -> Message:
    return Message(role, (Part(_PROBE),), True)


def _openai_call(call: Call, arguments: Any) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
