"""Micro-batches and their inputs are there before their turn, in order; no error or stop leaves a thread waiting."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from mmray.batches.ahead import InputsAhead, StepsAhead
from mmray.batches.micro_batch import DeviceInputs, MicroBatch, Place, mask, render
from mmray.packing.settings import PackingSettings
from tests.mmray.noise import noise
from tests.mmray.preparing import Preparation, write_rows

CPU = torch.device("cpu")
PATIENCE = 60
"""Seconds after which an event that never comes fails a test."""


class Source:
    """Items 0, 1, 2, …, with an event for each that is set when it is asked for."""

    def __init__(self, count: int, broken: int | None = None) -> None:
        self.asked = [threading.Event() for _ in range(count + 1)]
        self.broken, self.closed = broken, threading.Event()

    def items(self) -> Iterator[int]:
        try:
            for number, asked in enumerate(self.asked[:-1]):
                asked.set()
                if number == self.broken:
                    raise OSError("the store is gone")
                yield number
            self.asked[-1].set()
        finally:
            self.closed.set()


def test_a_step_is_asked_for_when_the_one_before_it_is_taken() -> None:
    source = Source(4)
    steps = StepsAhead(source.items())
    assert source.asked[0].wait(PATIENCE), "before anyone takes it"
    assert next(steps) == 0
    assert source.asked[1].wait(PATIENCE), "while step 0 is computed"
    assert not source.asked[2].is_set(), "a rank holds two steps, not three"
    assert list(steps) == [1, 2, 3]
    assert source.closed.wait(PATIENCE)


def test_an_error_of_the_source_comes_at_its_turn_and_stays() -> None:
    steps = StepsAhead(Source(3, broken=1).items())
    assert next(steps) == 0
    for _ in range(2):
        with pytest.raises(OSError, match="the store is gone"):
            next(steps)


def test_a_run_that_stops_takes_nothing_more() -> None:
    source = Source(9)
    steps = StepsAhead(source.items())
    assert next(steps) == 0
    assert source.asked[1].wait(PATIENCE)
    steps.close()
    assert source.closed.wait(PATIENCE)
    assert not source.asked[3].is_set()


class Numbered(MicroBatch):
    """A micro-batch whose only input is its number; `made` is set when that is made, also where it fails."""

    def __init__(self, number: int, fails: bool = False) -> None:
        self.number, self.fails, self.made = number, fails, threading.Event()
        self.labels = torch.tensor([[number]])
        self.made_ahead = None

    def inputs_on(self, device: torch.device, dtype: torch.dtype, config: PretrainedConfig) -> DeviceInputs:
        self.made.set()
        if self.fails:
            raise ValueError(f"micro-batch {self.number}")
        return DeviceInputs({"number": torch.tensor(self.number)}, self.labels + 100)

    def taken(self) -> int:
        return int(self.model_inputs(CPU, torch.float32, PretrainedConfig())["number"])


def added(*batches: Numbered) -> InputsAhead:
    inputs = InputsAhead(CPU, torch.float32, PretrainedConfig())
    for batch in batches:
        inputs.add(batch)
    return inputs


def test_one_micro_batch_is_made_before_its_turn() -> None:
    batches = [Numbered(number) for number in range(4)]
    inputs = added(*batches)
    for number, batch in enumerate(batches):
        assert batch.made.wait(PATIENCE), "while the one before it is computed"
        assert not any(later.made.is_set() for later in batches[number + 1 :])
        assert batch.taken() == number
        assert batch.labels.tolist() == [[number + 100]], "labels come with the inputs"
    assert batches[0].taken() == 0, "a second time they are made on the spot"
    inputs.close()


def test_an_error_in_making_inputs_comes_where_they_are_used() -> None:
    batches = [Numbered(0), Numbered(1, fails=True), Numbered(2)]
    inputs = added(*batches)
    assert batches[0].taken() == 0
    with pytest.raises(ValueError, match="micro-batch 1"):
        batches[1].taken()
    assert batches[2].taken() == 2
    inputs.close()


def test_inputs_that_nobody_uses_make_room_for_those_of_the_next_step() -> None:
    """A step without a trained token takes none of its inputs."""
    first, second = [Numbered(number) for number in range(3)], [Numbered(number) for number in range(3, 6)]
    inputs = added(*first, *second)
    assert first[0].made.wait(PATIENCE)
    inputs.give_up(first)
    assert [batch.taken() for batch in second] == [3, 4, 5]
    assert not first[2].made.is_set()
    inputs.close()


def test_what_is_made_ahead_is_the_same_to_the_bit(tmp_path: Path, processors: dict[str, Any]) -> None:
    noise((150, 90), 0).save(tmp_path / "page.png")
    rows = write_rows(tmp_path / "pages.jsonl", [{"id": "a", "text": "<image>\nTotal 12.50", "images": ["page.png"]}])
    preparation = Preparation(
        processors["qwen2_vl"],
        {"files": rows, "kind": "pretrain"},
        packing=PackingSettings(token_capacity=130, visual_capacity=130),
    )
    prepared = preparation.write(tmp_path / "prepared")
    rendered = render([prepared.bin(0)], Place(0, 0, 0), preparation.family, prepared.tiling)
    masked = mask(rendered, preparation.family, preparation.labels, CPU)
    ahead, here = (MicroBatch(masked, preparation.family) for _ in range(2))
    inputs = InputsAhead(CPU, torch.float32, PretrainedConfig())
    inputs.add(ahead)
    ours, theirs = (batch.model_inputs(CPU, torch.float32, PretrainedConfig()) for batch in (ahead, here))
    assert ours.keys() == theirs.keys()
    assert theirs["pixel_values"].numel() > 0
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value), name
    assert torch.equal(ahead.labels, here.labels)
    inputs.close()
