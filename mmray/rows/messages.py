"""From a row of chat as people write it to one form of conversation: every key is known, honoured or refused.

Known are the forms of the field: OpenAI's messages (parts, tool calls, names, weights), ShareGPT's conversations (its
`system` and `tools` columns, `function_call` and `observation`), the thoughts of thinking models. A null is an absent
key, since a Parquet struct has all keys in every row. What a key says that mmray does not know, a template might have
written: such a row is refused, unless its set lists the key under `ignore_message_keys`.
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
"""The roles of templates by the names that rows have for them, in small letters."""

FLAGS = ("train", "weight", "loss", "training")
"""Keys of a message, or of a part, that say whether it trains: of axolotl (two), OpenAI, ms-swift."""

_HARMLESS = frozenset({"id", "message_id", "uuid", "parent_id", "name", "timestamp", "created_at", "refusal", "audio"})
"""Keys that say nothing of the text: who spoke, when, under which number. The last two only where they are null."""
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
    """A piece of a message's content. picture: of an image, as the part itself names it: None where it does not, a
    number where it points into the row's images; trains: what its flag says."""

    text: str | None
    picture: ImageRef | int | None = None
    trains: bool | None = None

    @property
    def is_image(self) -> bool:
        return self.text is None


@dataclass(frozen=True)
class Call:
    """A tool call. arguments: an object, its strings and numbers as written."""

    id: str | None
    name: str
    arguments: JSON


