from dataclasses import replace
from typing import Any

import pytest
import torch
import toys

from erase.diffusion.losses import Redirect
from erase.engine.backend import seeded
from erase.engine.loop import unlearn
from erase.engine.losses import Objective
from erase.engine.method import Method
from erase.engine.saliency import Mask
from erase.engine.updates import Epoch
from erase.methods.random_label import random_label
from erase.methods.salun import salun
from erase.methods.sfron import sfron


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def go(method: Method, net: Any = None, **changes: Any) -> tuple[toys.Weights, list[dict[str, Any]]]:
    net, rows = net or toys.mlp(), list[Any]()
    settings = {"forget": toys.batches(1), "remain": toys.batches(2), "steps": 5, "optimizer": adam, "seed": 0}
    unlearn(toys.Noisy(net), method, **{**settings, "log": rows.append, **changes})
    return toys.weights(net), rows


def outside_stands(before: toys.Weights, after: toys.Weights, mask: Mask) -> bool:
    """Weights outside the mask bit for bit as they were, and those inside all moved."""
    assert all(bool((before[name] != after[name])[mask[name]].all()) for name in before)
    return all(torch.equal(before[name][~mask[name]], after[name][~mask[name]]) for name in before)


@pytest.mark.parametrize("optimizer", [adam, sgd])
@pytest.mark.parametrize("rate", [1.0, 0.0])  # 0: the remain gradient alone moves weights, and is masked too
def test_weights_outside_the_mask_never_change(rate: float, optimizer: Any) -> None:
    before, mask = toys.weights(toys.mlp()), toys.some_mask(toys.mlp())
    after, _ = go(salun(mask=mask, fast_rate=rate), optimizer=optimizer)
    assert outside_stands(before, after, mask)


@pytest.mark.parametrize("optimizer", [adam, sgd])
def test_layouts_other_than_row_major(optimizer: Any) -> None:
    net, shape = toys.conv(), (2, 2)
    before, mask = toys.weights(net), toys.some_mask(net)
    data = {"forget": toys.batches(1, shape=shape), "remain": toys.batches(2, shape=shape)}
    after, _ = go(salun(mask=mask), net, optimizer=optimizer, **data)
    assert outside_stands(before, after, mask)


@pytest.mark.parametrize("order", ["joint", "turn"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_weight_decay_and_then_masked_weights_and_momentum_are_restored(name: str, order: Any) -> None:
    """As published: a step of the optimizer on the masked gradient, then masked weights as before, without momentum."""

    def decaying(params: Any) -> torch.optim.Optimizer:
        if name == "sgd":
            return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)
        return (torch.optim.Adam if name == "adam" else torch.optim.AdamW)(params, lr=0.01, weight_decay=0.1)

    net, other = toys.mlp(), toys.mlp()
    before, mask = toys.weights(net), toys.some_mask(net)
    forget, remain = toys.drawn(toys.Noisy(net), 1), toys.drawn(toys.Noisy(net), 2)
    method = salun(mask=mask, order=order, epoch=Epoch(3, 3))
    ours, _ = go(method, net, forget=forget, remain=remain, optimizer=decaying, steps=7)
    assert outside_stands(before, ours, mask)
    optimizer = decaying(other.parameters())
    order_of = [forget[0], forget[1], forget[2], remain[0], remain[1], remain[2], forget[0]]
    for t in range(7):
        optimizer.zero_grad()
        for batch in (forget[t % 3], remain[t % 3]) if order == "joint" else (order_of[t],):
            toys.Noisy(other).losses(batch, toys.gen()).mean().backward()
        for key, p in other.named_parameters():
            assert p.grad is not None
            p.grad *= mask[key]
        optimizer.step()
        with torch.no_grad():
            for key, p in other.named_parameters():
                p.copy_(torch.where(mask[key], p, before[key]))
                for moment in optimizer.state[p].values():
                    if moment is not None and moment.shape == p.shape:
                        moment *= mask[key]
    toys.close(ours, toys.weights(other), rtol=1e-9)
    bare, _ = go(method, forget=forget, remain=remain, optimizer=lambda p: type(optimizer)(p, lr=0.01), steps=7)
    assert not toys.same(ours, bare)  # kept weights do decay


@pytest.mark.parametrize("clip", [None, 0.3])
def test_is_adam_on_the_masked_joint_gradient(clip: float | None) -> None:
    """By hand. The norm, and with it the clip, is that of the masked gradient."""
    mask, clip_at = toys.some_mask(toys.mlp()), clip or float("inf")
    net, other = toys.mlp(), toys.mlp()
    forget, remain = toys.drawn(toys.Noisy(net), 1), toys.drawn(toys.Noisy(net), 2)
    ours, rows = go(salun(mask=mask, fast_rate=0.7, clip_remain=clip), net, forget=forget, remain=remain)
    optimizer, norms = adam(other.parameters()), []
    for t in range(5):
        optimizer.zero_grad()
        for batch, factor in ((forget[t % 3], 0.7), (remain[t % 3], 1.0)):
            (factor * toys.Noisy(other).losses(batch, toys.gen()).mean()).backward()
        for name, p in other.named_parameters():
            assert p.grad is not None
            p.grad *= mask[name]
        norms.append(float(torch.nn.utils.clip_grad_norm_(other.parameters(), clip_at)))
        optimizer.step()
    toys.close(ours, toys.weights(other), rtol=1e-9)
    assert [row["remain_norm"] for row in rows] == pytest.approx(norms)
    assert clip is None or min(norms) > clip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("reduction", "clip"), [("mean", None), ("sum", 1.0)], ids=["stable_diffusion", "ddpm"])
