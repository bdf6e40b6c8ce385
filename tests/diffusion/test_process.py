"""Flow matching against diffusers' own scheduler, and the distribution of the times that it draws."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from erase.diffusion.process import Discrete, Flow, Prediction, flow

CPU = torch.device("cpu")


def share(process: Flow, t: Tensor) -> Tensor:
    """The share of draws that are below each of `t`: uniform in [0, 1) if the times are as the process says."""
    sigma = t.double() / (process.shift - (process.shift - 1) * t.double())
    return torch.special.ndtr(torch.logit(sigma)) if process.density == "logit_normal" else sigma


@pytest.mark.parametrize("density", ["logit_normal", "uniform"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_times_are_stratified_and_each_has_the_distribution(size: int, shift: float, density: Any) -> None:
    process, g = Flow(shift, density), torch.Generator().manual_seed(0)
    draws = torch.stack([process.times(size, g, CPU) for _ in range(2000)])
    assert draws.dtype == torch.float32
    assert draws.min() > 0
    assert draws.max() < 1
    strata = share(process, draws).sort().values * size - torch.arange(size)
    assert bool(((strata > -1e-3) & (strata < 1 + 1e-3)).all())  # the i-th of B in the i-th part, to float32's rounding
    # The first sample's share alone: uniform. 5 standard deviations of a count of 200 in each tenth.
    counts = torch.histc(share(process, draws[:, 0]).float(), 10, 0, 1)
    assert float((counts - 200).abs().max()) < 5 * 200**0.5


def test_the_density_is_the_logit_normal_of_its_source() -> None:
    """Mean 0 and standard deviation 1 of the logit before the shift, and log s more after it."""
    for shift in (1.0, 3.0):
        logits = torch.logit(Flow(shift).times(100_000, torch.Generator().manual_seed(0), CPU).double())
        assert float(logits.mean()) == pytest.approx(math.log(shift), abs=1e-3)
        assert float(logits.std()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("process", [Discrete(torch.linspace(0.9, 0.1, 50)), Flow(3.0), Flow(1.0, "uniform")])
def test_independent_times_and_mirrored_ones(process: Any) -> None:
    g = torch.Generator().manual_seed(0)
    for size in (1, 2, 5, 6):
        t = process.times(size, g, CPU, "antithetic").double()
        assert t.shape == (size,)
        if isinstance(process, Discrete):
            mirrored = 49 - t
        else:
            t = share(process, t)
            mirrored = 1 - t
        half = size // 2 + 1
        torch.testing.assert_close(t[half:], mirrored[: size - half], rtol=1e-4, atol=1e-4)  # float32
    # Uniform: the first of a batch says nothing of the second. 5 standard deviations of a count of 100.
    pairs = torch.stack([process.times(2, g, CPU, "uniform") for _ in range(2000)]).double()
    shares = pairs / 50 if isinstance(process, Discrete) else share(process, pairs)
    below = shares < 0.5
    assert abs(int((below[:, 0] & below[:, 1]).sum()) - 500) < 5 * 500**0.5
    assert abs(int(below[:, 0].sum()) - 1000) < 5 * 500**0.5
    with pytest.raises(ValueError, match="unknown spread of times 'even'; allowed: stratified, uniform, antithetic"):
        process.times(2, g, CPU, "even")


def test_antithetic_steps_are_the_published_formula() -> None:
    """t_1 … t_⌊B/2⌋+1 uniform, then T-1-t_1, T-1-t_2, …, B in all."""
    for size in (4, 5):
        t = torch.randint(0, 1000, (size // 2 + 1,), generator=torch.Generator().manual_seed(7))
        expected = [*t.tolist(), *(999 - t).tolist()][:size]
        process = Discrete(torch.linspace(0.9, 0.1, 1000))
        assert process.times(size, torch.Generator().manual_seed(7), CPU, "antithetic").tolist() == expected


def test_times_are_of_the_generator() -> None:
    one, two, three = (Flow(3.0).times(5, torch.Generator().manual_seed(seed), CPU) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_static_shift_is_the_schedulers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    process = flow(scheduler.config, 4096)
    plain = torch.arange(1000, 0, -1).double() / 1000
    torch.testing.assert_close(process.shift * plain / (1 + (process.shift - 1) * plain), scheduler.sigmas.double())
    torch.testing.assert_close(process.clock(scheduler.sigmas), scheduler.timesteps)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096])
def test_a_dynamic_shift_is_the_schedulers(tokens: int, kind: Any) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, time_shift_type=kind)
    plain = np.linspace(1, 0.05, 20)
    scheduler.set_timesteps(sigmas=list(plain), mu=calculate_shift(tokens))
    process = flow(scheduler.config, tokens)
    found = process.shift * plain / (1 + (process.shift - 1) * plain)
    np.testing.assert_allclose(found, scheduler.sigmas[:-1].numpy(), rtol=1e-5)  # the scheduler's are float32


def test_noise_target_and_bins() -> None:
    process, g = Flow(3.0), torch.Generator().manual_seed(0)
    z0, noise = (torch.randn(3, 2, 4, 4, generator=g) for _ in range(2))
    t = torch.tensor([0.0, 0.25, 1.0])
    noisy = process.noisy(z0, noise, t)
    torch.testing.assert_close(noisy[0], z0[0])
    torch.testing.assert_close(noisy[1], 0.75 * z0[1] + 0.25 * noise[1])
    torch.testing.assert_close(noisy[2], noise[2])
    velocity = process.target(z0, noise, t)
    step = (process.noisy(z0, noise, t + 1e-2) - noisy) / 1e-2
    torch.testing.assert_close(velocity, step, rtol=1e-3, atol=1e-3)  # a difference of float32s over 1e-2
    assert process.bins(torch.tensor([0.0, 0.049, 0.05, 0.5, 0.999]), 20).tolist() == [0, 0, 1, 10, 19]


PROCESSES = [
    *(Discrete(torch.linspace(0.9, 0.1, 50), kind) for kind in get_args(Prediction)),
    *(Flow(3.0), Flow(1.0, "uniform")),
]


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_a_prediction_is_split_into_what_it_is_of(process: Any) -> None:
    g = torch.Generator().manual_seed(0)
    z0, noise = (torch.randn(5, 2, 3, 3, generator=g) for _ in range(2))
    t = process.times(5, g, CPU)
    found = process.split(process.noisy(z0, noise, t), process.target(z0, noise, t), t)
    torch.testing.assert_close(found, (z0, noise), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("process", PROCESSES[2:], ids=str)
def test_even_times_are_the_middles_of_strata(process: Any) -> None:
    even = process.evenly(10, CPU)
    assert bool((even.diff() > 0).all())
    many = torch.stack([process.times(10, torch.Generator().manual_seed(i), CPU).sort().values for i in range(200)])
    assert bool(((even >= many.amin(0)) & (even <= many.amax(0))).all())


def test_even_steps_are_those_of_the_attack() -> None:
    """UnlearnDiffAtk's: 10, 30, … 990 of 1000."""
    assert Discrete(torch.linspace(0.9, 0.1, 1000)).evenly(50, CPU).tolist() == list(range(10, 1000, 20))


def test_errors() -> None:
    with pytest.raises(ValueError, match="shift"):
        Flow(0.0)
    with pytest.raises(ValueError, match="density"):
        Flow(1.0, "cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="DDPMScheduler"):
        flow({**DDPMScheduler().config, "_class_name": "DDPMScheduler"}, 4096)
