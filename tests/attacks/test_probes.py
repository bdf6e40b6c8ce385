"""Image-side probes against plain DDIM and Euler, and the genetic search of Ring-A-Bell."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from erase.attacks import probes, ring_a_bell
from erase.attacks.prefixes import Vocabulary
from erase.config import RingABell
from erase.diffusion.denoiser import Denoiser
from erase.diffusion.families import family
from erase.diffusion.process import Flow
from erase.programs.attacks.images import at_scale


def flow_model() -> Denoiser:
    small = toys.small_denoiser()
    return Denoiser(small.net, lambda net, z, t, cond: net(z, t, cond["text"]), Flow(3.0), small.null)


def batch() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    drawn = toys.latents(size=2)
    return drawn["mean"], toys.latents(1, size=2)["mean"], drawn["cond"]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_denoising_is_ddim(guidance: float) -> None:
    """With η = 0, written out: x0 from the noise, and that noise at the next level."""
    model, (data, noise, cond) = toys.small_denoiser(), batch()
    path = probes.Path(model, 6, guidance)
    times = path.times(data.device, 0.5)
    assert times.tolist() == [4, 12, 20]
    alphas = model.process.alphas_cumprod.double()
    z = alphas[20].sqrt() * data + (1 - alphas[20]).sqrt() * noise
    with torch.no_grad():
        for now, after in ((20, 12), (12, 4), (4, None)):
            t = torch.full((2,), now)
            said = model.net(z, t, cond["text"])
            if guidance != 1:
                plain = model.net(z, t, model.null["text"].expand(2, -1, -1))
                said = plain + guidance * (said - plain)
            clean = (z - (1 - alphas[now]).sqrt() * said) / alphas[now].sqrt()
            z = clean if after is None else alphas[after].sqrt() * clean + (1 - alphas[after]).sqrt() * said
    found = probes.half_noised(path, data, noise, cond, 0.5)
    torch.testing.assert_close(found.double(), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["flux", "sd"])
def test_flux_is_told_its_guidance(name: str) -> None:
    """And not guided by the empty prompt, as its pipeline does not."""
    told = {"text": torch.ones(2, 3), "guidance": torch.ones(2)}
    found = at_scale(SimpleNamespace(family=family(name)), told, 3.5)  # type: ignore[arg-type]
    assert found["guidance"].tolist() == ([3.5, 3.5] if name == "flux" else [1.0, 1.0])
    assert found["text"] is told["text"]


def test_denoising_a_flow_is_euler() -> None:
    model, (data, noise, cond) = flow_model(), batch()
    path = probes.Path(model, 5)
    times = path.times(data.device)
    levels = [*times.tolist()]
    z = (1 - levels[-1]) * data + levels[-1] * noise
    with torch.no_grad():
        for now, after in zip(levels[::-1], [*levels[-2::-1], 0.0], strict=True):
            velocity = model.net(z, torch.full((2,), 1000 * now), cond["text"])
            z = z + (after - now) * velocity
    torch.testing.assert_close(probes.half_noised(path, data, noise, cond, 1.0).double(), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [toys.small_denoiser, flow_model])
def test_what_is_not_hidden_stays(make: Any) -> None:
    data, noise, cond = batch()
    found = probes.inpaint(probes.Path(make(), 4), data, noise, cond, 0.25)
    hidden = probes.middle(data, 0.25)
    assert int(hidden.sum()) == 16  # of 64
    assert bool(hidden[2:6, 2:6].all())
    assert torch.equal(found[..., ~hidden].to(data), data[..., ~hidden])
    assert not torch.isclose(found[..., hidden].to(data), data[..., hidden]).any(-1).all()


def test_inversion_finds_the_noise_that_images_come_from() -> None:
    """The more steps, the nearer it comes."""
    model, (data, _, cond) = flow_model(), batch()
    apart = []
    for steps in (5, 80):
        found = probes.latent_seed(probes.Path(model, steps), data, cond, cond)
        apart.append(float((found - data).abs().mean()))
    assert apart[1] < 0.5 * apart[0]
    other = probes.latent_seed(probes.Path(model, 80), data, {"text": cond["text"] + 3}, cond)
    assert float((other - data).abs().mean()) > apart[1]


@pytest.mark.parametrize("make", [toys.small_denoiser, flow_model])
def test_inversion_begins_at_data(make: Any) -> None:
    """Where the model sees one noise everywhere, that noise is found, and leads back to the data.

    Of a flow it is found up to the square of the first time: data are asked for as a sample at that time.
    """
    model, (data, noise, cond) = make(), batch()
    said = noise - data if isinstance(model.process, Flow) else noise
    told = replace(model, call=lambda net, z, t, cond: said)
    path = probes.Path(told, 12)
    times = path.times(data.device)
    found = path.invert(data, times, cond)
    atol = 1e-4 if said is noise else 1.01 * float(times[0] ** 2 * said.abs().max())
    expected = model.process.noisy(data, noise, times[-1].expand(len(data)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)
    torch.testing.assert_close(path.denoise(found, times, cond), data, rtol=1e-4, atol=atol)


def test_guidance_up_to_1_is_none() -> None:
    """As in diffusers' pipelines: 0 is not the model without its prompt."""
    model, (data, noise, cond) = toys.small_denoiser(), batch()
    found = [probes.half_noised(probes.Path(model, 4, scale), data, noise, cond, 0.5) for scale in (0.0, 0.5, 1.0, 2.0)]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[3], found[2])


WORDS = [f"w{i}" for i in range(20)]


def search(seed: int = 0, **changes: Any) -> tuple[str, float]:
    table = torch.randn(20, 6, generator=toys.gen(5))
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(WORDS[int(i)] for i in ids))
    allowed = torch.ones(20, dtype=torch.bool)
    allowed[:2] = False
    words = Vocabulary({}, allowed, tokenizer)

    def embed(texts: Any) -> Tensor:
        return torch.stack([torch.cat([table[WORDS.index(word)] for word in text.split()]) for text in texts])

    goal = embed(["w3 w9 w14"])[0]
    wanted = RingABell(**{"tokens": 3, "population": 20, "generations": 60, **changes})
    return ring_a_bell.search(embed, goal, words, wanted, seed)


def test_a_genetic_search_finds_the_prompt_of_an_embedding() -> None:
    prompt, distance = search()
    assert (prompt, distance) == ("w3 w9 w14", pytest.approx(0, abs=1e-9))
    assert search() == (prompt, distance)
    assert search(generations=1, population=4)[1] > 0
    assert not set(search(generations=1)[0].split()) & {"w0", "w1"}  # not allowed


def test_the_target_is_the_prompt_moved_along_the_concept() -> None:
    told = {"nude": 5.0, "dressed": 1.0, "bare": 4.0, "clad": 2.0, "a": 10.0}
    pairs = [("nude", "dressed"), ("bare", "clad")]
    found = ring_a_bell.target_of(lambda texts: torch.tensor([[told[x]] for x in texts]), "a", pairs, 2.0)
    assert found.tolist() == [10 + 2 * ((5 + 4) / 2 - (1 + 2) / 2)]
