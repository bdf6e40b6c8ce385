from contextlib import nullcontext
from typing import Any

import pytest
import torch
import toys
from torch import nn

from erase.diffusion import condition
from erase.diffusion.denoiser import mse
from erase.diffusion.losses import Denoise, Exchanged, Redirect, copies, forget_objective, remain_objective
from erase.engine.fisher import fisher_diagonal
from erase.engine.losses import ASCENT


def nudge(net: nn.Module, by: float = 0.05) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(by)


def precision(name: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if name == "bf16" else nullcontext()


@pytest.mark.parametrize("name", ["no", "bf16"])
@pytest.mark.parametrize("target", ["online", "frozen"])
def test_redirect_is_the_distance_to_the_anchors_prediction(target: str, name: str) -> None:
    model = toys.denoiser()
    net = model.net
    objective = forget_objective("redirect", net, target)
    assert (objective.sense, objective.name) == (1, "redirect")
    batch = model.draw(toys.latents(), toys.gen())
    noisy = model.noisy(batch)
    with torch.no_grad(), precision(name):
        at_start = model.predict(noisy, batch["t"], batch["anchor"])
    nudge(net)
    online = toys.weights(net)
    with torch.no_grad(), precision(name):
        now = model.predict(noisy, batch["t"], batch["anchor"])
    assert not torch.allclose(at_start.float(), now.float(), rtol=0.1)
    with precision(name):
        losses = objective.loss(model, batch, toys.gen())
        expected = mse(
            model.predict(noisy, batch["t"], batch["cond"]), (now if target == "online" else at_start).detach()
        )
    assert losses.shape == (3,)
    torch.testing.assert_close(losses, expected)
    assert toys.same(toys.weights(net), online)  # the swap is undone

    # and its gradient is that of the first pass alone, at the online weights, though autocast caches its casts
    params = list(net.parameters())
    grads = torch.autograd.grad(losses.sum(), params)
    reference = torch.autograd.grad(expected.sum(), params)
    assert all(bool(g.any()) for g in grads)
    for g, r in zip(grads, reference, strict=True):
        torch.testing.assert_close(g, r)


def test_frozen_target_is_put_back_after_an_error() -> None:
    model = toys.denoiser()
    objective = forget_objective("redirect", model.net, "frozen")
    nudge(model.net)
    online = toys.weights(model.net)
    batch = {**toys.latents(), "anchor": {"text": torch.zeros(3, 3, 5)}}  # of the wrong width
    with pytest.raises(RuntimeError):
        objective.loss(model, batch, toys.gen())
    assert toys.same(toys.weights(model.net), online)


def test_redirect_of_a_concept_to_itself_is_zero() -> None:
    model = toys.denoiser()
    batch = toys.latents()
    losses = Redirect()(model, {**batch, "anchor": batch["cond"]}, toys.gen())
    assert losses.tolist() == [0.0] * 3


@pytest.mark.parametrize("name", ["ascent", "redirect"])
def test_a_forget_loss_drops_the_condition_of_a_share(name: str) -> None:
    """By hand: where the draw is below the dropout, the network is told the null condition; a target stays."""
    model = toys.denoiser()
    objective, plain = (forget_objective(name, model.net, dropout=dropout) for dropout in (0.6, 0.0))
    assert (objective.sense, objective.name) == (plain.sense, plain.name)
    batch = {**model.draw(toys.latents(), toys.gen()), "drop_draw": torch.tensor([0.59, 0.6, 0.1])}
    told = batch["cond"]["text"].clone()
    told[[0, 2]] = 0
    expected = plain.loss(model, {**batch, "cond": {"text": told}}, toys.gen())
    assert torch.equal(objective.loss(model, batch, toys.gen()), expected)
    assert not torch.equal(plain.loss(model, batch, toys.gen()), expected)
    undrawn = objective.loss(model, toys.latents(), toys.gen())
    assert torch.equal(undrawn, objective.loss(model, model.draw(toys.latents(), toys.gen()), toys.gen()))
    with pytest.raises(ValueError, match="needs a null condition, which this model lacks"):
        objective.loss(toys.denoiser(null=None), batch, toys.gen())
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\); got 1"):
        forget_objective(name, model.net, dropout=1)


@pytest.mark.parametrize("name", ["ascent", "redirect"])
def test_a_sum_is_as_many_means_as_there_are_elements(name: str) -> None:
    mean, total = toys.denoiser(), toys.denoiser(reduction="sum")
    objective, batch = forget_objective(name, mean.net), mean.draw(toys.latents(), toys.gen())
    torch.testing.assert_close(objective.loss(total, batch, toys.gen()), 256 * objective.loss(mean, batch, toys.gen()))
    distances = [m.distances(batch, toys.randomize(toys.unet(), 9, 0.1).float(), toys.gen()) for m in (mean, total)]
    torch.testing.assert_close(distances[1], 256 * distances[0])
    with pytest.raises(ValueError, match="unknown reduction 'max'; allowed: mean, sum"):
        toys.denoiser(reduction="max")


