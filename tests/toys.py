"""Tiny models, data and masks that the engine's tests share. float64 unless said: parity is then to rounding."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from erase.diffusion.denoiser import Denoiser
from erase.diffusion.process import Discrete
from erase.engine.saliency import Mask

Weights = dict[str, Tensor]


@dataclass
class Plain:
    """All that a user must write: a network and a loss per sample."""

    net: nn.Module

    def losses(self, batch: Any, generator: torch.Generator) -> Tensor:
        return (self.net(batch["x"]) - batch["y"]).square().flatten(1).mean(1)


@dataclass
class Noisy:
    """A backend that draws, with bins. A batch that is drawn already is left as it is."""

    net: nn.Module
    num_bins: int = 4

    def draw(self, batch: Any, generator: torch.Generator) -> Any:
        x = batch["x"]
        if "t" in batch:
            return batch
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return {**batch, "t": torch.randint(self.num_bins, (len(x),), generator=generator), "noise": noise}

    def bins(self, batch: Any) -> Tensor:
        return batch["t"]

    def losses(self, batch: Any, generator: torch.Generator) -> Tensor:
        batch = self.draw(batch, generator)
        error = self.net(batch["x"] + 0.3 * batch["noise"]) - batch["y"]
        return (1 + batch["t"]) * error.square().flatten(1).mean(1)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomize(net: nn.Module, seed: int = 0, std: float = 0.3) -> nn.Module:
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=gen(seed), dtype=torch.float64) * std)
            seed += 1
    return net


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    return randomize(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))).to(dtype)


def conv() -> nn.Module:
    """Images `[B, 4, 2, 2]` to `[B, 3, 2, 2]`; its weights lie channels-last in memory."""
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 3, padding=1))
    return randomize(net).double().to(memory_format=torch.channels_last)


def batches(seed: int, count: int = 3, size: int = 4, shape: tuple[int, ...] = (), dtype: Any = torch.float64) -> Any:
    """`count` batches of x `[B, 4, …]` and y `[B, 3, …]`."""
    g = gen(seed)
    return [
        {c: torch.randn(size, n, *shape, generator=g, dtype=torch.float64).to(dtype) for c, n in (("x", 4), ("y", 3))}
        for _ in range(count)
    ]


def drawn(backend: Noisy, seed: int, **kwargs: Any) -> Any:
    g = gen(seed + 100)
    return [backend.draw(batch, g) for batch in batches(seed, **kwargs)]


def some_mask(net: nn.Module, density: float = 0.4, seed: int = 3) -> Mask:
    """Random bits; the first parameter is wholly masked, the last wholly kept."""
    g = gen(seed)
    named = {name: torch.rand(p.shape, generator=g) < density for name, p in net.named_parameters()}
    first, *_, last = named
    named[first][:] = False
    named[last][:] = True
    return Mask(named)


def weights(net: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def same(a: Weights, b: Weights) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: Weights, b: Weights, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def unet() -> Any:
    """A Stable Diffusion UNet of 51 000 weights."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel  # a second that most tests can spare

    net = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    randomize(net, std=0.1)
    return net.eval()


def denoiser(
    net: nn.Module | None = None, prediction: Any = "epsilon", alphas: Tensor | None = None, **kwargs: Any
) -> Denoiser:
    return Denoiser(
        net or unet(),
        lambda net, noisy, t, cond: net(noisy, t, encoder_hidden_states=cond["text"]).sample,
        Discrete(torch.linspace(0.999, 0.01, 50) if alphas is None else alphas, prediction),
        **{"null": {"text": torch.zeros(1, 3, 8)}, **kwargs},
    )


class Small(nn.Module):
    """A denoiser's network in float64: latents `[B, 4, 8, 8]`, times `[B]` and text `[B, 3, 8]`, nonlinear in all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.text, self.last = nn.Conv2d(4, 6, 3, padding=1), nn.Linear(8, 6), nn.Conv2d(6, 4, 1)
        randomize(self).double()

    def forward(self, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
        told = self.text(text.double()).mean(1) + t.double()[:, None] / 50
        return self.last(torch.tanh(self.first(noisy.double()) + told[:, :, None, None]))


def small_denoiser() -> Denoiser:
    """Predictions and losses in float64, of noise in float32."""
    alphas = torch.linspace(0.999, 0.01, 50)
    null = {"text": torch.full((1, 3, 8), 0.5)}
    return Denoiser(Small(), lambda net, noisy, t, cond: net(noisy, t, cond["text"]), Discrete(alphas), null)


def latents(seed: int = 0, size: int = 3) -> dict[str, Any]:
    g = gen(seed)
    shapes = {"mean": (4, 8, 8), "std": (4, 8, 8), "cond": (3, 8), "anchor": (3, 8)}
    made = {name: torch.randn(size, *shape, generator=g) for name, shape in shapes.items()}
    return {**made, "cond": {"text": made["cond"]}, "anchor": {"text": made["anchor"]}}
