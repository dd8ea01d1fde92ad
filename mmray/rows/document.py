"""Turns rows as a user wrote them into text with one placeholder unit per image and the list of their images.

Both kinds of rows with text become a `Document`, whose text is ready for the tokenizer except that images are still
single units. Typed text is never structure: the family's special tokens inside the text of a row are refused, and so
are placeholders in the parts of a message. A chat's document records which letters belong to which message
(`mmray.rows.templates`), and a chat of which the template leaves something out is refused. Where turns are found by
plain text, a row that holds some of it is rendered twice (`TypedMarkers`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mmray.base.words import counted
from mmray.errors import RowError, UserError
from mmray.families import Family
from mmray.loss.settings import SAMPLED_ROLE
from mmray.rows.ids import has_id, id_text
from mmray.rows.image_refs import ImageRef, image_folder, image_ref, image_refs
from mmray.rows.message_values import refuse_words_for_truth
from mmray.rows.messages import Chat, MessageReader, missing_column, placed_images
from mmray.rows.settings import DatasetSettings
from mmray.rows.templates import ChatTemplate, RenderedChat
from mmray.rows.typed import TypedMarkers

DROPPED_THOUGHTS = "dropped_reasoning"
"""The note on a row whose thoughts the template leaves out (`allow_dropped`)."""


@dataclass(frozen=True)
class Document:
    """A row before tokenising.

    add_special_tokens: whether the processor would add special tokens to this text.
    rendered: for a chat, the text that belongs to each message.
    typed: (message, marker) of the turn markers that stand in messages.
    blanked: the text without these markers.
    notes: what the template left out where that is allowed.
    """

    id: str
    text: str
    images: tuple[ImageRef, ...]
    add_special_tokens: bool
    rendered: RenderedChat | None = None
    typed: tuple[tuple[str, str], ...] = ()
    blanked: str = ""
    notes: tuple[str, ...] = ()
    ends: bool = False
    """True if the row was written with an end of document, which is removed from the text."""

    @property
    def is_answered(self) -> bool:
        """True if the last message is the assistant's."""
        return self.rendered is not None and self.rendered.chat.messages[-1].role == SAMPLED_ROLE


