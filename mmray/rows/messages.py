"""Reads chat rows in the forms that people use into one form of conversation; every key is used or refused.

The known forms are OpenAI's messages (parts, tool calls, names, weights), ShareGPT's conversations (with the `system`
and `tools` columns, `function_call` and `observation`), and the thoughts of thinking models. A null is an absent key,
since a Parquet struct has all keys in every row. A key that mmray does not know might matter to a template, so such a
row is refused, unless its data set lists the key under `ignore_message_keys`.
"""

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmray.base.words import counted
from mmray.errors import RowError
from mmray.loss.settings import SAMPLED_ROLE
from mmray.rows.image_refs import ImageRef
from mmray.rows.message_values import (
    FLAGS,
    JSON,
    flag,
    name_text,
    one_of,
    parsed,
    refuse_not_finite,
    refuse_words_for_truth,
    says_nothing,
    without_nulls,
)
from mmray.rows.settings import FUNCTIONS, DatasetSettings

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""The role of templates for each name that rows use, in lower case."""

_HARMLESS = frozenset({"id", "message_id", "uuid", "parent_id", "name", "timestamp", "created_at", "refusal", "audio"})
"""Keys that do not affect the text: who spoke, when, under which number; the last two only where they are null."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_MESSAGE_KEYS = (
    "role", "from", "content", "value", *_THOUGHTS, "tool_calls", "function_call", "tool_call_id", *FLAGS,
)  # fmt: skip
_PART_KEYS = ("type", "text", "image", "path", "url", "image_url", "index", *FLAGS)
_PICTURE_KEYS = ("url", "detail", "path", "bytes")
_IMAGE_KEYS = ("image", "image_url", "path", "url")
_RESERVED = frozenset({"messages", "conversation", "tools", "add_generation_prompt", "chat_template", "tokenize"})

_PICTURE_IN_TEXT = re.compile(
    r"<img>\s*(?:[a-z0-9+]+://[^<>\s]+|data:image/[^<>\s]+|[^<>\n]+\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|heic|jp2|ppm))"
    r"\s*</img>",
    re.IGNORECASE,
)
"""Matches a picture as the first Qwen-VL wrote it, `<img>page.png</img>`; some OCR models answer with captions between
these tags."""


@dataclass(frozen=True)
class Part:
    """A part of a message's content.

    text: its text; None for an image.
    picture: the image that the part names; None where it names none, a number where it refers to the row's images.
    trains: whether the part is trained on by its flag; None without a flag.
    """

    text: str | None
    picture: ImageRef | int | None = None
    trains: bool | None = None

    @property
    def is_image(self) -> bool:
        return self.text is None


@dataclass(frozen=True)
class Call:
    """A tool call. arguments: an object with strings and numbers as written."""

    id: str | None
    name: str
    arguments: JSON


@dataclass(frozen=True)
class Message:
    """One message.

    parts: the parts of its content.
    is_text: whether the content was written as one string without placeholders.
    thought: the text of its reasoning.
    trains: whether the message is trained on by its flag; None without a flag.
    extra: its `name` and `tool_call_id`.
    """

    role: str
    parts: tuple[Part, ...]
    is_text: bool
    thought: str = ""
    calls: tuple[Call, ...] = ()
    trains: bool | None = None
    extra: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The text of the message's content, without images."""
        return "".join(part.text for part in self.parts if part.text is not None)


