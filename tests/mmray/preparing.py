"""A prepare in one process, without Ray: what pipelines/prepare.py does on actors, for tests."""

import copy
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image

from mmray.families import Family, family_of
from mmray.images import TilingPolicy
from mmray.loss.settings import Loss, allows_empty, label_maker
from mmray.packing.settings import PackingSettings
from mmray.prepared import PreparedDataset, PreparedWriter
from mmray.prepared.fingerprint import prepare_record
from mmray.prepared.window import Window, pack_window, samples_table
from mmray.rows.dealing import dealing_of
from mmray.rows.duplicates import chunk_id_hashes, with_duplicates
from mmray.rows.encode import Encoder
from mmray.rows.files import plan_chunks, source_files
from mmray.rows.read import RawRow, chunk_rows
from mmray.rows.sample import RejectedRow, Sample
from mmray.rows.settings import DatasetSettings, DataSettings
from mmray.storage import Folder

PACKING = PackingSettings(token_capacity=512, visual_capacity=256)
PICTURES = {"page.png": (170, 220), "wide.png": (220, 170), "small.png": (40, 60), "strip.png": (30, 400)}


class Preparation:
    """One job's settings with a processor: encodes rows, packs windows, writes prepared datasets."""

    def __init__(
        self, processor: Any, *datasets: dict[str, Any], tiling: TilingPolicy | dict[str, Any] | None = None,
        packing: PackingSettings = PACKING, loss: Loss = "sampled", **data: Any,
    ) -> None:  # fmt: skip
        self.tiling = TilingPolicy.model_validate(tiling or {})
        self.data = DataSettings(train=tuple(DatasetSettings(**each) for each in datasets), **data)
        self.packing, self.loss = packing, loss
        self.dealing: int | None = None
        """The way its rows are dealt, known with its windows."""
        known = isinstance(processor, Family)
        self.family = processor if known else family_of(processor, tiled=self.tiling.is_tiled)
        self.policy = self.family.resolve_tiling(self.tiling)
        self.labels = label_maker(loss, self.family)
        self.encoder = Encoder(self.data, self.data.train, self.family, self.policy, packing, loss=loss)

    def encode(
        self, *rows: Any, source: str = "/nowhere/rows.jsonl", verify: bool = True
    ) -> list[Sample | RejectedRow]:
        """The rows, as if they stood in a file of the first data set."""
        raw = [RawRow(f"{source}:{line}", 0, row) for line, row in enumerate(rows, start=1)]
        return self.encoder.encode(raw, verify=range(len(raw)) if verify else ())

    def sample(self, row: dict[str, Any], **options: Any) -> Sample:
        (result,) = self.encode(row, **options)
        assert isinstance(result, Sample), result
        return result

    def rejected(self, row: Any, **options: Any) -> RejectedRow:
        (result,) = self.encode(row, **options)
        assert isinstance(result, RejectedRow), result
        assert "\n" not in result.message
        return result

    def window(self, results: Iterable[Sample | RejectedRow]) -> Window:
        table, empty = samples_table(list(results)), allows_empty(self.loss)
        mixed = self.dealing is not None and self.dealing > 1
        return pack_window(table, self.packing, self.labels, self.family.sample_gap, empty, mixed=mixed)

    @property
    def record(self) -> dict[str, Any]:
        return prepare_record(
            files=source_files(self.data.train), datasets=self.data.train, data=self.data,
            processor=self.family.processor, tiling=self.policy, packing=self.packing, loss=self.loss,
        )  # fmt: skip

    def windows(self) -> Iterator[tuple[int, list[Sample | RejectedRow]]]:
        """The encoded rows of each window of the files."""
        self.dealing = self.dealing or dealing_of(self.record)
        chunks = plan_chunks(
            source_files(self.data.train), window_rows=self.packing.window_rows, chunk_rows=self.packing.chunk_rows,
            dealing=self.dealing,
        )  # fmt: skip
        if self.data.duplicate_ids == "reject":
            chunks = list(with_duplicates(chunks, [chunk_id_hashes(chunk, self.data.train) for chunk in chunks]))
        for number, window in itertools.groupby(chunks, lambda chunk: chunk.window):
            results = [self.encoder.encode(list(chunk_rows(chunk)), duplicates=chunk.duplicates) for chunk in window]
            yield number, list(itertools.chain(*results))

    def write(self, path: Path | str) -> PreparedDataset:
        """Prepare the files into a folder, as a job does: only what is missing."""
        writer = PreparedWriter(str(path))
        record = writer.as_begun(self.record)
        if writer.is_finished(record):
            writer.tidy()
            return PreparedDataset(str(path))
        finished = writer.begin(record)
        number = -1
        self.dealing = dealing_of(record)
        for number, results in self.windows():
            if number not in finished:
                writer.windows().write(number, self.window(results))
        return self.finish(writer, number + 1)

    def finish(self, writer: PreparedWriter, num_windows: int) -> PreparedDataset:
        capacities = (self.packing.token_capacity, self.packing.visual_capacity)
        facts = {"seconds": 1.5}
        return writer.finish(
            writer.as_begun(self.record), num_windows, tiling=self.policy, capacities=capacities, facts=facts
        )


