"""`erase.load`: a model of any form that erase knows, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from erase.api.history import Past, remember
from erase.classification import folders as classifiers
from erase.classification import models
from erase.diffusion.checkpoints import folders
from erase.diffusion.families import ddpm, family
from erase.diffusion.loading import take_any_dtype
from erase.programs import saving
from erase.programs.locating import locate_any
from erase.store import weights
from erase.store.class_names import class_names


def load(
    model: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    names: int | Sequence[str] = (),
    components: str | Path | None = None,
) -> Any:
    """Open a model by an embedded name, a diffusers folder, a single file, a hub id, or a classifier's folder.

    Args:
        model: the name, path or hub id.
        device: where the model goes. Default: the accelerator, or else the CPU.
        dtype: the dtype of its weights; a VAE stays in float32, and takes latents and images of any dtype.
        names: for a class-conditional folder without class names: how many classes there are, or a name for each.
        components: for a single file with the network only, such as one of Flux: a diffusers folder or hub id of the
            same model, which has the rest.

    Returns:
        A diffusers pipeline without a safety checker, or a network of transformers; in eval mode.

    Raises:
        ValueError: for a model that cannot be found or is not whole, and a DDPM in another dtype than float32.
    """
    where = device or (torch.accelerator.current_accelerator(check_available=True) or "cpu")
    source = locate_any(model, class_names(names) if names else (), components)
    if isinstance(source, classifiers.Source):
        opened = models.open_model(source.folder, where).net.to(dtype)
        net = opened
        marks: list[str] = []
    else:
        known = family(source.family)
        if known is ddpm and dtype != torch.float32:
            raise ValueError(f"dtype={dtype}: {source.name} is a {known.NAME}, which is float32 only: leave out dtype")
        opened = known.open(source, where, dtype)
        if dtype != torch.float32 and getattr(opened, "vae", None) is not None:
            take_any_dtype(opened.vae)
        net = getattr(opened, known.TRAINED)
        marks = folders.forgotten(source)
    meta = weights.provenance(saving.header(source))
    remember(net, Past(tuple(marks), meta, source, saving.base_name(source)))
    return opened
