import json
import math
from pathlib import Path
from typing import Any

import micro
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from scipy.linalg import sqrtm
from transformers.models.deit.configuration_deit import DeiTConfig
from transformers.models.deit.modeling_deit import DeiTForImageClassificationWithTeacher
from transformers.models.resnet.modeling_resnet import ResNetForImageClassification
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTForImageClassification

from erase import resources
from erase.evaluation import classes, classifiers, fidelity
from erase.evaluation.fidelity import (
    Features,
    coverage,
    density,
    frechet,
    kernel_distance,
    prdc,
    precision,
    recall,
    summary,
)
from erase.store.files import sha256

Array = Any


def with_moments(mean: Array, covariance: Array, N: int, seed: int) -> Array:
    """`[N, D]` whose sample mean and unbiased covariance are the given ones, but for rounding."""
    x = np.random.default_rng(seed).normal(size=(N, len(mean)))
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def random_covariance(D: int, seed: int) -> Array:
    root = np.random.default_rng(seed).normal(size=(D, D + 2))
    return root @ root.T


# --- Fréchet distance -----------------------------------------------------------------------------


def test_frechet_of_equal_sets_is_zero() -> None:
    x = with_moments(np.arange(6.0), random_covariance(6, 0), 50, 1)
    # rounding of traces of about 50
    assert frechet(x, x) == pytest.approx(0, abs=1e-12)
    assert frechet(x, x[::-1]) == pytest.approx(0, abs=1e-12)


def test_frechet_of_a_shift_is_its_square() -> None:
    covariance = random_covariance(5, 0)
    shift = np.array([3.0, 0, -4, 0, 0])
    a, b = with_moments(np.ones(5), covariance, 40, 1), with_moments(1 + shift, covariance, 70, 2)
    assert frechet(a, b) == pytest.approx(25, abs=1e-11)  # rounding of traces of about 40


def test_frechet_of_commuting_covariances() -> None:
    # one rotation for both: the distance is that of the standard deviations
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    s, t = np.array([0.5, 1, 2, 3]), np.array([1.5, 1, 1, 0.25])
    a = with_moments(np.zeros(4), rotation @ np.diag(s**2) @ rotation.T, 30, 1)
    b = with_moments(np.zeros(4), rotation @ np.diag(t**2) @ rotation.T, 30, 2)
    assert frechet(a, b) == pytest.approx(((s - t) ** 2).sum(), abs=1e-12)


def test_frechet_of_one_dimension_by_hand() -> None:
    # standard deviations √2 and √8, means 1 and 4
    assert frechet(np.array([[0.0], [2]]), np.array([[2.0], [6]])) == pytest.approx(9 + 2)


@pytest.mark.parametrize(("D", "N", "M"), [(3, 50, 60), (16, 40, 400), (64, 300, 100)])
def test_frechet_is_the_matrix_square_root(D: int, N: int, M: int) -> None:
    rng = np.random.default_rng(D)
    a, b = rng.normal(size=(N, D)) @ rng.normal(size=(D, D)), rng.exponential(size=(M, D)) + 0.3
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(0) - b.mean(0)
    expected = difference @ difference + np.trace(A + B - 2 * sqrtm(A @ B).real)
    # scipy takes the root of a matrix that is not symmetric, with condition numbers of about 1e4
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet(b, a) == pytest.approx(expected, rel=1e-9)


@given(st.integers(1, 12), st.integers(2, 30), st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_frechet_is_a_sum_of_singular_values(D: int, N: int, M: int, seed: int) -> None:
    # tr (A B)^½ = sum of the singular values of Xᵀ Y / √((N-1) (M-1)): no square roots of what should be 0
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(N, D)), 2 * rng.normal(size=(M, D)) + 1
    x, y = (a - a.mean(0)) / math.sqrt(N - 1), (b - b.mean(0)) / math.sqrt(M - 1)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * cross
    # N <= D is among them: roots of rounding, 1e-8 a dimension, of traces up to 100
    assert frechet(a, b) == pytest.approx(expected, abs=1e-5)


