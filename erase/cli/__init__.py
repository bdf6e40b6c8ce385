"""The `erase` command, a file a group of commands. Heavy imports happen inside them: `erase --help` is instant."""

from __future__ import annotations

import os
import sys
from typing import Any

from erase.cli import evaluate, files, generate, inspect, listing, pages, run  # noqa: F401  # they name their commands
from erase.cli.common import Stopped, app, let_the_first_speak, speaks

ORDER = ["demo", "run", "compare", "attack", "generate", "grid", "report", "ls", "show", "inspect", "convert", "apply"]
"""Of `erase --help`."""


def _place(command: Any) -> int:
    return ORDER.index(command.name or command.callback.__name__)


app.registered_commands.sort(key=_place)


def main() -> None:
    """Run the command; what a user can mend is one line on stderr and exit status 2, a full disk too.

    A signal's status is 143 (SIGTERM) or 130 (SIGINT).
    """
    try:
        app(standalone_mode=True)
    except Stopped as stopped:
        if speaks():
            sys.stderr.write(f"erase: stopped by {stopped.name}; go on with: {stopped.again}\n")
        raise
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("ERASE_DEBUG"):
            raise
        let_the_first_speak(error)
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        line = " ".join(text.split()) or type(error).__name__
        sys.stderr.write(f"erase: {line}\n")
        raise SystemExit(2) from None
