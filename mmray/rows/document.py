"""From a row as a user wrote it to text with one placeholder unit per image, and the list of its images.

Both kinds of rows with text end in the same form: a `Document` whose text is ready for the tokenizer except that
images are still single units. What a user typed is never structure: the family's special tokens inside the text of a
row are refused, placeholders in the parts of a message too. Where turns are found by plain text, a row that holds some
of it is rendered twice (`TypedMarkers`).
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from mmray.errors import RowError, UserError
from mmray.families import Family
from mmray.images.source import one_line
from mmray.loss.settings import SAMPLED_ROLE, chat_template, marks_generated
from mmray.rows.ids import has_id, id_text
from mmray.rows.image_refs import ImageRef, image_refs
from mmray.rows.settings import DatasetSettings
from mmray.rows.typed import TypedMarkers

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}


@dataclass(frozen=True)
class Document:
    """A row before tokenising. add_special_tokens: as the processor would for this text; generated: what of the text
    the chat template's `{% generation %}` blocks wrote, [start, stop) in characters each; is_answered: the last message
    is the assistant's; typed: (message, marker), markers of turns that stand in messages; blanked: the text without
    them."""

    id: str
    text: str
    images: tuple[ImageRef, ...]
    add_special_tokens: bool
    generated: tuple[tuple[int, int], ...] = ()
    is_answered: bool = False
    typed: tuple[tuple[str, str], ...] = ()
    blanked: str = ""


class DocumentReader:
    """Reads the `pretrain` and `chat` rows of one data set for one family."""

    def __init__(
        self, dataset: DatasetSettings, family: Family, markers: TypedMarkers | None = None, *,
        opens_answer: bool = False,
    ) -> None:  # fmt: skip
        """markers: by which the turns of chat rows will be found; None: they are not looked for. opens_answer: chats
        end where the model is to answer, with what its template writes before that.

        Raises UserError for chat rows that the model has no use for (`check_chats`).
        """
        check_chats(dataset, family)
        self.dataset = dataset
        self.family = family
        accepted = {dataset.placeholder, family.placeholder_unit, family.placeholder}
        self._placeholders = re.compile("|".join(map(re.escape, sorted(accepted, key=len, reverse=True))))
        self._markers = markers
        self._opens_answer = opens_answer
        special = {*family.structure_tokens, *(markers.special_tokens if markers else ())}
        self._special = re.compile("|".join(map(re.escape, sorted(special))))
        self._marks_generated = marks_generated(family.processor)

    def read(self, value: dict[str, Any], source: str) -> Document:
        """The row as a document. Raises RowError with the field, the value and the remedy."""
        images = image_refs(value, source, self.dataset)
        row_id = self.row_id(value, source)
        if self.dataset.kind == "chat":
            document, count = self._chat(value, row_id, images)
        else:
            text, count = self._units(self._string(value, "text"), "text")
            if not count and self.dataset.images_first:
                text, count = f"{self.family.placeholder_unit}\n" * len(images) + text, len(images)
            document = Document(row_id, text, images, add_special_tokens=True)
        check_image_count(count, len(images))
        return document

    # ---------------------------------------------------------------- fields

    def row_id(self, value: dict[str, Any], source: str) -> str:
        """The row's id; its source position when it has none."""
        found = value.get(self.dataset.column("id"))
        if not has_id(found):
            return source
        text = id_text(found)
        if text is None:
            raise RowError("wrong_type", f"id must be a string, not {type(found).__name__} {found!r:.60}")
        return text

    def _string(self, value: dict[str, Any], field: str) -> str:
        column = self.dataset.column(field)
        found = value.get(column)
        if found is None:
            raise missing_column(repr(column), value)
        if not isinstance(found, str):
            raise RowError("wrong_type", f"{column} must be a string, not {type(found).__name__} {found!r:.60}")
        if not found.strip():
            raise RowError("empty_text", f"{column} is empty: {found!r:.60}; write its text or drop the row")
        return found

    # ---------------------------------------------------------------- text

    def _units(self, text: str, where: str) -> tuple[str, int]:
        """The text with every placeholder as the family's unit, and their number."""
        pieces = self._placeholders.split(text)
        for piece in pieces:
            self._refuse_special(piece, where)
        return self.family.placeholder_unit.join(pieces), len(pieces) - 1

    def _refuse_special(self, text: str, where: str) -> None:
        found = self._special.search(text)
        if found:
            raise RowError(
                "special_token_in_text",
                f"{where} holds the token {found.group()!r}, which the model reads as structure; write it differently",
            )

    def _chat(self, value: dict[str, Any], row_id: str, images: tuple[ImageRef, ...]) -> tuple[Document, int]:
        """The document of a chat, and the number of its image parts."""
        messages, count = self._checked_messages(value)
        text, generated = self._template_text(messages)
        rendered = text.count(self.family.placeholder_unit)
        if rendered != count:
            raise RowError(
                "template",
                f"the chat template wrote {rendered} images where the messages have {count} image parts; "
                "put the images into user messages",
            )
        typed: tuple[tuple[str, str], ...] = ()
        blanked = ""
        if self._markers is not None:
            found = [(number, self._markers.found(message["content"])) for number, message in enumerate(messages)]
            typed = tuple((f"message {number}", marker) for number, own in found for marker in own)
        if self._markers is not None and typed:
            without = [each | {"content": self._markers.blanked(each["content"])} for each in messages]
            blanked, _ = self._template_text(without)
        bos = self.family.tokenizer.bos_token
        document = Document(
            row_id, text, images, not (bos and text.startswith(bos)), generated,
            messages[-1]["role"] == SAMPLED_ROLE, typed, blanked,
        )  # fmt: skip
        return document, count

    def _checked_messages(self, value: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
        """The messages as the template reads them, and the number of their images."""
        messages, count = [], 0
        for number, message in enumerate(self._messages(value)):
            where = f"message {number}"
            if not isinstance(message, dict):
                raise RowError("wrong_type", f"{where} must be an object, not {type(message).__name__} {message!r:.60}")
            role = message.get("role") or message.get("from")
            if not isinstance(role, str) or role not in _ROLES:
                raise RowError("unknown_role", f"{where} has role {role!r:.60}; known are {', '.join(_ROLES)}")
            content = message.get("content")
            content = self._content(message.get("value") if content is None else content, where)
            count += sum(part["type"] == "image" for part in content if isinstance(part, dict))
            messages.append({"role": _ROLES[role], "content": self._as_template_reads(content)})
        return messages, count

    def _template_text(self, messages: list[dict[str, Any]]) -> tuple[str, tuple[tuple[int, int], ...]]:
        """`_rendered`; raises RowError where the template refuses the messages."""
        try:
            return self._rendered(messages)
        except (TemplateError, TypeError, ValueError) as error:
            raise RowError(
                "template",
                f"the chat template refuses the messages: {one_line(error)}; check the roles, their order and contents",
            ) from error

    def _as_template_reads(self, content: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
        """The content in a form that the chat template writes. Some read one form only and say nothing of the other:
        PaddleOCR-VL's goes through a string as through a list of parts and writes none of it, GLM-4.1V's writes an
        assistant's list as Python would."""
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self._written_forms == {list} else content
        is_text = all(part["type"] == "text" for part in content)
        return "".join(part["text"] for part in content) if is_text and self._written_forms == {str} else content

    @functools.cached_property
    def _written_forms(self) -> set[type]:
        """The forms of a text, a string or a list of parts, that the chat template writes for user and assistant."""
        forms: dict[type, Any] = {str: _PROBE, list: [{"type": "text", "text": _PROBE}]}
        return {form for form, content in forms.items() if self._is_written(content)}

    def _is_written(self, content: Any) -> bool:
        try:
            text, _ = self._rendered([{"role": role, "content": content} for role in ("user", "assistant")])
        except (TemplateError, TypeError, ValueError):
            return False
        return text.count(_PROBE) == 2 and "'type'" not in text

    def _rendered(self, messages: list[dict[str, Any]]) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The text that the chat template writes, and what of it its `{% generation %}` blocks wrote.

        `apply_chat_template` tells of the blocks only after it has run the images through the processor too; the
        function beneath it does so at once.
        """
        processor = self.family.processor
        if not self._marks_generated:
            options = {"tokenize": False, "add_generation_prompt": self._opens_answer}
            return processor.apply_chat_template(messages, **options), ()
        rendered: Any = render_jinja_template(
            [messages],
            chat_template=chat_template(processor),
            return_assistant_tokens_mask=True,
            **processor.tokenizer.special_tokens_map,
            add_generation_prompt=self._opens_answer,
        )
        (text,), (generated,) = rendered
        return text, tuple(generated)

    def _messages(self, value: dict[str, Any]) -> list[object]:
        column = self.dataset.column("messages")
        found = value.get(column)
        if found is None:
            column = self.dataset.column("conversations")
            found = value.get(column)
        if found is None:
            raise missing_column(f"{self.dataset.column('messages')!r} and no {column!r}", value)
        if not isinstance(found, list) or not found:
            raise RowError("wrong_type", f"{column} must be a list with a message in it, not {found!r:.60}")
        return found

    def _content(self, content: object, where: str) -> str | list[dict[str, str]]:
        """A message's content: a string stays one unless it holds placeholders; parts are checked one by one."""
        if isinstance(content, str):
            pieces = self._placeholders.split(content)
            parts: list[dict[str, str]] = []
            for index, piece in enumerate(pieces):
                self._refuse_special(piece, where)
                parts += [{"type": "image"}] if index else []
                parts += [{"type": "text", "text": piece}] if piece else []
            return parts if len(pieces) > 1 else content
        if not isinstance(content, list):
            raise RowError("wrong_type", f"{where}: content must be a string or a list of parts, not {content!r:.60}")
        parts = [_part(part, where) for part in content]
        # Templates write parts one after another: a token could be typed half in one and half in the next.
        text = "".join(part.get("text", "\0") for part in parts)
        if found := self._placeholders.search(text):
            raise RowError(
                "special_token_in_text",
                f"{where}: a text part holds the image placeholder {found.group()!r}; make it a part of type 'image'",
            )
        self._refuse_special(text, where)
        return parts


def check_chats(dataset: DatasetSettings, family: Family) -> None:
    """Raise UserError for chat rows and a processor without a chat template, or a model without chats."""
    if dataset.kind == "chat" and family.has_prompt:
        raise UserError(
            f"{type(family.processor).__name__} knows no chats, only a prompt and its answer; make rows of kind "
            "pretrain, or of kind tokenized with labels"
        )
    if dataset.kind == "chat" and not family.processor.chat_template:
        raise UserError(
            f"{type(family.processor).__name__} has no chat template, which chat rows need; put a "
            "chat_template.jinja into the processor's folder"
        )


_PROBE = "What does it say?"


def missing_column(column: str, value: Iterable[str]) -> RowError:
    """The error of a row without a column, with the fields that it has."""
    fields = ", ".join(map(repr, value)) or "none"
    return RowError("missing_column", f"the row has no {column}; its fields are {fields:.200}; see data: columns")


def check_image_count(placeholders: int, images: int) -> None:
    """Raise RowError unless the row has one image for each placeholder."""
    if placeholders != images:
        raise RowError(
            "placeholder_count",
            f"{placeholders} image placeholders but {images} images; every image needs exactly one placeholder",
        )


def _part(part: object, where: str) -> dict[str, str]:
    """A part of a message in the form of chat templates: text, or an image without anything else."""
    if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
        return {"type": "image"}
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise RowError("wrong_type", f"{where}: a part must be of type 'text' or 'image', not {part!r:.80}")
