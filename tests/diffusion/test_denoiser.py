from typing import Any

import pytest
import torch
import toys
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from erase.diffusion.denoiser import as_denoiser, mse


class Echo(nn.Module):
    """Predicts what it is told to, scaled by its one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, noisy: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Any:
        self.seen = noisy, t, encoder_hidden_states
        return type("Out", (), {"sample": self.scale * noisy})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_and_targets_are_diffusers(prediction: Any) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    net = Echo()
    model = toys.denoiser(net, prediction, scheduler.alphas_cumprod)
    batch = model.draw(toys.latents(size=5), toys.gen())
    z0, noise, t = batch["z0"], batch["noise"], batch["t"]
    noisy = scheduler.add_noise(z0, noise, t)
    torch.testing.assert_close(model.noisy(batch), noisy)
    target = {"epsilon": noise, "sample": z0, "v_prediction": scheduler.get_velocity(z0, noise, t)}[prediction]
    torch.testing.assert_close(model.process.target(z0, noise, t), target)
    losses = model.losses(batch, toys.gen())
    torch.testing.assert_close(losses, (noisy - target).square().mean((1, 2, 3)))
    assert torch.equal(net.seen[1], t)
    assert torch.equal(net.seen[2], batch["cond"]["text"])


def test_draw_is_of_the_generator_and_keeps_the_batch() -> None:
    model, batch = toys.denoiser(Echo()), toys.latents()
    one, two, three = (model.draw(batch, toys.gen(seed)) for seed in (0, 0, 1))
    assert one.keys() == {"mean", "std", "cond", "anchor", "z0", "t", "noise", "drop_draw"}
    made = ("z0", "t", "noise", "drop_draw")
    assert all(torch.equal(one[k], two[k]) for k in made)
    assert not any(torch.equal(one[k], three[k]) for k in made)
    assert all(one[k] is batch[k] for k in batch)
    # z0 = mean + std · a standard normal that is not the noise to be predicted
    latent = (one["z0"] - one["mean"]) / one["std"]
    assert abs(float(torch.corrcoef(torch.stack([latent.flatten(), one["noise"].flatten()]))[0, 1])) < 0.15
    exact = model.draw({"mean": batch["mean"]}, toys.gen())
    assert torch.equal(exact["z0"], batch["mean"])
    # losses draw by themselves when nobody has
    assert torch.equal(model.losses(batch, toys.gen(0)), model.losses(one, toys.gen(9)))


@pytest.mark.parametrize("size", [1, 4, 7, 60])  # 60: more samples than timesteps
def test_timesteps_are_stratified_and_each_is_uniform(size: int) -> None:
    model, g = toys.denoiser(Echo()), toys.gen()
    T = 50
    draws = torch.stack([model.draw({"mean": torch.zeros(size, 1)}, g)["t"] for _ in range(3000)])
    assert draws.min() == 0
    assert draws.max() == T - 1
    strata = (draws.sort().values.double() + 0.5) * size / T - torch.arange(size)
    assert bool((strata.abs() <= 1 + size / T).all())  # the i-th of B lies in the i-th part, to a timestep
    # the first sample's timestep: each of T equally often. 5 standard deviations of a count of 3000 / T.
    counts = torch.bincount(draws[:, 0], minlength=T).double()
    expected = 3000 / T
    assert float((counts - expected).abs().max()) < 5 * expected**0.5


def test_bins_cover_the_schedule() -> None:
    model = toys.denoiser(Echo(), num_bins=20)
    bins = model.bins({"t": torch.arange(50)})
    assert bins.min() == 0
    assert bins.max() == 19
    assert torch.bincount(bins).tolist() == [3, 2] * 10


def test_mse_is_a_mean_per_sample_in_float32_or_better() -> None:
    a, b = torch.full((2, 3, 4), 300.0, dtype=torch.float16), torch.zeros(2, 3, 4, dtype=torch.float16)
    assert mse(a, b).tolist() == [90000.0, 90000.0]  # beyond float16
    assert mse(a, b.double()).dtype == torch.float64


def test_errors() -> None:
    with pytest.raises(ValueError, match="unknown prediction type 'x0'; allowed: epsilon, v_prediction, sample"):
        toys.denoiser(Echo(), prediction="x0")
    with pytest.raises(ValueError, match="needs a diffusion model; got a Plain"):
        as_denoiser(toys.Plain(nn.Identity()))
