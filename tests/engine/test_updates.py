from copy import deepcopy
from typing import Any

import pytest
import torch
import toys
from torch import nn

from erase.engine.saliency import Mask
from erase.engine.updates import FastStep, Update, outer_step

RULES = ("sgd", "normalized", "adam")


def gradients(net: nn.Module, seed: int) -> None:
    g = toys.gen(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)  # row-major, whatever the weight's layout


@pytest.mark.parametrize("make", [toys.mlp, toys.conv, lambda: toys.mlp(torch.float32)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_rules_against_the_equation(rule: Any, masked: bool, make: Any) -> None:
    net, other = make(), make()
    mask = toys.some_mask(net) if masked else None
    keep = {n: mask[n] if mask else torch.ones_like(p, dtype=torch.bool) for n, p in net.named_parameters()}
    step = FastStep(dict(net.named_parameters()), mask, rule)
    adam = torch.optim.Adam(other.parameters(), lr=0.0)
    for i, rate in enumerate([0.1, 0.05, 0.2]):
        before = toys.weights(other)
        gradients(net, i)
        gradients(other, i)
        kept = torch.cat([p.grad[keep[n]] for n, p in other.named_parameters() if p.grad is not None])
        step.step(rate)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        with torch.no_grad():
            for name, p in other.named_parameters():
                assert p.grad is not None
                change = {
                    "sgd": -rate * p.grad,
                    "normalized": -rate * p.grad / kept.square().mean().sqrt(),
                    "adam": p - before[name],
                }[rule]
                p.copy_(torch.where(keep[name], before[name] + change, before[name]))
        # float64: rounding. float32: the fused Adam of torch orders its operations otherwise.
        tolerance = {"rtol": 1e-10} if next(net.parameters()).dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
        toys.close(toys.weights(net), toys.weights(other), **tolerance)
        assert all(p.grad is None for n, p in net.named_parameters() if keep[n].any())


@pytest.mark.parametrize("make", [toys.mlp, toys.conv])
@pytest.mark.parametrize("rule", RULES)
def test_masked_weights_stay_bit_identical(rule: Any, make: Any) -> None:
    net = make()
    mask, before = toys.some_mask(net), toys.weights(net)
    step = FastStep(dict(net.named_parameters()), mask, rule)
    for i in range(4):
        gradients(net, i)
        step.step(0.3)
    for name, p in net.named_parameters():
        assert torch.equal(p[~mask[name]], before[name][~mask[name]])
        assert bool((p[mask[name]] != before[name][mask[name]]).all())


def test_normalized_rate_is_the_rms_change() -> None:
    net = toys.mlp()
    before, mask = toys.weights(net), toys.some_mask(net)
    gradients(net, 0)
    FastStep(dict(net.named_parameters()), mask, "normalized").step(0.25)
    change = torch.cat([(p - before[n])[mask[n]] for n, p in net.named_parameters()])
    assert change.square().mean().sqrt().item() == pytest.approx(0.25)


@pytest.mark.parametrize("rule", RULES)
def test_zero_and_missing_gradients_change_nothing(rule: Any) -> None:
    net = toys.mlp()
    before = toys.weights(net)
    step = FastStep(dict(net.named_parameters()), None, rule)
    net[0].weight.grad = torch.zeros_like(net[0].weight)
    step.step(1.0)
    step.step(1.0)
    assert toys.same(toys.weights(net), before)


def test_adam_state_comes_back() -> None:
    nets = toys.mlp(), toys.mlp()
    mask = toys.some_mask(nets[0])
    steps = [FastStep(dict(net.named_parameters()), mask, "adam") for net in nets]
    gradients(nets[0], 0)
    steps[0].step(0.1)
    nets[1].load_state_dict(nets[0].state_dict())
    steps[1].load_state_dict(deepcopy(steps[0].state_dict()))
    for net, step in zip(nets, steps, strict=True):
        gradients(net, 1)
        step.step(0.1)
    assert toys.same(toys.weights(nets[0]), toys.weights(nets[1]))
    kept = sum(int(m.sum()) for m in mask.named.values())
    assert sum(s["exp_avg"].numel() for s in steps[0].state_dict()["state"].values()) == kept


def test_bad_masks_rules_and_layouts() -> None:
    params = dict(toys.mlp().named_parameters())
    with pytest.raises(KeyError, match=r"no entry for '0\.bias'"):
        FastStep(params, Mask({"0.weight": torch.ones(8, 4, dtype=torch.bool)}), "sgd")
    with pytest.raises(ValueError, match=r"mask of '0\.weight' has shape \[4, 8\], the weight \[8, 4\]"):
        FastStep(params, Mask({n: torch.ones(p.shape[::-1], dtype=torch.bool) for n, p in params.items()}), "sgd")
    with pytest.raises(ValueError, match="rules sgd, normalized and adam; got 'shared'"):
        FastStep(params, None, "shared")
    gaps = nn.Parameter(torch.zeros(3, 4)[:, ::2])
    gaps.grad = torch.ones(3, 2)
    with pytest.raises(AssertionError, match="not dense"):
        FastStep({"gaps": gaps}, None, "sgd").step(1.0)


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 1.0])
def test_outer_step(rate: float) -> None:
    anchor, params = [torch.tensor([1.0, 2.0, 0.1])], [nn.Parameter(torch.tensor([3.0, -2.0, 0.3]))]
    expected = {0.0: [1, 2, 0.1], 0.25: [1.5, 1, 0.15], 0.5: [2, 0, 0.2], 1.0: [3, -2, 0.3]}[rate]
    outer_step(anchor, params, rate)
    assert torch.equal(params[0].detach(), anchor[0])
    torch.testing.assert_close(anchor[0], torch.tensor(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fast_rule": "lion"}, "unknown fast_rule 'lion'; allowed: sgd"),
        ({"schedule": "step"}, "unknown schedule 'step'"),
        ({"slow_schedule": "step"}, "unknown slow_schedule 'step'"),
        ({"fast_rate": -1.0}, "fast_rate must be finite and ≥ 0; got -1.0"),
        ({"fast_rate": float("nan")}, "fast_rate"),
        ({"slow_steps": -1}, "slow_steps ≥ 0 .* got -1 and 1"),
        ({"every": 0}, "every ≥ 1; got 1 and 0"),
        ({"outer_rate": 1.5}, r"outer_rate must be in \[0, 1\]; got 1.5"),
        ({"fast_rule": "joint", "slow_steps": 2}, "slow_steps must be 1; got 2"),
        ({"clip_forget": 0.0}, "clip_forget must be > 0 or left out; got 0.0"),
        ({"clip_remain": float("nan")}, "clip_remain must be > 0"),
    ],
)
def test_bad_updates(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Update(**{"fast_rate": 1.0, **change})