class DocumentReader:
    """Reads the `pretrain` and `chat` rows of one data set for one family."""

    def __init__(
        self, dataset: DatasetSettings, family: Family, markers: TypedMarkers | None = None,
        template: ChatTemplate | None = None, *, opens_answer: bool = False,
        with_pages: Callable[[tuple[ImageRef, ...]], tuple[ImageRef, ...]] = tuple,
    ) -> None:  # fmt: skip
        """Raises UserError for chat rows that the model cannot use (`check_chats`), and for `chat_template_kwargs`
        that the chat template does not read.

        markers: the texts by which the turns of chat rows will be found; None: they are not searched for.
        template: the family's chat template; None: it is built here.
        opens_answer: whether chats end with the generation prompt.
        with_pages: expands the images of a row to one image for each page or frame that they name.
        """
        check_chats(dataset, family)
        self.dataset = dataset
        self.family = family
        model_placeholders = (family.placeholder_unit, family.placeholder)
        if dataset.own_token_text is not None and (
            dataset.placeholder in model_placeholders or model_placeholders[1] in dataset.own_token_text
        ):
            raise UserError(
                "data: own_token_text: the set needs a placeholder other than the model's own "
                f"{model_placeholders[1]!r}, and a text without it"
            )
        accepted = {dataset.placeholder, *(model_placeholders if dataset.own_token_text is None else ())}
        self._placeholders = re.compile("|".join(map(re.escape, sorted(accepted, key=len, reverse=True))))
        self._markers, self._with_pages = markers, with_pages
        self._opens_answer = opens_answer
        special = {*family.structure_tokens, *(markers.special_tokens if markers else ())}
        self._special = re.compile("|".join(map(re.escape, sorted(special))))
        self._template = template or ChatTemplate(family)
        self._messages = MessageReader(dataset, self._placeholders, self._refuse_special, self._plain, self._remedy)
        try:
            refuse_words_for_truth(dataset.chat_template_kwargs, "chat_template_kwargs")
        except RowError as error:
            raise UserError(f"data: {error.message}") from error
        option_names = set(dataset.chat_template_kwargs)
        if option_names and (unread := option_names - self._template.variables):
            raise UserError(f"data: chat_template_kwargs: {self._unread(min(unread))}")
        end = dataset.end_of_document or family.tokenizer.eos_token
        self._end = str(end) if dataset.kind == "pretrain" and end else ""
        self._closings = tuple(mark for mark in (dataset.join_documents, self._end) if mark)

    def read(self, value: dict[str, Any], source: str) -> Document:
        """Reads a row as a document. Raises RowError with the field, the value and the remedy."""
        images = self._with_pages(image_refs(value, source, self.dataset))
        row_id = self.row_id(value, source)
        _refuse_other_media(value)
        if self.dataset.kind == "chat":
            return self._chat(value, row_id, images, source)
        text, count, ends = self._documents(self._string(value, "text"))
        if not count and self.dataset.images_first:
            text, count = f"{self.family.placeholder_unit}\n" * len(images) + text, len(images)
        check_image_count(count, len(images), self._remedy)
        return Document(row_id, text, images, add_special_tokens=True, ends=ends)

    def _documents(self, text: str) -> tuple[str, int, bool]:
        """Returns the text of a `pretrain` row, its number of placeholders, and whether it ended with an end of
        document. That end is removed from the text and appended once later, whoever wrote it."""
        join, end = self.dataset.join_documents, self._end
        written = text.rstrip()
        ends = written.endswith(self._closings)
        if ends:
            text = written.removesuffix(next(mark for mark in self._closings if written.endswith(mark)))
        pieces = [self._units(piece, "text") for piece in (text.split(join) if join else [text])]
        if len(pieces) > 1 and not end:
            raise RowError("special_token_in_text", "join_documents: the tokenizer has no end-of-document token")
        return end.join([piece for piece, _ in pieces]), sum([count for _, count in pieces]), ends

    def _plain(self, text: str) -> str:
        """Replaces the model's image token in a text by plain words (`own_token_text`)."""
        plain = self.dataset.own_token_text
        return text if plain is None else text.replace(self.family.placeholder, plain)

    @cached_property
    def _remedy(self) -> str:
        """The remedy where a text only mentions the placeholder."""
        if self.dataset.placeholder in (self.family.placeholder, self.family.placeholder_unit):
            return f"where a text only speaks of {self.family.placeholder!r}, set the set's own_token_text"
        return (
            f"where a text only speaks of {self.dataset.placeholder!r}, give the set another one (placeholder: "
            "'<|page|>')"
        )

    # ---------------------------------------------------------------- fields

    def row_id(self, value: dict[str, Any], source: str) -> str:
        """Returns the row's id, or its source position when it has none."""
        id_value = value.get(self.dataset.column("id"))
        if not has_id(id_value):
            return source
        text = id_text(id_value)
        if text is None:
            raise RowError("wrong_type", f"id must be a string, not {type(id_value).__name__} {id_value!r:.60}")
        return text

    def _string(self, value: dict[str, Any], field: str) -> str:
        column = self.dataset.column(field)
        text = value.get(column)
        if text is None:
            raise missing_column(repr(column), value)
        if not isinstance(text, str):
            raise RowError("wrong_type", f"{column} must be a string, not {type(text).__name__} {text!r:.60}")
        if not text.strip():
            raise RowError("empty_text", f"{column} is empty: {text!r:.60}; write its text or drop the row")
        return text

    # ---------------------------------------------------------------- text

    def _units(self, text: str, where: str) -> tuple[str, int]:
        """Returns the text with every placeholder replaced by the family's unit, and the number of placeholders."""
        pieces = self._placeholders.split(self._plain(text))
        for piece in pieces:
            self._refuse_special(piece, where)
        return self.family.placeholder_unit.join(pieces), len(pieces) - 1

    def _refuse_special(self, text: str, where: str) -> None:
        match = self._special.search(text)
        if match:
            raise RowError(
                "special_token_in_text",
                f"{where} holds the token {match.group()!r}, which the model reads as structure; write it differently",
            )

    def _chat(self, value: dict[str, Any], row_id: str, images: tuple[ImageRef, ...], source: str) -> Document:
        root = image_folder(source, self.dataset)
        chat = self._messages.read(value, lambda entry: self._picture(entry, root))
        if unread := {name for name, _ in chat.options} - self._template.variables:
            raise RowError("unknown_field", f"chat_template_kwargs: {self._unread(min(unread))}")
        count = len(chat.pictures)
        images = placed_images(chat, images, self.dataset.column("images"))
        check_image_count(count, len(images), self._remedy)
        rendered = self._template.render(chat, count_images=count)
        notes = self._check_written(rendered)
        if self._opens_answer:
            text = self._template.prompt_text(chat)
            special = not (self.family.tokenizer.bos_token and text.startswith(self.family.tokenizer.bos_token))
            return Document(row_id, text, images, special)
        typed, blanked = self._typed(chat)
        bos = self.family.tokenizer.bos_token
        begins = bool(bos and rendered.text.startswith(bos))
        return Document(row_id, rendered.text, images, not begins, rendered, typed, blanked, notes)

    def _picture(self, entry: object, root: str) -> ImageRef:
        """Returns the picture that a part of a message names. Raises RowError where it names several."""
        pages = self._with_pages((image_ref(entry, root),))
        if len(pages) != 1:
            raise RowError(
                "placeholder_count",
                f"a part of a message names {counted(len(pages), 'page')}, {entry!r:.60}; give each page a part",
            )
        return pages[0]

    def _check_written(self, rendered: RenderedChat) -> tuple[str, ...]:
        """Returns the notes on a chat. Raises RowError unless the template writes everything that the chat says."""
        plan, notes = rendered.plan, set()
        for number in plan.missing:
            leaf = rendered.leaves[number]
            role = rendered.chat.messages[leaf.message or 0].role
            if leaf.kind == "thought" and "reasoning" in self.dataset.allow_dropped:
                notes.add(DROPPED_THOUGHTS)
                continue
            remedy = (
                "allow_dropped: [reasoning] lets it leave thoughts out"
                if leaf.kind == "thought"
                else "mend the row, or take a template that writes it"
            )
            raise RowError(
                "not_written",
                f"message {leaf.message} ({role}): the chat template leaves out its {leaf.kind}, {leaf.text!r:.60}; "
                f"{remedy}",
            )
        if plan.tools_without:
            raise RowError(
                "not_written",
                f"the chat template leaves out {plan.tools_without}; mend them, or take a template that writes them",
            )
        for number in plan.lost_messages:
            raise RowError(
                "not_written", f"message {number} (assistant) is empty, and the chat template writes no turn of it"
            )
        return tuple(notes)

    def _typed(self, chat: Chat) -> tuple[tuple[tuple[str, str], ...], str]:
        """Returns the turn markers that stand in messages, and the text without them."""
        if self._markers is None:
            return (), ""
        typed_markers = [
            (number, self._markers.markers_in(message.parts)) for number, message in enumerate(chat.messages)
        ]
        typed = tuple((f"message {number}", marker) for number, markers in typed_markers for marker in markers)
        if not typed:
            return (), ""
        blanked = [replace(message, parts=self._markers.blanked(message.parts)) for message in chat.messages]
        return typed, self._template.plain_text(replace(chat, messages=tuple(blanked)))

    def _unread(self, name: str) -> str:
        known = ", ".join(sorted(self._template.variables - _ALWAYS_THERE)) or "none"
        return f"the chat template reads no {name!r}; it reads {known}"


