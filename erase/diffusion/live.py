"""A pipeline in memory as a model: its networks are the user's own, all else is a copy that a run may change."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import nn

from erase.diffusion.class_conditional import ClassConditionalPipeline
from erase.diffusion.families import FAMILIES, class_name, ddpm, family, supported
from erase.diffusion.loading import HALF, vae_in_float32
from erase.diffusion.model import Model

CHECKER = "safety_checker"


def model_of(pipe: Any, labels: Sequence[str] = ()) -> Model:
    """A pipeline of a known class, or any around a class-conditional `UNet2DModel`, as a model.

    Args:
        pipe: the pipeline.
        labels: names of the classes by number, for one that has none; by default it has the numbers.

    Raises:
        TypeError: for a pipeline of no family.
        ValueError: for a part that is missing, networks that no family takes, or that cannot learn where they are.
    """
    name, kind = family_name(pipe), type(pipe).__name__
    if name is None:
        raise TypeError(f"{kind} is not supported; supported pipelines: {', '.join(supported())}")
    known = family(name)
    own = copy.copy(pipe)
    if (plain := getattr(getattr(own, known.TRAINED), "_orig_mod", None)) is not None:  # of torch.compile
        setattr(own, known.TRAINED, plain)
    if absent := [part for part in known.PARTS if hasattr(own, part) and getattr(own, part) is None]:
        raise ValueError(f"{kind} has no {absent[0]} (it is None): give the whole pipeline")
    known.check(own, kind)
    shift = {"shift": pipe.scheduler.shift} if hasattr(pipe.scheduler, "shift") else {}  # set_shift() leaves the config
    own.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **shift)
    if name == "ddpm" and not isinstance(pipe, ClassConditionalPipeline):
        own = ClassConditionalPipeline(own.unet, own.scheduler, unet_names(own.unet, kind, labels))
    elif name == "ddpm" and labels and list(labels) != pipe.labels:
        raise ValueError(f"names: {kind} names its classes itself, {', '.join(pipe.labels)}: leave out names")
    elif name == "dit":
        own.register_to_config(id2label={str(i): label for i, label in dit_names(pipe, labels).items()})
    if getattr(own, CHECKER, None) is not None:  # it would black out what is to be counted
        own.safety_checker = None
    own.set_progress_bar_config(disable=True)
    found = Model(known, own)
    check_place(found, kind)
    own_dtype: Any = found.net.dtype
    return replace(found, dtype=own_dtype if own_dtype in HALF else torch.float32)


def family_name(pipe: Any) -> str | None:
    """The family of a pipeline, by its class or one that it inherits from."""
    if isinstance(getattr(pipe, "unet", None), UNet2DModel):
        return "ddpm"
    return next((name for name, classes in FAMILIES.items() if class_name(pipe) in classes), None)


def unet_names(unet: Any, where: str, labels: Sequence[str]) -> dict[int, str]:
    """Names of a UNet's classes by number: those given, else the numbers.

    Raises:
        ValueError: for names that are not one for each class embedding, or for each but the null class's.
    """
    rows = ddpm.class_rows(unet, where)
    names = list(labels) or [str(i) for i in range(rows)]
    if len(names) not in (rows, rows - 1) or len({*names}) < len(names):
        raise ValueError(f"names has {len(names)} names for {rows} class embeddings (the null class's included)")
    return dict(enumerate(names))


def dit_names(pipe: Any, labels: Sequence[str]) -> dict[int, str]:
    """Names of a DiT's classes by number: those given, else the pipeline's, with synonyms; none if it has none."""
    if labels:
        return dict(enumerate(labels))
    if kept := dict(pipe.config).get("id2label"):
        return {int(i): str(label) for i, label in kept.items()}
    words: dict[int, list[str]] = {}
    for word, i in (getattr(pipe, "labels", None) or {}).items():  # sorted by word
        words.setdefault(int(i), []).append(word)
    return {i: ", ".join(synonyms) for i, synonyms in sorted(words.items())}


def check_place(model: Model, where: str) -> None:
    """Refuse networks that cannot learn as they are.

    Raises:
        ValueError: for offloaded, hooked, fused, adapted or quantised ones, and float16 on a CPU.
    """
    net: Any = model.net
    parts = [part for part in model.pipe.components.values() if isinstance(part, nn.Module)]
    if any(hasattr(module, "_hf_hook") for part in parts for module in part.modules()):
        raise ValueError(f"{where} is offloaded: call remove_all_hooks() and to(device) on it first")
    if any(hasattr(module, "_diffusers_hook") for part in parts for module in part.modules()):
        raise ValueError(f"{where} has hooks of diffusers (layerwise casting, group offloading): load it without them")
    if any(getattr(module, "fused_projections", False) for module in net.modules()):
        raise ValueError(
            f"{where} has fused projections, which files have not: call unfuse_qkv_projections() on it first"
        )
    if getattr(net, "peft_config", None):
        raise ValueError(f"{where} has adapters: call fuse_lora() and unload_lora_weights() on it first")
    if any(not p.is_floating_point() or p.is_meta for p in net.parameters()):
        raise ValueError(
            f"{where} has weights that are quantised or not loaded: load it in float32, float16 or bfloat16"
        )
    if net.dtype == torch.float16 and model.device.type == "cpu":
        raise ValueError(f"{where} is in float16 on a CPU, where training needs float32: call to(torch.float32) first")


@contextmanager
def exact_vae(pipe: Any) -> Iterator[None]:
    """Have the VAE in float32 meanwhile: in float16 some overflow."""
    vae = getattr(pipe, "vae", None)
    with vae_in_float32(vae) if vae is not None and vae.dtype in HALF else nullcontext():
        yield


@contextmanager
def checkpointing(net: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing for a while, where it is wanted and not on."""
    if not wanted or net.is_gradient_checkpointing:
        yield
        return
    net.enable_gradient_checkpointing()
    try:
        yield
    finally:
        net.disable_gradient_checkpointing()