@dataclass(frozen=True)
class Chat:
    """A conversation, ready for a chat template. options: values for variables of the template."""

    messages: tuple[Message, ...]
    tools: tuple[JSON, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def pictures(self) -> list[ImageRef | int | None]:
        """The picture of each image part, in order."""
        return [part.picture for message in self.messages for part in message.parts if part.is_image]


class MessageReader:
    """Reads the chats of one data set."""

    def __init__(
        self, dataset: DatasetSettings, placeholders: re.Pattern[str], refuse_special: Callable[[str, str], None],
        plain: Callable[[str], str], remedy: str,
    ) -> None:  # fmt: skip
        """Prepares to read the chats of a data set.

        placeholders: matches the texts that stand for an image.
        refuse_special: called with a text and where it stands; raises RowError for structure tokens in the text.
        plain: replaces the model's image token in a text by plain words.
        remedy: what to do where a text only speaks of a placeholder.
        """
        self.dataset, self._plain, self._remedy = dataset, plain, remedy
        self._placeholders, self._refuse_special = placeholders, refuse_special
        self._roles: dict[str, str] = ROLES | {alias.lower(): role for alias, role in dataset.roles.items()}
        self._ignored = frozenset(dataset.ignore_message_keys)

    def read(self, value: Mapping[str, Any], to_image: Callable[[object], ImageRef]) -> Chat:
        """Reads the conversation of a row. to_image: reads the image that a part names, as `image_ref`.

        Raises RowError with the field, the value and the remedy.
        """
        column, raw_messages = self._conversation(value)
        messages = [self._message(message, f"message {n}", to_image) for n, message in enumerate(raw_messages)]
        if system := self._system(value):
            system_column = self.dataset.column("system")
            message = Message("system", *self._content(system, system_column, "system", to_image))
            if messages[0].role != "system":
                messages.insert(0, message)
            elif (messages[0].text, _count_images(messages[0])) != (message.text, _count_images(message)):
                raise RowError(
                    "wrong_type",
                    f"{system_column} is {system!r:.60} and {column} begin with another system message; leave one of "
                    "them out",
                )
        return Chat(tuple(messages), tuple(self._tools(value)), tuple(self._options(value).items()))

    # ---------------------------------------------------------------- columns

    def _conversation(self, value: Mapping[str, Any]) -> tuple[str, list[Any]]:
        """Returns the name of the column that holds the messages, and its value."""
        names = [self.dataset.column(field) for field in ("messages", "conversations")]
        present_columns = [name for name in dict.fromkeys(names) if value.get(name) is not None]
        chosen = [name for name in present_columns if name in self.dataset.columns.values()]
        if len(present_columns) > 1 and len(chosen) != 1:
            raise RowError(
                "wrong_type",
                f"the row has both {present_columns[0]} and {present_columns[1]}; name the one to read: "
                f"columns: {{messages: {present_columns[0]}}}",
            )
        if not present_columns:
            raise missing_column(f"{names[0]!r} and no {names[1]!r}", value)
        column = (chosen or present_columns)[0]
        conversation = value[column]
        if isinstance(conversation, str) and conversation.lstrip().startswith("["):
            conversation = parsed(conversation, column)
        if not isinstance(conversation, list) or not conversation:
            raise RowError("wrong_type", f"{column} must be a list with a message in it, not {conversation!r:.60}")
        return column, conversation

    def _system(self, value: Mapping[str, Any]) -> str:
        column = self.dataset.column("system")
        system = value.get(column)
        if system is not None and not isinstance(system, str):
            raise RowError("wrong_type", f"{column} must be a string, not {type(system).__name__} {system!r:.60}")
        return system or ""

    def _tools(self, value: Mapping[str, Any]) -> list[JSON]:
        column = self.dataset.column("tools")
        raw_tools = value.get(column)
        if column != FUNCTIONS and (functions := value.get(FUNCTIONS)):
            if raw_tools:
                raise RowError(
                    "wrong_type",
                    f"the row has both {column} and {FUNCTIONS}; leave one of them out: both say its tools",
                )
            column, raw_tools = FUNCTIONS, functions
        raw_tools = parsed(raw_tools, column) if isinstance(raw_tools, str) and raw_tools.strip() else raw_tools or []
        if not isinstance(raw_tools, list):
            raise RowError("wrong_type", f"{column} must be a list of tools or its JSON text, not {raw_tools!r:.60}")
        tools = [parsed(tool, column) if isinstance(tool, str) else tool for tool in raw_tools]
        for tool in tools:
            if not isinstance(tool, dict):
                raise RowError("wrong_type", f"{column}: a tool must be an object, not {tool!r:.60}")
            self._refuse_structure(tool, column)
        refuse_not_finite(tools, column)
        return [_wrapped(without_nulls(tool)) for tool in tools if not says_nothing(tool)]

    def _refuse_structure(self, value: Any, where: str) -> None:
        """Raises RowError for structure tokens in the texts of a value of JSON."""
        if isinstance(value, str):
            self._refuse_special(value, where)
        for entry in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
            self._refuse_structure(entry, where)

    def _options(self, value: Mapping[str, Any]) -> JSON:
        column = self.dataset.column("chat_template_kwargs")
        raw_options = value.get(column)
        raw_options = (
            parsed(raw_options, column) if isinstance(raw_options, str) and raw_options.strip() else raw_options or {}
        )
        if not isinstance(raw_options, dict):
            raise RowError("wrong_type", f"{column} must be an object, not {raw_options!r:.60}")
        for name in raw_options:
            if name in _RESERVED:
                raise RowError("unknown_field", f"{column}: {name!r} is no variable for a row to set; leave it out")
        refuse_not_finite(raw_options, column)
        refuse_words_for_truth(raw_options, column)
        raw_options = self._typed_values(raw_options, column)
        return dict(self.dataset.chat_template_kwargs) | without_nulls(raw_options)

    # ---------------------------------------------------------------- messages

    def _message(self, message: object, where: str, to_image: Callable[[object], ImageRef]) -> Message:
        if not isinstance(message, dict):
            raise RowError("wrong_type", f"{where} must be an object, not {type(message).__name__} {message!r:.60}")
        name = self._role_name({key: entry for key, entry in message.items() if entry is not None}, where)
        named = self._known(message, (*_MESSAGE_KEYS, *_HARMLESS), where)
        role = self._roles[name]
        calls = self._calls(named, where)
        content = one_of(named, ("content", "value"), where)
        if name == "function_call":
            calls += self._calls_of_text(content, where)
            content = ""
        if calls and role != SAMPLED_ROLE:
            raise RowError("wrong_type", f"{where} is of role {role!r} and has tool calls; only the assistant calls")
        thought = self._thought(named, role, where)
        if content is None and (calls or thought):
            content = ""
        parts, is_text = self._content(content, where, role, to_image)
        extra = [
            (key, self._typed(name_text(named[key], f"{where}: {key}"), where))
            for key in ("name", "tool_call_id")
            if named.get(key) is not None
        ]
        trains = flag(named, where)
        if trains and role != SAMPLED_ROLE:
            raise _flag_of_another_role(named, role, where)
        for part in parts:
            if part.trains and role != SAMPLED_ROLE:
                raise RowError(
                    "unsupported_flag", f"{where}: a part of role {role!r} is to be trained on; name it in loss.roles"
                )
        return Message(role, parts, is_text, thought, calls, trains, tuple(extra))

    def _known(self, value: JSON, known: Collection[str], where: str) -> JSON:
        """Returns the keys that are neither null nor ignored. Raises RowError for an unknown one."""
        named = {key: entry for key, entry in value.items() if not says_nothing(entry) and key not in self._ignored}
        for key in named:
            if key not in known or key in ("refusal", "audio"):
                near = difflib.get_close_matches(str(key), [name for name in known if name != key], n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}? Else" if near else "mend it, or"
                raise RowError(
                    "unknown_field",
                    f"{where} has the key {key!r}, which mmray does not know; {hint} list it under the set's "
                    "ignore_message_keys to train without it",
                )
        return named

    def _role_name(self, named: JSON, where: str) -> str:
        names = [named[key] for key in ("role", "from") if key in named]
        for name in names or [None]:
            if not isinstance(name, str) or name.lower() not in self._roles:
                raise RowError(
                    "unknown_role",
                    f"{where} has role {name!r:.60}; known are {', '.join(self._roles)}; see a set's roles",
                )
        if len({self._roles[name.lower()] for name in names}) > 1:
            raise RowError("unknown_role", f"{where} has two roles, {names[0]!r:.60} and {names[1]!r:.60}; keep one")
        return names[0].lower()

    def _thought(self, named: JSON, role: str, where: str) -> str:
        thought = one_of(named, _THOUGHTS, where)
        if thought is None or thought == "":
            return ""
        if not isinstance(thought, str):
            raise RowError("wrong_type", f"{where}: its thought must be a string, not {thought!r:.60}")
        if role != SAMPLED_ROLE:
            raise RowError("wrong_type", f"{where} is of role {role!r} and has a thought; only the assistant thinks")
        return self._typed(thought, f"{where}: its thought")

    def _typed(self, text: str, where: str) -> str:
        """Returns a text among which no image can stand. Raises RowError for structure and for placeholders in it."""
        text = self._plain(text)
        if match := self._placeholders.search(text):
            raise RowError(
                "special_token_in_text",
                f"{where} holds the image placeholder {match.group()!r}, and no image can stand there; {self._remedy}",
            )
        self._refuse_special(text, where)
        return text

    def _typed_values(self, value: Any, where: str) -> Any:
        """Returns a value of JSON with `_typed` texts and names of keys."""
        if isinstance(value, dict):
            return {self._typed(name, where): self._typed_values(entry, where) for name, entry in value.items()}
        if isinstance(value, list):
            return [self._typed_values(entry, where) for entry in value]
        return self._typed(value, where) if isinstance(value, str) else value

    # ---------------------------------------------------------------- calls

    def _calls(self, named: JSON, where: str) -> tuple[Call, ...]:
        raw_calls = named.get("tool_calls") or []
        raw_calls = parsed(raw_calls, f"{where}: tool_calls") if isinstance(raw_calls, str) else raw_calls
        if not isinstance(raw_calls, list):
            raise RowError("wrong_type", f"{where}: tool_calls must be a list, not {raw_calls!r:.60}")
        calls = [self._call(call, where) for call in raw_calls if not says_nothing(call)]
        if old := named.get("function_call"):
            calls.append(self._call(old, where))
        return tuple(calls)

    def _call(self, call: object, where: str) -> Call:
        call = parsed(call, f"{where}: a tool call") if isinstance(call, str) else call
        if not isinstance(call, dict):
            raise RowError("wrong_type", f"{where}: a tool call must be an object, not {call!r:.60}")
        outer = self._known(call, ("id", "type", "index", "function", "name", "arguments"), f"{where}: a tool call")
        if outer.get("type", "function") != "function":
            raise RowError("wrong_type", f"{where}: a tool call of type {outer['type']!r:.40}; known is 'function'")
        inner = outer.get("function", {key: outer[key] for key in ("name", "arguments") if key in outer})
        if not isinstance(inner, dict):
            raise RowError("wrong_type", f"{where}: a tool call's function must be an object, not {inner!r:.60}")
        inner = self._known(inner, ("name", "arguments"), f"{where}: a tool call's function")
        name, arguments = inner.get("name"), inner.get("arguments")
        if not isinstance(name, str) or not name:
            raise RowError("wrong_type", f"{where}: a tool call must name its function, not {call!r:.80}")
        if isinstance(arguments, str):
            arguments = parsed(arguments, f"{where}: arguments") if arguments.strip() else {}
        else:
            arguments = without_nulls(arguments)
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise RowError(
                "wrong_type", f"{where}: arguments must be an object or its JSON text, not {arguments!r:.60}"
            )
        refuse_not_finite(arguments, f"{where}: arguments")
        number = outer.get("id")
        number = None if number is None else self._typed(name_text(number, f"{where}: a tool call's id"), where)
        arguments = self._typed_values(arguments, f"{where}: an argument of a tool call")
        return Call(number, self._typed(name, where), arguments)

    def _calls_of_text(self, content: object, where: str) -> tuple[Call, ...]:
        """Reads the calls of ShareGPT's `function_call`: one call or several, as JSON."""
        value = parsed(content, where) if isinstance(content, str) else content
        calls = value if isinstance(value, list) else [value]
        if not calls:
            raise RowError("wrong_type", f"{where} is a function_call without a call")
        return tuple(self._call(call, where) for call in calls)

    # ---------------------------------------------------------------- content

    def _content(
        self, content: object, where: str, role: str, to_image: Callable[[object], ImageRef]
    ) -> tuple[tuple[Part, ...], bool]:
        """Returns the parts of a content, and whether it was one string without placeholders."""
        if isinstance(content, str):
            _refuse_picture_in_text(content, role, where)
            pieces = self._placeholders.split(self._plain(content))
            parts: list[Part] = []
            for index, piece in enumerate(pieces):
                self._refuse_special(piece, where)
                parts += [Part(None)] if index else []
                parts += [Part(piece)] if piece else []
            return tuple(parts), len(pieces) == 1
        if not isinstance(content, list):
            raise RowError("wrong_type", f"{where}: content must be a string or a list of parts, not {content!r:.60}")
        parts = [self._part(part, where, to_image) for part in content]
        # Templates write parts one after another: a token could be typed half in one and half in the next.
        text = "".join("\0" if part.text is None else part.text for part in parts)
        if match := self._placeholders.search(text):
            raise RowError(
                "special_token_in_text",
                f"{where}: a text part holds the image placeholder {match.group()!r}; make it a part of type 'image', "
                f"or, {self._remedy}",
            )
        self._refuse_special(text, where)
        _refuse_picture_in_text(text, role, where)
        return tuple(parts), False

    def _part(self, part: object, where: str, to_image: Callable[[object], ImageRef]) -> Part:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part, dict) and isinstance(part.get("text"), str):
            named = self._known(part, ("type", "text", *FLAGS), f"{where}: a text part")
            return Part(self._plain(named["text"]), trains=flag(named, f"{where}: a text part"))
        if kind in ("image", "image_url") and isinstance(part, dict):
            named = self._known(part, _PART_KEYS, f"{where}: an image part")
            if named.get("text"):
                raise RowError(
                    "wrong_type", f"{where}: an image part has a text, {named['text']!r:.60}; make it a part"
                )
            flag(named, f"{where}: an image part")  # images are never trained on
            return Part(None, self._picture(named, where, to_image))
        raise RowError("wrong_type", f"{where}: a part must be of type 'text' or 'image', not {part!r:.80}")

    def _picture(self, named: JSON, where: str, to_image: Callable[[object], ImageRef]) -> ImageRef | int | None:
        """Returns the picture that an image part names, as in `Part.picture`."""
        names = [named[key] for key in _IMAGE_KEYS if key in named]
        for name in names:
            if isinstance(name, dict):
                self._known(name, _PICTURE_KEYS, f"{where}: an image part's picture")
        entries = [name.get("url") if isinstance(name, dict) and "url" in name else name for name in names]
        pictures = [to_image(entry) for entry in entries]
        if len(set(pictures)) > 1:
            raise RowError("image_conflict", f"{where}: an image part names two pictures; keep one of its keys")
        index = named.get("index")
        if index is None:
            return pictures[0] if pictures else None
        if pictures or not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise RowError("wrong_type", f"{where}: an image part's index is {index!r:.40}; give a place in the images")
        return index


