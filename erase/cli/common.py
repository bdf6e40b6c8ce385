"""What the commands share: the application, options, signals, and imports put off until they are needed."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Erase concepts from diffusion models, and measure that they are gone and the rest is not.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
evaluate = typer.Typer(help="Count what pictures show.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(evaluate, name="eval")


OutDir = Annotated[Path, typer.Option("--out", help="Folder to write; must be new or empty.")]


def result_file(out: Path) -> Path:
    """Where a result may be written: at a new place, or over an earlier result.

    Raises:
        ValueError: for a folder, a place below a file, or a file that holds something else.
    """
    if out.is_dir():
        raise ValueError(f"{out} is a folder: --out names a file")
    if out.exists():
        with out.open("rb") as file:
            head = file.read(64)
        if not (head.lstrip().startswith(b"{") and b'"schema"' in head):
            raise ValueError(f"{out} is there and no result of erase: choose another --out")
    elif any(parent.is_file() for parent in out.parents):
        raise ValueError(f"{out} cannot be written: it is below a file")
    return out


OutFile = Annotated[Path, typer.Option("--out", help="File to write.", callback=result_file)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what the folder holds.")]
Blur = Annotated[bool, typer.Option("--blur/--no-blur", help="Hide exposed body parts that NudeNet finds.")]


class Stopped(SystemExit):
    """A signal ended the command; `again` goes on with it."""

    def __init__(self, number: int, again: str) -> None:
        super().__init__(128 + number)
        self.name, self.again = signal.Signals(number).name, again


def stoppable(again: str | None = None) -> None:
    """SIGTERM and SIGINT end a command that can be gone on with; its files are whole at any time.

    Args:
        again: the command that goes on; by default this one, with --resume.
    """
    said = again or command_line() + ("" if "--resume" in sys.argv else " --resume")

    def end(number: int, _: Any) -> None:
        raise Stopped(number, said)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def speaks() -> bool:
    """Whether this is the first process of its launch."""
    return os.environ.get("RANK", "0") == "0"


def let_the_first_speak(error: Exception) -> None:
    """Of the processes of a launch one says what is wrong; its launcher then ends the others.

    That is the first one, unless it only lost another: a process waits to be ended before it speaks for itself.
    """
    lost = isinstance(error, RuntimeError)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (lost or not speaks()):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(60 if lost else 10)


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["erase", *sys.argv[1:]])


def quiet() -> None:
    """Keep the libraries' notices about optional parts off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def no_loading_bars() -> None:
    """Ours tell of long work; theirs of loading small files. No variable of the environment switches them off."""
    from diffusers.utils.logging import disable_progress_bar as diffusers_bars
    from transformers.utils.logging import disable_progress_bar as transformers_bars

    diffusers_bars()
    transformers_bars()  # type: ignore[no-untyped-call]


def list_images_of(folders: Sequence[Path]) -> list[Path]:
    """The images of folders and single files, in order."""
    from erase.evaluation.image_files import list_images

    return [path for folder in folders for path in (list_images(folder) if not folder.is_file() else [folder])]


def mapping(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        ValueError: for a file that holds something else, or lacks one of the keys.
    """
    from erase.store import files

    value = files.read_json(path)
    if not isinstance(value, dict) or not value.keys() >= set(keys):
        raise ValueError(f"{path}: not a mapping{' with ' if keys else ''}{' and '.join(keys)}")
    return value
