import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.resnet.configuration_resnet import ResNetConfig
from transformers.models.resnet.modeling_resnet import ResNetForImageClassification
from typer.testing import CliRunner

from erase.api import count
from erase.cli import app
from erase.evaluation.axes import Axis, axes_of
from erase.evaluation.classes import (
    ClassPredictions,
    accuracy,
    any_of,
    axis,
    classify,
    confidence,
    correct,
    forget_remain,
    knows,
    named,
    pair_of,
    shows,
    values,
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
    with pytest.raises(ValueError, match=r"broken\.png is not an image"):
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
    with pytest.raises(ValueError, match="label 'cat' does not have two parts"):
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


ON_AXES = ("object=cat", "object=dog", "object=hen", "style=3d", "style=flat")
SCENES = ClassPredictions(
    np.array(
        [
            [0.9, 0.2, 0.1, 0.7, 0.3],  # a cat in 3d
            [0.8, 0.6, 0.0, 0.1, 0.9],  # a cat and a dog, flat
            [0.4, 0.3, 0.2, 0.6, 0.4],  # nothing, in 3d
        ]
    ),
    ON_AXES,
    tuple(Path(f"{i}.png") for i in range(3)),
    "made-up",
    "0" * 64,
    axes=axes_of(ON_AXES, ["object"]),
)


def test_axes_are_read_from_labels() -> None:
    assert axes_of(ON_AXES, ["object"]) == (Axis("object", (0, 1, 2), True), Axis("style", (3, 4)))
    assert axes_of(LABELS) == (Axis("", (0, 1, 2, 3)),)
    assert axes_of(("style=a", "object=x", "style=b", "object=y"))[0] == Axis("style", (0, 2))
    for labels, several, message in (
        (("object=cat", "dog"), (), "label 'dog' has no axis"),
        (("object=cat", "style=3d", "style=flat"), (), "axis 'object' has one label"),
        (ON_AXES, ["objects"], "several_axes has 'objects', expected some of object, style"),
        (ON_AXES, "object", "several_axes is 'object', expected a list"),
        (ON_AXES, [1], r"several_axes is \[1\], expected a list"),
    ):
        with pytest.raises(ValueError, match=message):
            axes_of(labels, several)  # type: ignore[arg-type]


def test_one_axis_of_several() -> None:
    things, styles = axis(SCENES, "object"), axis(SCENES, 1)
    assert things.labels == ("cat", "dog", "hen")
    assert things.predicted == ("cat", "cat", "none")
    assert things.shown == (("cat",), ("cat", "dog"), ())
    assert (styles.labels, styles.predicted) == (("3d", "flat"), ("3d", "flat", "3d"))
    assert SCENES.shown[1] == ("object=cat", "object=dog", "style=flat")
    np.testing.assert_allclose(SCENES.confidence, [0.9 * 0.7, 0.8 * 0.6 * 0.9, 0.6])
    with pytest.raises(ValueError, match="the axes object, style: choose one"):
        _ = SCENES.predicted
    with pytest.raises(ValueError, match="axis is 'colour', expected one of object, style"):
        axis(SCENES, "colour")


def test_composite_labels_are_counted() -> None:
    assert shows(SCENES, "object=cat") == [True, True, False]
    assert shows(SCENES, "object=cat/style=flat") == [False, True, False]
    assert shows(SCENES, "object=cat/object=dog") == [False, True, False]
    assert named(SCENES, "object=cat/style=3d")["named"] == 1
    assert correct(axis(SCENES, "object"), ["cat", "cat+dog", "cat"]) == [True, True, False]
    assert correct(axis(SCENES, "object"), ["cat+dog"] * 3) == [False, True, False]
    whole = [pair_of(SCENES, "cat", "3d"), pair_of(SCENES, "cat+dog", "flat"), pair_of(SCENES, "hen", "3d")]
    assert whole[1] == "object=cat/object=dog/style=flat"
    assert accuracy(SCENES, whole)["correct"] == 2
    assert pair_of(PREDICTIONS, "cat", "sepia") == "cat/sepia"
    for label in ("object=cow", "object=cat/style=old", "cat"):
        assert not knows(ON_AXES, label)
        with pytest.raises(ValueError, match="label is '"):
            shows(SCENES, label)
    assert knows(ON_AXES, "object=cat/style=3d")
    assert (values(ON_AXES, "style"), values(LABELS, "object")) == (("3d", "flat"), ("cat", "dog"))
    assert values(("cat", "dog"), "object") == ()


def test_any_of_labels() -> None:
    np.testing.assert_allclose(any_of(SCENES, ["object=cat"]), [0.9, 0.8, 0.4])
    np.testing.assert_allclose(any_of(SCENES, ["object=cat", "object=dog"]), [0.92, 0.92, 0.58])
    np.testing.assert_allclose(any_of(SCENES, ["style=3d", "style=flat"]), [1, 1, 1])
    np.testing.assert_allclose(any_of(SCENES, ["object=cat/style=3d"]), [0.63, 0.08, 0.24])
    np.testing.assert_allclose(any_of(SCENES, ["object=cat", "style=3d"]), [0.97, 0.82, 0.76])
    np.testing.assert_array_equal(
        any_of(PREDICTIONS, ["cat/plain", "cat/sepia"]), PREDICTIONS.probabilities[:, :2].sum(1)
    )


def test_a_classifier_of_several_axes(classifier: Path, images: list[Path], tmp_path: Path) -> None:
    labels = ("object=cat", "object=dog", "style=3d", "style=flat")
    for file in classifier.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"id2label": dict(enumerate(labels)), "label2id": {n: k for k, n in enumerate(labels)}}
    settings["several_axes"] = ["object"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found, plainly = classify(images, tmp_path), classify(images, classifier)
    scores = np.log(plainly.probabilities)  # logits, each image's up to a constant
    styles = np.exp(scores[:, 2:]) / np.exp(scores[:, 2:]).sum(1, keepdims=True)
    np.testing.assert_allclose(found.probabilities[:, 2:], styles, atol=1e-12)
    odds = found.probabilities[:, :2] / (1 - found.probabilities[:, :2])
    np.testing.assert_allclose(odds[:, 0] / odds[:, 1], np.exp(scores[:, 0] - scores[:, 1]), rtol=1e-6)
    assert axis(found, "style").predicted == tuple(("3d", "flat")[k] for k in styles.argmax(1))
    counts = count(images, classifier=str(tmp_path))["counts"]
    assert counts == {label: named(found, label)["named"] for label in labels}
    given = ["eval", "classes", *map(str, images), "--classifier", str(tmp_path), "--out", str(tmp_path / "out.json")]
    assert CliRunner().invoke(app, given).exit_code == 0
    rows = json.loads((tmp_path / "out.json").read_text())["pictures"]
    assert [row["label"] for row in rows] == ["/".join(shown) for shown in found.shown]
    settings["several_axes"] = ["colour"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="several_axes has 'colour', expected some of object, style"):
        classify(images, tmp_path)
