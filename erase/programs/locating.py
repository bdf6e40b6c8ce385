"""Find a checkpoint of any pipeline. Importing this module is cheap; finding imports the libraries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erase import resources
from erase.store import files


def locate_any(model: str | Path, names: Sequence[str] = (), components: str | Path | None = None) -> Any:
    """A checkpoint of any pipeline.

    Args:
        model: as the user gave it.
        names: of classes, for a folder that has none.
        components: for a single file that holds the network alone, a folder or hub id with the rest.

    Raises:
        ValueError: for a model that cannot be found or is not whole.
    """
    folder = resources.tiny_path(model) if str(model) in resources.list_tiny() else Path(model)
    index, config = folder / "model_index.json", folder / "config.json"
    if components is None and not index.exists() and config.exists() and is_classifier(files.read_json(config)):
        from erase.classification import folders as classifiers

        return classifiers.locate(str(model))
    from erase.diffusion.checkpoints.locate import locate

    return locate(model, labels=names, components=components)


def is_classifier(config: Any) -> bool:
    """Whether a folder's configuration is that of an image classifier of `transformers`."""
    kinds = config.get("architectures") if isinstance(config, dict) else None
    return isinstance(kinds, list) and any(str(kind).endswith("ForImageClassification") for kind in kinds)
