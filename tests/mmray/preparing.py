"""A prepare in one process, without Ray: what pipelines/prepare.py does on actors, for tests."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image

from mmray.families import family_of
from mmray.images import TilingPolicy
from mmray.masks.settings import MaskingSettings, label_maker
from mmray.packing_settings import PackingSettings
from mmray.prepared import PreparedDataset, PreparedWriter
from mmray.prepared.fingerprint import prepare_record
from mmray.prepared.window import Window, pack_window, samples_table
from mmray.rows.encode import Encoder, RejectedRow, Sample
from mmray.rows.files import plan_chunks, source_files
from mmray.rows.read import RawRow, read_piece
from mmray.rows.settings import DatasetSettings, DataSettings

PACKING = PackingSettings(token_capacity=512, visual_capacity=256)
PICTURES = {"page.png": (170, 220), "wide.png": (220, 170), "small.png": (40, 60), "strip.png": (30, 400)}


class Preparation:
    """One job's settings with a processor: encodes rows, packs windows, writes prepared datasets."""

    def __init__(
        self, processor: Any, *datasets: dict[str, Any], tiling: TilingPolicy | dict[str, Any] | None = None,
        packing: PackingSettings = PACKING, masking: MaskingSettings | None = None, **data: Any,
    ) -> None:  # fmt: skip
        self.tiling = TilingPolicy.model_validate(tiling or {})
        self.data = DataSettings(train=tuple(DatasetSettings(**each) for each in datasets), **data)
        self.packing, self.masking = packing, masking or MaskingSettings()
        self.family = family_of(processor, tiled=self.tiling.is_tiled)
        self.policy = self.family.resolve_tiling(self.tiling)
        self.labels = label_maker(self.masking, self.family)
        self.encoder = Encoder(
            self.data, self.data.train, self.family, self.policy, packing, train_on_inputs=self.masking.train_on_inputs
        )

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
        return pack_window(samples_table(list(results)), self.packing, self.labels)

    @property
    def record(self) -> dict[str, Any]:
        return prepare_record(
            files=source_files(self.data.train), datasets=self.data.train,
            max_image_pixels=self.data.max_image_pixels, processor=self.family.processor, tiling=self.policy,
            packing=self.packing, masking=self.masking,
        )  # fmt: skip

    def windows(self) -> Iterator[tuple[int, list[Sample | RejectedRow]]]:
        """The encoded rows of each window of the files."""
        chunks = plan_chunks(
            source_files(self.data.train), window_rows=self.packing.window_rows, chunk_rows=self.packing.chunk_rows
        )
        for window in range(chunks[-1].window + 1):
            pieces = [piece for chunk in chunks if chunk.window == window for piece in chunk.pieces]
            yield window, self.encoder.encode([row for piece in pieces for row in read_piece(piece)])

    def write(self, path: Path | str) -> PreparedDataset:
        """Prepare the files into a folder, as a job does: only what is missing."""
        writer, record = PreparedWriter(str(path)), self.record
        if writer.is_finished(record):
            return PreparedDataset(str(path))
        finished = writer.begin(record)
        number = -1
        for number, results in self.windows():
            if number not in finished:
                writer.write_window(number, self.window(results))
        return self.finish(writer, number + 1)

    def finish(self, writer: PreparedWriter, num_windows: int) -> PreparedDataset:
        capacities = (self.packing.token_capacity, self.packing.visual_capacity)
        facts = {"seconds": 1.5}
        return writer.finish(self.record, num_windows, tiling=self.policy, capacities=capacities, facts=facts)


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
