"""One bin, shown to a person: which samples stand in it, their images, and which of their tokens are trained.

Whatever comes from the data is printed as text, never as markup and never as control characters of the terminal.
"""

from itertools import groupby

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmray.errors import UserError
from mmray.families import Family, family_of, load_processor
from mmray.masks.labels import IGNORE_INDEX, LossRule, segment_ids
from mmray.masks.settings import MaskingSettings, label_maker
from mmray.prepared import Bin, PreparedDataset
from mmray.prepared.fingerprint import differences, processor_record

TRAINED, UNTRAINED = "green", "dim"
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE_CONTROLS = _CONTROLS | dict.fromkeys(range(127, 160), 0xFFFD)


def print_bin(console: Console, prepared: PreparedDataset, bin_number: int, processor: str | None = None) -> None:
    """Print one bin: a line of counts, a table with a row for each sample, and with a processor also their text.

    processor: folder or hub name of the one the dataset was prepared with. Trained tokens are shown green, the others
    dim, runs of one media token as `[504 × <|image_pad|>]`. Raises UserError for a bin that is not there and for
    another processor.
    """
    if not 0 <= bin_number < len(prepared):
        raise UserError(f"{prepared.path} has {len(prepared)} bins, counted from 0; there is no bin {bin_number}")
    shown = prepared.bin(bin_number)
    family = None if processor is None else _family(prepared, processor)
    console.print(
        _plain(
            f"bin {bin_number} of {len(prepared):,}   bucket {shown.bucket}   {len(shown.input_ids):,} tokens   "
            f"{shown.visual_tokens:,} visual   {shown.trained_tokens:,} trained"
        )
    )
    if family is None:
        console.print(_table(shown, None))
        return
    trained = _trained(shown, prepared, family)
    console.print(_table(shown, trained))
    for number, (start, stop) in enumerate(_borders(shown)):
        console.print(_plain(f"\n{shown.sample_ids[number]}", "bold"))
        console.print(sample_text(shown.input_ids[start:stop], trained[start:stop], family))


def sample_text(input_ids: np.ndarray, trained: np.ndarray, family: Family) -> Text:
    """The text of one sample, coloured. input_ids: int [n]; trained: bool [n]."""
    tokenizer, media = family.tokenizer, set(family.media_token_ids)
    text = Text()
    # A run is either one media token over and over, or any other tokens of one colour, decoded together.
    repeated = [token_id if token_id in media else None for token_id in input_ids.tolist()]
    tokens = zip(input_ids.tolist(), zip(trained.tolist(), repeated))
    for (is_trained, media_id), run in groupby(tokens, lambda token: token[1]):
        ids = [token_id for token_id, _ in run]
        if media_id is None or len(ids) == 1:
            decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        else:
            decoded = f"[{len(ids)} × {tokenizer.convert_ids_to_tokens(media_id)}]"
        text.append_text(_plain(decoded, TRAINED if is_trained else UNTRAINED))
    return text


def _family(prepared: PreparedDataset, processor: str) -> Family:
    loaded = load_processor(processor)
    lines = differences(prepared.manifest["record"]["processor"], processor_record(loaded))
    if lines:
        raise UserError(f"{processor} is not the processor that {prepared.path} was prepared with: {'; '.join(lines)}")
    return family_of(loaded, tiled=prepared.tiling.is_tiled)


def _trained(shown: Bin, prepared: PreparedDataset, family: Family) -> np.ndarray:
    """Which tokens of the bin are trained, bool [L]."""
    maker = label_maker(MaskingSettings.model_validate(prepared.manifest["record"]["masking"]), family)
    lengths = torch.from_numpy(shown.sample_lengths.astype(np.int64))
    blocks = [(image["first_token"], image["num_tokens"]) for image in shown.images]
    labels = maker.labels(
        torch.from_numpy(shown.input_ids.astype(np.int64)),
        segment_ids(lengths),
        torch.repeat_interleave(torch.from_numpy(shown.sample_rules.astype(np.int64)), lengths),
        torch.from_numpy(shown.given.copy() if len(shown.given) else np.zeros(len(shown.input_ids), dtype=bool)),
        torch.tensor(blocks, dtype=torch.int64).reshape(-1, 2),
    )
    return (labels != IGNORE_INDEX).numpy()


def _table(shown: Bin, trained: np.ndarray | None) -> Table:
    """A row for each sample; trained tokens where they are known."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("id", "source", "loss on"):
        table.add_column(name, overflow="fold")
    for name in ("tokens", "of images", *(() if trained is None else ("trained",))):
        table.add_column(name, justify="right")
    table.add_column("images (width x height)", overflow="fold")
    for number, (start, stop) in enumerate(_borders(shown)):
        images = [image for image in shown.images if image["sample"] == number]
        counts = [stop - start, sum(image["num_tokens"] for image in images)]
        counts += [] if trained is None else [int(trained[start:stop].sum())]
        names = [f"{image['uri'] or 'bytes'} ({image['width']} x {image['height']})" for image in images]
        rule = LossRule(int(shown.sample_rules[number])).name.lower()
        words = (shown.sample_ids[number], shown.sample_sources[number], rule)
        table.add_row(*map(_plain, words), *(f"{count:,}" for count in counts), _plain("\n".join(names)))
    return table


def _borders(shown: Bin) -> list[tuple[int, int]]:
    """The first token of each sample, and the one after its last."""
    stops = shown.sample_lengths.cumsum().tolist()
    return list(zip([0, *stops], stops))


def _plain(text: str, style: str = "") -> Text:
    return Text(text.translate(_VISIBLE_CONTROLS), style=style)