def test_frechet_of_few_images_is_too_large() -> None:
    # what the docstring warns of: one distribution, distance 0
    rng = np.random.default_rng(0)
    few, many = (
        np.mean([frechet(rng.normal(size=(N, 8)), rng.normal(size=(N, 8))) for _ in range(20)]) for N in (20, 200)
    )
    assert few > 5 * many > 0  # about 10 times


# --- precision, recall, density, coverage ---------------------------------------------------------


def slow_prdc(real: Array, fake: Array, k: int) -> dict[str, float]:
    def distance(x: Array, y: Array) -> float:
        return math.sqrt(sum((p - q) ** 2 for p, q in zip(x.tolist(), y.tolist(), strict=True)))

    def radius(points: Array, i: int) -> float:
        return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    R, F = range(len(real)), range(len(fake))
    in_real = [[distance(real[i], fake[j]) <= radius(real, i) for i in R] for j in F]
    in_fake = [[distance(real[i], fake[j]) <= radius(fake, j) for j in F] for i in R]
    return {
        "precision": sum(any(row) for row in in_real) / len(fake),
        "recall": sum(any(row) for row in in_fake) / len(real),
        "density": sum(map(sum, in_real)) / k / len(fake),
        "coverage": sum(any(in_real[j][i] for j in F) for i in R) / len(real),
    }


@pytest.mark.parametrize("rows", [1, 4, 1024])
@pytest.mark.parametrize(("N", "M", "D", "k"), [(9, 12, 2, 1), (14, 8, 3, 5), (10, 10, 6, 9), (12, 11, 1, 3)])
def test_prdc_is_the_loop(monkeypatch: pytest.MonkeyPatch, N: int, M: int, D: int, k: int, rows: int) -> None:
    monkeypatch.setattr(fidelity, "ROWS", rows)
    rng = np.random.default_rng(N)
    real, fake = rng.normal(size=(N, D)), rng.normal(size=(M, D)) + 0.7
    found = prdc(real, fake, k)
    assert found == pytest.approx(slow_prdc(real, fake, k), abs=1e-15)  # counts
    # a common offset changes nothing
    assert found == pytest.approx(prdc(real + 1e7, fake + 1e7, k), abs=1e-15)
    each = {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
    assert found == {name: function(real, fake, k) for name, function in each.items()}


def test_prdc_on_ties() -> None:
    # whole numbers: the loop's distances are exact, and neighbours lie on the boundaries
    rng = np.random.default_rng(0)
    real, fake = (rng.integers(-2, 3, (n, 2)).astype(float) for n in (25, 20))
    assert prdc(real, fake, 3) == pytest.approx(slow_prdc(real, fake, 3))
    # a model that draws the real images again: each ball holds its own and k more
    real = rng.normal(size=(40, 7))
    assert prdc(real, real[::-1], 4) == {"precision": 1, "recall": 1, "density": pytest.approx(5 / 4), "coverage": 1}


def test_prdc_of_one_distribution() -> None:
    # Naeem et al.: these expectations do not depend on the distribution
    N, M, k = 60, 40, 3
    rng = np.random.default_rng(0)
    found = [prdc(rng.normal(size=(N, 4)), rng.normal(size=(M, 4)), k) for _ in range(100)]
    missed = math.prod((N - i) / (M + N - i) for i in range(1, k + 1))
    # one draw's standard deviations are about 0.1 and 0.07; 4 of the mean's
    assert np.mean([f["density"] for f in found]) == pytest.approx(1, abs=0.04)
    assert np.mean([f["coverage"] for f in found]) == pytest.approx(1 - missed, abs=0.03)


def test_a_collapse_lowers_coverage_and_recall() -> None:
    rng = np.random.default_rng(0)
    centres = 20 * np.eye(10)

    def draw(modes: int) -> Array:
        return centres[np.arange(300) % modes] + rng.normal(size=(300, 10))

    real = draw(10)
    whole, collapsed = prdc(real, draw(10)), prdc(real, draw(3))
    assert min(whole["coverage"], whole["recall"]) > 0.9
    # 3 of 10 modes
    assert 0.25 < collapsed["coverage"] <= 0.3
    assert 0.2 < collapsed["recall"] <= 0.3
    # these two do not see it
    assert collapsed["precision"] > 0.9
    assert collapsed["density"] == pytest.approx(1, abs=0.2)  # one draw
    point = prdc(real, np.repeat(real[:1], 300, axis=0))  # one image again and again
    assert point["precision"] == 1
    assert point["coverage"] < 0.05
    assert point["recall"] == pytest.approx(1 / 300)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), r"shape \[1, 3\], expected \[N, D\] with N of 2 or more"),
        (np.zeros((5, 3)), np.zeros(3), r"shape \[3\]"),
        (np.zeros((5, 0)), np.zeros((5, 0)), r"shape \[5, 0\]"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "3 and 4 dimensions, expected the same"),
        (np.zeros((5, 3)), np.array([[0.0, 0], [np.nan, np.inf], [1, 1]]), "1 of 3 images are not finite"),
    ],
)
def test_bad_sets_are_refused(a: Array, b: Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet(a, b)
    with pytest.raises(ValueError, match=message):
        prdc(a, b, 1)


@pytest.mark.parametrize("k", [0, 4])
def test_bad_k_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k is {k}, expected 1 to 3: neighbours among 6 real and 4 fake"):
        prdc(np.eye(6), np.eye(4, 6), k)


# --- summary --------------------------------------------------------------------------------------


def made_up(values: Array, sha256: str = "0" * 64) -> Features:
    return Features(values, "made-up", sha256, "classifier.1")


def test_summary_is_json() -> None:
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(30, 4)), rng.normal(size=(30, 4))
    found = summary(made_up(real), made_up(fake), k=3)
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "frechet": frechet(real, fake),
        "kernel": kernel_distance(real, fake),
        **prdc(real, fake, 3),
        "k": 3,
        "n_real": 30,
        "n_fake": 30,
        "features": {
            "classifier": "made-up",
            "model_sha256": "0" * 64,
            "layer": "classifier.1",
            "dimensions": 4,
        },
        "warnings": [],
    }


