"""From a row as a user wrote it to text with one placeholder unit per image, and the list of its images.

Both kinds of rows with text end in the same form: a `Document` whose text is ready for the tokenizer except that
images are still single units. What a user typed is never structure: the family's special tokens inside the text of a
row are refused, placeholders in the parts of a message too. Of a chat the document knows which letters are whose
(`mmray.rows.templates`), and a chat of which the template leaves something out is refused. Where turns are found by
plain text, a row that holds some of it is rendered twice (`TypedMarkers`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mmray.errors import RowError, UserError
from mmray.families import Family
from mmray.loss.settings import SAMPLED_ROLE
from mmray.rows.ids import has_id, id_text
from mmray.rows.image_refs import ImageRef, image_folder, image_ref, image_refs
from mmray.rows.messages import Chat, MessageReader, missing_column, placed_images
from mmray.rows.settings import DatasetSettings
from mmray.rows.templates import ChatTemplate, RenderedChat
from mmray.rows.typed import TypedMarkers

DROPPED_THOUGHTS = "dropped_reasoning"
"""The note of a row of which the template leaves thoughts out (`allow_dropped`)."""


@dataclass(frozen=True)
class Document:
    """A row before tokenising. add_special_tokens: as the processor would for this text; rendered: of a chat, whose
    text is whose; typed: (message, marker), markers of turns that stand in messages; blanked: the text without them;
    notes: what the template left out and was let pass."""

    id: str
    text: str
    images: tuple[ImageRef, ...]
    add_special_tokens: bool
    rendered: RenderedChat | None = None
    typed: tuple[tuple[str, str], ...] = ()
    blanked: str = ""
    notes: tuple[str, ...] = ()
    ends: bool = False
    """It was written with the end of a document behind it, which the text no longer holds."""

    @property
    def is_answered(self) -> bool:
        """The last message is the assistant's."""
        return self.rendered is not None and self.rendered.chat.messages[-1].role == SAMPLED_ROLE


