"""What the field counts after unlearning in classifiers, each from logits `[N, K]` (numpy, any float).

Membership inference is done in two ways: `MIA` as in Huang et al., arXiv 2409.19732, and `MIA_SVC` as in SalUn (Fan et
al., arXiv 2310.12508). They count opposite things: the share taken for members, and the share not taken for members.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]
GAPS = ("FA", "RA", "TA", "MIA")


def check_sklearn() -> None:
    """Find out before hours of work that membership inference can be done.

    Raises:
        ValueError: without scikit-learn.
    """
    if find_spec("sklearn") is None:
        raise ValueError("membership inference needs scikit-learn: pip install 'erase[classify]'")


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """`z - log Σ_k exp z_k`, `[N, K]`, float64."""
    z = np.asarray(logits, np.float64)
    z = z - z.max(axis=1, keepdims=True)
    shifted: npt.NDArray[np.float64] = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return shifted


def correct(logits: Floats, labels: Ints) -> npt.NDArray[np.bool_]:
    """`argmax_k z_k = y`, `[N]`."""
    hits: npt.NDArray[np.bool_] = np.asarray(logits).argmax(axis=1) == labels
    return hits


def accuracy(logits: Floats, labels: Ints) -> float | None:
    """Share of images whose largest logit is their label's, percent; None of no images.

    `FA` on forgotten training images, `RA` on remaining ones, `TA` on test images.
    """
    return None if len(labels) == 0 else 100 * float(correct(logits, labels).mean())


def entropy(logits: Floats) -> npt.NDArray[np.float64]:
    """`-Σ_k p_k log p_k` of the predictions, `[N]`, nats."""
    log_p = log_softmax(logits)
    found: npt.NDArray[np.float64] = -(np.exp(log_p) * log_p).sum(axis=1)
    return found


def membership(forget: Floats, members: Floats, others: Floats) -> float:
    """`MIA`: percent of the forgotten images that an attacker takes for training images.

    The attacker is a logistic regression on the entropy of the prediction, fitted to training images that remain
    (members) and to test images (others), both classes weighted alike.

    Args:
        forget: logits of the forgotten images.
        members: of the remaining training images.
        others: of images the model was not trained on.
    """
    from sklearn.linear_model import LogisticRegression

    x = np.concatenate([entropy(members), entropy(others)])[:, None]
    y = np.concatenate([np.ones(len(members)), np.zeros(len(others))])
    attacker = LogisticRegression(class_weight="balanced").fit(x, y)
    return 100 * float(attacker.predict(entropy(forget)[:, None]).mean())


def confidence(logits: Floats, labels: Ints) -> npt.NDArray[np.float32]:
    """The probability of the label, `[N]`."""
    found: npt.NDArray[np.float32] = np.exp(log_softmax(logits)[np.arange(len(labels)), labels]).astype(np.float32)
    return found


def membership_svc(
    forget: tuple[Floats, Ints], members: tuple[Floats, Ints], others: tuple[Floats, Ints], seed: int = 0
) -> float:
    """`MIA_SVC`: percent of the forgotten images that an attacker does *not* take for training images.

    The attacker is a support vector classifier (radial kernel with γ = 1, C = 3) on the probability of the label,
    fitted to as many training images that remain (members) as test images (others), the larger set cut by lot.

    Args:
        forget: logits and labels of the forgotten images.
        members: of the remaining training images.
        others: of images the model was not trained on.
        seed: of the lot.
    """
    from sklearn.svm import SVC

    size, lot = min(len(members[1]), len(others[1])), np.random.default_rng(seed)
    sides = [confidence(*side)[lot.permutation(len(side[1]))[:size]] for side in (members, others)]
    # Equal probabilities, of which there are many near 1, are one point of as much weight: the same, and faster.
    (inside, num_inside), (outside, num_outside) = (np.unique(side, return_counts=True) for side in sides)
    x = np.concatenate([inside, outside])[:, None].astype(np.float64)
    y = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
    weight = np.concatenate([num_inside, num_outside]).astype(np.float64)
    attacker = SVC(C=3, gamma=1.0, kernel="rbf").fit(x, y, sample_weight=weight)
    return 100 * (1 - float(attacker.predict(confidence(*forget)[:, None].astype(np.float64)).mean()))


def divergence(retrained: Floats, unlearned: Floats) -> float:
    """`D_KL`: mean over images of `Σ_k p_k log(p_k / q_k)`, p the retrained model's, q the unlearned one's; nats."""
    log_p, log_q = log_softmax(retrained), log_softmax(unlearned)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())


def gaps(ours: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> dict[str, float]:
    """`|a - b|` of FA, RA, TA and MIA, points, between a model and the retrained one; those that both have."""
    pairs = {name: (ours[name], theirs[name]) for name in GAPS}
    return {name: abs(a - b) for name, (a, b) in pairs.items() if a is not None and b is not None}


def average_gap(ours: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> float:
    """`Avg.D`: the mean of `gaps`, points."""
    found = gaps(ours, theirs)
    return sum(found.values()) / len(found)