def placed_images(chat: Chat, images: Sequence[ImageRef], column: str) -> tuple[ImageRef, ...]:
    """Returns the pictures of a chat's image parts, in their order. images: those of the row's column.

    Raises RowError where a part names another picture than the column, or an index that the column does not have.
    """
    pictures = chat.pictures
    for picture in pictures:
        if isinstance(picture, int) and picture >= len(images):
            raise RowError(
                "image_conflict",
                f"an image part has index {picture}, and {column} has {counted(len(images), 'image')}, from 0 on",
            )
    by_index = [picture for picture in pictures if isinstance(picture, int)]
    if by_index:
        if len(by_index) < len(pictures):
            raise RowError("image_conflict", "some image parts have an index and some have not; give it to all or none")
        if unused := set(range(len(images))) - set(by_index):
            raise RowError("image_conflict", f"{column}[{min(unused)}] is the picture of no image part; leave it out")
        return tuple(images[number] for number in by_index)
    named_pictures = [picture for picture in pictures if isinstance(picture, ImageRef)]
    if not images and len(named_pictures) == len(pictures):
        return tuple(named_pictures)
    for number, (picture, image) in enumerate(zip(pictures, images)):
        if isinstance(picture, ImageRef) and picture != image:
            raise RowError(
                "image_conflict",
                f"image part {number} names {_shown(picture)}, and {column}[{number}] {_shown(image)}; name each "
                "picture in one place, or the same in both",
            )
    return tuple(images)


