"""An image classifier as a backend: cross entropy per sample, augmentation drawn apart from the loss.

Batches are dicts with `x`, pixels `[B, C, H, W]`, uint8, and `y`, labels `[B]`. `draw` makes of `x` what the network
takes, and adds `other`, a class by lot for each image. Where `relabel` `[B]` (optional) says so, that is its label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erase.engine import distributed
from erase.engine.backend import LossFn
from erase.engine.losses import Objective
from erase.engine.method import Method

Relabel = Literal["other", "any"]
"""Labels by lot: never the true one, or from all classes (SalUn's scripts)."""


@dataclass(frozen=True)
class Prepare:
    """Pixels as a network takes them: resized, their middle kept, then `(x / 255 - mean) / std` by channel."""

    mean: tuple[float, ...] = (0.5,)
    """`[C]`"""
    std: tuple[float, ...] = (0.5,)
    size: tuple[int, int] | int | None = None
    """Height and width, or the shorter side (the other in proportion); None leaves images as they are."""
    crop: tuple[int, int] | None = None
    """Height and width of the middle; None keeps all."""
    mode: Literal["bilinear", "bicubic"] = "bilinear"
    """Of resizing."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """`[B, C, H, W]`, float32, of uint8; one channel is repeated where the network takes three.

        Raises:
            ValueError: for images smaller than what is kept of them.
        """
        x = pixels.float() / 255
        H, W = x.shape[2:]
        size = self.size
        if isinstance(size, int):
            size = (size * H // min(H, W), size * W // min(H, W))
        if size is not None and size != (H, W):
            for part in ((H, size[1]), size):  # as Pillow: along rows, then along columns, overshoots cut in between
                x = F.interpolate(x, part, mode=self.mode, antialias=True).clamp(0, 1)
        if self.crop is not None:
            (H, W), (h, w) = x.shape[2:], self.crop
            if h > H or w > W:
                raise ValueError(f"images of {H}×{W} pixels are smaller than the {h}×{w} that are kept of them")
            x = x[:, :, (H - h) // 2 :, (W - w) // 2 :][:, :, :h, :w]
        mean, std = (x.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


@dataclass(frozen=True)
class Augment:
    """Random shifts of up to `shift` pixels (black comes in) and horizontal flips of every second image."""

    shift: int = 0
    flip: bool = False

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """`[B, C, H, W]` of the same."""
        B, _, H, W = pixels.shape
        device = pixels.device
        if self.shift:
            edge = self.shift
            padded = F.pad(pixels, (edge, edge, edge, edge))
            top, left = torch.randint(2 * edge + 1, (2, B, 1), generator=generator, device=device)
            rows, columns = top + torch.arange(H, device=device), left + torch.arange(W, device=device)
            sample = torch.arange(B, device=device).view(-1, 1, 1)
            pixels = padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
        if self.flip:
            turned = torch.rand(B, generator=generator, device=device) < 0.5
            pixels = torch.where(turned.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        return pixels


@dataclass(frozen=True)
class Classifier:
    """A network that gives logits `[B, K]`, or an output of `transformers` that holds them: a `Backend` that draws."""

    net: nn.Module
    num_classes: int
    """K"""
    prepare: Callable[[Tensor], Tensor] = Prepare()
    """Of what batches hold; by default of pixels."""
    augment: Augment = Augment()
    relabel: Relabel = "other"
    """What the lot gives: another class than the true one, or any."""

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: for fewer than two classes, or an unknown lot.
        """
        if self.relabel not in get_args(Relabel):
            raise ValueError(f"unknown relabel {self.relabel!r}; allowed: {', '.join(get_args(Relabel))}")
        if self.num_classes < 2:
            raise ValueError(f"a classifier needs two classes or more; got {self.num_classes}")

    def draw(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Prepared and augmented images, labels, and `other`, a label by lot; a drawn batch as it is.

        Of a batch with `relabel` (`erase.engine.batches.Together`) the labels of forget data are those by lot.
        """
        if "other" in batch:
            return batch
        x, y = batch["x"], batch["y"]
        lot = torch.randint(
            1 if self.relabel == "other" else 0, self.num_classes, y.shape, generator=generator, device=y.device
        )
        other = (y + lot) % self.num_classes
        label = torch.where(batch["relabel"], other, y) if "relabel" in batch else y
        return {"x": self.prepare(self.augment(x, generator)), "y": label, "other": other}

    def losses(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Cross entropy, `[B]`."""
        batch = self.draw(batch, generator)
        return F.cross_entropy(logits(self.net, batch["x"]), batch["y"], reduction="none")

    def distances(self, batch: dict[str, Tensor], teacher: nn.Module, generator: torch.Generator) -> Tensor:
        """`KL(teacher ‖ net)`, `[B]`, nats."""
        return self.losses_and_distances(batch, teacher, generator)[1]

    def losses_and_distances(
        self, batch: dict[str, Tensor], teacher: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """`losses` and `distances`, of one pass of each network."""
        batch = self.draw(batch, generator)
        own = logits(self.net, batch["x"])
        with torch.no_grad():
            other = logits(teacher, batch["x"])
        wide = torch.promote_types(torch.float32, own.dtype)  # two near bfloat16 distributions differ by rounding
        ours, theirs = (x.to(wide).log_softmax(1) for x in (own, other))
        apart = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
        return F.cross_entropy(own, batch["y"], reduction="none"), apart


def logits(net: nn.Module, x: Tensor) -> Tensor:
    """`[B, K]`."""
    out = net(x)
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found


def other_label(backend: Classifier, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """Cross entropy with a label by lot, drawn anew each time, `[B]`."""
    batch = backend.draw(batch, generator)
    return backend.losses({**batch, "y": batch["other"]}, generator)


RELABEL = Objective(other_label, 1, "relabel")


@dataclass(frozen=True)
class KeepStatistics:
    """A loss whose passes leave the running statistics of batch normalisation alone.

    In training mode every pass updates them, also one whose gradient is ascended: the statistics would drift towards
    the forget data, masked weights or not, and no later step knows of them. The loop knows of losses alone, and leaves
    the network's mode to its caller; so the forget loss says it itself.
    """

    loss: LossFn
    running: bool = False
    """Whether batches are normalised by the running statistics, as in use; else by their own."""

    def __call__(self, backend: Classifier, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Losses `[B]`."""
        with keeping_statistics(backend.net, self.running):
            return self.loss(backend, batch, generator)


def without_statistics(method: Method, running: bool = False) -> Method:
    """The method, whose forget phase updates no running statistics, or goes by them."""
    if method.forget is None:
        return method
    return replace(method, forget=replace(method.forget, loss=KeepStatistics(method.forget.loss, running)))


@contextmanager
def keeping_statistics(net: nn.Module, running: bool = False) -> Iterator[None]:
    """Running statistics of batch normalisation are not updated; batches go by their own, or by the running ones."""
    name = "training" if running else "track_running_stats"
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    changed = [m for m in norms if getattr(m, name)]
    for module in changed:
        setattr(module, name, False)
    try:
        yield
    finally:
        for module in changed:
            setattr(module, name, True)


def together(net: nn.Module) -> nn.Module:
    """The same network; with several processes batch normalisation is by the whole batch, not a process's share of it.

    (torch's own synchronised one takes no tensors on a CPU.)
    """
    if distributed.world() > 1:
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.forward = partial(_normalise, module)  # type: ignore[method-assign]
    return net


def _normalise(module: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """What the module gives for the whole batch, of which `x` `[B, C, …]` is this process's share."""
    if not module.training and module.running_mean is not None:
        return type(module).forward(module, x)
    y, each = x.float(), [i for i in range(x.ndim) if i != 1]
    n = distributed.world() * y.numel() // y.shape[1]
    mean = _total(y.sum(each)) / n
    y = y - _across(mean, x)
    var = _total(y.square().sum(each)) / n
    if module.training and module.track_running_stats:
        _follow(module, mean.detach(), var.detach() * n / max(n - 1, 1))
    y = y * _across(torch.rsqrt(var + module.eps), x)
    if module.affine:
        y = y * _across(module.weight, x) + _across(module.bias, x)
    return y.to(x.dtype)


def _across(values: Tensor, x: Tensor) -> Tensor:
    """`[C]` as it is spread over `x`."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


@torch.no_grad()
def _follow(module: nn.modules.batchnorm._BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Running statistics take a step."""
    assert module.num_batches_tracked is not None
    module.num_batches_tracked += 1
    rate = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
    for running, seen in ((module.running_mean, mean), (module.running_var, var)):
        assert running is not None
        running.lerp_(seen.to(running.dtype), rate)


class _Total(torch.autograd.Function):
    """Sum over processes; of the gradient too, as every process's loss is made of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return distributed.total(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return distributed.total(grads[0])


def _total(x: Tensor) -> Tensor:
    found: Tensor = _Total.apply(x)  # type: ignore[no-untyped-call]
    return found
