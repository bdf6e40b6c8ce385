"""`erase ls` and `show`: what comes with erase."""

from __future__ import annotations

from typing import Annotated

import typer

from erase.cli import complete
from erase.cli.common import app
from erase.nearest import meant


@app.command(name="ls")
def list_(
    what: Annotated[
        str, typer.Argument(help="methods, presets, comparisons, prompts or models", autocompletion=complete.kinds)
    ] = "",
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
    if not what:
        typer.echo("note: the preset sd_concept_sfron is for any concept and text-to-image model", err=True)


@app.command(name="settings")
def settings_(
    what: Annotated[str, typer.Argument(help="sd, ddpm, classify, or a method", autocompletion=complete.explained)],
    key: Annotated[str, typer.Argument(help="Only settings that begin with this, such as train.")] = "",
) -> None:
    """Explain the settings of a pipeline or of a method.

    Shows allowed values, default and meaning.

    Example: erase settings sd saliency
    """
    from erase import config
    from erase.config.listing import listed, listed_method

    if what in config.PIPELINES:
        found = list(listed(config.PIPELINES[what]))
    else:
        from erase.methods import find_method, list_methods

        if what not in list_methods():
            known = [*config.PIPELINES, *list_methods()]
            raise ValueError(f"no pipeline or method {what!r}{meant(what, known, 'known', 'erase ls methods')}")
        found = list(listed_method(find_method(what)))
    shown = [setting for setting in found if setting.path.startswith(key)]
    if not shown:
        hint = meant(key, [setting.path for setting in found], "settings", f"erase settings {what} explains all")
        raise ValueError(f"{what} has no setting that begins with {key!r}{hint}")
    typer.echo("\n".join(setting.lines() for setting in shown))
    if what in config.PIPELINES and "method".startswith(key):
        typer.echo("method.*: settings of the method; see erase settings METHOD, such as erase settings sfron")


@app.command()
def show(
    preset: Annotated[
        str, typer.Argument(help="The name or file of a preset or a comparison.", autocompletion=complete.specs)
    ],
) -> None:
    """Print a preset or a comparison with its values and notes.

    Example: erase show sd_photos_sfron
    """
    from erase import config, resources

    compares = preset in resources.list_comparisons()
    path = resources.comparison_path(preset) if compares else resources.preset_path(preset)
    config.read_preset(path)  # says what is wrong with a file that is none
    typer.echo(path.read_text(encoding="utf-8").rstrip())
