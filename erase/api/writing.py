"""A model in memory on disk: whole, with provenance, or its weights by the names that files have."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from erase.classification import models
from erase.diffusion.families import family
from erase.diffusion.live import family_name
from erase.diffusion.lora.adapter import Pairs
from erase.diffusion.lora.svd import Ranks, product, rounded
from erase.diffusion.lora.write import difference, write_lora
from erase.engine.borrow import Values
from erase.programs import saving
from erase.store import card
from erase.store.safetensors import Lazy, open_safetensors, write_safetensors
from erase.store.weights import fitted, rewrite


def write_model(model: Any, out: Path, meta: Mapping[str, str], part: str | None, processor: Any = None) -> None:
    """Write a model as its library does, with provenance in the header of the weights and a card.

    Args:
        model: a pipeline, a network of diffusers or transformers, or any other, which is written as safetensors.
        out: a new folder; it appears whole or not at all.
        meta: provenance.
        part: the component of a pipeline that learned.
        processor: of a classifier's images; written beside it.

    Raises:
        ValueError: if `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as temporary:
        target = Path(temporary) / out.name
        if not hasattr(model, "save_pretrained"):
            write_safetensors(target / "model.safetensors", weights(model), meta)
        else:
            model.save_pretrained(target)
            for path in (target if part is None else target / part).glob("*.safetensors"):
                old, header = open_safetensors(path)
                rewrite(path, old, header, {}, path, meta)
            card.write(target, meta, "transformers" if isinstance(model, PreTrainedModel) else "diffusers")
        if processor is not None:
            processor.save_pretrained(target)
        target.rename(out)


def weights(net: nn.Module) -> Mapping[str, Tensor]:
    """A network's weights by the names that they have in files, on the CPU."""
    if isinstance(net, PreTrainedModel):
        return models.stored(net)
    state = net.state_dict()
    return Lazy(state, lambda name: state[name].detach().cpu())


def base_of(net: nn.Module, base: Values, source: saving.Source | None) -> Mapping[str, Tensor]:
    """The weights before, by the names of files: those of the source, if they are what was erased, else of memory.

    Args:
        net: the network as it is now.
        base: what changed of it.
        source: where it was loaded from.

    Raises:
        ValueError: if the network was converted to another dtype since.
    """
    base.check()
    if isinstance(net, PreTrainedModel):  # files have other names
        with base.back():
            before = weights(net)
    else:
        now = weights(net)
        before = Lazy(now, lambda name: base.held[name] if name in base.held else now[name])
    if source is None:
        return before
    stored = saving.tensors(source)
    same = stored.keys() == before.keys()
    return stored if same and all(torch.equal(stored[n].to(before[n].dtype), before[n]) for n in stored) else before


def save_lora(
    model: Any,
    net: nn.Module,
    before: Mapping[str, Tensor],
    target: Path,
    meta: Mapping[str, str],
    ranks: Ranks,
    pairs: Pairs | None = None,
) -> Path:
    """Write what a pipeline's network learned as a LoRA; the path of the file.

    Args:
        model: the pipeline.
        net: its network, as it is now.
        before: the network's weights before, by the names of files.
        target: a folder, or a `.safetensors` file.
        meta: provenance.
        ranks: how ranks are chosen.
        pairs: what was trained in LoRA form, whose weights in 16 bits are rounded; by default the difference of the
            weights is written.

    Raises:
        ValueError: for a model or a change that no LoRA carries, or a path in use.
    """
    name = family_name(model)
    layout = None if name is None else family(name).LORA
    if layout is None:
        raise ValueError(f"form='lora': no program loads LoRAs onto a {type(model).__name__}; use full or delta")
    if target.suffix != ".safetensors":
        target = target / saving.LORA
    config: Any = net.config
    after, layers = weights(net), layout.layers(before, config)
    if pairs:
        change = Lazy(pairs, lambda name: product(*pairs[name]))
        write_lora(change, layout, layers, target, meta, ranks)
        return target
    write_lora(
        difference(before, after), layout, layers, target, meta, ranks, rounding=lambda name: rounded(after[name])
    )
    return target


def erased_of(net: nn.Module, base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights after, in the dtypes of those before."""
    after = weights(net)
    return Lazy(base, lambda name: fitted(name, base[name], after[name], Path(type(net).__name__)))
