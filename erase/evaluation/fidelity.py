"""How near a set of drawn images is to a set of real ones, in the features of a named image classifier.

Features: what the classifier's last linear layer receives, in the pass, with the preprocessing and the weights of
`erase.evaluation.classes.classify`.

- Fréchet distance of the Gaussians fitted to two sets (Dowson & Landau 1982, J. Multivar. Anal. 12:450; on features,
  Heusel et al. 2017, arXiv 1706.08500): ‖μ_a - μ_b‖² + tr(A + B - 2 (A B)^½).
- The kernel distance of KID (Bińkowski et al. 2018, arXiv 1801.01401): the squared maximum mean discrepancy with the
  kernel (x·y / D + 1)³, unbiased, of all images at once rather than the mean over subsets.
- Precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al. 2020,
  arXiv 2002.09797).

On a classifier's features these are no FID and no KID: those are on the 2048 features of one Inception network, which
does not come with erase. `inception` reads it where a copy is; only then are the numbers called FID and KID. Numbers
compare only at one network (weights and layer), one reference set and equal counts of images: the fewer images, the
larger the Fréchet distance (by about 1/N: two samples of one distribution are apart, too) and the larger the balls of
the last four.

`perceptual` compares images pair by pair, base with erased.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from erase.evaluation.axes import Floats
from erase.evaluation.classes import ClassPredictions, Images, classify
from erase.evaluation.classifiers import load
from erase.evaluation.image_files import read_image
from erase.store.files import sha256

ROWS = 1024
"""Rows of a block of pairwise distances: 40 MB a block for 5000 images."""
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""Of `inception-2015-12-05.pt`, the network of FID as TorchScript (NVIDIA's translation of the TensorFlow graph)."""


@dataclass(frozen=True, eq=False)
class Features:
    """What a network made of N images: what a classifier's last linear layer received, or Inception's features."""

    values: Floats
    """`[N, D]`"""
    classifier: str
    """Its folder's or file's name."""
    model_sha256: str
    layer: str
    """Name of the layer that received, or made, them."""

    def __len__(self) -> int:
        """N."""
        return len(self.values)

    def take(self, index: Sequence[int] | npt.NDArray[Any]) -> Features:
        """The images ``index``, numbers or `[N]` bool: such as those of one class, to see whether it collapsed."""
        return replace(self, values=self.values[np.asarray(index)])

    @property
    def provenance(self) -> dict[str, Any]:
        """What made them, and D."""
        return {
            "classifier": self.classifier,
            "model_sha256": self.model_sha256,
            "layer": self.layer,
            "dimensions": self.values.shape[1],
        }


def features(
    images: Images,
    folder: Path,
    *,
    batch_size: int = 64,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """The features of images.

    Where classes are wanted too, `classify` the images with ``features=True`` and take `features_of` the result: the
    network runs once.

    Args:
        images: image files, or uint8 pixels `[N, C, H, W]`.
        folder: a transformers image classifier's.
        batch_size: images a forward pass.
        device: a torch device.
        progress: called with (images done, images in all) after each batch.

    Raises:
        ValueError: as `classify`.
    """
    return features_of(classify(images, folder, features=True, batch_size=batch_size, device=device, progress=progress))


def features_of(predictions: ClassPredictions) -> Features:
    """The features that `classify` kept.

    Raises:
        ValueError: it was not asked to.
    """
    if predictions.features is None or predictions.layer is None:
        raise ValueError("the predictions hold no features, expected those of classify(..., features=True)")
    return Features(predictions.features, predictions.classifier, predictions.model_sha256, predictions.layer)


def inception(
    images: Sequence[Path], weights: Path, *, device: str = "cpu", progress: Callable[[int, int], None] | None = None
) -> Features:
    """The features that FID and KID are defined on, `[N, 2048]`; the network scales the images to 299 pixels itself.

    Args:
        images: image files, of any sizes.
        weights: the TorchScript file `inception-2015-12-05.pt`; any other is refused before it is read.
        device: a torch device.
        progress: called with (images done, images in all) after each image.

    Raises:
        ValueError: no images, one that cannot be decoded, or a file that is missing or is another one.
    """
    import torch

    if not images:
        raise ValueError("got no images, expected at least 1")
    if not Path(weights).is_file():
        raise ValueError(
            f"{weights}: no such file; FID and KID need the Inception network inception-2015-12-05.pt (TorchScript). "
            "Without it, give --classifier: its distances have their own names"
        )
    digest = sha256(Path(weights))
    if digest != INCEPTION_SHA256:
        raise ValueError(
            f"{weights}: not the Inception network of FID: its SHA-256 is {digest[:16]}…, expected that of "
            f"inception-2015-12-05.pt, {INCEPTION_SHA256[:16]}…"
        )
    read: Any = torch.jit.load  # untyped upstream; what it reads is known by its hash
    network = read(str(weights), map_location=device).eval()
    found = []
    for number, path in enumerate(images, 1):  # one at a time: sizes may differ
        pixels = torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1)[None].to(device)
        with torch.inference_mode():
            found.append(np.asarray(network(pixels, return_features=True).double().cpu().numpy(), np.float64))
        if progress:
            progress(number, len(images))
    return Features(np.concatenate(found), Path(weights).stem, digest, "pool3")