@pytest.mark.parametrize("dropout", [0.0, 0.3, 0.999])
def test_denoise_drops_the_condition_of_a_share(dropout: float) -> None:
    model = toys.denoiser()
    batch = model.draw(toys.latents(), toys.gen())
    batch["drop_draw"] = torch.tensor([0.0, 0.3, 0.99])
    dropped = torch.tensor([d < dropout for d in (0.0, 0.3, 0.99)])
    assert model.null is not None
    kept = model.losses(batch, toys.gen())
    null = model.losses({**batch, "cond": condition.expand(model.null, 3)}, toys.gen())
    torch.testing.assert_close(Denoise(dropout)(model, batch, toys.gen()), torch.where(dropped, null, kept))
    assert not torch.allclose(kept, null, rtol=1e-4)
    undrawn = Denoise(dropout)(model, toys.latents(), toys.gen())
    assert torch.equal(undrawn, Denoise(dropout)(model, model.draw(toys.latents(), toys.gen()), toys.gen()))


@pytest.mark.parametrize("name", ["no", "bf16"])
def test_distillation_is_the_distance_to_what_the_first_weights_predict(name: str) -> None:
    model = toys.denoiser()
    assert model.null is not None
    objective = remain_objective("distill", model.net, 0.5)
    assert (objective.sense, objective.name) == (1, "distill")
    batch = {**model.draw(toys.latents(), toys.gen()), "drop_draw": torch.tensor([0.0, 0.9, 0.9])}
    cond = condition.cat([model.null, condition.take(batch["cond"], torch.tensor([1, 2]))])
    noisy, params = model.noisy(batch), list(model.net.parameters())
    with torch.no_grad(), precision(name):
        first = model.predict(noisy, batch["t"], cond)
    with precision(name):
        losses = objective.loss(model, batch, toys.gen())
    assert not losses.any()
    assert not any(bool(g.any()) for g in torch.autograd.grad(losses.sum(), params))
    nudge(model.net)
    with precision(name):
        losses, expected = objective.loss(model, batch, toys.gen()), mse(model.predict(noisy, batch["t"], cond), first)
    assert losses.all()
    torch.testing.assert_close(losses, expected)
    for g, r in zip(*(torch.autograd.grad(x.sum(), params) for x in (losses, expected)), strict=True):
        torch.testing.assert_close(g, r)


def test_a_teacher_has_no_dropout() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    x, first = torch.randn(4, 3), copies(net)
    sure = net.eval()(x)
    net.train()
    assert torch.equal(Exchanged(net, first)(x), sure)
    assert not torch.equal(Exchanged(net, {})(x), sure)  # an online target is of the network as it learns
    assert all(m.training for m in net.modules())


def test_remain_objectives_by_name() -> None:
    model = toys.denoiser()
    plain = remain_objective("denoise", model.net, 0.5)
    assert (plain.loss, plain.sense) == (Denoise(0.5), 1)
    with pytest.raises(ValueError, match="unknown remain loss 'redirect'; allowed: denoise, distill"):
        remain_objective("redirect", model.net, 0.5)


def test_forget_losses_have_no_dropout() -> None:
    model = toys.denoiser()
    batch = {**model.draw(toys.latents(), toys.gen()), "drop_draw": torch.zeros(3)}
    kept = {**batch, "drop_draw": torch.ones(3)}
    for name in ("ascent", "redirect"):
        loss = forget_objective(name, model.net).loss
        assert torch.equal(loss(model, batch, toys.gen()), loss(model, kept, toys.gen()))
    assert forget_objective("ascent", model.net) is ASCENT


def test_redirect_has_a_fisher_diagonal() -> None:
    model = toys.denoiser()
    for loss in (Redirect(), forget_objective("redirect", model.net, "frozen").loss):
        by_one = fisher_diagonal(model, [toys.latents()], generator=toys.gen(), loss=loss, chunk=1)
        by_layers = fisher_diagonal(model, [toys.latents()], generator=toys.gen(), loss=loss, chunk=3)
        for name, value in by_one.named.items():
            torch.testing.assert_close(by_layers.named[name], value, rtol=1e-3, atol=1e-3 * value.max().item())


def test_errors() -> None:
    model = toys.denoiser(null=None)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\); got 1.0"):
        Denoise(1.0)
    with pytest.raises(ValueError, match=r"dropout 0\.1 needs a null condition"):
        Denoise()(model, toys.latents(), toys.gen())
    for loss in (Denoise(0.0), Redirect()):
        with pytest.raises(ValueError, match="needs a diffusion model; got a Plain"):
            loss(toys.Plain(nn.Identity()), {}, toys.gen())
    with pytest.raises(ValueError, match="unknown forget loss 'descent'; allowed: redirect, ascent"):
        forget_objective("descent", model.net)
    with pytest.raises(ValueError, match="unknown target 'ema'; allowed: online, frozen"):
        forget_objective("redirect", model.net, "ema")
