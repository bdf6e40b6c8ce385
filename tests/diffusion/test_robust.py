"""A redirect that holds around the prompt: its adversary, its probes, and the plain redirect without both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from erase.diffusion import robust
from erase.diffusion.denoiser import mse
from erase.diffusion.losses import Dropped, Redirect, copies, forget_objective
from erase.diffusion.robust import Robust, RobustRedirect, harden
from erase.engine.backend import map_batch
from erase.engine.losses import Training
from erase.methods.sfron import sfron


def setup(**wanted: Any) -> tuple[Any, RobustRedirect, dict[str, Any]]:
    """A model that has moved away from θ0, the loss, and a drawn batch."""
    model = toys.denoiser()
    frozen = copies(model.net)
    with torch.no_grad():
        for p in model.net.parameters():
            p.add_(0.02)
    batch = model.draw({**toys.latents(size=8)}, toys.gen())
    return model, RobustRedirect(frozen, Robust(**wanted)), batch


def before(model: Any, loss: RobustRedirect, batch: dict[str, Any], cond: Any) -> Tensor:
    """What θ0 predicts."""
    now = {name: p.detach().clone() for name, p in model.net.named_parameters()}
    with torch.no_grad():
        for name, p in model.net.named_parameters():
            p.copy_(loss.frozen[name])
        found = model.predict(model.noisy(batch), batch["t"], cond)
        for name, p in model.net.named_parameters():
            p.copy_(now[name])
    return found


@pytest.mark.parametrize("off", [{"steps": 0}, {"radius": 0.0}])
def test_without_adversary_and_probes_it_is_the_redirect(off: dict[str, Any]) -> None:
    model, loss, batch = setup(images=0.0, **off)
    plain = Redirect(loss.frozen)(model, batch, toys.gen())
    assert torch.equal(loss(model, batch, toys.gen()), plain)


def test_the_adversary_finds_the_concept_within_its_bound_and_the_step_is_made_there() -> None:
    model, loss, batch = setup(steps=5, radius=0.5, images=0.0)
    batch |= {"t": torch.tensor([3, 30, 24, 25, 49, 0, 40, 10])}  # of 50
    noisy, t, cond, anchor = model.noisy(batch), batch["t"], batch["cond"], batch["anchor"]
    concept, target = (before(model, loss, batch, c) for c in (cond, anchor))
    found = loss.adversary(model, noisy, t, cond, anchor, concept, t >= 25, batch["drop_draw"])
    bound = 0.5 * (cond["text"] - anchor["text"]).flatten(1).square().mean(1).sqrt()
    moved = (found["text"] - cond["text"]).flatten(1).abs().amax(1)
    assert bool((moved <= bound * (1 + 1e-5)).all())
    assert bool((moved > 0.5 * bound)[t >= 25].all())
    assert torch.equal(found["text"][t < 25], cond["text"][t < 25])  # in the less noisy half nobody looks

    def apart(c: Any) -> Tensor:
        with torch.no_grad():
            return mse(model.predict(noisy, t, c), concept)

    assert float(apart(found).sum()) < float(apart(cond).sum())
    once_more = loss.adversary(model, noisy, t, cond, anchor, concept, t >= 25, batch["drop_draw"])
    assert torch.equal(found["text"], once_more["text"])

    losses = loss(model, batch, toys.gen(1))
    expected = mse(model.predict(noisy, t, found), target)
    torch.testing.assert_close(losses, expected)
    params = list(model.net.parameters())
    for g, r in zip(
        torch.autograd.grad(losses.sum(), params), torch.autograd.grad(expected.sum(), params), strict=True
    ):
        torch.testing.assert_close(g, r)
    with torch.no_grad():  # as the weights of a batch in parts are found
        torch.testing.assert_close(loss(model, batch, toys.gen(1)), expected)


def test_the_adversary_costs_passes_of_the_noisy_half_alone() -> None:
    model, loss, batch = setup(steps=3, images=0.0)
    sizes: list[int] = []
    model.net.register_forward_pre_hook(lambda net, args: sizes.append(len(args[0])))
    loss(model, batch | {"t": torch.tensor([3, 30, 24, 25, 49, 0, 40, 10])}, toys.gen())
    assert sizes == [8, 8, 4, 4, 4, 8]
    sizes.clear()
    loss(model, batch | {"t": torch.zeros(8, dtype=torch.long)}, toys.gen())
    assert sizes == [8, 8, 8]


def test_a_batch_in_parts_has_the_losses_of_the_whole() -> None:
    """Where the search starts is a sample's own, whatever stands beside it (`train.micro_batch`)."""
    model, loss, batch = setup(steps=2, radius=0.5)
    whole = loss(model, batch, toys.gen(1))
    parts = [loss(model, map_batch(lambda x, i=i: x[i : i + 2], batch), toys.gen(i)) for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.cat(parts), whole)
    other = loss(model, batch | {"drop_draw": (batch["drop_draw"] + 0.01) % 1}, toys.gen(1))
    assert not torch.allclose(other, whole)


