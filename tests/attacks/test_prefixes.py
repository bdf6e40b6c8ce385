"""Searched words and a learned embedding, on checkpoints of random weights; losses beside plain transcriptions."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import micro_flux
import micro_lumina2
import micro_pixart
import micro_sd3
import micro_sdxl
import pytest
import torch
from torch import Tensor

from erase.attacks import p4d, places, prefixes, prompt_search, soft_prompt
from erase.config import PrefixSearch, SoftPrompt
from erase.diffusion import condition, loading
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.data import LatentSet
from erase.diffusion.model import Model, open_model
from erase.engine.backend import seeded

PROMPTS = ["a photo of a cat", "a cat"]
WANTED = PrefixSearch(tokens=3, steps=3, times=2, lr=0.1, images=2)


@pytest.fixture
def model(micro_sd: Path) -> Model:
    return open_model(locate(micro_sd))


def latents(model: Model, count: int = 2) -> Tensor:
    one, _ = model.family.example(model.configs)
    return torch.randn((count, *one.shape[1:]), generator=seeded("cpu", 1))


def search(model: Model, name: str, wanted: PrefixSearch = WANTED, seed: int = 3) -> prefixes.Search:
    model.ready(model.family.TRAINED, *places.tables(model))
    words, relaxation = prefixes.vocabularies(model), Any
    if name == "p4d":
        relaxation = p4d.Nearest(words, 2, wanted.tokens, seeded("cpu", seed))
        loss = p4d.match_base(model.denoiser(), model.net, condition.to(model.embed(PROMPTS), model.device))
    else:
        relaxation = prompt_search.Distributions(words, 2, wanted.tokens, model.device)
        loss = prompt_search.own_loss(model.denoiser())
    return prefixes.Search(model, PROMPTS, latents(model), wanted, words, relaxation, loss, seed)


@pytest.mark.parametrize("name", ["prompt_search", "p4d"])
def test_losses_are_those_of_the_papers(model: Model, micro_sd: Path, name: str) -> None:
    """Noise the latents, ask the UNet under prefix and prompt, take the mean squared error."""
    found, words = search(model, name), torch.tensor([[5, 6, 7], [8, 9, 5]])
    other = open_model(locate(micro_sd))
    with torch.no_grad():
        for p in other.net.parameters():
            p.mul_(1.1)
    if name == "p4d":
        asked = condition.to(model.embed(PROMPTS), "cpu")
        found.loss = p4d.match_base(model.denoiser(), other.net, asked)
    t, pipe, scheduler = 700, model.pipe, model.pipe.scheduler
    noise = torch.randn(found.latents.shape, generator=seeded("cpu", 8))
    batch = {"mean": found.latents, "z0": found.latents, "noise": noise, "t": torch.full((2,), t)}
    ours = found.loss(found.conditions([words]), batch)

    noisy = scheduler.add_noise(found.latents, noise, torch.tensor(t))
    for row in range(2):
        ids = pipe.tokenizer(PROMPTS[row]).input_ids
        ids = [ids[0], *words[row].tolist(), *ids[1:]]
        ids += [pipe.tokenizer.pad_token_id] * (pipe.tokenizer.model_max_length - len(ids))
        with torch.no_grad():
            text = pipe.text_encoder(torch.tensor([ids]))[0]
            said = pipe.unet(noisy[row : row + 1], t, encoder_hidden_states=text).sample
            target = noise[row : row + 1]
            if name == "p4d":
                plain = pipe.tokenizer(PROMPTS[row], padding="max_length", return_tensors="pt").input_ids
                target = other.pipe.unet(
                    noisy[row : row + 1], t, encoder_hidden_states=pipe.text_encoder(plain)[0]
                ).sample
        assert float(ours[row]) == pytest.approx(float((said - target).square().mean()), abs=1e-6)


def test_the_simplex_is_met_where_bisection_meets_it() -> None:
    """The authors' projection: clip(x - μ) to [0, 1] with the μ at which it adds up to 1."""
    x = torch.randn(4, 7, generator=seeded("cpu", 0), dtype=torch.float64)
    found = prompt_search.onto_simplex(x)
    for row, point in zip(x, found, strict=True):
        low, high = float(row.min()) - 1, float(row.max())
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if (row - middle).clamp(0, 1).sum() > 1 else (low, middle)
        torch.testing.assert_close(point, (row - low).clamp(0, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(prompt_search.onto_simplex(found), found)


def test_a_step_of_prompt_search_is_adam_on_limited_gradients(model: Model) -> None:
    """Of the sampled words, as the script has it: `d loss / d one-hot` within [-1, 1], L2 decay in the gradient."""
    wanted = PrefixSearch(tokens=3, steps=1, times=2, lr=0.1, weight_decay=0.2)
    found = search(model, "prompt_search", wanted)
    (start,), (vocabulary,) = [p.detach().clone() for p in found.relaxation.params], prefixes.vocabularies(model)
    generator = seeded("cpu", 3, 0, 0)
    batch = model.denoiser().draw_at({"mean": found.latents}, found.times[0].expand(2), generator)
    ids = torch.multinomial(start.flatten(0, 1), 1, generator=generator).view(2, 3)
    hot = torch.nn.functional.one_hot(ids, start.shape[-1]).float().requires_grad_(True)
    with places.meaning(model, {"text_encoder": hot @ vocabulary.tables["text_encoder"]}):
        cond = model.family.embed(model.pipe, found.read)
    (grad,) = torch.autograd.grad(found.loss(cond, batch).sum(), hot)
    grad = grad.clamp(-1, 1) + 0.2 * start
    stepped = start - 0.1 * grad / (grad.abs() + 1e-8)  # the first step of Adam
    allowed = vocabulary.allowed
    expected = torch.zeros_like(start)
    expected[..., allowed] = prompt_search.onto_simplex(stepped[..., allowed])
    found.round(0)
    torch.testing.assert_close(found.relaxation.params[0].detach(), expected, rtol=0, atol=1e-5)


def test_vectors_are_read_as_the_nearest_words(model: Model) -> None:
    """By cosine, and none that has a meaning of its own."""
    (vocabulary,) = prefixes.vocabularies(model)
    assert not vocabulary.allowed[model.pipe.tokenizer.all_special_ids].any()
    table = vocabulary.tables["text_encoder"]
    relaxation = p4d.Nearest([vocabulary], 2, 3, seeded("cpu", 0))
    relaxation.params[0] = torch.randn(2, 3, table.shape[1], generator=seeded("cpu", 1))
    (ids,) = relaxation.tokens()
    for row in range(2):
        for k in range(3):
            alike = torch.cosine_similarity(relaxation.params[0][row, k], table, dim=-1)
            assert int(ids[row, k]) == max(vocabulary.allowed.nonzero().flatten().tolist(), key=lambda i: alike[i])
    read = relaxation.embedded(seeded("cpu", 0))["text_encoder"]
    torch.testing.assert_close(read, table[ids], rtol=0, atol=1e-6)


FAMILIES = [micro_sdxl, micro_sd3, micro_flux, micro_pixart, micro_lumina2]


OFTEN = ((micro_sdxl, True),)
"""Stable Diffusion is asked above; the others are marked slow."""


@pytest.mark.parametrize(
    ("build", "lean"),
    [
        pytest.param(*cell, marks=[pytest.mark.slow] * (cell not in OFTEN), id=f"{cell[0].__name__}-{cell[1]}")
        for cell in product(FAMILIES, (False, True))
    ],
)
def test_every_family_is_searched_and_says_what_was_found(
    build: Any, lean: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same words twice; the network is told those words, and no weight of it learns."""
    build.pipeline(tmp_path).save_pretrained(tmp_path / "model")
    if lean:
        monkeypatch.setattr(loading, "held_dtype", lambda *_: torch.bfloat16)
    model = open_model(locate(tmp_path / "model"))
    wanted = PrefixSearch(tokens=2, steps=2, times=1, lr=0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=lean):
        for name in ("prompt_search", "p4d"):
            both = [search(model, name, wanted) for _ in range(2)]
            before = [p.detach().clone() for p in both[0].relaxation.params]
            for one in both:
                one.round(0)
            tokens = [one.relaxation.tokens() for one in both]
            assert all(torch.equal(a, b) for a, b in zip(*tokens, strict=True))
            assert not all(torch.equal(a, b) for a, b in zip(before, both[0].relaxation.params, strict=True))
            assert all(words.allowed[ids].all() for words, ids in zip(both[0].words, tokens[0], strict=True))
        told = both[0].conditions(tokens[0])
        plain = model.embed(PROMPTS)
        assert told["text"].shape == plain["text"].shape
        assert not torch.equal(told["text"].float(), plain["text"])
        assert len({*both[0].texts(tokens[0])}) == 2
        data = LatentSet(latents(model, 4), torch.zeros(4, dtype=torch.long), plain)
        learned = soft_prompt.learn_prompt(model, data, PROMPTS[0], SoftPrompt(steps=2, batch_size=2), 3)
    assert learned.keys() == plain.keys()
    for name, x in learned.items():
        start = plain[name][:1]
        assert (name in condition.WORDS) != torch.equal(x.float(), start.float())


@pytest.mark.slow
def test_a_soft_prompt_fits_its_images_and_is_drawn_with(model: Model) -> None:
    data = LatentSet(latents(model, 4), torch.zeros(4, dtype=torch.long), model.embed(PROMPTS))
    learned = soft_prompt.learn_prompt(model, data, PROMPTS[0], SoftPrompt(steps=30, lr=0.1, batch_size=4), 3)

    def loss(cond: Any) -> float:
        batch = {**data.gather(torch.arange(4)), "cond": condition.expand(cond, 4)}
        with torch.no_grad():
            return sum(float(model.denoiser().losses(batch, seeded("cpu", i)).mean()) for i in range(20))

    assert loss(learned) < loss(condition.to(model.embed([PROMPTS[0]]), "cpu"))

    def draw() -> list[Tensor]:
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        drawn: Any = model.generate([PROMPTS[0], "a dog"], generators, steps=2, guidance=3.0, latents=True)
        return list(drawn)

    plain = draw()
    model.given[PROMPTS[0]] = learned
    told = draw()
    assert not torch.equal(told[0], plain[0])
    torch.testing.assert_close(told[1], plain[1])
    model.given[PROMPTS[0]] = model.embed([PROMPTS[0]])
    torch.testing.assert_close(draw()[0], plain[0])