def check_chats(dataset: DatasetSettings, family: Family) -> None:
    """Raises UserError for chat rows where the processor has no chat template or the model knows no chats."""
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


_ALWAYS_THERE = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "pad_token"})


_OTHER_MEDIA = frozenset({"videos", "video", "audios", "audio"})


def _refuse_other_media(value: dict[str, Any]) -> None:
    """Raises RowError for a row whose text refers to a video or a sound in a column beside it."""
    if _OTHER_MEDIA.isdisjoint(value):
        return
    for kind in ("video", "audio"):
        column = next((name for name in (f"{kind}s", kind) if value.get(name)), None)
        if column and f"<{kind}>" in str({name: entry for name, entry in value.items() if name != column}):
            raise RowError(
                "wrong_type",
                f"the row has {column}, to which <{kind}> in its text refers, and mmray reads only images; leave such "
                "rows out, or write its frames as images",
            )


def check_image_count(placeholders: int, images: int, remedy: str = "") -> None:
    """Raises RowError unless the row has one image for each placeholder. remedy: what to do about too many
    placeholders."""

    if placeholders != images:
        more = f"; {remedy}" if remedy and placeholders > images else ""
        raise RowError(
            "placeholder_count",
            f"{counted(placeholders, 'image placeholder')} but {counted(images, 'image')}; every image needs exactly "
            f"one placeholder{more}",
        )