def test_summary_warns_and_refuses() -> None:
    x = np.random.default_rng(0).normal(size=(30, 12))
    few, other = summary(made_up(x), made_up(x).take(range(12)))["warnings"]
    assert few.startswith("12 images for 12 feature dimensions")
    assert other.startswith("30 real and 12 fake images")
    with pytest.raises(ValueError, match=r"model_sha256 is 000.* of the real images and 111.* expected one network"):
        summary(made_up(x), made_up(x, "1" * 64))


def test_take() -> None:
    x = made_up(np.arange(6.0).reshape(3, 2))
    assert x.take([2, 0]).values.tolist() == [[4, 5], [0, 1]]
    one = x.take(np.array([False, True, False]))
    assert (len(one), one.values.tolist(), one.layer) == (1, [[2, 3]], x.layer)


# --- features -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """Gradients and checks, no two alike: `[6, 3, 28, 28]`."""
    y, x = np.mgrid[0:28, 0:28]
    pictures = [
        np.stack([9 * x, 9 * y, 4 * (x + y)]) if i % 2 else 255 * ((x // (i + 1) + y // 3) % 2) * np.ones((3, 1, 1))
        for i in range(6)
    ]
    noise = np.random.default_rng(0).integers(0, 30, (6, 3, 28, 28))
    return torch.from_numpy(np.clip(np.stack(pictures) + noise, 0, 255).astype(np.uint8))


def write(folder: Path, pixels: torch.Tensor) -> list[Path]:
    paths = []
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        paths.append(folder / f"{i}.png")
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(paths[-1])
    return paths


def by_hand(pixels: torch.Tensor) -> torch.Tensor:
    """The preprocessing of `micro.write_classifier`."""
    size = (micro.SIZE, micro.SIZE)
    resized = [
        np.asarray(Image.fromarray(a).resize(size, Image.Resampling.BILINEAR), np.float64)
        for a in pixels.permute(0, 2, 3, 1).numpy()
    ]
    return torch.from_numpy((np.stack(resized) / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).float()


def copy_preprocessor(source: Path, folder: Path) -> None:
    (folder / "preprocessor_config.json").write_bytes((source / "preprocessor_config.json").read_bytes())


def test_features_are_the_pooled_output(micro_classifier: Path, pixels: torch.Tensor) -> None:
    calls: list[tuple[int, int]] = []
    found = fidelity.features(pixels, micro_classifier, batch_size=4, progress=lambda i, n: calls.append((i, n)))
    model = ResNetForImageClassification.from_pretrained(micro_classifier).eval()
    with torch.inference_mode():
        expected = model.resnet(by_hand(pixels)).pooler_output.flatten(1).double().numpy()
    assert np.ptp(expected, axis=0).max() > 1e-3  # the images are told apart
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-6)  # float32 through a few layers
    assert found.values.dtype == np.float64
    assert (found.classifier, found.layer) == ("classifier", "classifier.1")
    assert calls == [(4, 6), (6, 6)]


def test_features_of_a_transformer(micro_classifier: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=micro.SIZE,
        patch_size=micro.SIZE // 2,
        num_labels=3,
    )
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    copy_preprocessor(micro_classifier, tmp_path)
    with torch.inference_mode():
        expected = model.vit(by_hand(pixels)).last_hidden_state[:, 0].double().numpy()
    found = fidelity.features(pixels, tmp_path)
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-5)  # float32 through a few layers
    assert found.layer == "classifier"


@pytest.mark.parametrize("C", [1, 3])
def test_one_pass_gives_what_two_give(pixels: torch.Tensor, tmp_path: Path, C: int) -> None:
    folder = resources.tiny_path("photos-classifier")
    images = pixels[:, :C]
    paths = write(tmp_path, images)
    plain, both = classes.classify(paths, folder), classes.classify(images, folder, features=True)
    assert plain.features is None
    assert plain.layer is None
    # the same batches of the same pixels: bit for bit
    np.testing.assert_array_equal(both.probabilities, plain.probabilities)
    found = fidelity.features_of(both)
    np.testing.assert_array_equal(found.values, fidelity.features(paths, folder).values)
    assert (found.model_sha256, found.classifier) == (plain.model_sha256, "photos-classifier")
    assert (plain.files, both.files) == (tuple(paths), ())
    assert classes.accuracy(both, both.predicted)["correct"] == 6
    # and they are what the probabilities come from
    weights = load_file(folder / "model.safetensors")
    logits = found.values @ weights[f"{found.layer}.weight"].double().numpy().T
    logits += weights[f"{found.layer}.bias"].double().numpy()
    expected = torch.from_numpy(logits).softmax(1).numpy()
    np.testing.assert_allclose(plain.probabilities, expected, atol=1e-5)  # the last layer in float32


def test_two_heads_are_refused(micro_classifier: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    config = DeiTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=micro.SIZE,
        patch_size=micro.SIZE // 2,
        num_labels=3,
    )
    DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path)
    copy_preprocessor(micro_classifier, tmp_path)
    assert len(classes.classify(pixels, tmp_path).probabilities) == 6
    with pytest.raises(ValueError, match=r"layer distillation_classifier does not compute the logits"):
        fidelity.features(pixels, tmp_path)


