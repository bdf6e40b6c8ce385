import json
import shutil
from pathlib import Path

import micro
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel, SiglipModel

from erase.evaluation import clip as clips
from erase.evaluation.clip import clip_score, feature_blocks, image_features, open_clip, scores, text_features
from erase.store.files import sha256

PROMPTS = ["a photo of a cat", "a dog", "a car", "a boat", "a sepia photo of a dog", "a cat"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(len(PROMPTS))]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (micro.SIZE, micro.SIZE, 3), np.uint8)).save(path)
    return paths


def test_scores_are_the_models_own(micro_clip: Path, paths: list[Path]) -> None:
    """transformers' own logits, over their temperature, times 100."""
    clip = open_clip(micro_clip)
    found = scores(clip, [image_features(clip, paths, batch_size=4)], PROMPTS)
    net = CLIPModel.from_pretrained(micro_clip)
    tokens = AutoTokenizer.from_pretrained(micro_clip)(PROMPTS, padding=True, return_tensors="pt")
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths]).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = net(**tokens, pixel_values=pixels / 127.5 - 1).logits_per_image / net.logit_scale.exp()
    # float32, a few layers
    assert found == pytest.approx((100 * logits.diagonal()).tolist(), abs=1e-3)
    assert max(found) - min(found) > 5
    assert clip.provenance == {
        "clip": str(micro_clip),
        "model_sha256": sha256(micro_clip / "model.safetensors"),
        "scale": "100 × cosine",
    }


def test_a_siglip_is_read_as_it_was_trained(micro_siglip: Path, paths: list[Path]) -> None:
    """transformers' own sigmoid logits, without their scale and bias, of text padded to its full length."""
    clip = open_clip(micro_siglip)
    found = scores(clip, feature_blocks(clip, paths), PROMPTS)
    net = SiglipModel.from_pretrained(micro_siglip)
    tokens = AutoTokenizer.from_pretrained(micro_siglip)(
        PROMPTS, padding="max_length", max_length=micro.MAX_TOKENS, return_tensors="pt"
    )
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths]).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = net(input_ids=tokens.input_ids, pixel_values=pixels / 127.5 - 1).logits_per_image
        cosines = (logits - net.logit_bias) / net.logit_scale.exp()
    assert found == pytest.approx((100 * cosines.diagonal()).tolist(), abs=1e-3)
    assert max(found) - min(found) > 5
    assert clip.max_tokens == micro.MAX_TOKENS


def test_prompts_shuffled_score_lower(micro_clip: Path, paths: list[Path]) -> None:
    """Images that are where their prompts are: the right order scores 100, any other one less."""
    clip = open_clip(micro_clip)
    texts = text_features(clip, PROMPTS)
    right, wrong = (
        clip_score(clip, scores(clip, [texts], some), some) for some in (PROMPTS, PROMPTS[1:] + PROMPTS[:1])
    )
    assert right["score"] == pytest.approx(100)
    assert right["ci95"] == pytest.approx([100, 100])
    assert wrong["score"] < 99
    assert wrong["ci95"][0] < wrong["score"] < wrong["ci95"][1]
    few = clip_score(clip, scores(clip, [texts[:2]], PROMPTS[:2]), PROMPTS[:2])
    assert (few["n"], few["prompts"], few["ci95"]) == (2, 2, None)
    for wrong_number in (PROMPTS[1:], [*PROMPTS, "a dog"]):
        with pytest.raises(ValueError, match=f"got 6 images and {len(wrong_number)} prompts"):
            scores(clip, [texts[:3], texts[3:]], wrong_number)


def test_pairs_are_scored_in_blocks(micro_clip: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the features of all images at once; and similarity is that of the two images, not of their prompts."""
    clip, prompts = open_clip(micro_clip), PROMPTS[:3] * 2
    features, texts = image_features(clip, paths), text_features(clip, prompts)
    monkeypatch.setattr(clips, "AT_ONCE", 4)
    before, after, alike = clips.score_pairs(clip, paths, paths[::-1], prompts)
    assert before == pytest.approx(100 * np.einsum("ij,ij->i", features, texts), abs=1e-4)  # float32, other batches
    assert after == pytest.approx(100 * np.einsum("ij,ij->i", features[::-1], texts), abs=1e-4)
    assert alike == pytest.approx(100 * np.einsum("ij,ij->i", features, features[::-1]), abs=1e-4)
    assert scores(clip, feature_blocks(clip, paths), prompts) == before
    assert max(alike) - min(alike) > 0.1


def test_long_prompts_are_cut_and_named(micro_clip: Path) -> None:
    clip = open_clip(micro_clip)
    long = "a photo of a " + "cat " * 20
    assert clip.max_tokens == micro.MAX_TOKENS
    assert clip.truncated(["a cat", long, long]) == [long]
    cut = text_features(clip, [long, "a photo of a " + "cat " * 30])
    assert cut[0] == pytest.approx(cut[1])
    asked = [long, "a dog"]
    assert clip_score(clip, scores(clip, [cut], asked), asked)["truncated"] == [long]


def test_no_model_no_score(micro_clip: Path, micro_classifier: Path, paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'nobody/nothing' is not a folder"):
        open_clip("nobody/nothing")
    with pytest.raises(ValueError, match="photos-clip"):  # as a name of an embedded one
        open_clip("photos-clop")
    with pytest.raises(ValueError, match="a model of type 'resnet', expected 'clip' or 'siglip'"):
        open_clip(micro_classifier)
    with pytest.raises(ValueError, match="safetensors"):
        open_clip(tmp_path)
    part = tmp_path / "part"
    shutil.copytree(micro_clip, part)
    (part / "model.safetensors").write_bytes((part / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(ValueError, match="safetensors"):
        open_clip(part)
    (part / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        open_clip(part)
    shutil.copy(micro_clip / "model.safetensors", part)
    config = json.loads((part / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 2
    (part / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weights are missing from the CLIP model, such as vision_model"):
        open_clip(part)
    with pytest.raises(ValueError, match="no images"):
        image_features(open_clip(micro_clip), [])
