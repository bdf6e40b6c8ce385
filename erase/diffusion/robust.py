"""A redirect that holds around the prompt, not at it: adversarial conditions, and images of the concept themselves.

What an attacker on the side of the prompt looks for is a condition under which the network predicts what the first
model predicted of the concept. What an image becomes is decided while it is mostly noise; so for the samples whose
timestep is in the noisier half a few signed steps look for such a condition before each forget step, within a bound
around the prompt's own, and the step is made there:

    δ ← clip_r(δ - ρ sign ∇_δ ‖ε_θ(z_t, t, c + δ) - ε0(z_t, t, c)‖²),  from a random start, `steps` times
    min over θ of  ‖ε_θ(z_t, t, c + δ) - ε0(z_t, t, a)‖²

c is the forget prompt's condition, a its anchor's, ε0 the model at the start. The bound r is a share of the root mean
square of c - a, so that it means the same for every text encoder; ρ is 2 r / `steps`. Looking in both halves harmed
more of what stays, and made what is drawn in the concept's place less sharp.

What an attacker on the side of the image does is to start from a half-noised image of the concept, and to ask for
nothing. So a share of the samples whose timestep is in the less noisy half has the empty prompt or the anchor as its
condition, and is led away from what the first model saw in the image:

    min over θ of  ‖ε_θ(z_t, t, ∅ or a) - (ε0(z_t, t, a) - η (ε0(z_t, t, c) - ε0(z_t, t, a)))‖²

Sources: adversarial training of erasers, Zhang et al., NeurIPS 2024, arXiv 2405.15234 (AdvUnlearn), whose adversary are
words before the prompt and whose weights are the text encoder's; negative guidance as in ESD, arXiv 2303.07345.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from erase.diffusion import condition
from erase.diffusion.condition import WORDS, Condition
from erase.diffusion.denoiser import Denoiser, as_denoiser, mse
from erase.diffusion.losses import Exchanged, Redirect
from erase.engine.backend import LossFn
from erase.engine.losses import Objective, Training
from erase.engine.sharding import is_sharded


@dataclass(frozen=True)
class Robust:
    """How a redirect is made robust."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    steps: int = 3
    """Signed steps on the condition before each forget step; each costs a forward and a backward pass of half of the
    batch. 0 leaves the conditions as they are."""
    radius: float = 1.0
    """r, how far they lead: a share of the root mean square of the difference between the prompt's condition and its
    anchor's."""
    images: float = 0.25
    """The share of the less noisy half of the samples that have the empty prompt or the anchor as their condition. With
    `forget.pictures=both` half of these are images of the anchor."""
    away: float = 1.0
    """η, how far these are led beyond the anchor."""

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: for values outside their range.
        """
        if self.steps < 0 or self.radius < 0 or self.away < 0 or not 0 <= self.images <= 1:
            raise ValueError(f"robust needs steps, radius, away ≥ 0 and images in [0, 1]; got {self}")


@dataclass(frozen=True)
class RobustRedirect:
    """The losses above as one, `[B]`."""

    frozen: dict[str, Tensor]
    """θ0, of the weights that learn."""
    wanted: Robust

    def __call__(self, backend: Any, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Loss `[B]` of a batch with `cond` and `anchor`."""
        model = as_denoiser(backend)
        if "t" not in batch:
            batch = model.draw(batch, generator)
        noisy, t, cond, anchor = model.noisy(batch), batch["t"], batch["cond"], batch["anchor"]
        first = Exchanged(model.net, self.frozen)
        with torch.no_grad():
            concept, target = (model.predict(noisy, t, c, first) for c in (cond, anchor))
        clear = model.process.bins(t, 2) == 0
        asked = self.adversary(model, noisy, t, cond, anchor, concept, ~clear, batch["drop_draw"])
        asked, probed = self.probes(model, batch, asked, clear)
        shape = (-1, *[1] * (noisy.ndim - 1))
        target = torch.where(probed.view(shape), target - self.wanted.away * (concept - target), target)
        return model.error(model.predict(noisy, t, asked), target)

    def adversary(
        self,
        model: Denoiser,
        noisy: Tensor,
        t: Tensor,
        cond: Condition,
        anchor: Condition,
        concept: Tensor,
        where: Tensor,
        chance: Tensor,
    ) -> dict[str, Tensor]:
        """Conditions near the prompts' own under which the network predicts the concept, leaves `[B, …]`.

        Samples for which `where` `[B]` does not hold keep theirs. Processes that share the weights must ask the network
        equally often, so they take all samples along; the bound of those that keep theirs is 0. Where a sample's search
        starts depends on its `chance` `[B]` alone, so that a batch may be taken in parts.
        """
        wanted, start = self.wanted, dict(cond)
        rows = torch.arange(len(t), device=t.device) if is_sharded(model.net) else where.nonzero().flatten()
        if not wanted.steps or not wanted.radius or not len(rows):
            return start
        reach, moved = {}, {}
        for name in WORDS:
            if name in start:
                x = start[name]
                bound = wanted.radius * root_mean_square(x - anchor[name], start.get("mask")) * where
                reach[name] = bound.to(x).view(-1, *[1] * (x.ndim - 1))[rows]
                moved[name] = reach[name] * (2 * uniform(chance[rows], x[0]) - 1)
        asked = {name: x[rows] for name, x in start.items()}
        noisy, t, concept = noisy[rows], t[rows], concept[rows]
        for _ in range(wanted.steps):
            with torch.enable_grad():
                free = {name: x.detach().requires_grad_(True) for name, x in moved.items()}
                said = model.predict(noisy, t, {**asked, **{name: asked[name] + x for name, x in free.items()}})
                apart = mse(said, concept).sum() * noisy[0].numel()  # signs count, which float16 would lose
                grads = torch.autograd.grad(apart, list(free.values()))
            for (name, r), grad in zip(reach.items(), grads, strict=True):
                stepped = moved[name] - 2 * r / wanted.steps * grad.sign()
                moved[name] = torch.minimum(torch.maximum(stepped, -r), r)
        found = {name: start[name].index_copy(0, rows, (asked[name] + x).detach()) for name, x in moved.items()}
        return {**start, **found}

    def probes(
        self, model: Denoiser, batch: dict[str, Any], asked: Condition, where: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The conditions with those of image-side samples in their places, and which samples these are, `[B]`.

        They are among those for which `where` `[B]` holds.
        """
        chance, share = batch["drop_draw"], self.wanted.images
        probed = where & (chance < share)
        if not share:
            return dict(asked), probed
        empty = probed & (chance < share / 2)
        found = condition.where(probed, batch["anchor"], asked)
        if model.null is None:
            return found, probed
        return condition.where(empty, condition.to(model.null, chance.device), found), probed


def root_mean_square(x: Tensor, mask: Tensor | None) -> Tensor:
    """Of `x` `[B, …]` a number each, `[B]`; of tokens `[B, T, D]` those that are read, by a `mask` `[B, T]`."""
    squares = x.float().square()
    if mask is None or x.ndim < 3:
        return squares.flatten(1).mean(1).sqrt()
    read = mask.to(squares)
    return ((squares.mean(2) * read).sum(1) / read.sum(1).clamp(min=1)).sqrt()


def uniform(chance: Tensor, like: Tensor) -> Tensor:
    """Numbers in [0, 1) of the shape and kind of `like` for each number in [0, 1) of `chance`, and of it alone."""
    found = [
        torch.rand(like.shape, generator=torch.Generator().manual_seed(int(seed * 2**53))) for seed in chance.tolist()
    ]
    return torch.stack(found).to(like)


def harden(objective: Objective, wanted: Robust) -> Objective:
    """A redirect to what the first model predicts, made robust.

    Raises:
        ValueError: for another objective, a redirect to what the model predicts as it learns, and dropped conditions.
    """

    def hardened(loss: LossFn) -> LossFn:
        if isinstance(loss, Training):
            return replace(loss, loss=hardened(loss.loss))
        if not isinstance(loss, Redirect) or loss.frozen is None:
            raise ValueError(
                "method.robust needs forget.loss=redirect, forget.target=frozen and forget.dropout=0; got "
                f"{objective.name}: set them, or robust=null"
            )
        return RobustRedirect(loss.frozen, wanted)

    return replace(objective, loss=hardened(objective.loss), name="robust redirect")
