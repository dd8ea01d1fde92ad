"""DeepSpeed's converter, forked from a process that has imported it, for ranks that convert many small checkpoints.

Where a test asks for it, the first one of each rank is converted as ever, by a new Python, whose imports take 3 s.
"""

import contextlib
import io
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

from mmray.training.conversion import CONVERTER


@contextlib.contextmanager
def converter_at_hand(*, first_in_new_python: bool) -> Iterator[None]:
    """Conversions of this process, in the block, go through one that is forked now. Before threads are started."""
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(ours, theirs))
    process.start()
    theirs.close()
    run, first = subprocess.run, [first_in_new_python]

    def run_or_convert(command: list[str], **options: Any) -> Any:
        if CONVERTER not in command or (first and first.pop()):
            return run(command, **options)
        ours.send((command[command.index(CONVERTER) + 1 :], str(options["cwd"])))
        return subprocess.CompletedProcess(command, *ours.recv())

    try:
        with patch("subprocess.run", run_or_convert):
            yield
    finally:
        ours.close()
        process.join()


def _serve(ours: Connection, theirs: Connection) -> None:
    """Convert what is asked for; answer with an exit code and the output."""
    ours.close()
    with contextlib.suppress(EOFError):
        while True:
            sys.argv[1:], folder = theirs.recv()
            os.chdir(folder)
            code, output = 0, io.StringIO()
            with contextlib.redirect_stdout(output):
                try:
                    exec(CONVERTER, {})
                except BaseException:  # noqa: BLE001  as an interpreter does
                    code = 1
                    output.write(traceback.format_exc())
            theirs.send((code, output.getvalue()))
