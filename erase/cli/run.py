"""`erase run`, `demo`, `attack` and `compare`: what trains and measures."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from erase.cli import complete
from erase.cli.common import (
    OutDir,
    Resume,
    app,
    check_out,
    command_line,
    no_loading_bars,
    quiet,
    speaks,
    stoppable,
)
from erase.nearest import meant


class _Pipelines(TyperGroup):
    """The pipelines of `erase run`."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = super().get_command(ctx, cmd_name)
        if found is None and not ctx.resilient_parsing:
            raise ValueError(f"no pipeline {cmd_name!r}{meant(cmd_name, [*self.commands], 'pipelines', '')}")
        return found


runs = typer.Typer(
    cls=_Pipelines,
    help="Erase concepts, classes or training images.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(runs, name="run")


def _run(
    pipeline: str,
    preset: str,
    settings: Sequence[str],
    out: Path | None,
    resume: bool,
    form: Literal["full", "delta", "lora"] = "full",
    dry_run: bool = False,
    again: str | None = None,
) -> None:
    quiet()
    from erase import config, resources
    from erase.store.files import paths

    stoppable(None if dry_run else out, again)
    try:
        path = resources.preset_path(preset, pipeline)
    except ValueError as error:
        if pipeline != "sd":
            raise
        raise ValueError(f"{error}; sd_concept_sfron is for any concept and model") from None
    data = config.read_preset(path)
    if "pipeline" not in data:
        raise ValueError(f"preset {preset!r} does not set pipeline: add pipeline: {pipeline}")
    if data["pipeline"] != pipeline:
        raise ValueError(f"preset {preset!r} is for erase run {data['pipeline']}, not for {pipeline}")
    # All that can be checked without a model is checked before the libraries are loaded: they take seconds.
    checked: Any = config.parse(config.override(data, settings), config.PIPELINES[pipeline])
    if out is None and not dry_run:
        raise ValueError(
            "--out is missing: give a new folder, such as --out runs/first; only --dry-run does not need one"
        )
    if out is not None and not dry_run:
        check_out(out, resume, "run.json", again)
    from erase.programs.settings import read_method, unused

    for line in unused(checked, *read_method(checked), paths(dict(config.read_words(settings)))):
        if speaks():
            typer.echo(f"note: {line}", err=True)
    from erase.programs.run import main

    no_loading_bars()
    options: dict[str, Any] = {"resume": resume, "command": command_line(), "preset": preset, "form": form}
    main(checked, out or Path(), say=typer.echo, dry_run=dry_run, **options)


@app.command()
def demo(
    world: Annotated[
        Literal["photos", "emoji"],
        typer.Argument(
            help="photos: erase a woman, counted by NudeNet. emoji: erase a drawn castle from a UNet and a transformer."
        ),
    ] = "photos",
    *,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; by default runs/demo or runs/demo-emoji.")
    ] = None,
) -> None:
    """Try erase on a small included model.

    Erases a concept and writes a report. Takes minutes on a CPU.

    Example: erase demo --out runs/demo

    Example: erase demo emoji
    """
    if world == "emoji":
        _compare("demo-emoji", [], out or Path("runs/demo-emoji"))
        return
    out = out or Path("runs/demo")
    again = shlex.join(["erase", "run", "sd", "sd_photos_sfron", "--out", str(out), "--resume"])
    _run("sd", "sd_photos_sfron", [], out, resume=False, again=again)


Preset = Annotated[
    str,
    typer.Argument(
        metavar="PRESET", help="A preset's name (erase ls presets) or a YAML file.", autocompletion=complete.presets
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings to change; see erase settings.", autocompletion=complete.settings
    ),
]
RunDir = Annotated[
    Path | None, typer.Option("--out", help="Folder to write; must be new or empty. Required, except with --dry-run.")
]
Save = Annotated[
    Literal["full", "delta", "lora"],
    typer.Option(help="What to save: the whole model, only what changed (see erase apply), or a LoRA (run sd only)."),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the numbers of trained weights, steps and images, and the memory for training; write nothing.",
    ),
]


def _add(pipeline: str, what: str, example: str) -> None:
    """A command of `erase run`."""

    def command(
        preset: Preset,
        settings: Settings = None,
        *,
        out: RunDir = None,
        resume: Resume = False,
        save: Save = "full",
        dry_run: DryRun = False,
    ) -> None:
        _run(pipeline, preset, settings or [], out, resume, save, dry_run)

    listed = f"All settings: erase settings {pipeline}. Values of a preset: erase show PRESET."
    runs.command(name=pipeline, help=f"{what}\n\n{listed}\n\nExample: erase run {pipeline} {example}")(command)


_add(
    "sd",
    "Erase concepts from a text-to-image model.",
    "sd_photos_sfron forget.prompts='a photo of a cat' --out runs/cat",
)
_add(
    "ddpm",
    "Erase classes from a class-conditional model, or train one. Also retrains it without some classes.",
    "ddpm_fashion_sfron forget.labels=[bag] --out runs/bag",
)
_add(
    "classify",
    "Erase training images from an image classifier, or train one. Also retrains it without some images.",
    "classify_fashion_sfron forget.fraction=0.1 --out runs/tenth",
)


@app.command()
def attack(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run (erase run sd).")],
    settings: Settings = None,
    *,
    out: OutDir,
    preset: Annotated[
        str | None,
        typer.Option(
            help="An attack with a published budget: unlearndiffatk, unlearndiffatk_style, p4d, p4d_style, ring_a_bell."
        ),
    ] = None,
    resume: Resume = False,
) -> None:
    """Try to bring back the concept that a run erased.

    Runs the attacks in eval.attacks; by default inversion, relearn, and paraphrases if there are prompts for them.

    All attacks: erase settings sd eval.attacks. Their settings: erase settings sd attack.

    Example: erase attack runs/demo --preset unlearndiffatk --out runs/searched

    Example: erase attack runs/demo eval.attacks=[inversion,relearn] attack.inversion.steps=100 --out runs/attacked
    """
    quiet()
    stoppable(out)
    check_out(out, resume, "run.json")
    from erase.programs.attack import attack_run

    no_loading_bars()
    attack_run(run, settings or [], out, preset=preset, resume=resume, command=command_line(), say=typer.echo)


@app.command()
def compare(
    spec: Annotated[
        str,
        typer.Argument(
            help="A comparison's name (erase ls comparisons) or a YAML file.", autocompletion=complete.comparisons
        ),
    ],
    settings: Settings = None,
    *,
    out: Annotated[
        Path, typer.Option("--out", help="Folder to write; if it already holds this comparison, it is resumed.")
    ],
) -> None:
    """Compare methods, and write a page with tables and plots.

    Runs every method on every target with every seed. Finished runs are not repeated.

    Example: erase compare photos-objects --out runs/objects
    """
    _compare(spec, settings or [], out)


def _compare(spec: str, settings: Sequence[str], out: Path) -> None:
    quiet()
    from erase import config, resources

    stoppable()
    from erase.programs import compare as comparing

    plan = comparing.read_spec(config.read_preset(resources.comparison_path(spec)), settings)
    no_loading_bars()
    table = comparing.main(plan, out, command=command_line(), say=typer.echo)
    typer.echo(table.read_text(encoding="utf-8").rstrip())
    typer.echo(f"page: {table.with_name('index.html')}")