def perceptual(
    before: Sequence[Path],
    after: Sequence[Path],
    classifier: Path,
    *,
    batch_size: int = 32,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Floats:
    """How different the images of each pair look to a classifier, stage by stage, `[N]`; 0 for equal ones.

    The distance of LPIPS (Zhang et al. 2018, arXiv 1801.03924, eq. 1) with all its weights 1, summed over the stages
    (`hidden_states`) of this classifier: the squared distance of features of unit length, its mean over positions. It
    is not LPIPS, whose weights were fitted to people's judgements on another network.

    Args:
        before: image files.
        after: the same pairs in the same order.
        classifier: a transformers image classifier's folder.
        batch_size: pairs a forward pass.
        device: a torch device.
        progress: called with (pairs done, pairs in all) after each batch.

    Raises:
        ValueError: no pairs, an image that cannot be decoded, or a folder that is not a whole image classifier.
    """
    import torch

    if len(before) != len(after) or not before:
        raise ValueError(f"got {len(before)} images before and {len(after)} after, expected pairs")
    model, processor, _ = load(Path(classifier))
    model.to(device)
    found: list[Floats] = []
    for start in range(0, len(before), batch_size):
        part = slice(start, start + batch_size)
        batch = [read_image(path) for side in (before, after) for path in side[part]]
        pixels = processor(images=batch, return_tensors="pt")["pixel_values"].to(device, torch.float32)
        with torch.inference_mode():
            stages = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        total = torch.zeros(len(batch) // 2, dtype=torch.float64, device=pixels.device)
        for stage in stages:
            # `[2B, C, H, W]` of convolutions, `[2B, T, C]` of transformers
            channels = stage.movedim(1, -1) if stage.ndim == 4 else stage
            a, b = torch.nn.functional.normalize(channels.flatten(1, -2).double(), dim=-1).chunk(2)
            total += (a - b).square().sum(dim=-1).mean(dim=1)
        found.append(np.asarray(total.cpu().numpy(), np.float64))
        if progress:
            progress(min(start + batch_size, len(before)), len(before))
    return np.concatenate(found)


def frechet(a: Floats, b: Floats) -> float:
    """Fréchet distance (squared, as is the custom) between Gaussians fitted to `[N, D]` and `[M, D]`.

    Covariances are unbiased (over N - 1); the distance is not: it is too large, the more so the fewer the images, and
    by far with N <= D, where a covariance is singular. Compare numbers of equal N and M only.
    The trace of (A B)^½ is summed from the eigenvalues of A^½ B A^½, which are the same and not negative.

    Returns:
        In squared units of the features, at least 0. Rounding: about 1e-14 of the covariances' traces, and 1e-7 where
        N <= D (square roots of eigenvalues that should be 0).

    Raises:
        ValueError: a set that is not `[N, D]` with N of 2 or more, is not finite, or has another D than the other.
    """
    a, b = _sets(a, b)
    A, B = (np.atleast_2d(np.cov(values, rowvar=False)) for values in (a, b))
    eigenvalues, vectors = np.linalg.eigh(A)
    root = (vectors * np.sqrt(eigenvalues.clip(0))) @ vectors.T
    product = root @ B @ root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    shift = a.mean(axis=0) - b.mean(axis=0)
    return max(0.0, float(shift @ shift + A.trace() + B.trace() - 2 * cross))


def kernel_distance(a: Floats, b: Floats) -> float:
    """Unbiased squared maximum mean discrepancy of `[N, D]` and `[M, D]`, kernel (x·y / D + 1)³: KID's.

    It is 0 on average for two samples of one distribution, whatever their sizes, and so may fall below 0.

    Raises:
        ValueError: as `frechet`.
    """
    a, b = _sets(a, b)

    def total(x: Floats, y: Floats) -> float:
        D = x.shape[1]
        return sum(float(((x[i : i + ROWS] @ y.T / D + 1) ** 3).sum()) for i in range(0, len(x), ROWS))

    def within(x: Floats) -> float:
        own = float((((x * x).sum(axis=1) / x.shape[1] + 1) ** 3).sum())
        return (total(x, x) - own) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))