def test_no_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="somewhere: the classifier has no linear layer with 3 outputs"):
        classifiers.tap_features(
            torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Conv2d(4, 3, 1)), 3, Path("somewhere")
        )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 28, 28), r"pixels are torch\.float32 of shape \[2, 3, 28, 28\], expected uint8"),
        (torch.zeros(3, 28, 28, dtype=torch.uint8), r"shape \[3, 28, 28\], expected uint8 \[N, C, H, W\]"),
        (torch.zeros(2, 28, 28, 3, dtype=torch.uint8), "with C = 1 or 3"),
        (torch.zeros(0, 3, 28, 28, dtype=torch.uint8), "got no images"),
        ([], "got no images"),
    ],
)
def test_bad_images_are_refused(micro_classifier: Path, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fidelity.features(images, micro_classifier)


def test_predictions_without_features_are_refused(micro_classifier: Path, pixels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"no features, expected those of classify\(\.\.\., features=True\)"):
        fidelity.features_of(classes.classify(pixels, micro_classifier))


# --- kernel distance ------------------------------------------------------------------------------


def test_kernel_distance_is_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "ROWS", 4)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(9, 3)), rng.normal(size=(7, 3)) + 0.5

    def kernel(x: Array, y: Array) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within = [
        sum(kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1))
        for x in (a, b)
    ]
    across = sum(kernel(x, y) for x in a for y in b) / 63
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * across, rel=1e-12)


