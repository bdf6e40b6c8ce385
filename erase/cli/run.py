"""`erase run`, `demo`, `attack` and `compare`: what trains and measures."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from erase.cli.common import (
    OutDir,
    Resume,
    app,
    command_line,
    no_loading_bars,
    quiet,
    stoppable,
)


def _run(
    pipeline: str,
    preset: str,
    settings: Sequence[str],
    out: Path,
    resume: bool,
    form: Literal["full", "delta"] = "full",
    dry_run: bool = False,
    again: str | None = None,
) -> None:
    quiet()
    from erase import config, resources

    stoppable(again)
    data = config.read_preset(resources.preset_path(preset))
    if data.get("pipeline") != pipeline:
        raise ValueError(f"preset {preset!r} is for erase run {data.get('pipeline')}, not for {pipeline}")
    # Checked here, before the libraries are loaded: they take seconds.
    checked: Any = config.parse(config.override(data, settings), config.PIPELINES[pipeline])
    from erase.programs.run import main

    no_loading_bars()
    options: dict[str, Any] = {"resume": resume, "command": command_line(), "preset": preset, "form": form}
    main(checked, out, say=typer.echo, dry_run=dry_run, **options)


@app.command()
def demo(out: OutDir = Path("runs/demo")) -> None:
    """Erase the woman from the embedded Stable Diffusion and show it: the whole path, minutes on a CPU.

    Example: erase demo --out runs/demo
    """
    again = shlex.join(["erase", "run", "sd", "sd_photos_sfron", "--out", str(out), "--resume"])
    _run("sd", "sd_photos_sfron", [], out, resume=False, again=again)


@app.command()
def run(
    pipeline: Annotated[str, typer.Argument(help="sd, ddpm or classify")],
    preset: Annotated[str, typer.Argument(help="A preset's name (erase ls presets) or a YAML file.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    *,
    out: OutDir,
    resume: Resume = False,
    save: Annotated[
        Literal["full", "delta"], typer.Option(help="Keep the whole model, or only what changed (see erase apply).")
    ] = "full",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would learn, be in memory and be done; write nothing.")
    ] = False,
) -> None:
    """Unlearn: measure, mask, erase, save, measure again, report.

    Example: erase run sd sd_photos_sfron forget.prompts='a photo of a cat' --out runs/cat
    """
    from erase import config

    if pipeline not in config.PIPELINES:
        raise ValueError(f"no pipeline {pipeline!r}; pipelines: {', '.join(config.PIPELINES)}")
    again = command_line() if dry_run else None
    _run(pipeline, preset, settings or [], out, resume, save, dry_run, again)


@app.command()
def attack(
    run: Annotated[Path, typer.Argument(help="Folder of a finished erase run sd.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    *,
    out: OutDir,
    resume: Resume = False,
) -> None:
    """Attack a run's model: paraphrases, a learned word, training on the concept again; all, or `eval.attacks`.

    Example: erase attack runs/demo eval.attacks=[inversion,relearn] attack.inversion.steps=100 --out runs/attacked
    """
    quiet()
    stoppable()
    from erase.programs.attack import attack_run

    no_loading_bars()
    attack_run(run, settings or [], out, resume=resume, command=command_line(), say=typer.echo)


@app.command()
def compare(
    spec: Annotated[str, typer.Argument(help="A comparison's name (erase ls comparisons) or a YAML file.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder to write; one of the same comparison is gone on with.")],
) -> None:
    """Run methods × targets × seeds, and write a page, a table and a plot; finished runs are not done again.

    Example: erase compare photos-objects --out runs/objects
    """
    quiet()
    from erase import config, resources

    stoppable(command_line())
    from erase.programs import compare as comparing

    plan = comparing.read_spec(config.read_preset(resources.comparison_path(spec)), settings or [])
    no_loading_bars()
    table = comparing.main(plan, out, command=command_line(), say=typer.echo)
    typer.echo(table.read_text(encoding="utf-8").rstrip())
    typer.echo(f"page: {table.with_name('index.html')}")
