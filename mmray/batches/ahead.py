"""Brings a rank's micro-batches to its device before their turn, on threads, while a step is computed.

    source ─ (thread) StepsAhead: the next step's micro-batches ─ (thread) InputsAhead: the model's inputs of the next
    micro-batch, on the device ─ the step

`StepsAhead` asks the source for one step before its turn, so a rank holds the micro-batches of two steps. `InputsAhead`
makes the inputs of one micro-batch before its turn, also of the first of the next step. On a GPU it copies from pinned
memory on a stream of its own: neither the copies nor what a family reads back while it makes its inputs keep the step
waiting. What is made is the same to the bit.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mmray.batches.micro_batch import DeviceInputs, MicroBatch

AHEAD = 1
"""Number of micro-batches whose inputs are on the device before they are used, beside those in use."""

Item = TypeVar("Item")


class StepsAhead(Generic[Item]):
    """Takes the items of an iterator on a thread, each when the one before it is taken from here.

    An error of the iterator is raised at its item's turn.
    """

    def __init__(self, items: Iterator[Item]) -> None:
        """Begins at once. items: is used by the thread alone from now on, and closed by it."""
        self._items, self._closed = items, False
        self._room = threading.Semaphore(1)
        self._taken: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="steps-ahead", daemon=True).start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        is_item, value = self._taken.get()
        self._room.release()
        if is_item:
            item: Item = value
            return item
        self._taken.put((False, value))  # again, for whoever asks again
        raise value

    def close(self) -> None:
        """Takes nothing more. Does not wait for an item that the thread is waiting for."""
        self._closed = True
        self._room.release()

    def _work(self) -> None:
        try:
            while True:
                self._room.acquire()
                if self._closed:
                    break
                self._taken.put((True, next(self._items)))
        except BaseException as error:  # noqa: BLE001 (raised where the item is asked for; StopIteration is one of them)
            self._taken.put((False, error))
        finally:
            if close := getattr(self._items, "close", None):
                close()


class InputsAhead:
    """Makes the model's inputs of micro-batches on a thread, in the order in which they are added."""

    def __init__(self, device: torch.device, dtype: torch.dtype, config: PretrainedConfig) -> None:
        """The arguments are those of `MicroBatch.model_inputs`."""
        self._device, self._dtype, self._config = device, dtype, config
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._room, self._closed = threading.Semaphore(AHEAD), False
        self._added: queue.SimpleQueue[tuple[MicroBatch, Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="inputs-ahead", daemon=True).start()

    def add(self, batch: MicroBatch) -> None:
        """Makes the inputs of a micro-batch when those added before it are used or given up."""
        future: Future[Any] = Future()
        batch.made_ahead = partial(self._take, future)
        self._added.put((batch, future))

    def give_up(self, batches: Sequence[MicroBatch]) -> None:
        """Forgets the inputs of those of some micro-batches that were not used.

        batches: in the order in which they were added. The last is forgotten first, so that the thread begins with none
        of the others meanwhile.
        """
        for batch in reversed(batches):
            if batch.made_ahead is not None:
                future: Future[Any] = batch.made_ahead.args[0]  # type: ignore[attr-defined]
                batch.made_ahead = None
                if not future.cancel():  # it is made, or about to be
                    future.exception()
                    self._room.release()

    def close(self) -> None:
        """Makes nothing more."""
        self._closed = True
        self._added.put(None)
        self._room.release()

    def _take(self, future: "Future[tuple[DeviceInputs, torch.cuda.Event | None]]") -> DeviceInputs:
        try:
            inputs, made = future.result()
        finally:
            self._room.release()
        if made is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(made)
            for tensor in _tensors((inputs.arguments, inputs.labels)):
                tensor.record_stream(stream)
        return inputs

    def _work(self) -> None:
        while (added := self._added.get()) is not None:
            batch, future = added
            self._room.acquire()
            if self._closed:
                break
            if not future.set_running_or_notify_cancel():
                self._room.release()
                continue
            try:
                future.set_result(self._made(batch))
            except BaseException as error:  # noqa: BLE001 (raised where the inputs are used)
                future.set_exception(error)
            del added, batch, future

    def _made(self, batch: MicroBatch) -> "tuple[DeviceInputs, torch.cuda.Event | None]":
        if self._stream is None:
            return batch.inputs_on(self._device, self._dtype, self._config), None
        with torch.cuda.stream(self._stream):
            inputs = batch.inputs_on(self._device, self._dtype, self._config)
            return inputs, self._stream.record_event()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)