class DocumentReader:
    """Reads the `pretrain` and `chat` rows of one data set for one family."""

    def __init__(
        self, dataset: DatasetSettings, family: Family, markers: TypedMarkers | None = None,
        template: ChatTemplate | None = None, *, opens_answer: bool = False,
        with_pages: Callable[[tuple[ImageRef, ...]], tuple[ImageRef, ...]] = tuple,
    ) -> None:  # fmt: skip
        """markers: by which the turns of chat rows will be found; None: they are not looked for. template: the
        family's; made anew without it. opens_answer: chats end where the model is to answer, with what its template
        writes before that. with_pages: gives the images of a row, where each page or frame that it names is one.

        Raises UserError for chat rows that the model has no use for (`check_chats`), and for variables of the set that
        the chat template does not read.
        """
        check_chats(dataset, family)
        self.dataset = dataset
        self.family = family
        own = (family.placeholder_unit, family.placeholder)
        if dataset.own_token_text is not None and (dataset.placeholder in own or own[1] in dataset.own_token_text):
            raise UserError(
                f"data: own_token_text: the set needs a placeholder other than the model's own {own[1]!r}, and a text "
                "without it"
            )
        accepted = {dataset.placeholder, *(own if dataset.own_token_text is None else ())}
        self._placeholders = re.compile("|".join(map(re.escape, sorted(accepted, key=len, reverse=True))))
        self._markers, self._with_pages = markers, with_pages
        self._opens_answer = opens_answer
        special = {*family.structure_tokens, *(markers.special_tokens if markers else ())}
        self._special = re.compile("|".join(map(re.escape, sorted(special))))
        self._template = template or ChatTemplate(family)
        self._messages = MessageReader(dataset, self._placeholders, self._refuse_special, self._plain)
        given = set(dataset.chat_template_kwargs)
        if given and (unread := given - self._template.variables):
            raise UserError(f"data: chat_template_kwargs: {self._unread(min(unread))}")
        end = dataset.end_of_document or family.tokenizer.eos_token
        self._end = str(end) if dataset.kind == "pretrain" and end else ""

    def read(self, value: dict[str, Any], source: str) -> Document:
        """The row as a document. Raises RowError with the field, the value and the remedy."""
        images = self._with_pages(image_refs(value, source, self.dataset))
        row_id = self.row_id(value, source)
        if self.dataset.kind == "chat":
            return self._chat(value, row_id, images, source)
        text, count, ends = self._documents(self._string(value, "text"))
        if not count and self.dataset.images_first:
            text, count = f"{self.family.placeholder_unit}\n" * len(images) + text, len(images)
        check_image_count(count, len(images), self._remedy)
        return Document(row_id, text, images, add_special_tokens=True, ends=ends)

    def _documents(self, text: str) -> tuple[str, int, bool]:
        """The text of a `pretrain` row, its images, and whether it ends with the end of a document, which it then
        does not hold: it is appended once, whoever wrote it."""
        join, end = self.dataset.join_documents, self._end
        written = text.rstrip()
        closing = next((mark for mark in (join, end) if mark and written.endswith(mark)), "")
        if closing:
            text = written.removesuffix(closing)
        pieces = [self._units(piece, "text") for piece in (text.split(join) if join else [text])]
        if len(pieces) > 1 and not end:
            raise RowError("special_token_in_text", "join_documents: the tokenizer has no end-of-document token")
        return end.join(piece for piece, _ in pieces), sum(count for _, count in pieces), bool(closing)

    def _plain(self, text: str) -> str:
        """A text as it may be read: the model's own token for an image as its words (`own_token_text`)."""
        plain = self.dataset.own_token_text
        return text if plain is None else text.replace(self.family.placeholder, plain)

    @property
    def _remedy(self) -> str:
        """What to do where a text speaks of the placeholder."""
        if self.dataset.placeholder in (self.family.placeholder, self.family.placeholder_unit):
            return f"where a text only speaks of {self.family.placeholder!r}, set the set's own_token_text"
        return (
            f"where a text only speaks of {self.dataset.placeholder!r}, give the set another one (placeholder: "
            "'<|page|>')"
        )

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
        pieces = self._placeholders.split(self._plain(text))
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
        """The picture that a part of a message names. Raises RowError where it names several."""
        pages = self._with_pages((image_ref(entry, root),))
        if len(pages) != 1:
            raise RowError(
                "placeholder_count",
                f"a part of a message names {len(pages)} pages, {entry!r:.60}; give each page a part",
            )
        return pages[0]

    def _check_written(self, rendered: RenderedChat) -> tuple[str, ...]:
        """The notes of a chat. Raises RowError unless the template writes everything that it says."""
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
        if plan.drops_tools:
            raise RowError(
                "not_written", "the chat template leaves out the row's tools; take a template that writes them"
            )
        for number in plan.lost_messages:
            raise RowError(
                "not_written", f"message {number} (assistant) is empty, and the chat template writes no turn of it"
            )
        return tuple(notes)

    def _typed(self, chat: Chat) -> tuple[tuple[tuple[str, str], ...], str]:
        """Markers of turns that stand in messages, and the text without them."""
        if self._markers is None:
            return (), ""
        found = [(number, self._markers.found(message.parts)) for number, message in enumerate(chat.messages)]
        typed = tuple((f"message {number}", marker) for number, own in found for marker in own)
        if not typed:
            return (), ""
        blanked = [replace(message, parts=self._markers.blanked(message.parts)) for message in chat.messages]
        return typed, self._template.plain_text(replace(chat, messages=tuple(blanked)))

    def _unread(self, name: str) -> str:
        known = ", ".join(sorted(self._template.variables - _ALWAYS_THERE)) or "none"
        return f"the chat template reads no {name!r}; it reads {known}"


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


_ALWAYS_THERE = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "pad_token"})


def check_image_count(placeholders: int, images: int, remedy: str = "") -> None:
    """Raise RowError unless the row has one image for each placeholder. remedy: where there are too many."""
    if placeholders != images:
        more = f"; {remedy}" if remedy and placeholders > images else ""
        raise RowError(
            "placeholder_count",
            f"{placeholders} image placeholders but {images} images; every image needs exactly one placeholder{more}",
        )
