"""Processor inputs for pages and text, exactly as training made them: `mmray.prompt`.

A page becomes the tiles of the training's policy, the text what its rows became, and the processor is called so that it
takes each tile as it is. A default call of the processor resizes and splits anew: a tile of 512 pixels of granite
trained as 64 image tokens and becomes 1,088.
"""

import io
import itertools
import operator
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from mmray.base.settings import RowKind
from mmray.errors import RowError, UserError
from mmray.families import Tile, load_family
from mmray.images import ImageSource, image_size, plan_tiles, render_tiles
from mmray.loss.settings import SAMPLED_ROLE
from mmray.rows.document import Document, DocumentReader
from mmray.rows.encode import expanded_units
from mmray.rows.image_refs import ImageRef
from mmray.rows.settings import DatasetSettings
from mmray.run.export.sidecar import read_sidecar
from mmray.training.model import DTYPES

_SOURCE = "prompt:1"
_ANSWER = "Yes, it says so."
"""A stand-in for the answer, which shows what a chat's template writes before one."""

Picture = ImageSource | Image.Image
"""A path, a URI, bytes of an image file, or a picture that is decoded and upright."""


class Prompt:
    """Makes a model's inputs of pages and text, as in the training that a folder was exported from.

    >>> prompt = mmray.prompt("out/model")
    >>> inputs = prompt("<image>\\nTotal:", images=["page.png"])
    >>> output = model.generate(**inputs, max_new_tokens=100)
    >>> prompt.decode(output[0, inputs["input_ids"].shape[1] :])
    """

    def __init__(self, folder: str, *, trust_remote_code: bool = False) -> None:
        """Loads what `mmray export` wrote into a folder. Raises UserError for any other folder."""
        sidecar = read_sidecar(folder)
        self.policy, self.dtype = sidecar.tiling, DTYPES[sidecar.dtype]
        self.family = load_family(
            folder, tiled=self.policy.is_tiled, model_type=sidecar.model_type, trust_remote_code=trust_remote_code
        )

    def __call__(
        self, text: str | None = None, images: Sequence[Picture] = (), *,
        messages: Sequence[dict[str, Any]] | None = None,
    ) -> BatchFeature:  # fmt: skip
        """The keyword arguments of the model's `generate` for one prompt, a batch of one.

        text: as in a `pretrain` row, with an `<image>` for each image.
        messages: as in a `chat` row, without the answer that is asked for. Exactly one of text and messages is passed.
        images: in the order of their places.

        Raises UserError, with the field and the remedy, for a prompt that training would have refused, and the errors
        of `mmray.images.load_image` where an image cannot be read.
        """
        if (text is None) == (messages is None):
            raise UserError("give a prompt either text or messages")
        sources = [_source(image) for image in images]
        plans = [plan_tiles(image_size(source), self.policy) for source in sources]
        refs = [ImageRef(data=b"")] * len(sources)
        try:
            if messages is None:
                document = self._reader("pretrain").read({"text": text, "images": refs}, _SOURCE)
            else:
                document = self._asked(list(messages), refs)
        except RowError as error:
            raise UserError(f"the prompt: {error}") from error
        rendered = expanded_units(document.text, plans, self.family.placeholder_unit)
        tiles = [tile for source, plan in zip(sources, plans) for tile in render_tiles(source, plan)]
        special = document.add_special_tokens
        output = self.family.process(rendered, tiles, add_special_tokens=special, return_tensors="pt")
        inputs = {name: value for name, value in output.items() if name != "labels"}
        if messages is not None and (melting := self._melting_tokens(rendered)):
            length = inputs["input_ids"].shape[1]
            inputs = {
                name: value[:, :-melting] if value.shape == (1, length) else value for name, value in inputs.items()
            }
        return BatchFeature(inputs | self._pixels(tiles, inputs))

    def _asked(self, messages: list[dict[str, Any]], refs: list[ImageRef]) -> Document:
        """The text of a chat up to where the model answers, as it stands in a row with the answer.

        The template's generation prompt is used where it stands in that row, too: some templates write none, and
        LLaVA-OneVision's writes another one than before the answers that it was trained on.
        """
        answer = {"role": SAMPLED_ROLE, "content": _ANSWER}
        reader = self._reader("chat")
        answered = reader.read({"messages": [*messages, answer], "images": refs}, _SOURCE)
        before, _, _ = answered.text.rpartition(_ANSWER)
        asked = reader.read({"messages": messages, "images": refs}, _SOURCE)
        if asked.is_answered or not before:
            raise UserError("the prompt: the last message is the assistant's already; end with the user's")
        opened = self._reader("chat", opens_answer=True).read({"messages": messages, "images": refs}, _SOURCE)
        if opened.text != asked.text and before.startswith(opened.text):
            return opened
        return replace(asked, text=before)

    def _melting_tokens(self, text: str) -> int:
        """Number of white space tokens at a text's end that would merge with the answer after them.

        In training they were a part of the answer's first token, so they are left to the model.
        """
        if not text[-1:].isspace():
            return 0
        tail = text.split(self.family.placeholder_unit)[-1]
        backend = self.family.tokenizer.backend_tokenizer
        followed = [f"{tail}{letter}" for letter in string.ascii_letters]
        alone, *others = (
            encoding.ids for encoding in backend.encode_batch([tail, *followed], add_special_tokens=False)
        )
        same = (itertools.takewhile(bool, map(operator.eq, alone, ids)) for ids in others)
        return len(alone) - min(sum(matches) for matches in same)

    def _reader(self, kind: RowKind, *, opens_answer: bool = False) -> DocumentReader:
        dataset = DatasetSettings(files=(_SOURCE,), kind=kind)
        return DocumentReader(dataset, self.family, opens_answer=opens_answer)

    def decode(self, token_ids: torch.Tensor) -> str:
        """The text of generated tokens, int [n], without special ones."""
        text: str = self.family.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def _pixels(self, tiles: Sequence[Image.Image], inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The processor's pixel arguments, computed by mmray's own arithmetic and bit-equal to training."""
        if not tiles:
            return {}
        frames = [self.family.frames(tile, len(tiles)) for tile in tiles]
        sizes = [tuple((frame.shape[1], frame.shape[0]) for frame in of_tile) for of_tile in frames]
        planned = [Tile(0, tile.size, frame_sizes) for tile, frame_sizes in zip(tiles, sizes)]
        flat = [torch.from_numpy(frame.copy()) for of_tile in frames for frame in of_tile]
        pixels = self.family.pixel_inputs(planned, flat, self.dtype)
        return {name: value for name, value in pixels.items() if name in inputs and value.shape == inputs[name].shape}


def _source(image: Picture) -> ImageSource:
    """The input that mmray's readers take: a decoded picture becomes the bytes of a PNG file."""
    if not isinstance(image, Image.Image):
        return image
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "png")
    return buffer.getvalue()