def _shown(image: ImageRef) -> str:
    return f"{image.uri!r:.120}" if image.data is None else "bytes"


def _wrapped(tool: JSON) -> JSON:
    """Returns a tool in OpenAI's form; ShareGPT's `tools` columns hold functions alone, which few templates know."""
    if isinstance(tool.get("name"), str) and "type" not in tool and "function" not in tool:
        return {"type": "function", "function": tool}
    return tool


def _count_images(message: Message) -> int:
    return sum(part.is_image for part in message.parts)


def _refuse_picture_in_text(text: str, role: str, where: str) -> None:
    if role != SAMPLED_ROLE and (match := _PICTURE_IN_TEXT.search(text)):
        raise RowError(
            "placeholder_count",
            f"{where} names a picture in its text, {match.group()!r:.80}; write a placeholder there and the picture in "
            "the row's images, or make it a part of type 'image'",
        )


def missing_column(column: str, value: Mapping[str, Any]) -> RowError:
    """Builds the error of a row that lacks a column, with the fields that it has."""
    fields = ", ".join(map(repr, value)) or "none"
    return RowError("missing_column", f"the row has no {column}; its fields are {fields:.200}; see data: columns")


def _flag_of_another_role(named: JSON, role: str, where: str) -> RowError:
    key = next(key for key in FLAGS if key in named)
    return RowError(
        "unsupported_flag",
        f"{where} is of role {role!r} and has {key} {named[key]!r:.40}; only the assistant's messages can be told to "
        "train one by one, other roles by loss.roles",
    )
