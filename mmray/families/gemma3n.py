"""Gemma 3n: Gemma 3's turns and one picture size; its attention is causal, so that positions keep samples apart.

The template writes the token that carries a feature for an image, not the one that opens it. Audio is not read.
"""

import functools
from typing import Any

from mmray.families.gemma3 import GemmaText
from mmray.families.parts import Parts


class Gemma3n(GemmaText):
    """Gemma 3n (audio is not read): nothing beside the positions."""

    model_types = ("gemma3n",)
    processor_classes = ("Gemma3nProcessor",)
    module_names = Parts(
        vision=("model.vision_tower",),
        projector=("model.embed_vision",),
        embeddings=(
            "model.language_model.embed_tokens",
            "model.language_model.embed_tokens_per_layer",
            "lm_head",
        ),
        audio=("model.audio_tower", "model.embed_audio"),
    )

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        self.placeholder = self.placeholder_unit = processor.image_token
        super().__init__(processor, tiled)
        self.image_token_id = self.placeholder_id

    @functools.cached_property
    def media_token_ids(self) -> tuple[int, ...]:
        tokenizer = self.tokenizer
        audio = self.known_token_ids([tokenizer.boa_token, tokenizer.audio_token, tokenizer.eoa_token])
        return (*super().media_token_ids, *audio)
