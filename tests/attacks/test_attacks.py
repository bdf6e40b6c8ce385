"""A learned word and relearning, on a checkpoint of random weights."""

from pathlib import Path
from typing import Any

import micro_flux
import micro_pixart
import micro_sd3
import micro_sdxl
import pytest
import torch
from torch import Tensor

from erase.attacks import inversion, places, relearning
from erase.config import Inversion, Relearn, RelearnLora
from erase.diffusion import condition, loading
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.data import LatentSet
from erase.diffusion.model import Model, open_model
from erase.engine.backend import seeded

INVERSION = Inversion(steps=8, lr=0.1, batch_size=4)


@pytest.fixture
def model(micro_sd: Path) -> Model:
    return open_model(locate(micro_sd))


@pytest.fixture
def data(model: Model) -> LatentSet:
    return LatentSet(
        torch.randn(4, 4, 8, 8, generator=seeded("cpu", 1)),
        torch.zeros(4, dtype=torch.long),
        model.embed(["a photo of a cat"]),
    )


def weights(model: Model) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": p.detach().clone()
        for part in ("unet", "text_encoder")
        for name, p in getattr(model.pipe, part).named_parameters()
    }


def test_a_word_means_its_embedding_and_other_words_stay(model: Model) -> None:
    """With the embedding of `cat` a prompt is the one that says so."""
    table = model.pipe.text_encoder.get_input_embeddings().weight
    before = model.embed(["a photo of *", "a photo of cat"])["text"]
    with places.meaning(model, {"text_encoder": table[model.pipe.tokenizer("cat").input_ids[1]].clone()}):
        within = model.embed(["a photo of *", "a photo of cat"])["text"]
    assert torch.equal(within[0], before[1])
    assert torch.equal(within[1], before[1])
    assert not torch.equal(before[0], before[1])
    assert torch.equal(model.embed(["a photo of *"])["text"][0], before[0])


def test_a_word_is_learned_and_no_weight_moves(model: Model, data: LatentSet) -> None:
    before, rows = weights(model), list[Any]()
    word = inversion.learn_word(model, data, INVERSION, 3, log=rows.append)
    after = weights(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(rows) == INVERSION.steps
    assert torch.equal(word["text_encoder"], inversion.learn_word(model, data, INVERSION, 3)["text_encoder"])

    def loss(prompt_word: dict[str, Tensor]) -> float:
        backend, generator = model.denoiser(), seeded("cpu", 9)
        with places.meaning(model, prompt_word):
            cond = condition.expand(model.embed([INVERSION.prompt]), 4)
        batch = {**data.gather(torch.arange(4)), "cond": cond}
        with torch.no_grad():
            return sum(float(backend.losses(batch, generator).mean()) for _ in range(20))

    table = model.pipe.text_encoder.get_input_embeddings().weight
    start = {name: table[token] for name, token in inversion.check_word(model, "*").items()}
    assert loss(word) < loss(start)


@pytest.mark.parametrize("prompt", ["a photo of a cat", "* of *", "a photo*of"])
def test_a_prompt_holds_the_word_once(model: Model, prompt: str) -> None:
    if prompt == "a photo*of":  # a word of its own for byte-level BPE all the same
        inversion.check_word(model, prompt)
        return
    with pytest.raises(ValueError, match=r"must hold the word \* once, such as 'a photo of \*'; got"):
        inversion.check_word(model, prompt)


def test_relearning_is_looked_at_on_its_way_and_not_disturbed(micro_sd: Path, data: LatentSet) -> None:
    found: dict[tuple[int, ...], dict[int, dict[str, Tensor]]] = {}
    for at in ((3,), (3, 1)):
        model = open_model(locate(micro_sd))
        seen: dict[int, dict[str, Tensor]] = {}

        def look(done: int, model: Model = model, seen: Any = seen) -> None:
            seen[done] = weights(model)
            torch.rand(done + 1)  # as drawing may

        relearning.relearn(model, data, Relearn(at=list(at), lr=1e-2, batch_size=2), 0, look)
        found[at] = seen
    assert [list(seen) for seen in found.values()] == [[0, 3], [0, 1, 3]]
    start, end = found[3,][0], found[3,][3]
    assert all(torch.equal(end[name], value) for name, value in found[3, 1][3].items())
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert any(".attn2." in name for name in moved)
    assert any(".resnets." in name for name in moved)  # full
    assert all(name.startswith("unet.") for name in moved)


def test_relearning_by_a_lora_leaves_the_weights_as_they_are(model: Model, data: LatentSet) -> None:
    before, seen = dict(model.net.named_parameters()), list[int]()
    old = {name: p.detach().clone() for name, p in before.items()}
    wanted = RelearnLora(at=[1, 2], rank=2, lr=1e-2, batch_size=2)
    relearning.relearn(model, data, wanted, 0, seen.append)
    assert seen == [0, 1, 2]
    assert all(torch.equal(p, old[name]) for name, p in before.items())
    pairs = {name: p for name, p in model.net.named_parameters() if ".lora_" in name}
    assert pairs
    assert all(".attn2." in name and 2 in p.shape and p.any() for name, p in pairs.items())


@pytest.mark.parametrize(
    "build",
    [
        micro_sdxl.pipeline,
        *(pytest.param(m.pipeline, marks=pytest.mark.slow) for m in (micro_sd3, micro_flux, micro_pixart)),
    ],
)
@pytest.mark.parametrize("lean", [False, True])
def test_every_encoder_of_every_family_learns_the_word(
    build: Any, lean: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path).save_pretrained(tmp_path / "model")
    if lean:
        monkeypatch.setattr(loading, "held_dtype", lambda *_: torch.bfloat16)
    model = open_model(locate(tmp_path / "model"))
    assert model.lean is lean
    latents, _ = model.family.example(model.configs)
    mean = torch.randn((4, *latents.shape[1:]), generator=seeded("cpu", 1))
    data = LatentSet(mean, torch.zeros(4, dtype=torch.long), model.embed(["a photo of a cat"]))
    with torch.autocast("cpu", torch.bfloat16, enabled=lean):
        word = inversion.learn_word(model, data, Inversion(steps=2, lr=0.1, batch_size=2), 3)
    assert word.keys() == {name for name in model.family.ENCODERS if getattr(model.pipe, name) is not None}
    with places.meaning(model, word):
        within = model.embed(["a photo of *"])
    assert not torch.equal(within["text"], model.embed(["a photo of *"])["text"])
