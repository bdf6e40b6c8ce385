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
from typer.core import TyperGroup

ORDER = ["demo", "run", "compare", "attack", "generate", "eval", "grid", "report", "ls", "show", "settings", "inspect"]
"""The order of `erase --help`; the rest follows."""


class _Commands(TyperGroup):
    """The commands in the order in which a user meets them."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = [str(name) for name in super().list_commands(ctx)]
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
evaluate = typer.Typer(help="Count and score what images show.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(evaluate, name="eval")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"erase {version('erase')}")
        raise typer.Exit


@app.callback()
def _erase(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Erase concepts from diffusion models and image classifiers, and measure what is gone and what is kept."""


OutDir = Annotated[Path, typer.Option("--out", help="Folder to write; must be new or empty.")]


def result_file(out: Path) -> Path:
    """The path of a result: a new file, or an earlier result to overwrite.

    Raises:
        ValueError: for a folder, a place below a file, or a file that holds something else.
    """
    check_place(out)
    if out.exists() and not begins_with(out, "nudity", "classes", "fidelity", "clip", "change"):
        raise ValueError(f"{out} exists and is not a result of erase eval: choose another --out")
    return out


def begins_with(path: Path, *keys: str) -> bool:
    """Whether a JSON file of ours has one of these keys near its beginning; the rest may be rows of many images."""
    with path.open("rb") as file:
        head = file.read(2**16)
    return b'"schema"' in head and any(f'\n  "{key}":'.encode() in head for key in keys)


def check_place(out: Path) -> None:
    """Find out that a file may be written at a path.

    Raises:
        ValueError: for a folder, or a place below a file.
    """
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: give a file")
    if any(parent.is_file() for parent in out.parents):
        raise ValueError(f"{out} cannot be written: one of its parents is a file")


OutFile = Annotated[Path, typer.Option("--out", help="File to write.", callback=result_file)]
Components = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="For a single file that holds only the network (as Flux's do): a diffusers folder or hub id of the same "
        "model, from which the rest is taken.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the run that --out holds.")]
Blur = Annotated[bool, typer.Option("--blur/--no-blur", help="Hide exposed body parts that NudeNet finds.")]


class Stopped(SystemExit):
    """A signal ended the command; the command line `again` resumes it."""

    def __init__(self, number: int, again: str) -> None:
        super().__init__(128 + number)
        self.name, self.again = signal.Signals(number).name, again


def stoppable(out: Path | None = None, resume: str | None = None) -> None:
    """SIGTERM and SIGINT end a command that can be resumed; its files are complete at any time.

    Args:
        out: the folder that it writes, if it takes `--resume`.
        resume: the command that resumes, once that folder holds something; by default this one with `--resume`.
    """
    from erase.store.files import in_use

    same = command_line()

    def end(number: int, _: Any) -> None:
        again = resume or same + ("" if "--resume" in sys.argv else " --resume")
        raise Stopped(number, again if out is not None and in_use(out) else same)

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


def check_out(out: Path, resume: bool, holds: str, again: str | None = None) -> None:
    """Refuse, before anything is loaded, a folder that cannot be written or resumed.

    Args:
        out: the folder.
        resume: whether it is to be resumed.
        holds: a file that a folder has from the beginning on.
        again: the command that resumes it, where that is another one.

    Raises:
        ValueError: for a file, a folder that holds something, or one that holds nothing to resume.
    """
    from erase.store.files import in_use

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    if any(parent.is_file() for parent in out.parents):
        raise ValueError(f"{out} cannot be written: one of its parents is a file")
    if resume and not (out / holds).is_file():
        why = "is not there" if not out.exists() else f"has no {holds}" if in_use(out) else "is empty"
        raise ValueError(f"--resume: {out} {why}: leave out --resume to start a new run, or choose another --out")
    if not resume and in_use(out):
        raise ValueError(f"{out} is not empty: choose another --out, or resume with {again or '--resume'}")


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["erase", *sys.argv[1:]])


def quiet() -> None:
    """Keep the libraries' notices about optional parts off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # a hub that cannot be reached is one error, not a notice a try


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
        raise ValueError(f"{path}: not a JSON mapping{' with ' if keys else ''}{' and '.join(keys)}")
    return value
