"""Writes rows from PDFs, one for each page (`mmray from-pdf`).

Nothing is rendered: a row names its page, which is rendered during training. With the text layer a page takes some
milliseconds, so finished files of a long list are recorded beside the result, and the same command continues there.
"""

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmray.errors import RowError, UserError
from mmray.images.paged import PageOfFile
from mmray.images.pdf import num_pages, page_text
from mmray.storage import explained, file_system

TEXT_FROM = "pdf"
"""The value of `text_from` in rows whose text is a text layer."""
_PARTIAL, _DONE = ".partial", b'{"done": '


@dataclass
class WrittenRows:
    """The result of writing rows from PDFs.

    rows: the number of pages written.
    without_text: the number of pages left out because they have no text layer.
    failed: the files that cannot be read, with the reason.
    image_root: the folder that a job must name; None where it need not name one.
    """

    rows: int = 0
    without_text: int = 0
    failed: list[str] = field(default_factory=list)
    image_root: str | None = None


def write_pdf_rows(
    files: Sequence[str], out: str, *, text: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> WrittenRows:  # fmt: skip
    """Writes a row for each page of PDFs to a JSONL file, which appears only when it is complete.

    files: paths, folders (all PDFs in and below them), globs and URIs.
    out: a local path.
    text: whether the text layer is written behind the placeholder.
    on_progress: called with the number of files done and the number of all files.

    Raises UserError where there is no PDF, or the file exists already.
    """
    target = Path(out).absolute()
    if "://" in out:
        raise UserError(f"{out}: rows are written to a local file; copy it to the store then")
    if target.exists():
        raise UserError(f"{out} is there already; remove it, or write to another file")
    documents = sorted(set(_documents(files)))
    local = [path for path in documents if "://" not in path]
    root = os.path.commonpath([os.path.dirname(path) for path in local]) if local else str(target.parent)
    is_below = f"{root}/".startswith(f"{target.parent}/")
    named = {path: path for path in documents} | {
        path: os.path.relpath(path, target.parent) for path in local if is_below
    }
    written = WrittenRows(image_root=None if is_below else root)
    partial = target.with_name(target.name + _PARTIAL)
    target.parent.mkdir(parents=True, exist_ok=True)
    done = _begin(partial, {"files": _hash(documents), "text": text})
    with partial.open("a", encoding="utf-8") as file:
        for number, path in enumerate(documents, 1):
            if path not in done:
                lines, facts = _rows(path, named[path], text)
                done[path] = facts
                file.write("".join(lines) + json.dumps({"done": path, **facts}) + "\n")
                file.flush()
            on_progress(number, len(documents))
    for facts in done.values():
        written.rows += facts["rows"]
        written.without_text += facts["without_text"]
        written.failed += [facts["failed"]] if facts["failed"] else []
    if not written.rows:
        partial.unlink()
        what = written.failed[0] if written.failed else "no page has a text layer; leave out --text"
        raise UserError(f"no row from {len(documents)} PDFs: {what}")
    _finish(partial, target)
    return written


def _documents(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        if "://" in name:
            scheme = name.partition("://")[0]
            with explained(name):
                system, path = file_system(name)
                paths = [f"{scheme}://{match}" for match in system.glob(path)] if glob.has_magic(path) else [name]
        elif os.path.isdir(name):
            paths = [str(path) for path in Path(name).rglob("*") if path.suffix.lower() == ".pdf"]
        else:
            paths = [name] if os.path.exists(name) else glob.glob(name, recursive=True)
        if not paths:
            raise UserError(f"{name}: no such PDF; name files, folders or globs")
        for path in paths:
            if not path.lower().endswith(".pdf"):
                raise UserError(f"{path}: its name does not end with .pdf, by which rows tell a PDF; rename it")
            yield path if "://" in path else os.path.abspath(path)


def _rows(path: str, name: str, text: bool) -> tuple[list[str], dict[str, Any]]:
    """Returns the lines of a document's rows, and its counts: rows, pages without text, reason of failure."""
    lines, without_text = [], 0
    try:
        for number in range(1, num_pages(path) + 1):
            layer = page_text(PageOfFile(path, number)) if text else ""
            if text and not layer:
                without_text += 1
                continue
            page = f"{name}#page={number}"
            row = {"id": page, "text": f"<image>\n{layer}" if text else "<image>", "images": [page]}
            lines.append(json.dumps(row | ({"text_from": TEXT_FROM} if text else {}), ensure_ascii=False) + "\n")
    except RowError as error:
        return [], {"rows": 0, "without_text": 0, "failed": str(error)}
    return lines, {"rows": len(lines), "without_text": without_text, "failed": ""}


def _begin(partial: Path, head: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the documents that an interrupted run of the same command has finished, with their counts.

    The lines of an unfinished document are cut off. Without such a run, a new partial file is begun.
    """
    done: dict[str, dict[str, Any]] = {}
    first, whole = (json.dumps(head) + "\n").encode(), 0
    with contextlib.suppress(FileNotFoundError), partial.open("rb") as file:
        if file.readline() == first:
            whole = file.tell()
            for line in iter(file.readline, b""):
                if line.startswith(_DONE) and line.endswith(b"\n"):
                    facts = json.loads(line)
                    done[facts.pop("done")] = facts
                    whole = file.tell()
    if not whole:
        partial.write_bytes(first)
    else:
        os.truncate(partial, whole)
    return done


def _finish(partial: Path, target: Path) -> None:
    """Writes the rows of a partial file, without the records of finished documents, under the target's name."""
    beside = partial.with_name(f".{target.name}")
    with partial.open("rb") as source, beside.open("wb") as file:
        next(source)
        file.writelines(line for line in source if not line.startswith(_DONE))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(target)
    partial.unlink()


def _hash(documents: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(documents).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
