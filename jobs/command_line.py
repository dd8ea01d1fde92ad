"""The command line of every job: one line for a mistake, an end by a signal. It imports neither Ray nor torch."""

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import typer
from rich.console import Console

from mmray.base.command_help import PlainCommand
from mmray.errors import UserError

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130


def run_main(main: Callable[..., None]) -> NoReturn:
    """Run a job's command line: a mistake of the user is one red line and exit code 2, without a stack trace.

    SIGTERM, which `ray job stop` sends, ends it as Ctrl-C does. Either is exit code 130.
    """
    signal.signal(signal.SIGTERM, as_ctrl_c)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=PlainCommand)(main)
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_USER_ERROR)
    except Stopped as stop:
        Console(stderr=True).print(_escaped(str(stop)), highlight=False, soft_wrap=True)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        usage = getattr(error, "show", None)  # click's own messages about the command line
        if usage is None:
            raise
        usage()
        sys.exit(EXIT_USER_ERROR)
    if code == EXIT_INTERRUPTED:  # what typer makes of Ctrl-C
        Console(stderr=True).print("interrupted; the same command continues")
    sys.exit(code if isinstance(code, int) else 0)


class Stopped(Exception):
    """The work was asked to stop and is saved so far; the message says where."""


def as_ctrl_c(_: int, frame: FrameType | None) -> None:
    """Handle a signal as whoever handles Ctrl-C now would: Ray Train first ends its workers.

    SIGINT itself would not arrive in a submitted job, where Ray blocks it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