def test_is_the_published_loop_of_diffusion_models(reduction: Any, clip: float | None, masked: bool) -> None:
    """Remain loss and the distance to the anchor's own prediction in one step; SalUn masks it, RL does not.

    As in Stable Diffusion's script, means without a clip, and in the DDPM's, sums clipped to 1 after the mask.
    """
    model, other = replace(toys.small_denoiser(), reduction=reduction), toys.small_denoiser()
    mask = toys.some_mask(other.net)
    settings: Any = {"fast_rate": 0.7, "clip_remain": clip, "forget": Objective(Redirect(), 1)}
    method = salun(mask=mask, **settings) if masked else random_label(**settings)
    forget, remain = toys.latents(1), toys.latents(2)
    unlearn(model, method, [forget], [remain], steps=5, optimizer=adam, seed=4)
    optimizer, alphas = adam(other.net.parameters()), torch.linspace(0.999, 0.01, 50)
    for step in range(5):
        losses = []
        for number, data in enumerate((forget, remain)):
            batch = other.draw(data, seeded("cpu", 4, step, number, 0))
            a, t = alphas[batch["t"]].view(-1, 1, 1, 1), batch["t"]
            noisy = a.sqrt() * batch["z0"] + (1 - a).sqrt() * batch["noise"]
            target = batch["noise"]
            if number == 0:
                with torch.no_grad():
                    target = other.net(noisy, t, batch["anchor"]["text"])
            errors = (other.net(noisy, t, batch["cond"]["text"]) - target).square().flatten(1)
            losses.append((errors.mean(1) if reduction == "mean" else errors.sum(1)).mean())
        optimizer.zero_grad()
        (losses[1] + 0.7 * losses[0]).backward()
        for name, p in other.net.named_parameters():
            assert p.grad is not None
            p.grad *= mask[name] if masked else 1
        norm = torch.nn.utils.clip_grad_norm_(other.net.parameters(), clip or float("inf"))
        optimizer.step()
        assert clip is None or norm > clip
    toys.close(toys.weights(model.net), toys.weights(other.net), rtol=1e-9)


def test_a_full_mask_and_none_are_random_labels() -> None:
    full = Mask({name: torch.ones_like(p, dtype=torch.bool) for name, p in toys.mlp().named_parameters()})
    expected, _ = go(random_label(fast_rate=0.5))
    for mask in (full, None):
        assert toys.same(go(salun(mask=mask, fast_rate=0.5))[0], expected)
    assert not toys.same(go(salun(mask=toys.some_mask(toys.mlp()), fast_rate=0.5))[0], expected)


@pytest.mark.parametrize("ron", [True, False])
def test_other_methods_mask_the_forget_side_alone(ron: bool) -> None:
    """The remain gradients of SFR-on move all weights, with and without R-on."""
    before, mask = toys.weights(toys.mlp()), toys.some_mask(toys.mlp())
    assert not outside_stands(before, go(sfron(mask=mask, fast_rate=0.01, ron=ron))[0], mask)


def test_a_mask_of_other_parameters_is_refused_before_the_first_step() -> None:
    net = toys.mlp()
    before, mask = toys.weights(net), toys.some_mask(net)
    with pytest.raises(KeyError, match=r"no entry for '0\.bias'"):
        go(salun(mask=Mask({"0.weight": mask["0.weight"]})), net)
    flipped = Mask({name: m.t() if m.ndim == 2 else m for name, m in mask.named.items()})
    with pytest.raises(ValueError, match=r"the mask of '0\.weight' has shape \[4, 8\], the weight \[8, 4\]"):
        go(salun(mask=flipped), net)
    assert toys.same(toys.weights(net), before)


def test_settings() -> None:
    mask = toys.some_mask(toys.mlp())
    method, base = salun(mask=mask, fast_rate=0.5), random_label(fast_rate=0.5)
    assert (method.name, method.mask is mask) == ("salun", True)
    assert method.update == replace(base.update, mask_all=True)  # type: ignore[call-arg]
    assert (method.forget, method.remain) == (base.forget, base.remain)
