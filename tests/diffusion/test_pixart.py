"""What PixArt alone has: a T5 tokenizer, a mask, a learned variance, and two pipelines."""

import io
import json
from pathlib import Path
from typing import Any

import micro_pixart
import pytest
import torch
from torch import Tensor

from erase.diffusion import loading, text
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.live import model_of
from erase.diffusion.model import Model, open_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("pixart")
    micro_pixart.pipeline(work).save_pretrained(work / "model")
    return work / "model"


@pytest.fixture
def model(folder: Path) -> Model:
    return open_model(locate(folder))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_null_prompt_is_the_pipelines_negative_condition(model: Model) -> None:
    found = model.embed(["", "a photo of a cat"])
    with torch.no_grad():
        cat, mask, no_text, no_mask = model.pipe.encode_prompt("a photo of a cat")
    assert torch.equal(found["text"], torch.cat([no_text, cat]))
    assert torch.equal(found["mask"], torch.cat([no_mask, mask]))
    assert found["mask"].sum(1).tolist() == [1, 6]


def test_a_class_of_the_users_own_is_read_as_the_one_it_is_made_of(tmp_path: Path) -> None:
    pipe = micro_pixart.pipeline(tmp_path)
    pipe.__class__ = type("Mine", (type(pipe),), {})
    own = model_of(pipe)
    assert own.embed(["a cat"])["text"].shape[1] == own.family.tokenizer(pipe)[1]
    assert own.family.example(own.configs)[1]["text"].shape[1] == own.family.tokenizer(pipe)[1]


def test_padding_is_not_read(model: Model) -> None:
    latents, _ = model.family.example(model.configs)
    asked = model.embed(["a photo of a cat"])
    other = {**asked, "text": torch.where(asked["mask"][..., None] > 0, asked["text"], 7.0)}
    with torch.no_grad():
        a, b = (model.family.call(model.net, latents + 1, torch.tensor([500]), c) for c in (asked, other))
    assert torch.equal(a, b)


def test_the_learned_variance_enters_no_loss(model: Model) -> None:
    net = model.net.requires_grad_(True)
    latents, _ = model.family.example(model.configs)
    model.denoiser().losses(
        {"mean": latents, "cond": model.embed(["a cat"])}, torch.Generator().manual_seed(0)
    ).sum().backward()
    rows = net.proj_out.weight.grad.view(2, 2, 2, 4, -1)  # patch, patch, (mean, variance), channels
    assert rows[:, :, 0].abs().min() > 0
    assert rows[:, :, 1].abs().max() == 0


def test_a_prompts_case_and_ends_do_not_matter(model: Model) -> None:
    """As the stock pipeline has it; tokens are counted and paired of what is read."""
    prompts = ["  A Photo of a CAT ", "a photo of a cat"]
    found = model.embed(prompts)
    assert torch.equal(found["text"][0], found["text"][1])
    assert model.count_tokens(prompts[0]) == model.count_tokens(prompts[1]) == 6


def test_concepts_leave_padding_out(model: Model) -> None:
    """Last words are paired, and the end; what the network does not read is not edited."""
    forget, anchors, kept = ["a photo of a cat", "a sepia dog"], ["a photo of a dog", "dog"], ["", "boat"]
    found = text.concepts(model, forget, anchors, kept)

    def tokens(prompt: str) -> Tensor:
        embedded = model.embed([prompt])
        return embedded["text"][0][embedded["mask"][0] > 0]

    first, second = map(tokens, forget)
    assert torch.equal(found.erased, torch.cat([first[4:], second]))
    dog, lone = map(tokens, anchors)
    assert torch.equal(found.targets, torch.cat([dog[4:], lone[[0, 0, 0, 1]]]))
    assert torch.equal(found.kept, torch.cat([tokens(prompt) for prompt in kept]))
    assert torch.equal(found.empty, tokens(""))
    assert found.begin.shape == (0, found.empty.shape[1])
    assert found.kept_of.tolist() == [number for number, text in enumerate(kept) for _ in tokens(text)]
    assert model.net.get_parameter("caption_projection.linear_1.weight").shape[1] == found.erased.shape[1]


def test_older_folders_name_another_class(folder: Path, tmp_path: Path, model: Model) -> None:
    """Published PixArt checkpoints call their network a `Transformer2DModel`."""
    pipe = micro_pixart.pipeline(tmp_path)
    pipe.save_pretrained(tmp_path / "old")
    edit(tmp_path / "old/model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edit(tmp_path / "old/transformer/config.json", _class_name="Transformer2DModel")
    old = open_model(locate(tmp_path / "old"))
    assert type(old.net) is type(model.net)
    for name, p in model.net.named_parameters():
        assert torch.equal(old.net.get_parameter(name), p)


@pytest.mark.parametrize(("taken", "given"), [(9, 8), (8, 16), (4, 12)])
def test_another_number_of_channels_is_refused(tmp_path: Path, taken: int, given: int) -> None:
    micro_pixart.pipeline(tmp_path, in_channels=taken, out_channels=given).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=f"{taken} input and {given} output channels for 4 latent channels"):
        open_model(locate(tmp_path / "model"))


def write_sentencepiece(folder: Path) -> None:
    """The tokenizer of `micro_pixart` as published checkpoints have it: a `spiece.model` alone."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as messages  # the one that transformers reads it with

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat"] * 9), model_writer=trained, vocab_size=8, hard_vocab_limit=False, minloglevel=2
    )
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    found = messages.ModelProto()
    for word, score in words:
        piece = found.pieces.add()
        piece.piece, piece.score = word, score
        piece.type = {"<unk>": 2, "<pad>": 3, "</s>": 3}.get(word, 1)  # unknown, control, normal
    found.normalizer_spec.CopyFrom(messages.ModelProto.FromString(trained.getvalue()).normalizer_spec)  # as T5's
    spec = found.trainer_spec
    spec.model_type, spec.unk_id, spec.pad_id, spec.eos_id, spec.bos_id = 1, 2, 0, 1, -1
    (folder / "spiece.model").write_bytes(found.SerializeToString())
    (folder / "tokenizer.json").unlink()


def test_a_tokenizer_that_cannot_be_read_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    micro_pixart.pipeline(tmp_path).save_pretrained(tmp_path / "model")
    folder = tmp_path / "model/tokenizer"
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").touch()
    monkeypatch.setattr(loading, "_installed", lambda name: name != "sentencepiece")
    with pytest.raises(ValueError, match=r"sentencepiece is not installed: pip install 'erase\[t5\]'"):
        open_model(locate(tmp_path / "model"))


def test_a_tokenizer_of_sentencepiece_is_read(tmp_path: Path, model: Model) -> None:
    pytest.importorskip("sentencepiece")
    micro_pixart.pipeline(tmp_path).save_pretrained(tmp_path / "model")
    write_sentencepiece(tmp_path / "model/tokenizer")
    again = open_model(locate(tmp_path / "model"))
    assert torch.equal(again.embed(["a photo of a cat"])["mask"], model.embed(["a photo of a cat"])["mask"])
    assert torch.equal(again.embed(["a photo of a cat"])["text"], model.embed(["a photo of a cat"])["text"])
