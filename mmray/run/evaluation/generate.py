"""Generation for rows together: prompts of like length are padded on the left, and a key cache is kept.

A row's text is what the model would write for it alone, up to rounding: padding is masked, and positions are counted
without it. Families whose rows cannot be padded (`Family.pads_prompts`) are read one row at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from mmray.loss.sources import ending_token_ids
from mmray.run.evaluation.prompts import PromptCutter, ReadingTask, in_row
from mmray.run.scoring.settings import GenerateSettings
from mmray.training.attention_paths import plain_attention


@dataclass(frozen=True)
class Written:
    """A text that a model wrote for a task: its tokens without the last one, which ended it, and whether one did."""

    token_ids: tuple[int, ...]
    text: str
    stopped: bool


class TextGenerator:
    """Writes texts with a model, for tasks of one family."""

    def __init__(
        self, model: PreTrainedModel, cutter: PromptCutter, settings: GenerateSettings, *, dtype: torch.dtype,
        device: torch.device, stop_token_ids: Sequence[int] = (), synced: bool = False,
    ) -> None:  # fmt: skip
        """Binds a model in evaluation mode.

        stop_token_ids: tokens that end a text, besides those that ended turns and documents in training.
        synced: whether all ranks call `write` equally often, each call with images or each without: under ZeRO-3 they
        then go on together until the last has finished.
        """
        self.model, self.family, self._cutter, self._settings = model, cutter.family, cutter, settings
        self._dtype, self._device, self._synced = dtype, device, synced
        stops = {*stop_token_ids, *ending_token_ids(self.family), self.family.tokenizer.eos_token_id}
        self.stop_token_ids = tuple(sorted(token for token in stops if token is not None))

    def batches(self, tasks: Sequence[ReadingTask]) -> list[list[int]]:
        """The numbers of tasks that are written at once: those of like length, with images or without."""
        order = sorted(range(len(tasks)), key=lambda number: (not tasks[number].tiles, len(tasks[number].prompt_ids)))
        most = self._settings.batch_rows if self.family.pads_prompts else 1
        batches: list[list[int]] = []
        for number in order:
            last = batches[-1] if batches else []
            if last and len(last) < most and bool(tasks[last[0]].tiles) == bool(tasks[number].tiles):
                last.append(number)
            else:
                batches.append([number])
        return batches

    def write_all(self, tasks: Sequence[ReadingTask]) -> list[Written]:
        """Generates a text for each task; returns them in order."""
        written: dict[int, Written] = {}
        for numbers in self.batches(tasks):
            written.update(zip(numbers, self.write([tasks[number] for number in numbers])))
        return [written[number] for number in range(len(tasks))]

    def write(self, tasks: Sequence[ReadingTask]) -> list[Written]:
        """Generates a text for each task of one batch, whose prompts all have images or all have none."""
        limits = [task.most_tokens(self._settings) for task in tasks]
        inputs = self._inputs(tasks)
        with plain_generation(self.model):
            output = self.model.generate(  # type: ignore[operator]
                **inputs, generation_config=self._config(max(limits)), synced_gpus=self._synced
            )
        new = output[:, inputs["input_ids"].shape[1] :].cpu()
        return [self._written(row[:limit]) for row, limit in zip(new, limits)]

    def _written(self, row: Tensor) -> Written:
        ends = [place for place, token in enumerate(row.tolist()) if token in self.stop_token_ids]
        made = row[: ends[0]] if ends else row
        return Written(tuple(made.tolist()), self._cutter.text(made), bool(ends))

    def _inputs(self, tasks: Sequence[ReadingTask]) -> dict[str, Any]:
        """The model's arguments: token ids and their mask, int64 [tasks, longest], and the pictures of all rows."""
        longest = max(len(task.prompt_ids) for task in tasks)
        ids = torch.full((len(tasks), longest), self.family.padding_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, task in enumerate(tasks):
            ids[row, longest - len(task.prompt_ids) :] = torch.from_numpy(task.prompt_ids)
            mask[row, longest - len(task.prompt_ids) :] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        tiles = [tile for row, task in enumerate(tasks) for tile in in_row(task, row)]
        frames = [frame.to(self._device) for task in tasks for frame in task.frames]
        prompt = self.family.prompt_inputs(ids, mask, tiles, frames, self._dtype, self.model)
        return {"input_ids": ids, "attention_mask": mask} | prompt

    def _config(self, max_new_tokens: int) -> GenerationConfig:
        sampling = self._settings.temperature > 0
        return GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=sampling, use_cache=True, eos_token_id=list(self.stop_token_ids),
            pad_token_id=self.family.padding_id, **({"temperature": self._settings.temperature} if sampling else {}),
        )  # fmt: skip


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Sets aside the model's own generation settings inside the block: transformers would fill in from them what a
    call leaves open, such as a penalty on repetitions, with which no text can be read that repeats a word. Attention
    goes by masks and a key cache there (`plain_attention`)."""
    own_config = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with torch.no_grad(), plain_attention(model):
            yield
    finally:
        model.generation_config = own_config
