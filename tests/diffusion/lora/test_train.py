"""Training in LoRA form: what learns, and what becomes of it."""

import importlib.util
from typing import Any

import micro
import micro_flux
import pytest
import torch
from torch import Tensor, nn

from erase.diffusion.families import family
from erase.diffusion.lora.train import FREE, dense, inject, measuring
from erase.diffusion.model import Model
from erase.diffusion.parameters import Learning
from erase.engine.fast_step import FastStep
from erase.engine.fisher import fisher_diagonal
from erase.engine.saliency import Mask


def names(net: nn.Module, which: str) -> list[str]:
    return [name for name, p in net.named_parameters() if which in name and p.ndim in (2, 4)]


def test_nothing_changes_until_it_learns() -> None:
    net: Any = micro.unet()
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, micro.WIDTH)
    before, old = net(x, t, text).sample, {name: p.detach().clone() for name, p in net.named_parameters()}
    weights = [*names(net, "attn2"), "conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"]
    learning = inject(net, weights, 3, seed=0)
    assert learning == [name for name, p in net.named_parameters() if p.requires_grad]
    assert len(learning) == 2 * len(weights)
    assert torch.equal(net(x, t, text).sample, before)
    found = dense(net)
    assert found.keys() == set(weights)
    assert all(torch.equal(t, old[name]) for name, t in found.items())
    for name in learning:
        nn.init.normal_(net.get_parameter(name), std=0.1)
    ranks = {name: int(torch.linalg.matrix_rank((t - old[name]).flatten(1))) for name, t in dense(net).items()}
    assert set(ranks.values()) == {3}


def test_a_is_drawn_by_the_seed_and_no_global_state_changes() -> None:
    state = torch.default_generator.get_state()
    nets = [micro.unet() for _ in range(3)]
    torch.default_generator.set_state(state)
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        inject(net, names(net, "attn2"), 2, seed)
    assert torch.equal(torch.default_generator.get_state(), state)
    first, same, other = ([p for n, p in net.named_parameters() if "lora_A" in n] for net in nets)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_layers_whose_names_end_alike_are_told_apart() -> None:
    """Flux has a `proj_out` of its own and one in every single block."""
    net = micro_flux.transformer()
    assert {name.split(".lora_")[0] for name in inject(net, ["proj_out.weight"], 2, 0)} == {"proj_out"}


def test_frozen_weights_stay_in_16_bits() -> None:
    net = micro_flux.transformer().to(torch.bfloat16)
    learning = inject(net, names(net, "add_k_proj"), 2, 0)
    assert {net.get_parameter(name).dtype for name in learning} == {torch.float32}
    assert {p.dtype for name, p in net.named_parameters() if name not in learning} == {torch.bfloat16}
    assert {t.dtype for t in dense(net).values()} == {torch.float32}


def test_only_what_a_lora_carries_learns() -> None:
    model = Model(family("sd"), type("Pipe", (), {"unet": micro.unet()})())
    every = model.choose(Learning("full"))
    safe = model.choose(Learning("full", lora_safe=True))
    layout = family("sd").LORA
    assert layout is not None
    assert safe == [name for name in every if layout.carried(name, model.net.get_parameter(name).ndim)]
    assert 0 < len(safe) < len(every)
    assert len(model.choose(Learning("xattn", rank=2))) == 2 * len(names(micro.unet(), "attn2"))


class Backend:
    """One layer, whose loss differs from sample to sample."""

    def __init__(self) -> None:
        self.net = nn.Sequential(nn.Linear(4, 3, bias=False))
        inject(self.net, ["0.weight"], 2, 0)
        for p in self.net.parameters():
            nn.init.normal_(p)

    def losses(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        found: Tensor = self.net(batch).square().sum(1)
        return found


def test_the_fisher_diagonal_of_a_and_b_is_that_of_single_samples() -> None:
    torch.default_generator.manual_seed(0)
    backend, batch = Backend(), torch.randn(5, 4)
    found = fisher_diagonal(backend, [batch], draws=1, generator=torch.Generator().manual_seed(0))
    sums = dict.fromkeys(found.named, 0)
    for row in batch:
        backend.net.zero_grad()
        backend.losses(row[None], torch.Generator()).sum().backward()  # type: ignore[no-untyped-call]
        for name in sums:
            grad = backend.net.get_parameter(name).grad
            assert grad is not None
            sums[name] = sums[name] + grad.square() / len(batch)
    for name, wanted in sums.items():
        torch.testing.assert_close(found.named[name], wanted)


def test_masks_are_of_b_and_a_is_free() -> None:
    """At B = 0 nothing of A is measured; a forget step may change all of it, and of B what the mask keeps."""
    torch.default_generator.manual_seed(0)
    backend, batch = Backend(), torch.randn(5, 4)
    params = dict(backend.net.named_parameters())
    down, up = (next(name for name in params if f"lora_{part}." in name) for part in "AB")
    nn.init.zeros_(params[up])
    given = {"draws": 1, "generator": torch.Generator().manual_seed(0)}
    backend.net[0].base_layer.requires_grad_(False)
    whole = fisher_diagonal(backend, [batch], **given)  # type: ignore[arg-type]
    assert not whole.named[down].any()
    with measuring(backend.net):
        found = fisher_diagonal(backend, [batch], **given)  # type: ignore[arg-type]
    assert found.named.keys() == {up}
    assert torch.equal(found.named[up], whole.named[up])
    assert params[down].requires_grad
    keep = torch.zeros(params[up].shape, dtype=torch.bool)
    keep[0] = True
    learning = {name: params[name] for name in (down, up)}
    before = {name: p.detach().clone() for name, p in learning.items()}
    step = FastStep(learning, Mask({up: keep}, {"free": FREE}), "sgd")
    for p in learning.values():
        p.grad = torch.ones_like(p)
    step.step(0.1)
    assert torch.equal(params[up] != before[up], keep)
    assert bool((params[down] != before[down]).all())


def test_peft_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"erase\[lora\]"):
        inject(micro.unet(), [], 2, 0)