def contents(folder: Path | str) -> dict[str, bytes]:
    """The files of a folder by name."""
    files = Folder(str(folder))
    return {name: files.read(name) for name in files.names()}


def other_packing(preparation: Preparation, **changes: Any) -> Preparation:
    """The same job with another setting of packing."""
    dataset = preparation.data.train[0].model_dump()
    packing = preparation.packing.model_copy(update=changes)
    return Preparation(preparation.family.processor, dataset, packing=packing)


def write_rows(path: Path | str, rows: Iterable[dict[str, Any]]) -> str:
    """Write rows as JSON lines to a path or URI."""
    with fsspec.open(str(path), "wb") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    return str(path)


def write_pictures(folder: Path) -> Path:
    """A folder with the small grey images of PICTURES."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in PICTURES.items():
        Image.new("L", size, 200).save(folder / name)
    return folder


def chat(*turns: str, images: Iterable[str] = (), **fields: Any) -> dict[str, Any]:
    """A chat row of strings, user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return {"messages": messages, "images": list(images), **fields}


_MARKED = """\
{%- macro said(message) -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- part['text'] if part['type'] == 'text' else 'IMAGE' -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- 'OPEN' + message['role'] + 'HEADER' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- said(message) + 'INSIDE' -}}
{%- endgeneration -%}
{{- 'OUTSIDE' -}}
{%- else -%}
{{- said(message) + 'INSIDE' + 'OUTSIDE' -}}
{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
"""


def with_marked_template(processor: Any, *, end_inside: bool = True) -> Any:
    """A copy of a processor whose chat template marks what the assistant says, and the end of its turn or not, as
    generated. Of the Qwen processors and those of granite-docling's form."""
    marked = copy.deepcopy(processor)
    is_qwen = "<|im_start|>" in processor.tokenizer.get_vocab()
    end = processor.tokenizer.eos_token
    words = {
        "OPEN": "<|im_start|>" if is_qwen else "<|start_of_role|>",
        "HEADER": "\n" if is_qwen else "<|end_of_role|>",
        "IMAGE": "<|vision_start|><|image_pad|><|vision_end|>" if is_qwen else "<image>",
        "INSIDE": end if end_inside else "",
        "OUTSIDE": "" if end_inside else end,
    }
    template = _MARKED
    for word, text in words.items():
        template = template.replace(word, text.replace("\n", "\\n"))
    marked.chat_template = template
    return marked


def blank_unseen(path: Path | str) -> None:
    """Overwrite a file with zeros, its size and time kept: only who opens it can tell."""
    path = Path(path)
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
