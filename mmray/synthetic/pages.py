"""Page images with rows, written to a folder: training and held-out sets, and bad rows on purpose.

The folder looks like what a user brings: `pages.jsonl` (pre-training rows), `chat.jsonl` (conversations with
two images, one or none, and several turns), `eval.jsonl` (held out), and `pages/` with JPEG and PNG files of
several shapes, modes and EXIF orientations. What must come of the bad rows is in the returned `RowFile`s, so
that a demo or a test can check a prepare's statistics against them.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from mmray.synthetic.documents import Document, make_document
from mmray.synthetic.pictures import save_page, storage_of

NUM_EVAL_PAGES = 12
OVERSIZE_CHARACTERS = 100_000  # random letters: more than 30,000 tokens, whatever the tokenizer

Row = dict[str, Any]
Chat = tuple[int, list[Row]]  # number of images, messages


@dataclass(frozen=True)
class RowFile:
    """A JSONL file of rows.

    num_rows: number of lines, bad rows included.
    expected_rejects: reason -> number of rows that must be rejected for it; empty for the held-out set.
        "too_long" assumes a token capacity of at most 30,000.
    """

    path: Path
    num_rows: int
    expected_rejects: dict[str, int]

    @property
    def num_good_rows(self) -> int:
        """Number of rows that a prepare must pack."""
        return self.num_rows - sum(self.expected_rejects.values())


@dataclass(frozen=True)
class SyntheticPages:
    """The files that `write_pages` wrote. `folder` is the image root: paths in rows are relative to it."""

    folder: Path
    num_pages: int
    pages: RowFile
    chat: RowFile
    eval: RowFile


@dataclass(frozen=True)
class _Page:
    path: str  # relative to the folder
    document: Document


def write_pages(folder: str | Path, num_pages: int = 100, seed: int = 0) -> SyntheticPages:
    """Write `num_pages` training pages, 12 held-out ones, three row files and some broken images.

    `pages.jsonl` has a row for each page (one in ten holds the next page too), `chat.jsonl` a conversation
    for each second page, both with bad rows between the good. Same arguments and Pillow, same files.
    Raises ValueError for fewer than 2 pages.
    """
    if num_pages < 2:
        raise ValueError(f"num_pages must be at least 2, got {num_pages}")
    folder = Path(folder)
    (folder / "pages").mkdir(parents=True, exist_ok=True)
    pages = _write_images(folder, num_pages, seed, "train")
    held_out = _write_images(folder, NUM_EVAL_PAGES, seed, "eval")
    _write_broken_images(folder)

    page_rows = [_page_row(pages, index) for index in range(num_pages)]
    chat_rows = [_chat_row(pages, index) for index in range(num_pages // 2)]
    eval_rows = [_page_row([page], 0) | {"id": f"eval-{i:03d}"} for i, page in enumerate(held_out)]
    return SyntheticPages(
        folder=folder,
        num_pages=num_pages,
        pages=_write_rows(folder / "pages.jsonl", page_rows, _bad_page_rows(pages[0], seed)),
        chat=_write_rows(folder / "chat.jsonl", chat_rows, _bad_chat_rows(pages[0], seed)),
        eval=_write_rows(folder / "eval.jsonl", eval_rows, []),
    )


def _write_images(folder: Path, count: int, seed: int, split: str) -> list[_Page]:
    pages = []
    for index in range(count):
        storage, document = storage_of(index), make_document(seed, index, split)
        path = f"pages/{split}-{index:04d}{storage.suffix}"
        save_page(document, folder / path, storage)
        pages.append(_Page(path, document))
    return pages


def _write_broken_images(folder: Path) -> None:
    """Writes two files whose header cannot be read: a JPEG that ends within it, and noise with a JPEG's name."""
    (folder / "pages/broken-truncated.jpg").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00")
    (folder / "pages/broken-noise.jpg").write_bytes(Random("mmray noise").randbytes(2000))


# --- good rows ----------------------------------------------------------------------------------------------


def _page_row(pages: list[_Page], index: int) -> Row:
    """A pre-training row of page `index`; each tenth one, where there is a next page, holds that page too."""
    shown = pages[index : index + 2] if index % 10 == 9 else pages[index : index + 1]
    return {
        "id": f"page-{index:04d}",
        "text": "\n\n".join(f"<image>\n{page.document.text}" for page in shown),
        "images": [page.path for page in shown],
    }


