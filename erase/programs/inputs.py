"""What a method needs beside settings: objectives, a mask, Fisher diagonals, copies of networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from erase.config import DdpmConfig, Saliency, SdConfig, Train
from erase.diffusion.denoiser import Denoiser
from erase.diffusion.lora.train import FREE, RANK, measuring
from erase.diffusion.losses import Dropped, Guided, copies, forget_objective, remain_objective
from erase.diffusion.parameters import Learning
from erase.diffusion.text import Concepts
from erase.engine import distributed
from erase.engine.backend import Backend, LossFn, batch_size, device_of, map_batch, seeded, trainable
from erase.engine.fisher import Fisher, fisher_diagonal, mean_gradient
from erase.engine.image_fisher import image_diagonal
from erase.engine.losses import Objective, Training, plain
from erase.engine.precision import Precision
from erase.engine.saliency import Mask, fisher_ratio_mask, load_mask, magnitude_mask, parked, save_mask
from erase.engine.sharding import local
from erase.engine.state import Checkpoint, remove_state
from erase.engine.updates import SIDES, Epoch
from erase.methods import NEEDS, Entry
from erase.programs.progress import advance, bar

COMMON = frozenset({"forget", "remain", "mask", "fisher", "origin", "origin_net", "epoch"})
"""What every program can give a method, of `erase.methods.NEEDS`."""
RARE = {
    "concepts": "erase run sd",
    "denoiser": "erase run sd or ddpm",
    "new_net": "erase run ddpm or classify",
}
"""Which programs can give the others."""
Settings = TypeVar("Settings", SdConfig, DdpmConfig)


def check_needs(entry: Entry, rare: Collection[str]) -> None:
    """Check that a program, which has some `rare` needs besides the `COMMON` ones, has what a method needs.

    Raises:
        ValueError: if it has not.
    """
    for need in entry.needs:
        if need not in COMMON and need not in rare:
            raise ValueError(
                f"method {entry.name} needs {NEEDS[need]}, which only {RARE[need]} has: choose another method"
            )


def sides_read(config: Any, entry: Entry) -> tuple[bool, bool]:
    """Whether a run reads images of what is forgotten, and of what stays; only those are generated."""
    masked = config.saliency.kind != "none"
    return entry.reads("forget", masked), entry.reads("remain", masked)


def with_dropout(config: Settings, has_null: bool) -> Settings:
    """The settings, `train.dropout` of null resolved: .1 where the model has an empty condition."""
    if config.train.dropout is not None:
        return config
    return replace(config, train=replace(config.train, dropout=0.1 if has_null else 0.0))


def resolve_inputs(
    entry: Entry,
    config: Any,
    backend: Backend[Any],
    forget: Objective,
    remain: Objective,
    batches: Sequence[Sequence[Any]],
    precision: Precision,
    mask_path: Path | None = None,
    resume: bool = False,
    renew: Callable[[], nn.Module] | None = None,
    concepts: Concepts | None = None,
    epoch: Epoch | None = None,
) -> dict[str, Any]:
    """Compute what a method's builder takes besides settings: objectives, a mask, a Fisher diagonal, and so on.

    Args:
        entry: says what the method needs.
        config: has `saliency`, `seed` and `checkpoint_every`.
        backend: the model, at θ0.
        forget: what is to be done on forget data.
        remain: what is to be done on remain data.
        batches: some of the forget and of the remain data, for Fisher diagonals. That of images (`saliency.per`) is of
            both: the forget images, not what stands in for them.
        precision: of the forward passes.
        mask_path: where the mask is kept, and Fisher sums beside it; by default nowhere.
        resume: whether to resume from Fisher sums that are there.
        renew: makes the network anew, with new weights.
        concepts: text embeddings, for closed forms.
        epoch: how many batches an epoch has.

    Raises:
        ValueError: for a method that needs something else; nothing is computed then.
    """
    rare = {"new_net": renew, "concepts": concepts, "denoiser": backend if isinstance(backend, Denoiser) else None}
    check_needs(entry, [name for name, value in rare.items() if value is not None])
    given: dict[str, Any] = {"forget": forget, "remain": remain, "epoch": epoch, **rare}
    if "mask" in entry.needs:
        sides = list(zip(SIDES, batches, saliency_losses(config.saliency, forget), strict=True))
        given["mask"] = make_mask(config, backend, sides, precision, mask_path, resume)
    if "fisher" in entry.needs:
        pulled = [*batches[0], *batches[1]] if config.saliency.per == "image" else batches[1]
        remain_side = ("remain", pulled, saliency_losses(config.saliency, forget)[1])
        found = diagonal(config, backend, remain_side, precision, mask_path and mask_path.parent, resume)
        given["fisher"] = found.named
    if "origin" in entry.needs:
        given["origin"] = {name: p.detach().clone() for name, p in trainable(backend.net).items()}
    if "origin_net" in entry.needs:
        given["origin_net"] = copy.deepcopy(backend.net).eval().requires_grad_(False)
    if "new_net" in entry.needs and renew is not None:  # made only now: it is as large as the model
        given["new_net"] = renew().eval().requires_grad_(False)
    return {need: given[need] for need in entry.needs}


def saliency_losses(wanted: Saliency, forget: Objective) -> tuple[LossFn, LossFn]:
    """The losses on forget and on remain data that saliency is of: the same, unless the settings say otherwise.

    Neither has dropout, of conditions or of the network.
    """
    same = plain if wanted.guidance is None else Guided(wanted.guidance)
    if wanted.loss == "plain":
        return same, same
    own: Any = forget.loss
    while isinstance(own, Dropped | Training):
        own = own.loss
    return own, same


def check_guidance(wanted: Saliency, entry: Entry, has_null: bool) -> None:
    """Find out before anything is computed that predictions cannot be guided.

    Raises:
        ValueError: for `saliency.guidance` on a model without an empty condition.
    """
    measures = "fisher" in entry.needs or ("mask" in entry.needs and wanted.kind != "none")
    if measures and wanted.guidance is not None and not has_null:
        raise ValueError(
            f"saliency.guidance={wanted.guidance} needs an empty condition, which this model does not have: set "
            "saliency.guidance=null"
        )


def denoising(config: Any, net: nn.Module) -> tuple[Objective, Objective]:
    """What runs of diffusion models do on forget and on remain data; both hold one copy of the weights at most."""
    held = config.forget.loss == "redirect" and config.forget.target == "frozen"
    start = copies(net) if held or config.remain.loss == "distill" else None
    forget = forget_objective(config.forget.loss, net, config.forget.target, start, config.forget.dropout)
    remain = remain_objective(config.remain.loss, net, config.train.dropout, start)
    if config.train.network_dropout:
        return replace(forget, loss=Training(forget.loss)), replace(remain, loss=Training(remain.loss))
    return forget, remain


def learning_of(config: Settings) -> Learning:
    """What of the model learns, and in which form.

    Raises:
        ValueError: for a LoRA of a model of classes.
    """
    train = config.train
    if isinstance(config, DdpmConfig):
        if train.form == "lora" or train.lora_safe:
            raise ValueError("train.form=lora and train.lora_safe are for erase run sd: no program loads such LoRAs")
        return Learning(train.parameters)
    rank = (config.lora.rank or RANK) if train.form == "lora" else None
    return Learning(train.parameters, train.lora_safe, rank, config.seed)


def check_dense(config: SdConfig) -> None:
    """Refuse to train as a LoRA what is edited in closed form.

    Raises:
        ValueError: for `train.form=lora`.
    """
    if config.train.form == "lora":
        raise ValueError(
            "train.form=lora is trained, and a closed form (method uce or speed, forget.start=uce) edits the weights: "
            "use train.form=dense, of which --save lora makes a LoRA"
        )


def learning(train: Train, denoiser: Denoiser) -> Denoiser:
    """A denoiser as it learns: how times are drawn, and how errors are reduced."""
    return replace(denoiser, spread=train.times, reduction=train.reduction)


def make_mask(
    config: Any,
    backend: Backend[Any],
    sides: Sequence[tuple[str, Sequence[Any], LossFn]],
    precision: Precision,
    path: Path | None,
    resume: bool = False,
) -> Mask | None:
    """S: the mask, kept in `path` (if there is one) and read from there if it exists; `None` if it is off.

    Args:
        config: has `saliency`, `seed` (of timesteps and noise, the same on both sides) and `checkpoint_every`.
        backend: the model.
        sides: forget and remain, in this order: a name, the batches, the loss.
        precision: of the forward passes.
        path: where the mask is kept; Fisher sums are, beside it, until it is there.
        resume: whether to go on with Fisher sums that are there.
    """
    wanted: Saliency = config.saliency
    if wanted.kind == "none":
        return None
    if path is not None and distributed.on_main(path.exists):
        return load_mask(path)
    if getattr(config.train, "form", "dense") == "lora":
        with measuring(backend.net):
            found = measured_mask(config, backend, sides, precision, path, resume)
        mask = Mask(found.named, {**found.meta, "free": FREE})
    else:
        mask = measured_mask(config, backend, sides, precision, path, resume)
    if path is not None and distributed.rank() == 0:
        save_mask(mask, path)
        for side in sides:
            remove_state(sums_path(path.parent, side[0]))
    return mask


def measured_mask(
    config: Any,
    backend: Backend[Any],
    sides: Sequence[tuple[str, Sequence[Any], LossFn]],
    precision: Precision,
    path: Path | None,
    resume: bool,
) -> Mask:
    """The mask of what learns now; arguments as those of `make_mask`."""
    wanted: Saliency = config.saliency
    if wanted.kind == "magnitude":
        gradient = mean_gradient(
            backend,
            to_device(sides[0][1], backend),
            draws=wanted.draws,
            generator=seeded(precision.device, config.seed, 1),
            loss=sides[0][2],
            autocast=precision.autocast,
            scale=precision.scale,
            share=(distributed.rank(), distributed.world()),
            total=distributed.total,
        )
        for g in gradient.values():
            local(g).abs_()
        return magnitude_mask(gradient, density=wanted.density or 0)
    folder = path and path.parent
    with parked(diagonal(config, backend, sides[0], precision, folder, resume), folder) as forget:
        remain = diagonal(config, backend, sides[1], precision, folder, resume)
        return fisher_ratio_mask(forget, remain, threshold=wanted.threshold, density=wanted.density)


def sums_path(out: Path, side: str) -> Path:
    """Where the Fisher sums of a side are kept."""
    return out / f"fisher-{side}.safetensors"


def diagonal(
    config: Any,
    backend: Backend[Any],
    side: tuple[str, Sequence[Any], LossFn],
    precision: Precision,
    out: Path | None,
    resume: bool = False,
) -> Fisher:
    """The Fisher diagonal of one side, with a progress bar; its sums are kept in the folder `out`, if there is one."""
    what, batches, loss = side
    wanted: Saliency = config.saliency
    with bar(sum(map(batch_size, batches)), f"saliency: {what}") as shown:
        progress: Callable[[int], None] = partial(advance, shown)
        data, generator = to_device(batches, backend), seeded(precision.device, config.seed, 1)
        if wanted.per == "image":
            return image_diagonal(
                backend,
                data,
                draws=wanted.draws,
                generator=generator,
                loss=loss,
                chunk=wanted.batch_size,
                autocast=precision.autocast,
                scale=precision.scale,
                share=(distributed.rank(), distributed.world()),
                total=distributed.total,
                progress=progress,
            )
        return fisher_diagonal(
            backend,
            data,
            per=wanted.per,
            draws=wanted.draws,
            generator=generator,
            loss=loss,
            clip=wanted.clip,
            # Gradients of single samples out of a batch need activations that checkpointing does not keep.
            chunk=1 if getattr(config.train, "checkpointing", False) else wanted.chunk,
            autocast=precision.autocast,
            scale=precision.scale,
            share=(distributed.rank(), distributed.world()),
            total=distributed.total,
            checkpoint=None if out is None else Checkpoint(sums_path(out, what), config.checkpoint_every, resume),
            progress=progress,
        )


def to_device(batches: Sequence[Any], backend: Backend[Any]) -> Iterator[Any]:
    """The batches on the network's device, moved one at a time: data are cached on the CPU."""
    device = device_of(backend.net)
    return (map_batch(lambda x: x.to(device), batch) for batch in batches)
