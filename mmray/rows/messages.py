"""Reads chat rows in the forms that people use into one form of conversation; every key is used or refused.

The known forms are OpenAI's messages (parts, tool calls, names, weights), ShareGPT's conversations (with the `system`
and `tools` columns, `function_call` and `observation`), and the thoughts of thinking models. A null is an absent key,
since a Parquet struct has all keys in every row. A key that mmray does not know might matter to a template, so such a
row is refused, unless its data set lists the key under `ignore_message_keys`.
"""

import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmray.errors import RowError
from mmray.loss.settings import SAMPLED_ROLE
from mmray.rows.image_refs import ImageRef
from mmray.rows.json_rows import lone_surrogate
from mmray.rows.settings import DatasetSettings

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

FLAGS = ("train", "weight", "loss", "training")
"""Keys of a message, or of a part, that say whether it is trained on: of axolotl (two), OpenAI, ms-swift."""

_HARMLESS = frozenset({"id", "message_id", "uuid", "parent_id", "name", "timestamp", "created_at", "refusal", "audio"})
"""Keys that do not affect the text: who spoke, when, under which number; the last two only where they are null."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_MESSAGE_KEYS = (
    "role", "from", "content", "value", *_THOUGHTS, "tool_calls", "function_call", "tool_call_id", *FLAGS,
)  # fmt: skip
_PART_KEYS = ("type", "text", "image", "path", "url", "image_url", "index", *FLAGS)
_IMAGE_KEYS = ("image", "image_url", "path", "url")
_RESERVED = frozenset({"messages", "conversation", "tools", "add_generation_prompt", "chat_template", "tokenize"})

JSON = dict[str, Any]


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
        plain: Callable[[str], str],
    ) -> None:  # fmt: skip
        """Prepares to read the chats of a data set.

        placeholders: matches the texts that stand for an image.
        refuse_special: called with a text and where it stands; raises RowError for structure tokens in the text.
        plain: replaces the model's image token in a text by plain words.
        """
        self.dataset, self._plain = dataset, plain
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
            if messages[0].role == "system" and messages[0].text != system:
                raise RowError(
                    "wrong_type",
                    f"{self.dataset.column('system')} is {system!r:.60} and {column} begin with another system "
                    "message; leave one of them out",
                )
            if messages[0].role != "system":
                self._refuse_special(system, self.dataset.column("system"))
                messages.insert(0, Message("system", (Part(system),), is_text=True))
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
            conversation = _parsed(conversation, column)
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
        raw_tools = _parsed(raw_tools, column) if isinstance(raw_tools, str) and raw_tools.strip() else raw_tools or []
        if not isinstance(raw_tools, list):
            raise RowError("wrong_type", f"{column} must be a list of tools or its JSON text, not {raw_tools!r:.60}")
        tools = [_parsed(tool, column) if isinstance(tool, str) else tool for tool in raw_tools]
        for tool in tools:
            if not isinstance(tool, dict):
                raise RowError("wrong_type", f"{column}: a tool must be an object, not {tool!r:.60}")
            self._refuse_special(json.dumps(tool, ensure_ascii=False), column)
        return [without_nulls(tool) for tool in tools]

    def _options(self, value: Mapping[str, Any]) -> JSON:
        column = self.dataset.column("chat_template_kwargs")
        raw_options = value.get(column)
        raw_options = (
            _parsed(raw_options, column) if isinstance(raw_options, str) and raw_options.strip() else raw_options or {}
        )
        if not isinstance(raw_options, dict):
            raise RowError("wrong_type", f"{column} must be an object, not {raw_options!r:.60}")
        for name, option in raw_options.items():
            if name in _RESERVED:
                raise RowError("unknown_field", f"{column}: {name!r} is no variable for a row to set; leave it out")
            if isinstance(option, str):
                self._refuse_special(option, f"{column}: {name}")
        return dict(self.dataset.chat_template_kwargs) | without_nulls(raw_options)

    # ---------------------------------------------------------------- messages

    def _message(self, message: object, where: str, to_image: Callable[[object], ImageRef]) -> Message:
        if not isinstance(message, dict):
            raise RowError("wrong_type", f"{where} must be an object, not {type(message).__name__} {message!r:.60}")
        name = self._role_name({key: entry for key, entry in message.items() if entry is not None}, where)
        named = self._known(message, (*_MESSAGE_KEYS, *_HARMLESS), where)
        role = self._roles[name]
        calls = self._calls(named, where)
        content = _one_of(named, ("content", "value"), where)
        if name == "function_call":
            calls += self._calls_of_text(content, where)
            content = ""
        if calls and role != SAMPLED_ROLE:
            raise RowError("wrong_type", f"{where} is of role {role!r} and has tool calls; only the assistant calls")
        thought = self._thought(named, role, where)
        if content is None and (calls or thought):
            content = ""
        parts, is_text = self._content(content, where, to_image)
        extra = [(key, named[key]) for key in ("name", "tool_call_id") if named.get(key) is not None]
        for key, text in extra:
            if not isinstance(text, str):
                raise RowError("wrong_type", f"{where}: {key} must be a string, not {text!r:.60}")
            self._refuse_special(text, where)
        trains = _flag(named, where)
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
        named = {key: entry for key, entry in value.items() if not _says_nothing(entry) and key not in self._ignored}
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
        thought = _one_of(named, _THOUGHTS, where)
        if thought is None or thought == "":
            return ""
        if not isinstance(thought, str):
            raise RowError("wrong_type", f"{where}: its thought must be a string, not {thought!r:.60}")
        if role != SAMPLED_ROLE:
            raise RowError("wrong_type", f"{where} is of role {role!r} and has a thought; only the assistant thinks")
        self._refuse_special(thought, where)
        return thought

    # ---------------------------------------------------------------- calls

    def _calls(self, named: JSON, where: str) -> tuple[Call, ...]:
        raw_calls = named.get("tool_calls") or []
        raw_calls = _parsed(raw_calls, f"{where}: tool_calls") if isinstance(raw_calls, str) else raw_calls
        if not isinstance(raw_calls, list):
            raise RowError("wrong_type", f"{where}: tool_calls must be a list, not {raw_calls!r:.60}")
        calls = [self._call(call, where) for call in raw_calls if not _says_nothing(call)]
        if old := named.get("function_call"):
            calls.append(self._call(old, where))
        return tuple(calls)

    def _call(self, call: object, where: str) -> Call:
        call = _parsed(call, f"{where}: a tool call") if isinstance(call, str) else call
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
            arguments = _parsed(arguments, f"{where}: arguments") if arguments.strip() else {}
        else:
            arguments = without_nulls(arguments)
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise RowError(
                "wrong_type", f"{where}: arguments must be an object or its JSON text, not {arguments!r:.60}"
            )
        for text in (name, json.dumps(arguments, ensure_ascii=False)):
            self._refuse_special(text, where)
        number = outer.get("id")
        if number is not None and not isinstance(number, str):
            raise RowError("wrong_type", f"{where}: a tool call's id must be a string, not {number!r:.60}")
        self._refuse_special(number or "", where)
        return Call(number, name, arguments)

    def _calls_of_text(self, content: object, where: str) -> tuple[Call, ...]:
        """Reads the calls of ShareGPT's `function_call`: one call or several, as JSON."""
        parsed = _parsed(content, where) if isinstance(content, str) else content
        calls = parsed if isinstance(parsed, list) else [parsed]
        if not calls:
            raise RowError("wrong_type", f"{where} is a function_call without a call")
        return tuple(self._call(call, where) for call in calls)

    # ---------------------------------------------------------------- content

    def _content(
        self, content: object, where: str, to_image: Callable[[object], ImageRef]
    ) -> tuple[tuple[Part, ...], bool]:
        """Returns the parts of a content, and whether it was one string without placeholders."""
        if isinstance(content, str):
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
                "or, where the text only speaks of it, give the set another placeholder (placeholder:)",
            )
        self._refuse_special(text, where)
        return tuple(parts), False

    def _part(self, part: object, where: str, to_image: Callable[[object], ImageRef]) -> Part:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part, dict) and isinstance(part.get("text"), str):
            named = self._known(part, ("type", "text", *FLAGS), f"{where}: a text part")
            return Part(self._plain(named["text"]), trains=_flag(named, f"{where}: a text part"))
        if kind in ("image", "image_url") and isinstance(part, dict):
            named = self._known(part, _PART_KEYS, f"{where}: an image part")
            if named.get("text"):
                raise RowError(
                    "wrong_type", f"{where}: an image part has a text, {named['text']!r:.60}; make it a part"
                )
            _flag(named, f"{where}: an image part")  # images are never trained on
            return Part(None, self._picture(named, where, to_image))
        raise RowError("wrong_type", f"{where}: a part must be of type 'text' or 'image', not {part!r:.80}")

    def _picture(self, named: JSON, where: str, to_image: Callable[[object], ImageRef]) -> ImageRef | int | None:
        """Returns the picture that an image part names, as in `Part.picture`."""
        names = [named[key] for key in _IMAGE_KEYS if key in named]
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
                "image_conflict", f"an image part has index {picture}, and {column} has {len(images)} images, from 0 on"
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


