"""Start a function on several ranks: new processes, gloo, results and errors brought back.

They are forked from one that has imported what they need, which would take each of them 7 s.
"""

import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.mmray.training.converter import converter_at_hand

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.mmray.training.imported"])


class RankGroup:
    """A running function on `world_size` new processes; `results()` waits for them."""

    def __init__(
        self, world_size: int, function: Callable[..., Any], *arguments: Any, backend: str = "gloo",
        new_python: bool = False,
    ) -> None:  # fmt: skip
        """Starts the ranks. backend: with nccl each has the GPU of its number. new_python: each rank's first checkpoint
        of another number of ranks is converted by a new Python, as outside tests."""
        self._folder = tempfile.TemporaryDirectory()
        self._processes = [
            _CONTEXT.Process(
                target=_run, args=(rank, world_size, self._folder.name, function, arguments, backend, new_python)
            )
            for rank in range(world_size)
        ]
        for process in self._processes:
            process.start()

    def results(self, timeout_seconds: float = 1200) -> list[Any]:
        """What the function returned on each rank. Fails with the ranks' traces, or when they hang."""
        deadline = time.monotonic() + timeout_seconds
        try:
            while any(process.is_alive() for process in self._processes) and time.monotonic() < deadline:
                if any(process.exitcode not in (None, 0) for process in self._processes):
                    break  # the others would wait for it for minutes
                time.sleep(0.1)
            codes = [process.exitcode for process in self._processes]
            errors = [path.read_text() for path in sorted(Path(self._folder.name).glob("error-*"))]
            assert not errors, "\n".join(errors)
            assert not any(codes), f"ranks died with exit codes {codes}"
            hung = [rank for rank, code in enumerate(codes) if code is None]
            assert not hung, f"ranks {hung} hang after {timeout_seconds} s"
            files = [Path(self._folder.name) / f"result-{rank}.pt" for rank in range(len(self._processes))]
            return [torch.load(file, weights_only=False) for file in files]
        finally:
            for process in self._processes:
                process.kill()
                process.join()
            self._folder.cleanup()


def _run(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...], backend: str,
    new_python: bool,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    with converter_at_hand(first_in_new_python=new_python):
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        try:
            torch.save(function(rank, world_size, *arguments), f"{folder}/result-{rank}.pt")
            # An exit closes connections that another rank may still need for its last collective.
            while len(list(Path(folder).glob("result-*"))) < world_size:
                time.sleep(0.05)
        except BaseException:
            Path(f"{folder}/error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
            raise
        dist.destroy_process_group()
