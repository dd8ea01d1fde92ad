"""Greedy generation in this process: the text a model writes for a page, until it stops as it was trained to.

It is meant for a few rows of an exported folder. Rows are read one at a time: without padding no row's answer depends
on its neighbours.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig

import mmray
from mmray.loss.sources import ending_token_ids
from mmray.run.evaluation.generate import plain_generation
from mmray.run.export.prompting import Picture


class Reader:
    """A model from a folder that `mmray export` wrote, prompted as in its training."""

    def __init__(
        self, folder: str, *, device: torch.device | str = "cpu", attention: str = "sdpa",
        trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        """Loads the model. folder: a local path; attention: an attention implementation of transformers.

        Raises UserError where `mmray export` did not write the folder.
        """
        self.prompt = mmray.prompt(folder, trust_remote_code=trust_remote_code)
        load: Any = AutoModelForImageTextToText.from_pretrained
        self.model = (
            load(folder, dtype="auto", attn_implementation=attention, trust_remote_code=trust_remote_code)
            .to(device)
            .eval()
        )
        self.stop_token_ids = self._stop_token_ids()

    def read(
        self, text: str | None = None, images: Sequence[Picture] = (), *,
        messages: Sequence[dict[str, Any]] | None = None, max_new_tokens: int,
    ) -> str:  # fmt: skip
        """The text that the model writes after a prompt (as for `mmray.prompt`), without special tokens.

        max_new_tokens: tokens after which generation stops. Raises the errors of a prompt.
        """
        inputs = self.prompt(text, images, messages=messages).to(self.model.device)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=list(self.stop_token_ids),
            pad_token_id=self.prompt.family.padding_id,
        )  # fmt: skip
        with plain_generation(self.model):
            output = self.model.generate(**inputs, generation_config=config)
        return self.prompt.decode(output[0, inputs["input_ids"].shape[1] :])

    def _stop_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens with which documents and assistant turns ended in training, and those of the model's own
        settings."""
        eos = self.model.generation_config.eos_token_id
        family = self.prompt.family
        ids = [*ending_token_ids(family), family.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
        return tuple(sorted({token for token in ids if token is not None}))