def missing_column(column: str, value: Mapping[str, Any]) -> RowError:
    """Builds the error of a row that lacks a column, with the fields that it has."""
    fields = ", ".join(map(repr, value)) or "none"
    return RowError("missing_column", f"the row has no {column}; its fields are {fields:.200}; see data: columns")


def without_nulls(value: Any) -> Any:
    """Removes keys that are null, at any depth: a Parquet struct fills in every key that some row has."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


def _parsed(text: str, where: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise RowError("wrong_type", f"{where}: {text!r:.60} is not JSON: {error}") from error
    if half := lone_surrogate(text, found):
        raise RowError("not_utf8", f"{where} holds {half!a}, half of a surrogate pair; write the whole character")
    return found


def _says_nothing(value: object) -> bool:
    """Whether a value is null, or an object of nulls alone: what Parquet may make of an absent object."""
    if isinstance(value, dict):
        return bool(value) and all(map(_says_nothing, value.values()))
    return value is None


def _one_of(named: JSON, keys: Sequence[str], where: str) -> Any:
    """Returns the value of the first present key among keys of one meaning; None where all are absent.

    Raises RowError where two of them differ.
    """
    present_keys = [key for key in keys if key in named]
    for key in present_keys[1:]:
        if named[key] != named[present_keys[0]]:
            raise RowError("wrong_type", f"{where} has {present_keys[0]} and {key}, which differ; keep one of them")
    return named[present_keys[0]] if present_keys else None


def _flag(named: JSON, where: str) -> bool | None:
    """Returns whether a message is trained on by its flag; None without a flag. Raises RowError for a bad flag."""

    flags = [(key, named[key]) for key in FLAGS if key in named]
    for key, value in flags:
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowError(
                "unsupported_flag",
                f"{where} has {key} {value!r:.40}; true and false (or 1 and 0) are honoured, parts of a loss are not",
            )
    values = {bool(value) for _, value in flags}
    if len(values) > 1:
        raise RowError("unsupported_flag", f"{where}: {' and '.join(key for key, _ in flags)} disagree; keep one")
    return values.pop() if values else None


def _flag_of_another_role(named: JSON, role: str, where: str) -> RowError:
    key = next(key for key in FLAGS if key in named)
    return RowError(
        "unsupported_flag",
        f"{where} is of role {role!r} and has {key} {named[key]!r:.40}; only the assistant's messages can be told to "
        "train one by one, other roles by loss.roles",
    )
