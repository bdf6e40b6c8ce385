import builtins
from importlib import util
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.svm import SVC

from erase.classification import metrics


def some(seed: int, n: int = 50, size: float = 3.0) -> metrics.Floats:
    return np.random.default_rng(seed).normal(size=(n, 4)) * size


def probabilities(logits: metrics.Floats) -> Any:
    e = np.exp(logits)
    return e / e.sum(axis=1, keepdims=True)


def test_accuracy_is_in_percent() -> None:
    logits = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 1.0]])
    assert metrics.accuracy(logits, np.array([1, 0, 0, 0])) == 75.0
    assert metrics.accuracy(logits[:0], np.array([], int)) is None


def test_entropy_and_divergence_are_those_of_scipy() -> None:
    a, b = some(0), some(1)
    assert metrics.entropy(a) == pytest.approx(stats.entropy(probabilities(a), axis=1))
    expected = stats.entropy(probabilities(a), probabilities(b), axis=1).mean()
    assert metrics.divergence(a, b) == pytest.approx(expected)
    assert metrics.divergence(b, a) != pytest.approx(expected)
    assert metrics.divergence(a, a) == 0


def test_large_logits_do_not_overflow() -> None:
    sure = np.array([[1e4, 0.0, 0.0, 0.0]])
    assert metrics.entropy(sure) == pytest.approx([0.0])
    assert metrics.divergence(sure, sure + 5) == pytest.approx(0)
    assert np.isfinite(metrics.divergence(some(0, 1), sure))


def test_membership_is_the_share_that_looks_like_training_images() -> None:
    """Sure answers on members, unsure ones on others: the attacker sees which the forgotten ones are like."""
    members, others = some(0, 300, size=20), some(1, 30, size=0.3)  # ten times as many: weighted alike
    assert metrics.membership(some(2, 40, size=20), members, others) > 95
    assert metrics.membership(some(3, 40, size=0.3), members, others) < 5
    mixed = np.concatenate([some(2, 40, size=20), some(3, 40, size=0.3)])
    assert metrics.membership(mixed, members, others) == pytest.approx(50, abs=5)


def test_members_that_look_like_others_are_guessed() -> None:
    """Without a difference an unweighted attacker would call all members, of which there are more."""
    share = metrics.membership(some(2, 2000), some(0, 9000), some(1, 1000))
    assert 10 < share < 90


def test_membership_by_svc_is_the_plain_protocol() -> None:
    """Softmax, the label's probability, as many members as others, SVC(C=3, gamma="auto"), 1 - the mean prediction."""
    rng = np.random.default_rng(5)
    sets = []
    for n, sure in ((80, 2.0), (150, 4.0), (150, 1.0)):
        labels = rng.integers(4, size=n)
        sets.append((rng.normal(size=(n, 4)) + sure * np.eye(4)[labels], labels))
    sets[1] = tuple(np.concatenate([x, x[:40]]) for x in sets[1][:2])  # some say the same
    sets[2] = tuple(np.concatenate([x, x[:40]]) for x in sets[2][:2])
    p = [np.array([[row[label]] for row, label in zip(probabilities(z), y, strict=True)]) for z, y in sets]
    attacker = SVC(C=3, gamma="auto", kernel="rbf").fit(np.concatenate(p[1:]), [1] * 190 + [0] * 190)
    expected = 100 * (1 - attacker.predict(p[0]).mean())
    assert 5 < expected < 95
    assert metrics.membership_svc(*sets) == pytest.approx(expected, rel=1e-9)
    assert metrics.confidence(*sets[0]) == pytest.approx(p[0][:, 0])


def test_membership_by_svc_has_equal_subsets_by_lot() -> None:
    """Nine times as many members do not make everything a member."""
    y = np.zeros(9000, int)
    forget, members, others = (some(2, 200), y[:200]), (some(0, 1800), y[:1800]), (some(1, 200), y[:200])
    shares = [metrics.membership_svc(forget, members, others, seed) for seed in (0, 0, 1)]
    assert shares[0] == shares[1] != shares[2]
    assert all(10 < share < 90 for share in shares)
    sure = (np.eye(4)[np.zeros(50, int)] * 20, y[:50])
    assert metrics.membership_svc(sure, sure, others) == 0
    assert metrics.membership_svc((some(3, 50), y[:50]), sure, others) > 80


def test_gaps_are_absolute_and_their_mean() -> None:
    ours = {"FA": 90.0, "RA": 99.0, "TA": 91.0, "MIA": 50.0}
    theirs = {"FA": 92.0, "RA": 98.0, "TA": 91.0, "MIA": 41.0}
    assert metrics.gaps(ours, theirs) == {"FA": 2, "RA": 1, "TA": 0, "MIA": 9}
    assert metrics.average_gap(ours, theirs) == 3
    assert metrics.average_gap({**ours, "MIA": None}, theirs) == 1


def test_a_missing_scikit_learn_is_a_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics.check_sklearn()
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == "sklearn" else util.find_spec(name))
    with pytest.raises(ValueError, match=r"membership inference needs scikit-learn: pip install 'erase\[classify\]'"):
        metrics.check_sklearn()


def test_without_scikit_learn_there_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def refuse(name: str, *args: Any, **settings: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name)
        return load(name, *args, **settings)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError):
        metrics.membership(some(0), some(1), some(2))
