import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.resnet.configuration_resnet import ResNetConfig
from transformers.models.resnet.modeling_resnet import ResNetForImageClassification

from erase.evaluation.classes import (
    ClassPredictions,
    accuracy,
    axis,
    classify,
    confidence,
    forget_remain,
    named,
)

LABELS = ("cat/plain", "cat/sepia", "dog/plain", "dog/sepia")
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "tiny"
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4],
        depths=[1],
        layer_type="basic",
        id2label=dict(enumerate(LABELS)),
        label2id={label: k for k, label in enumerate(LABELS)},
    )
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        model = ResNetForImageClassification(config)
        for weight in model.parameters():  # so that the classes differ
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for number, size in enumerate([(32, 32), (48, 40), (32, 32)]):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(paths[-1])
    return paths


def test_classify_is_resize_normalise_softmax(classifier: Path, images: list[Path]) -> None:
    calls: list[tuple[int, int]] = []
    found = classify(images, classifier, batch_size=2, progress=lambda i, n: calls.append((i, n)))
    model = ResNetForImageClassification.from_pretrained(classifier).eval()
    pixels = np.stack(
        [
            (np.asarray(Image.open(p).resize((32, 32), Image.Resampling.BILINEAR), np.float64) / 255 - MEAN) / STD
            for p in images
        ]
    )
    with torch.inference_mode():
        logits = model(pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2).float()).logits
    expected = torch.softmax(logits.double(), 1).numpy()
    assert np.ptp(expected, axis=0).max() > 0.01  # the images are told apart
    # float32 through a few layers
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    assert found.probabilities.sum(1) == pytest.approx(1, abs=1e-12)
    assert (found.labels, found.files, found.classifier) == (LABELS, tuple(images), "tiny")
    assert len(found.model_sha256) == 64
    assert calls == [(2, 3), (3, 3)]


def test_classify_refuses(classifier: Path, images: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken\.png is no image"):
        classify([*images, broken], classifier)
    with pytest.raises(ValueError, match="no images"):
        classify([], classifier)
    with pytest.raises(ValueError, match=r"no config\.json there"):
        classify(images, tmp_path)


@pytest.mark.parametrize("lost", ["preprocessor_config.json", "model.safetensors"])
def test_half_a_classifier_is_refused(classifier: Path, images: list[Path], tmp_path: Path, lost: str) -> None:
    for file in classifier.iterdir():
        if file.name != lost:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="not a transformers image classifier") as caught:
        classify(images, tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_refused(classifier: Path, images: list[Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in classifier.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing from the classifier, such as classifier\.1\.weight"):
        classify(images, tmp_path)


PREDICTIONS = ClassPredictions(
    np.array([[0.4, 0.3, 0.2, 0.1], [0.3, 0.0, 0.35, 0.35], [0.0, 1.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]]),
    LABELS,
    tuple(Path(f"{i}.png") for i in range(4)),
    "made-up",
    "0" * 64,
)


def test_axis_sums_over_the_other_part() -> None:
    things, styles = axis(PREDICTIONS, 0), axis(PREDICTIONS, 1)
    assert (things.labels, styles.labels) == (("cat", "dog"), ("plain", "sepia"))
    np.testing.assert_allclose(things.probabilities, [[0.7, 0.3], [0.3, 0.7], [1, 0], [0.3, 0.7]])
    np.testing.assert_allclose(styles.probabilities, [[0.6, 0.4], [0.65, 0.35], [0, 1], [0.4, 0.6]])
    assert things.files == PREDICTIONS.files
    with pytest.raises(ValueError, match="label 'cat' has no two parts"):
        axis(things, 0)
    with pytest.raises(ValueError, match="axis is 2"):
        axis(PREDICTIONS, 2)


def test_accuracy_and_named() -> None:
    things = axis(PREDICTIONS, 0)
    assert things.predicted == ("cat", "dog", "cat", "dog")
    score = accuracy(things, ["cat", "cat", "cat", "dog"])
    assert (score["n"], score["correct"], score["accuracy"]) == (4, 3, 0.75)
    assert score["ci95"] == pytest.approx([0.3006, 0.9544], abs=1e-4)
    assert {k: v for k, v in named(things, "dog").items() if k != "ci95"} == {
        "label": "dog",
        "n": 4,
        "named": 2,
        "rate": 0.5,
    }


def test_confidence_by_hand() -> None:
    result = confidence(PREDICTIONS, "cat/sepia")
    entropies = [-sum(p * math.log(p) for p in row if p > 0) for row in PREDICTIONS.probabilities.tolist()]
    assert result["probability"] == pytest.approx((0.3 + 0.0 + 1.0 + 0.2) / 4)
    assert result["entropy"] == pytest.approx(sum(entropies) / 4)


def test_forget_remain() -> None:
    things = axis(PREDICTIONS, 0)
    scores = forget_remain(things, ["cat", "cat", "dog", "dog"], ["cat"])
    assert (scores["forget"]["correct"], scores["forget"]["n"]) == (1, 2)
    assert (scores["remain"]["correct"], scores["remain"]["n"]) == (1, 2)
    assert scores["per_label"]["dog"] == scores["remain"]
    nothing = forget_remain(things, ["cat"] * 4, ["dog"])["forget"]
    assert nothing == {"n": 0, "correct": 0, "accuracy": None, "ci95": None}


def test_unknown_labels_are_refused() -> None:
    things = axis(PREDICTIONS, 0)
    with pytest.raises(ValueError, match="label is 'hen', expected one of cat, dog"):
        accuracy(things, ["cat", "cat", "cat", "hen"])
    with pytest.raises(ValueError, match="3 expected labels for 4 images"):
        accuracy(things, ["cat"] * 3)
    with pytest.raises(ValueError, match="label is 'hen'"):
        named(things, "hen")
    with pytest.raises(ValueError, match="label is 'hen'"):
        forget_remain(things, ["cat"] * 4, ["hen"])
    with pytest.raises(ValueError, match="expected a collection"):
        forget_remain(things, ["cat"] * 4, "cat")