@dataclass(frozen=True)
class Message:
    """One message. parts: of its content; is_text: it was written as one string without placeholders; trains: what its
    flag says; extra: `name` and `tool_call_id`."""

    role: str
    parts: tuple[Part, ...]
    is_text: bool
    thought: str = ""
    calls: tuple[Call, ...] = ()
    trains: bool | None = None
    extra: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The text of its content."""
        return "".join(part.text for part in self.parts if part.text is not None)


@dataclass(frozen=True)
class Chat:
    """A conversation, ready for a chat template. options: variables of the template."""

    messages: tuple[Message, ...]
    tools: tuple[JSON, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def pictures(self) -> list[ImageRef | int | None]:
        """Of each image part, in order."""
        return [part.picture for message in self.messages for part in message.parts if part.is_image]


class MessageReader:
    """Reads the chats of one set of rows."""

    def __init__(
        self, dataset: DatasetSettings, placeholders: re.Pattern[str], refuse_special: Callable[[str, str], None],
        plain: Callable[[str], str],
    ) -> None:  # fmt: skip
        """placeholders: texts that stand for an image; refuse_special(text, where): raises for structure in a text;
        plain: a text as it may be read."""
        self.dataset, self._plain = dataset, plain
        self._placeholders, self._refuse_special = placeholders, refuse_special
        self._roles: dict[str, str] = ROLES | {alias.lower(): role for alias, role in dataset.roles.items()}
        self._ignored = frozenset(dataset.ignore_message_keys)

    def read(self, value: Mapping[str, Any], to_image: Callable[[object], ImageRef]) -> Chat:
        """The conversation of a row. to_image: what an image part names, as `image_ref`. Raises RowError."""
        column, found = self._conversation(value)
        messages = [self._message(message, f"message {n}", to_image) for n, message in enumerate(found)]
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
        """The column of the messages, and what it holds."""
        names = [self.dataset.column(field) for field in ("messages", "conversations")]
        there = [name for name in dict.fromkeys(names) if value.get(name) is not None]
        chosen = [name for name in there if name in self.dataset.columns.values()]
        if len(there) > 1 and len(chosen) != 1:
            raise RowError(
                "wrong_type",
                f"the row has both {there[0]} and {there[1]}; name the one to read: columns: {{messages: {there[0]}}}",
            )
        if not there:
            raise missing_column(f"{names[0]!r} and no {names[1]!r}", value)
        column = (chosen or there)[0]
        found = value[column]
        if isinstance(found, str) and found.lstrip().startswith("["):
            found = _parsed(found, column)
        if not isinstance(found, list) or not found:
            raise RowError("wrong_type", f"{column} must be a list with a message in it, not {found!r:.60}")
        return column, found

    def _system(self, value: Mapping[str, Any]) -> str:
        column = self.dataset.column("system")
        found = value.get(column)
        if found is not None and not isinstance(found, str):
            raise RowError("wrong_type", f"{column} must be a string, not {type(found).__name__} {found!r:.60}")
        return found or ""

    def _tools(self, value: Mapping[str, Any]) -> list[JSON]:
        column = self.dataset.column("tools")
        found = value.get(column)
        found = _parsed(found, column) if isinstance(found, str) and found.strip() else found or []
        if not isinstance(found, list):
            raise RowError("wrong_type", f"{column} must be a list of tools or its JSON text, not {found!r:.60}")
        tools = [_parsed(tool, column) if isinstance(tool, str) else tool for tool in found]
        for tool in tools:
            if not isinstance(tool, dict):
                raise RowError("wrong_type", f"{column}: a tool must be an object, not {tool!r:.60}")
            self._refuse_special(json.dumps(tool, ensure_ascii=False), column)
        return [without_nulls(tool) for tool in tools]

    def _options(self, value: Mapping[str, Any]) -> JSON:
        column = self.dataset.column("chat_template_kwargs")
        found = value.get(column)
        found = _parsed(found, column) if isinstance(found, str) and found.strip() else found or {}
        if not isinstance(found, dict):
            raise RowError("wrong_type", f"{column} must be an object, not {found!r:.60}")
        for name, option in found.items():
            if name in _RESERVED:
                raise RowError("unknown_field", f"{column}: {name!r} is no variable for a row to set; leave it out")
            if isinstance(option, str):
                self._refuse_special(option, f"{column}: {name}")
        return dict(self.dataset.chat_template_kwargs) | without_nulls(found)

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
        for key, found in extra:
            if not isinstance(found, str):
                raise RowError("wrong_type", f"{where}: {key} must be a string, not {found!r:.60}")
            self._refuse_special(found, where)
        trains = _flag(named, where)
        if trains and role != SAMPLED_ROLE:
            raise _flag_of_another_role(named, role, where)
        for part in parts:
            if part.trains and role != SAMPLED_ROLE:
                raise RowError(
                    "unsupported_flag", f"{where}: a part of role {role!r} is to train; name it in loss.roles"
                )
        return Message(role, parts, is_text, thought, calls, trains, tuple(extra))

    def _known(self, value: JSON, known: Collection[str], where: str) -> JSON:
        """The keys that say something. Raises RowError for one that is not known."""
        named = {key: entry for key, entry in value.items() if not _says_nothing(entry) and key not in self._ignored}
        for key in named:
            if key not in known or key in ("refusal", "audio"):
                near = difflib.get_close_matches(str(key), [each for each in known if each != key], n=1, cutoff=0.5)
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
        found = _one_of(named, _THOUGHTS, where)
        if found is None or found == "":
            return ""
        if not isinstance(found, str):
            raise RowError("wrong_type", f"{where}: its thought must be a string, not {found!r:.60}")
        if role != SAMPLED_ROLE:
            raise RowError("wrong_type", f"{where} is of role {role!r} and has a thought; only the assistant thinks")
        self._refuse_special(found, where)
        return found

    # ---------------------------------------------------------------- calls

    def _calls(self, named: JSON, where: str) -> tuple[Call, ...]:
        found = named.get("tool_calls") or []
        found = _parsed(found, f"{where}: tool_calls") if isinstance(found, str) else found
        if not isinstance(found, list):
            raise RowError("wrong_type", f"{where}: tool_calls must be a list, not {found!r:.60}")
        calls = [self._call(call, where) for call in found if not _says_nothing(call)]
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
        """Of ShareGPT's `function_call`: one call or several, as JSON."""
        found = _parsed(content, where) if isinstance(content, str) else content
        calls = found if isinstance(found, list) else [found]
        if not calls:
            raise RowError("wrong_type", f"{where} is a function_call without a call")
        return tuple(self._call(call, where) for call in calls)

    # ---------------------------------------------------------------- content

    def _content(
        self, content: object, where: str, to_image: Callable[[object], ImageRef]
    ) -> tuple[tuple[Part, ...], bool]:
        """The parts of a content, and whether it was one string without placeholders."""
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
        if found := self._placeholders.search(text):
            raise RowError(
                "special_token_in_text",
                f"{where}: a text part holds the image placeholder {found.group()!r}; make it a part of type 'image', "
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
            _flag(named, f"{where}: an image part")  # pictures never train
            return Part(None, self._picture(named, where, to_image))
        raise RowError("wrong_type", f"{where}: a part must be of type 'text' or 'image', not {part!r:.80}")

    def _picture(self, named: JSON, where: str, to_image: Callable[[object], ImageRef]) -> ImageRef | int | None:
        """What an image part says its picture is."""
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
    """The pictures of a chat's image parts, in their order. images: of the row's column.

    Raises RowError where a part names another picture than the column, or a place that the column does not have.
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
    own = [picture for picture in pictures if isinstance(picture, ImageRef)]
    if not images and len(own) == len(pictures):
        return tuple(own)
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
    """The error of a row without a column, with the fields that it has."""
    fields = ", ".join(map(repr, value)) or "none"
    return RowError("missing_column", f"the row has no {column}; its fields are {fields:.200}; see data: columns")


def without_nulls(value: Any) -> Any:
    """Without keys that are null, at any depth: a Parquet struct fills in every key that some row has."""
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
    """What the first of some keys of one meaning says. Raises RowError where two say different things."""
    there = [key for key in keys if key in named]
    for key in there[1:]:
        if named[key] != named[there[0]]:
            raise RowError("wrong_type", f"{where} has {there[0]} and {key}, which differ; keep one of them")
    return named[there[0]] if there else None


def _flag(named: JSON, where: str) -> bool | None:
    """Whether a message trains by its own flag; None without one."""
    found = [(key, named[key]) for key in FLAGS if key in named]
    for key, value in found:
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowError(
                "unsupported_flag",
                f"{where} has {key} {value!r:.40}; true and false (or 1 and 0) are honoured, parts of a loss are not",
            )
    values = {bool(value) for _, value in found}
    if len(values) > 1:
        raise RowError("unsupported_flag", f"{where}: {' and '.join(key for key, _ in found)} disagree; keep one")
    return values.pop() if values else None


def _flag_of_another_role(named: JSON, role: str, where: str) -> RowError:
    key = next(key for key in FLAGS if key in named)
    return RowError(
        "unsupported_flag",
        f"{where} is of role {role!r} and has {key} {named[key]!r:.40}; only the assistant's messages can be told to "
        "train one by one, other roles by loss.roles",
    )
