"""The `erase` command, a file a group of commands. Heavy imports happen inside them: `erase --help` is instant."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from erase.cli import evaluate, files, generate, inspect, listing, pages, run  # noqa: F401  # they name their commands
from erase.cli.common import Stopped, app, let_the_first_speak, speaks

_USAGE: Any = typer.BadParameter.__base__
"""What is wrong with the words of a command: of click, or of typer's own copy of it."""
_EXPECTED = (ValueError, KeyError, OSError, ImportError, RuntimeError, typer.Abort)
_UNFORESEEN = (AttributeError, TypeError)
"""Of input that nothing was ready for."""


def main() -> None:
    """Run the command; what a user can mend is one line on stderr and exit status 2, a full disk too.

    A signal's status is 143 (SIGTERM) or 130 (SIGINT).
    """
    try:
        status = app(standalone_mode=False, prog_name="erase")
    except Stopped as stopped:
        if speaks():
            sys.stderr.write(f"erase: stopped by {stopped.name}; resume with: {stopped.again}\n")
        raise
    except _USAGE as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            sys.stderr.write(f"erase: {_usage(error)}\n")
        raise SystemExit(2) from None
    except (*_EXPECTED, *_UNFORESEEN) as error:
        if os.environ.get("ERASE_DEBUG"):
            raise
        let_the_first_speak(error)
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        line = " ".join(text.split()) or type(error).__name__
        if isinstance(error, _UNFORESEEN):
            line = f"{type(error).__name__}: {line} (ERASE_DEBUG=1 tells where)"
        sys.stderr.write(f"erase: {line}\n")
        raise SystemExit(2) from None
    raise SystemExit(status if isinstance(status, int) else 0)


def _usage(error: Any) -> str:
    """What is wrong with the words of a command, and where to read of the right ones."""
    said = " ".join(error.format_message().split()).rstrip(".")
    where = "erase" if error.ctx is None else error.ctx.command_path
    return f"{said[:1].lower()}{said[1:]}; see {where} -h"