def test_kernel_distance_of_one_distribution_is_zero_on_average() -> None:
    """Unlike the Fréchet distance, at any count of images."""
    rng = np.random.default_rng(0)
    found = [kernel_distance(rng.normal(size=(20, 4)), rng.normal(size=(30, 4))) for _ in range(200)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 200**0.5
    assert min(found) < 0


# --- Inception ------------------------------------------------------------------------------------


class Planted(torch.nn.Module):
    """Called as the TorchScript Inception is: uint8 pixels of any size, features on request."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8
        mean = img.float().mean(dim=[2, 3])
        return torch.cat([mean, mean.square()], dim=1) if return_features else mean


def test_fid_is_called_so_on_inception_alone(
    tmp_path: Path, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write(tmp_path, pixels)
    Image.effect_noise((20, 30), 50).convert("RGB").save(tmp_path / "other.png")  # sizes may differ
    paths = [*paths, tmp_path / "other.png"]
    file = tmp_path / "inception-2015-12-05.pt"
    with pytest.raises(ValueError, match=r"12-05\.pt: no such file; FID and KID need the Inception network"):
        fidelity.inception(paths, file)
    torch.jit.script(Planted()).save(str(file))
    with pytest.raises(ValueError, match="not the Inception network of FID: its SHA-256 is"):
        fidelity.inception(paths, file)
    monkeypatch.setattr(fidelity, "INCEPTION_SHA256", sha256(file))
    found = fidelity.inception(paths, file)
    mean = np.asarray(Image.open(paths[-1]), np.float64).mean(axis=(0, 1))
    assert found.values[-1] == pytest.approx([*mean, *mean**2], rel=1e-5)  # float32
    result = summary(found, found, k=1)
    assert {"fid", "kid"} <= result.keys()
    assert not {"frechet", "kernel"} & result.keys()
    assert result["fid"] == pytest.approx(0, abs=1e-4 * float((mean**4).sum()))
    assert result["features"]["classifier"] == "inception-2015-12-05"
    assert {"frechet", "kernel"} <= summary(made_up(found.values), made_up(found.values), k=1).keys()


# --- pairs ----------------------------------------------------------------------------------------


def test_perceptual_distance_by_hand(micro_classifier: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    a = write(tmp_path, pixels)
    b = [a[0], *a[2:], a[1]]
    found = fidelity.perceptual(a, b, micro_classifier, batch_size=4)
    model = ResNetForImageClassification.from_pretrained(micro_classifier).eval()
    stages = model(pixel_values=by_hand(pixels), output_hidden_states=True).hidden_states
    assert len(stages) == 2
    expected = np.zeros(len(a))
    for stage in stages:
        units = [x.flatten(1).T.double() for x in stage.detach()]  # [positions, C]
        units = [x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in units]
        expected += [float((units[i] - units[a.index(path)]).square().sum(1).mean()) for i, path in enumerate(b)]
    assert found[0] == 0
    assert found[1:].min() > 0
    assert found == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="expected pairs"):
        fidelity.perceptual(a, b[1:], micro_classifier)
