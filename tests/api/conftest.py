"""Micro models of the user's own, and presets small enough that a call takes a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from erase import resources
from erase.api import settings

SMALL: dict[str, Any] = {
    "saliency.count": 4,
    "saliency.draws": 1,
    "saliency.density": 0.5,
    "saliency.threshold": None,
    "train.batch_size": 2,
    "train.steps": 2,
    "train.lr": 1e-3,
    "draw.steps": 2,
    "draw.batch_size": 4,
}

DATA: dict[str, dict[str, Any]] = {
    "sd": {
        "forget.count": 2,
        "remain.count": 1,
        "remain.prompts": ["a car", "a boat"],  # micro models read few tokens
        "train.checkpointing": False,  # costs a third more; asked for where it is in question
    },
    "ddpm": {"forget.count": 4},
}


@pytest.fixture(scope="session")
def small_presets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The families' presets, but smaller; as many images as are asked for, but fewer."""
    from erase.config import put

    work, found = tmp_path_factory.mktemp("presets"), {}
    for kind, name in settings.PRESETS.items():
        preset = yaml.safe_load(resources.preset_path(name).read_text())
        own = {key: value for key, value in SMALL.items() if not (key.startswith("draw") and "draw" not in preset)}
        own |= DATA.get(preset["pipeline"], {})
        path = work / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(put(preset, own)))
        found[kind] = str(path)
    return found


@pytest.fixture(autouse=True)
def small(small_presets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, path in small_presets.items():
        monkeypatch.setitem(settings.PRESETS, kind, path)


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    """A Stable Diffusion pipeline."""
    import micro

    return micro.pipeline(tmp_path / "tokenizers")


@pytest.fixture
def rows() -> tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]:
    """What `progress` is told."""
    found: list[dict[str, Any]] = []
    return found, found.append
