from copy import deepcopy
from typing import Any

import pytest
import torch
import toys
from torch import nn

from erase.engine.fast_step import FastStep, outer_step
from erase.engine.losses import ASCENT, DESCENT
from erase.engine.method import Method
from erase.engine.saliency import Mask
from erase.engine.updates import ClosedForm, Descent, FastSlow, Joint, Shared, Solved

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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_zero_and_missing_gradients_change_nothing(rule: Any, masked: bool) -> None:
    net = toys.mlp()
    before = toys.weights(net)
    step = FastStep(dict(net.named_parameters()), toys.some_mask(net) if masked else None, rule)
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
    with pytest.raises(ValueError, match=r"fast_rule 'shared'; .*sgd, normalized, adam"):
        FastStep(params, None, "shared")  # type: ignore[arg-type]
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


RATES = {FastSlow: "fast_rate", Shared: "forget_alpha", Joint: "forget_weight", ClosedForm: "share"}
"""What the setting `fast_rate` is called in each rule."""


def made(rule: Any, **changes: Any) -> Any:
    needed = {RATES[rule]: 1.0} if rule in RATES else {}
    return rule(**{**needed, **({"edit": lambda net: Solved({})} if rule is ClosedForm else {}), **changes})


@pytest.mark.parametrize(
    ("rules", "change", "names"),
    [
        ((FastSlow,), {"fast_rule": "lion"}, ["fast_rule", "'lion'", "sgd"]),
        ((FastSlow, Shared, Joint), {"schedule": "step"}, ["schedule", "'step'", "linear"]),
        ((FastSlow, Shared, Joint, Descent), {"slow_schedule": "step"}, ["slow_schedule", "'step'", "linear"]),
        ((FastSlow, Shared), {"slow_steps": -1}, ["slow_steps", "-1"]),
        ((FastSlow, Shared, Joint), {"every": 0}, ["every", "0"]),
        ((FastSlow, Joint), {"outer_rate": 1.5}, ["outer_rate", "1.5", "[0, 1]"]),
        ((FastSlow, Shared), {"clip_forget": 0.0}, ["clip_forget", "0.0"]),
        ((FastSlow, Shared, Descent), {"clip_remain": float("nan")}, ["clip_remain", "nan"]),
        ((Joint,), {"clip": -1.0}, ["clip_remain", "-1.0"]),
    ],
)
def test_bad_updates(rules: Any, change: Any, names: list[str]) -> None:
    """The error names the setting, the value got and the values allowed."""
    for rule in rules:
        with pytest.raises(ValueError, match=names[0]) as caught:
            made(rule, **change)
        assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize("rule", RATES)
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_rates_are_finite_and_not_negative(rule: Any, value: float) -> None:
    with pytest.raises(ValueError, match=f"fast_rate.*; got {value}"):
        made(rule, **{RATES[rule]: value})


@pytest.mark.parametrize("rule", [FastSlow, Shared, Joint, Descent, ClosedForm])
@pytest.mark.parametrize("forget", [None, ASCENT])
@pytest.mark.parametrize("remain", [None, DESCENT])
def test_a_method_has_the_objectives_that_its_rule_needs_and_no_others(rule: Any, forget: Any, remain: Any) -> None:
    allowed = {
        FastSlow: forget is not None,
        Shared: forget is not None,
        Joint: forget is not None and remain is not None,
        Descent: forget is None and remain is not None,
        ClosedForm: forget is None and remain is None,
    }[rule]
    if allowed:
        assert Method("mine", forget, remain, made(rule)).update == made(rule) or rule is ClosedForm
    else:
        with pytest.raises(ValueError, match=rf"'mine' .*(forget|remain) objective, .*{rule.__name__}"):
            Method("mine", forget, remain, made(rule))


@pytest.mark.parametrize(("steps", "forget"), [(0, 0), (1, 1), (3, 1), (4, 2)])
def test_phases_of_the_first_steps(steps: int, forget: int) -> None:
    assert FastSlow(1.0, slow_steps=2, every=3).phases(steps) == {"forget": forget, "remain": 2 * steps}
    assert Shared(1.0, slow_steps=0, every=3).phases(steps) == {"forget": forget, "remain": 0}
    assert Joint(1.0, every=3).phases(steps) == {"forget": forget, "remain": steps}
    assert Descent().phases(steps) == {"forget": 0, "remain": steps}
    assert made(ClosedForm).phases(steps) == {"forget": 0, "remain": 0}


def test_moments_are_restored_where_the_weights_are() -> None:
    """Fused Adam counts its steps on the weights' device; `meta` stands for any that is not the file's."""
    weight = nn.Parameter(torch.ones(4))
    saved = FastStep({"w": weight}, None, "adam")
    weight.grad = torch.ones(4)
    saved.step(0.1)
    away = FastStep({"w": nn.Parameter(torch.ones(4, device="meta"))}, None, "adam")
    away.load_state_dict(saved.state_dict())
    assert away.adam is not None
    [moments] = away.adam.state.values()
    assert {key: value.device.type for key, value in moments.items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), "meta"
    )
