"""`erase ls` and `show`: what comes with erase."""

from __future__ import annotations

from typing import Annotated

import typer

from erase.cli.common import (
    app,
)


@app.command(name="ls")
def list_(
    what: Annotated[str, typer.Argument(help="methods, presets, comparisons, prompts or models")] = "",
) -> None:
    """List what comes with erase.

    Example: erase ls presets
    """
    from erase import resources

    def methods() -> list[str]:
        from erase.methods import list_methods

        return list_methods()

    kinds = {
        "methods": methods,
        "presets": resources.list_presets,
        "comparisons": resources.list_comparisons,
        "prompts": resources.list_prompts,
        "models": resources.list_tiny,
    }
    if what and what not in kinds:
        raise ValueError(f"nothing to list under {what!r}; allowed: {', '.join(kinds)}")
    for kind in [what] if what else kinds:
        names = kinds[kind]()
        typer.echo("\n".join(names) if what else f"{kind}: {', '.join(names)}")


@app.command()
def show(preset: Annotated[str, typer.Argument(help="A preset's or a comparison's name or file.")]) -> None:
    """Print a preset or a comparison: every value, and where it comes from.

    Example: erase show sd_photos_sfron
    """
    from erase import config, resources

    compares = preset in resources.list_comparisons()
    path = resources.comparison_path(preset) if compares else resources.preset_path(preset)
    config.read_preset(path)  # says what is wrong with a file that is none
    typer.echo(path.read_text(encoding="utf-8").rstrip())
