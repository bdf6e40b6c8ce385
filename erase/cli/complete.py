"""What a shell's TAB completes: names of what comes with erase, and keys of settings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import typer

import erase
from erase import resources

METHODS = Path(erase.__file__).parent / "methods"
"""The folder, as its package imports torch, which takes seconds."""


def _begins(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def presets(ctx: typer.Context, incomplete: str) -> list[str]:
    """The presets of the pipeline that the command is for."""
    return _begins(resources.presets_of(str(ctx.info_name)), incomplete)


def kinds(incomplete: str) -> list[str]:
    """What `erase ls` lists."""
    return _begins(("methods", "presets", "comparisons", "prompts", "models"), incomplete)


def explained(incomplete: str) -> list[str]:
    """What `erase settings` explains, methods without importing them."""
    from erase import config

    methods = (path.stem for path in METHODS.glob("[a-z]*.py"))
    return _begins([*config.PIPELINES, *sorted(methods)], incomplete)


def comparisons(incomplete: str) -> list[str]:
    """Names of comparisons."""
    return _begins(resources.list_comparisons(), incomplete)


def specs(incomplete: str) -> list[str]:
    """Names of presets and comparisons."""
    return _begins([*resources.list_presets(), *resources.list_comparisons()], incomplete)


def prompts(incomplete: str) -> list[str]:
    """Names of prompt sets."""
    return _begins(resources.list_prompts(), incomplete)


def models(incomplete: str) -> list[str]:
    """Names of embedded models."""
    return _begins(resources.list_tiny(), incomplete)


def settings(ctx: typer.Context, incomplete: str) -> list[str]:
    """Keys of settings, with what follows them."""
    from erase import config
    from erase.config.listing import listed

    kind = config.PIPELINES.get(str(ctx.info_name), config.SdConfig)
    return _begins((f"{setting.path}=" for setting in listed(kind)), incomplete)