def test_the_bound_is_of_tokens_that_are_read() -> None:
    x = torch.randn(2, 4, 3, generator=toys.gen())
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    found = robust.root_mean_square(x, mask)
    torch.testing.assert_close(found, torch.stack([x[0, :2].square().mean(), x[1].square().mean()]).sqrt())
    torch.testing.assert_close(robust.root_mean_square(x, None), x.square().mean((1, 2)).sqrt())
    torch.testing.assert_close(robust.root_mean_square(x[:, 0], mask), x[:, 0].square().mean(1).sqrt())  # pooled
    assert torch.equal(robust.root_mean_square(x, mask * 0), torch.zeros(2))


def test_where_processes_share_the_weights_all_samples_are_asked_for_and_the_same_ones_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, loss, batch = setup(steps=3, images=0.0)
    batch |= {"t": torch.tensor([3, 30, 24, 25, 49, 0, 40, 10])}
    alone = loss(model, batch, toys.gen(1))
    sizes: list[int] = []
    model.net.register_forward_pre_hook(lambda net, args: sizes.append(len(args[0])))
    monkeypatch.setattr(robust, "is_sharded", lambda of: True)
    torch.testing.assert_close(loss(model, batch, toys.gen(1)), alone)
    assert sizes == [8] * 6


def test_images_of_the_concept_are_led_away_under_the_empty_prompt_and_the_anchor() -> None:
    model, loss, batch = setup(steps=0, images=0.5, away=2.0)
    batch |= {"t": torch.tensor([3, 10, 24, 20, 5, 30, 40, 26])}  # of 50
    batch |= {"drop_draw": torch.tensor([0.1, 0.3, 0.2, 0.6, 0.49, 0.1, 0.3, 0.0])}
    noisy, t = model.noisy(batch), batch["t"]
    text, kind = batch["cond"]["text"].clone(), ["null", "anchor", "null", "", "anchor", "", "", ""]
    concept, anchored = (before(model, loss, batch, batch[name]) for name in ("cond", "anchor"))
    target = anchored.clone()
    for i, name in enumerate(kind):
        if name:
            text[i] = model.null["text"][0] if name == "null" else batch["anchor"]["text"][i]
            target[i] = anchored[i] - 2.0 * (concept[i] - anchored[i])
    expected = mse(model.predict(noisy, t, {"text": text}), target)
    torch.testing.assert_close(loss(model, batch, toys.gen()), expected)


def test_only_a_redirect_to_the_first_model_is_hardened() -> None:
    net, wanted = toys.denoiser().net, Robust()
    frozen = forget_objective("redirect", net, "frozen")
    for inner in (frozen.loss, Training(frozen.loss)):
        found: Any = harden(type(frozen)(inner, 1, "redirect"), wanted)
        loss = found.loss.loss if isinstance(inner, Training) else found.loss
        assert isinstance(loss, RobustRedirect)
        assert found.sense == 1
    for name, target in (("redirect", "online"), ("ascent", "frozen")):
        with pytest.raises(ValueError, match=r"method\.robust needs"):
            harden(forget_objective(name, net, target), wanted)
    with pytest.raises(ValueError, match=r"forget\.dropout=0"):
        harden(type(frozen)(Dropped(frozen.loss, 0.1), 1, "redirect"), wanted)
    method = sfron(fast_rate=0.1, robust=wanted, forget=frozen)
    assert isinstance(method.forget and method.forget.loss, RobustRedirect)
    assert sfron(fast_rate=0.1, forget=frozen).forget is frozen
    with pytest.raises(ValueError, match="robust"):
        sfron(fast_rate=0.1, published=True, robust=wanted)
    with pytest.raises(ValueError, match="images"):
        Robust(images=2.0)
