"""What tests of `mmray inspect` share: prepared rows worth looking at, and the labels that training makes of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmray.batches.micro_batch import Place, mask, render
from mmray.families import Family
from mmray.packing.settings import PackingSettings
from mmray.prepared import PreparedDataset
from tests.mmray.preparing import Preparation, chat, write_rows

PACKING = PackingSettings(token_capacity=900, visual_capacity=600)
ODD = "[bold red]not[/] [/markup] \x1b[31m \x9b \x07"


def drawn_page(size: tuple[int, int]) -> Image.Image:
    """A picture no two regions of which are alike: brightness by column, redness by row."""
    width, height = size
    across = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    down = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([down, across, 255 - across], axis=2).astype(np.uint8))


def write_looked_at(folder: Path) -> Path:
    """A folder with chat rows, document rows and the pictures of both."""
    drawn_page((170, 220)).save(folder / "page.png")
    drawn_page((40, 60)).save(folder / "small.png")
    rows = [
        chat("<image>What is it?", "A page.", "Sure?", "Yes, 日本 \N{GRINNING FACE}.", images=["page.png"], id="turns"),
        chat("Say it", ODD, id="[red]odd[/]\x1b[1m"),
    ]
    write_rows(folder / "chat.jsonl", rows)
    text = "<image>\nINVOICE\nUser: no turn<image>"
    write_rows(folder / "pretrain.jsonl", [{"id": "page", "text": text, "images": ["small.png"] * 2}])
    return folder


def preparation(
    processor: Any, folder: Path, *kinds: str, rows: Sequence[dict[str, Any]] | None = None, **options: Any
) -> Preparation:
    """A job over the files of `write_looked_at`; or over these rows, of the one kind given."""
    files = {kind: folder / f"{kind}.jsonl" for kind in kinds}
    if rows is not None:
        (kind,) = kinds
        files[kind] = folder / f"{len(list(folder.iterdir()))}.jsonl"
        write_rows(files[kind], rows)
    datasets = [{"files": (str(file),), "kind": kind} for kind, file in files.items()]
    return Preparation(processor, *datasets, **{"packing": PACKING} | options)


def name_processor(prepared: PreparedDataset, source: Path | str, model_type: str | None = None) -> PreparedDataset:
    """The dataset as a job leaves it: its manifest names the processor."""
    manifest = Path(prepared.path) / "manifest.json"
    facts = {"processor_source": str(source), "model_type": model_type}
    manifest.write_text(json.dumps(json.loads(manifest.read_text(encoding="utf-8")) | facts), encoding="utf-8")
    return PreparedDataset(prepared.path)


def training_labels(prepared: PreparedDataset, number: int, made: Preparation) -> np.ndarray:
    """The labels of a bin as training computes them, int64 [L], without what stands between and after its samples."""
    family: Family = made.family
    rendered = render([prepared.bin(number)], Place(0, 0, 0), family, prepared.tiling)
    masked = mask(rendered, family, made.labels, torch.device("cpu"))
    return masked.labels[~masked.padding.repeat(masked.lengths)]
