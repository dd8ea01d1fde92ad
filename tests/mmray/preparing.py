"""Rows, windows and prepared datasets of a processor, for tests that have no job."""

import copy
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image

from mmray.families import Family, family_of
from mmray.images import TilingPolicy
from mmray.images.size_cache import KeptSizes
from mmray.loss.labels import LabelMaker
from mmray.loss.settings import Loss
from mmray.packing.settings import PackingSettings
from mmray.prepared import PreparedDataset, PreparedWriter, WindowWriter
from mmray.prepared.driver import RunWindows, prepare_files
from mmray.prepared.stages import PrepareContext, WindowPacker
from mmray.prepared.versions import labels_record
from mmray.prepared.window import Window, samples_table
from mmray.rows.dealing import dealing_of
from mmray.rows.files import Chunk, set_files, source_files
from mmray.rows.plan import plan_chunks
from mmray.rows.read import RawRow, chunk_rows
from mmray.rows.sample import RejectedRow, Sample
from mmray.rows.settings import DatasetSettings, DataSettings
from mmray.storage import Folder

PACKING = PackingSettings(token_capacity=512, visual_capacity=256)
PICTURES = {"page.png": (170, 220), "wide.png": (220, 170), "small.png": (40, 60), "strip.png": (30, 400)}


def png(picture: Image.Image) -> dict[str, bytes]:
    """A picture as rows hold it."""
    buffer = io.BytesIO()
    picture.save(buffer, "png", compress_level=1)
    return {"bytes": buffer.getvalue()}


class Preparation:
    """One job's settings with a processor: encodes rows, packs windows, writes prepared datasets."""

    def __init__(
        self, processor: Any, *datasets: dict[str, Any], tiling: TilingPolicy | dict[str, Any] | None = None,
        packing: PackingSettings = PACKING, loss: Loss = "sampled", **data: Any,
    ) -> None:  # fmt: skip
        settings = DataSettings(train=tuple(DatasetSettings(**each) for each in datasets), **data)
        self.tiling = TilingPolicy.model_validate(tiling or {})
        known = isinstance(processor, Family)
        family = processor if known else family_of(processor, tiled=self.tiling.is_tiled)
        self.context = PrepareContext(
            "train", "", settings.train, settings, packing, loss, family, family.resolve_tiling(self.tiling)
        )  # fmt: skip
        self.encoder = self.context.encoder(settings, None)

    @property
    def data(self) -> DataSettings:
        return self.context.data

    @property
    def packing(self) -> PackingSettings:
        return self.context.packing

    @property
    def loss(self) -> Loss:
        return self.context.loss

    @property
    def family(self) -> Family:
        return self.context.family

    @property
    def policy(self) -> TilingPolicy:
        return self.context.tiling

    @property
    def labels(self) -> LabelMaker:
        return self.context.labels()

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
        return WindowPacker(self.context, "").pack(samples_table(list(results)))

    @property
    def record(self) -> dict[str, Any]:
        return self.context.record(source_files(self.data.train))

    def windows(self) -> Iterator[tuple[int, list[Sample | RejectedRow]]]:
        """The encoded rows of each window of the files, dealt as for a new dataset."""
        self.context = self.context.dealt(dealing_of(self.record))
        chunks = plan_chunks(
            source_files(self.data.train), window_rows=self.packing.window_rows, chunk_rows=self.packing.chunk_rows,
            dealing=self.context.dealing,
        )  # fmt: skip
        for number, window in itertools.groupby(chunks, lambda chunk: chunk.window):
            yield number, [result for chunk in window for result in self.encoder.encode(list(chunk_rows(chunk)))]

    def packed_windows(self) -> dict[int, Window]:
        """The windows of the files, by number."""
        return {number: self.window(results) for number, results in self.windows()}

    def write(self, path: Path | str, **options: Any) -> PreparedDataset:
        """Prepare the files into a folder, as a job does. options: of `prepare_files`."""
        context = replace(self.context, path=str(path))
        return prepare_files(context, source_files(self.data.train), **options)[0]

    def finish(self, writer: PreparedWriter, num_windows: int) -> PreparedDataset:
        capacities = (self.packing.token_capacity, self.packing.visual_capacity)
        facts = {
            "model_family": type(self.family).__name__, "model_type": None, "processor_source": None,
            "loss_sources": [source.value for source in self.encoder.sources],
            "labels": labels_record(self.labels, [source.value for source in self.encoder.sources]),
            "set_files": set_files(source_files(self.data.train), len(self.data.train)),
        }  # fmt: skip
        return writer.finish(self.record, num_windows, tiling=self.policy, capacities=capacities, facts=facts)


def committing(windows: Mapping[int, Window]) -> RunWindows:
    """A way of making windows, each in one chunk, that commits these."""

    def run_windows(
        context: PrepareContext, token: str, chunks: Sequence[Chunk], _sizes: KeptSizes | None
    ) -> Iterator[int]:
        for chunk in chunks:
            WindowWriter(context.path, token).write(chunk.window, windows[chunk.window])
            yield chunk.window

    return run_windows


def contents(folder: Path | str) -> dict[str, bytes]:
    """The files of a folder by name; of a manifest all but the time that preparing took."""
    files = Folder(str(folder))
    data = {name: files.read(name) for name in files.names()}
    if "manifest.json" in data:
        manifest = json.loads(data["manifest.json"])
        data["manifest.json"] = json.dumps({key: manifest[key] for key in manifest if key != "seconds"}).encode()
    return data


def other_packing(preparation: Preparation, max_rejected_share: float = 0.05, **changes: Any) -> Preparation:
    """The same job with another setting of packing."""
    dataset = preparation.data.train[0].model_dump()
    packing = preparation.packing.model_copy(update=changes)
    return Preparation(
        preparation.family.processor, dataset, packing=packing, max_rejected_share=max_rejected_share
    )  # fmt: skip


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
    marked = copy.copy(processor)
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