def prdc(real: Floats, fake: Floats, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage of fake images `[M, D]` against real ones `[N, D]`.

    Around each image lies the ball that reaches to its k-th nearest neighbour in its own set (Euclidean; itself not
    counted; the boundary, to within rounding, belongs to it, as in Kynkäänniemi et al., eq. 1; Naeem et al.'s program
    leaves it out, which differs on exact ties alone).

    - precision: fakes that lie in some real ball, as a fraction of M
    - recall: reals that lie in some fake ball, as a fraction of N
    - density: real balls that a fake lies in, its mean over the fakes, over k; not bounded by 1
    - coverage: real balls that hold some fake, as a fraction of N

    Of two sets of one continuous distribution the expected density is 1, and the expected coverage
    1 - (N-1)…(N-k) / ((M+N-1)…(M+N-k)), about 1 - 2^-k at N = M. A model that draws few modes keeps its precision
    and loses recall and coverage.

    Raises:
        ValueError: as `frechet`; or k is not from 1 to the lesser count - 1.
    """
    real, fake = _sets(real, fake)
    N, M = len(real), len(fake)
    if not 1 <= k < min(N, M):
        raise ValueError(f"k is {k}, expected 1 to {min(N, M) - 1}: neighbours among {N} real and {M} fake images")
    centre = real.mean(axis=0)  # what a common offset adds to the norms is lost in the distances
    real, fake = real - centre, fake - centre
    rounding = 8 * (real.shape[1] + 2) * np.finfo(np.float64).eps * max((x * x).sum(axis=1).max() for x in (real, fake))
    real_radii, fake_radii = _radii(real, k) + rounding, _radii(fake, k) + rounding
    balls = np.zeros(M, np.int64)
    recalled = covered = 0
    for rows, squared in _blocks(real, fake):
        balls += (squared <= real_radii[rows, None]).sum(axis=0)
        recalled += int((squared <= fake_radii).any(axis=1).sum())
        covered += int((squared.min(axis=1) <= real_radii[rows]).sum())
    return {
        "precision": float((balls > 0).mean()),
        "recall": recalled / N,
        "density": float(balls.mean()) / k,
        "coverage": covered / N,
    }


def precision(real: Floats, fake: Floats, k: int = 5) -> float:
    """Precision alone, as `prdc`."""
    return prdc(real, fake, k)["precision"]


def recall(real: Floats, fake: Floats, k: int = 5) -> float:
    """Recall alone, as `prdc`."""
    return prdc(real, fake, k)["recall"]


def density(real: Floats, fake: Floats, k: int = 5) -> float:
    """Density alone, as `prdc`."""
    return prdc(real, fake, k)["density"]


def coverage(real: Floats, fake: Floats, k: int = 5) -> float:
    """Coverage alone, as `prdc`."""
    return prdc(real, fake, k)["coverage"]


def summary(real: Features, fake: Features, k: int = 5) -> dict[str, Any]:
    """All of it, as JSON.

    Returns:
        ``frechet, kernel, precision, recall, density, coverage, k`` (the given one, or one less than the images of the
        smaller set), ``n_real, n_fake, features`` (their provenance) and ``warnings``, lines that belong beside the
        numbers; none for equal counts above D. On Inception's features ``fid`` and ``kid`` take the place of the first
        two.

    Raises:
        ValueError: as `prdc`; or the two sets come from different weights or layers.
    """
    for name in ("model_sha256", "layer"):
        ours, theirs = getattr(real, name), getattr(fake, name)
        if ours != theirs:
            raise ValueError(f"{name} is {ours} of the real images and {theirs} of the fake, expected one network")
    N, M, D = len(real), len(fake), real.values.shape[1]
    k, warnings = max(1, min(k, N - 1, M - 1)), []
    if min(N, M) <= D:
        warnings.append(f"{min(N, M)} images for {D} feature dimensions: the Fréchet distance is too large by far")
    if N != M:
        warnings.append(f"{N} real and {M} fake images: compare only with results from equal numbers of images")
    names = ("fid", "kid") if real.model_sha256 == INCEPTION_SHA256 else ("frechet", "kernel")
    return {
        names[0]: frechet(real.values, fake.values),
        names[1]: kernel_distance(real.values, fake.values),
        **prdc(real.values, fake.values, k),
        "k": k,
        "n_real": N,
        "n_fake": M,
        "features": real.provenance,
        "warnings": warnings,
    }


def _sets(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    pair = np.asarray(a, np.float64), np.asarray(b, np.float64)
    for values in pair:
        if values.ndim != 2 or len(values) < 2 or values.shape[1] < 1:
            raise ValueError(f"features are of shape {list(values.shape)}, expected [N, D] with N of 2 or more")
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values).all(axis=1)).sum())
            raise ValueError(f"features of {bad} of {len(values)} images are not finite")
    if pair[0].shape[1] != pair[1].shape[1]:
        raise ValueError(f"features have {pair[0].shape[1]} and {pair[1].shape[1]} dimensions, expected the same")
    return pair


def _radii(values: Floats, k: int) -> Floats:
    """`[N]`, squared distance to the k-th neighbour: the entry after the k nearest, of which one is itself."""
    return np.concatenate([np.partition(squared, k, axis=1)[:, k] for _, squared in _blocks(values, values)])


def _blocks(a: Floats, b: Floats) -> Iterator[tuple[slice, Floats]]:
    """Squared distances of `[N, D]` to `[M, D]`, `ROWS` of them at a time; within rounding, so below 0 even."""
    a_norms, b_norms = (a * a).sum(axis=1), (b * b).sum(axis=1)
    for start in range(0, len(a), ROWS):
        rows = slice(start, start + ROWS)
        yield rows, a_norms[rows, None] + b_norms - 2 * (a[rows] @ b.T)
