from typing import Any

import pytest
import torch
import toys
from torch import nn

from erase.diffusion.denoiser import mse
from erase.engine.backend import seeded
from erase.engine.loop import unlearn
from erase.engine.updates import FastSlow
from erase.methods.esd import esd


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.5])
def test_a_step_is_toward_the_opposite_of_what_the_first_model_said(eta: float) -> None:
    """θ ← θ - β ∇ mean ‖ε_θ(c) - (ε0(∅) - η (ε0(c) - ε0(∅)))‖², twice, by hand."""
    model, other, first = (toys.denoiser() for _ in range(3))
    method, asked_for = esd(fast_rate=3.0, fast_rule="sgd", eta=eta, denoiser=model), list[Any]()
    model.net.register_forward_hook(lambda *_: asked_for.append(None))
    unlearn(model, method, [toys.latents()], None, steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=9.0), seed=0)
    assert len(asked_for) == 2 * (3 if eta else 2)  # at 0 what the first model said of the concept does not matter
    params = list(other.net.parameters())
    for step in range(2):
        batch = first.draw(toys.latents(), seeded("cpu", 0, step, 0, 0))
        noisy, t, cond = first.noisy(batch), batch["t"], batch["cond"]
        with torch.no_grad():
            asked, without = (first.predict(noisy, t, c) for c in (cond, {"text": torch.zeros(3, 3, 8)}))
        assert not torch.allclose(asked, without, rtol=0.01)
        loss = mse(other.predict(noisy, t, cond), without - eta * (asked - without)).mean()
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.data -= 3.0 * g
    before, after, expected = (toys.weights(m.net) for m in (first, model, other))
    moved = {name: expected[name] - before[name] for name in before}
    far = max(float(x.abs().max()) for x in moved.values())
    assert far > 1e-4
    toys.close({name: after[name] - before[name] for name in before}, moved, rtol=1e-3, atol=1e-3 * far)  # float32


@pytest.mark.parametrize(("current", "scale"), [(False, 1.0), (False, 0.0), (True, 2.0), (True, 1.0)])
def test_both_conventions_in_float64(current: bool, scale: float) -> None:
    """`ε0(∅) - η (ε0(c) - ε0(∅))` of the paper, and `ε0(c) - n (ε0(c) - ε0(∅))`, n = η + 1, of the script; Adam."""
    model, other, first = (toys.small_denoiser() for _ in range(3))
    method = esd(fast_rate=0.01, eta=scale - 1 if current else scale, denoiser=model)
    unlearn(model, method, [toys.latents()], None, steps=5, optimizer=lambda p: torch.optim.SGD(p, lr=9.0), seed=0)
    optimizer = torch.optim.Adam(other.net.parameters(), lr=0.01)
    for step in range(5):
        batch = first.draw(toys.latents(), seeded("cpu", 0, step, 0, 0))
        a = torch.linspace(0.999, 0.01, 50)[batch["t"]].view(-1, 1, 1, 1)
        noisy, t, text = a.sqrt() * batch["z0"] + (1 - a).sqrt() * batch["noise"], batch["t"], batch["cond"]["text"]
        with torch.no_grad():
            asked, without = first.net(noisy, t, text), first.net(noisy, t, torch.full((3, 3, 8), 0.5))
            target = (asked if current else without) - scale * (asked - without)
        optimizer.zero_grad()
        nn.functional.mse_loss(other.net(noisy, t, text), target).backward()
        optimizer.step()
    toys.close(toys.weights(model.net), toys.weights(other.net), rtol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_an_attribute_is_erased_from_a_concept_that_stays(scale: float) -> None:
    """`ε0(c) - n (ε0(a) - ε0(∅))` of the authors' current script, where c learns and a is the attribute; in float64."""
    model, other, first = (toys.small_denoiser() for _ in range(3))
    batch = toys.latents()
    batch = {**{name: batch[name] for name in ("mean", "std", "cond")}, "attribute": batch["anchor"]}
    method = esd(fast_rate=0.01, eta=scale, denoiser=model)
    unlearn(model, method, [batch], None, steps=5, optimizer=lambda p: torch.optim.SGD(p, lr=9.0), seed=0)
    optimizer = torch.optim.Adam(other.net.parameters(), lr=0.01)
    for step in range(5):
        drawn = first.draw(batch, seeded("cpu", 0, step, 0, 0))
        a = torch.linspace(0.999, 0.01, 50)[drawn["t"]].view(-1, 1, 1, 1)
        noisy, t = a.sqrt() * drawn["z0"] + (1 - a).sqrt() * drawn["noise"], drawn["t"]
        concept, attribute = drawn["cond"]["text"], drawn["attribute"]["text"]
        with torch.no_grad():
            stays, lost, without = (first.net(noisy, t, x) for x in (concept, attribute, torch.full((3, 3, 8), 0.5)))
            target = stays - scale * (lost - without)
        optimizer.zero_grad()
        nn.functional.mse_loss(other.net(noisy, t, concept), target).backward()
        optimizer.step()
    toys.close(toys.weights(model.net), toys.weights(other.net), rtol=1e-9)


def test_weights_that_do_not_learn_are_those_of_the_target_too() -> None:
    """ESD-x: the target is the first model's whole, though only the weights that learn are kept for it."""
    model, rows = toys.denoiser(), list[Any]()
    for name, p in model.net.named_parameters():
        p.requires_grad_(".attn2." in name)
    before = toys.weights(model.net)
    batch = {**toys.latents(), "cond": {"text": torch.zeros(3, 3, 8)}}  # the empty condition is its own opposite
    method = esd(fast_rate=0.1, denoiser=model)
    unlearn(
        model, method, [batch], None, steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=9.0), seed=0, log=rows.append
    )
    assert [row["forget_loss"] for row in rows] == [0.0, 0.0]
    assert toys.same(toys.weights(model.net), before)


def test_it_needs_an_empty_condition() -> None:
    model = toys.denoiser(null=None)
    with pytest.raises(ValueError, match="needs a null condition, which this model lacks"):
        unlearn(
            model,
            esd(fast_rate=0.1, denoiser=model),
            [toys.latents()],
            None,
            steps=1,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            seed=0,
        )


def test_settings() -> None:
    method = esd(fast_rate=1e-5)
    assert (method.name, method.remain, method.mask) == ("esd", None, None)
    assert method.update == FastSlow(1e-5, "adam", schedule="constant")
    with pytest.raises(ValueError, match=r"eta must be ≥ 0; got -1\.0"):
        esd(fast_rate=1e-5, eta=-1.0)