def _chat_row(pages: list[_Page], index: int) -> Row:
    """Conversation `index`, about pages 2 * index and the next; the forms take turns."""
    shown = pages[2 * index : 2 * index + 2]
    form = (index + index // 5) % len(_CHAT_FORMS)  # shifted, so that each form meets all kinds of document
    num_images, messages = _CHAT_FORMS[form](*(page.document for page in shown))
    return {
        "id": f"chat-{index:04d}",
        "messages": messages,
        "images": [page.path for page in shown[:num_images]],
    }


def _transcription(page: Document, _: Document) -> Chat:
    return 1, [_parts("user", None, "Transcribe this page."), _say("assistant", page.text)]


def _short_answer(page: Document, _: Document) -> Chat:
    """A conversation with a system prompt, the question before the image, and the answer as parts."""
    question, answer = page.facts[0]
    turns = [_parts("user", f"{question} ", None), _parts("assistant", answer)]
    return 1, [_say("system", "You answer briefly."), *turns]


def _several_turns(page: Document, _: Document) -> Chat:
    (question, answer), *more = *page.facts, ("What kind of page is it?", page.kind)
    messages = [_parts("user", None, question), _say("assistant", answer)]
    for question, answer in more:
        messages += [_say("user", question), _say("assistant", answer)]
    return 1, messages


def _two_images(page: Document, other: Document) -> Chat:
    question = _parts("user", "First: ", None, " Second: ", None, " What are they?")
    return 2, [question, _say("assistant", f"{page.kind}, {other.kind}")]


def _text_alone(page: Document, other: Document) -> Chat:
    kinds = (page.kind, other.kind)
    answer = ", ".join(sorted(kinds))
    return 0, [_say("user", f"Put in order: {', '.join(kinds)}"), _say("assistant", answer)]


_CHAT_FORMS = (_transcription, _short_answer, _several_turns, _two_images, _text_alone)


def _say(role: str, text: str) -> Row:
    return {"role": role, "content": text}


def _parts(role: str, *parts: str | None) -> Row:
    """A message of parts: a string becomes a text, None an image."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


# --- bad rows -----------------------------------------------------------------------------------------------


def _bad_page_rows(page: _Page, seed: int) -> list[tuple[str, str]]:
    """Bad rows, each as (line, the reason it must be rejected for)."""
    text = f"<image>\n{page.document.text}"
    rows: list[tuple[Row, str]] = [
        ({"id": "bad-missing", "text": text, "images": ["pages/nowhere.jpg"]}, "image_missing"),
        ({"id": "bad-count", "text": f"<image>\n{text}", "images": [page.path]}, "placeholder_count"),
        ({"id": "bad-truncated", "text": text, "images": ["pages/broken-truncated.jpg"]}, "image_unreadable"),
        ({"id": "bad-noise", "text": text, "images": ["pages/broken-noise.jpg"]}, "image_unreadable"),
        ({"id": "bad-long", "text": f"<image>\n{_oversize(seed)}", "images": [page.path]}, "too_long"),
    ]
    return [(json.dumps(row), reason) for row, reason in rows] + [('{"id": "bad-json", "text": "<image>', "bad_json")]


def _bad_chat_rows(page: _Page, seed: int) -> list[tuple[str, str]]:
    """Bad rows, each as (line, the reason it must be rejected for)."""
    messages = [_parts("user", None, "Transcribe this page."), _say("assistant", page.document.text)]
    long = [_say("user", "Repeat: " + _oversize(seed)), _say("assistant", "No.")]
    broken = ["pages/broken-noise.jpg"]
    rows: list[tuple[Row, str]] = [
        ({"id": "bad-missing", "messages": messages, "images": ["pages/nowhere.png"]}, "image_missing"),
        ({"id": "bad-count", "messages": messages, "images": [page.path, page.path]}, "placeholder_count"),
        ({"id": "bad-noise", "messages": messages, "images": broken}, "image_unreadable"),
        ({"id": "bad-long", "messages": long, "images": []}, "too_long"),
    ]
    return [(json.dumps(row), reason) for row, reason in rows] + [("not a row at all", "bad_json")]


def _oversize(seed: int) -> str:
    letters = Random(f"mmray/{seed}/oversize").choices("abcdefghijklmnopqrstuvwxyz ", k=OVERSIZE_CHARACTERS)
    return "".join(letters)


def _write_rows(path: Path, rows: Iterable[Row], bad: list[tuple[str, str]]) -> RowFile:
    """Writes the rows, with the bad ones spread evenly between them."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for number, (line, _) in reversed(list(enumerate(bad))):
        lines.insert((number + 1) * len(lines) // (len(bad) + 1), line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return RowFile(path, len(lines), dict(Counter(reason for _, reason in bad)))
