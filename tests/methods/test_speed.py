"""SPEED against the paper's formulas, written out token by token."""

from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
import toys
from torch import Tensor
from toy_text import Net, go

from erase.diffusion.families.sd import TEXT_KV
from erase.diffusion.text import Concepts
from erase.methods.speed import Projected, speed

EDITED = tuple(f"block.attn2.{name}.weight" for name in ("to_k", "to_v"))
D = 6


def concepts(erased: int = 2, kept: int = 12, rank: int = D, empty: int = 5) -> Concepts:
    """The first of the kept tokens is the empty prompt's, of the others two each are of one prompt.

    Without it their mean square is 1; they span `rank` dimensions, to which those that are erased are not confined.
    """
    g = toys.gen(5)
    c, target, stay, null = (torch.randn(n, D, generator=g).double() for n in (erased, erased, kept + 1, empty))
    stay[:, rank:] = 0
    stay /= stay[1:].square().mean().sqrt()
    return Concepts(c, target, stay, (torch.arange(kept + 1) + 1) // 2, null[:1], null, str(TEXT_KV))


def columns(x: Tensor) -> np.ndarray:
    """Tokens as the paper has them."""
    found: np.ndarray = x.double().numpy().T
    return found


def transcribed(W: np.ndarray, data: Concepts, *, lambd: float, threshold: float, augment: int, filtered: bool) -> Any:
    """The new matrix, the null space's dimensions before the invariants, and the prompts that are left."""
    C1, target, C0, empty = (columns(x) for x in (data.erased, data.targets, data.kept[1:], data.empty))
    eye = np.eye(len(C1))
    free = W @ (target @ C1.T - C1 @ C1.T) @ np.linalg.inv(C1 @ C1.T + lambd * eye)
    shift = [np.sum((free @ c) ** 2) for c in C0.T]
    chosen = [i for i, x in enumerate(shift) if x >= np.mean(shift) or not filtered]
    left = [C0[:, i] for i in chosen]
    v = np.linalg.svd(W)[2][min(W.shape) - 1]
    varied = [c + NormalDist().inv_cdf((k + 0.5) / augment) * v for c in left for k in range(augment)]
    shift = [np.sum((free @ c) ** 2) for c in varied]
    left += [c for c, x in zip(varied, shift, strict=True) if x >= np.mean(shift)]
    values, U = np.linalg.eigh(np.mean([np.outer(c, c) for c in left], axis=0))
    P = U[:, values < threshold] @ U[:, values < threshold].T
    begin = columns(data.begin)[:, 0]
    others = empty - np.outer(begin, begin @ empty) / np.sum(begin**2)
    C2 = np.stack([begin, np.linalg.svd(others.T)[2][0]], axis=1)
    M = np.linalg.inv(C1 @ C1.T @ P + lambd * eye)
    Q = eye - M @ C2 @ np.linalg.inv(C2.T @ P @ M @ C2) @ C2.T @ P
    new = W + W @ (target @ C1.T - C1 @ C1.T) @ P @ Q @ M
    return new, int(np.sum(values < threshold)), {int(data.kept_of[i + 1]) for i in chosen}


@pytest.mark.parametrize(("erased", "lambd"), [(2, 1.0), (1, 0.3), (9, 0.05)])  # several at once; more than dimensions
@pytest.mark.parametrize(("augment", "filtered"), [(10, True), (0, True), (3, False), (0, False)])
def test_it_is_the_paper_s_closed_form(erased: int, lambd: float, augment: int, filtered: bool) -> None:
    """To 1e-10: two ways to the same in float64, of small numbers."""
    net, data = Net(), concepts(erased)
    before = toys.weights(net)
    settings = {"lambd": lambd, "threshold": 0.9, "augment": augment}
    (row,) = go(speed(invariants=1, prior_filter=filtered, concepts=data, **settings), net)  # type: ignore[arg-type]
    after, dims, left = toys.weights(net), [], []
    for name, old in before.items():
        if name in EDITED:
            new, small, prompts = transcribed(old.numpy(), data, filtered=filtered, **settings)  # type: ignore[arg-type]
            np.testing.assert_allclose(after[name].numpy(), new, rtol=0, atol=1e-10)
            assert np.abs(new - old.numpy()).max() > 1e-3
            dims.append(small - 2)
            left.append(len(prompts))
        else:
            assert torch.equal(after[name], old)
    assert (row["null_space"], row["null_space_least"]) == (np.mean(dims), min(dims))
    assert (row["prompts_kept"], row["prompts_dropped"]) == (6, 6 - np.mean(left))
    assert 0 < row["residual"] <= 1


def test_kept_tokens_and_the_empty_prompt_read_as_before() -> None:
    """Those of the null space's other side, to rounding; and erased ones become their anchors where there is room."""
    net, data = Net(), concepts(erased=1, rank=3, empty=2)
    before = toys.weights(net)
    (row,) = go(speed(lambd=1e-9, threshold=1e-9, augment=0, prior_filter=False, concepts=data), net)
    after = toys.weights(net)
    assert row["null_space"] == 1  # of six: three are kept, two are the empty prompt's
    for name in EDITED:
        for x in (data.kept, data.empty):
            torch.testing.assert_close(x @ after[name].T, x @ before[name].T, rtol=0, atol=1e-12)
        torch.testing.assert_close(data.erased @ after[name].T, data.targets @ before[name].T, rtol=0, atol=1e-6)
    assert row["residual"] < 1e-6


@pytest.mark.parametrize("erased", [1, 2, 3])
def test_the_change_has_no_more_ranks_than_tokens_are_erased(erased: int) -> None:
    net = Net()
    before = toys.weights(net)
    go(speed(threshold=10.0, invariants=0, augment=0, concepts=concepts(erased)), net)
    for name in EDITED:
        S = torch.linalg.svdvals(toys.weights(net)[name] - before[name])
        assert int((S / S[0] > 1e-10).sum()) == erased


def test_variations_are_along_what_a_matrix_reads_least() -> None:
    """They are kept too: of two kept tokens and their variations three dimensions are left, without them four."""
    dims = {}
    for augment in (0, 4):
        (row,) = go(speed(threshold=1e-6, augment=augment, invariants=0, concepts=concepts(kept=2)), Net())
        dims[augment] = row["null_space"]
    assert dims[0] - dims[4] == 1


def test_a_text_encoder_s_scale_does_not_matter() -> None:
    nets = [Net(), Net()]
    for net, factor in zip(nets, (1.0, 40.0), strict=True):
        data = concepts()
        scaled = {name: factor * getattr(data, name) for name in ("erased", "targets", "kept", "begin", "empty")}
        go(speed(threshold=0.9, invariants=1, concepts=replace(data, **scaled)), net)
    toys.close(toys.weights(nets[0]), toys.weights(nets[1]), rtol=1e-9, atol=1e-12)


def test_a_share_of_the_way_and_a_mask() -> None:
    whole, half, masked = Net(), Net(), Net()
    before, mask = toys.weights(whole), toys.some_mask(masked)
    method = {"threshold": 0.9, "invariants": 1, "concepts": concepts()}
    go(speed(**method), whole)  # type: ignore[arg-type]
    go(speed(fast_rate=0.5, **method), half)  # type: ignore[arg-type]
    go(speed(mask=mask, **method), masked)  # type: ignore[arg-type]
    ends = toys.weights(whole)
    toys.close(toys.weights(half), {name: (before[name] + ends[name]) / 2 for name in before})
    assert toys.same(toys.weights(masked), {name: torch.where(mask[name], ends[name], before[name]) for name in before})


@pytest.mark.parametrize(("begin", "empty", "fixed"), [(1, 5, 4), (0, 1, 1), (1, 1, 1), (1, 0, 1), (0, 0, 0)])
def test_a_text_encoder_may_have_no_beginning_and_nothing_for_an_empty_prompt(
    begin: int, empty: int, fixed: int
) -> None:
    """SDXL has zeros there. Nothing is dropped where all tokens are alike."""
    data = concepts(kept=2)
    data = replace(data, kept=data.kept[1:2].expand(3, D), begin=data.begin[:begin])
    data = replace(data, empty=torch.cat([data.empty[:empty], torch.zeros(2, D)]))
    (row,) = go(speed(threshold=1e-6, augment=0, concepts=data), Net())
    assert row["prompts_dropped"] == 0
    assert row["null_space"] == D - 1 - fixed


def test_what_it_cannot_do_without() -> None:
    data = concepts()
    with pytest.raises(ValueError, match="speed needs text embeddings"):
        go(speed(), Net())
    with pytest.raises(ValueError, match=r"remain\.prompts"):
        go(speed(concepts=replace(data, kept=data.kept[:1], kept_of=data.kept_of[:1])), Net())
    with pytest.raises(ValueError, match=r"method\.threshold=1e-12.* 6 .*remain\.prompts"):
        go(speed(threshold=1e-12, concepts=data), Net())
    net = Net()
    net.block["attn2"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"set train\.parameters"):
        go(speed(concepts=data), net)
    for name, value in (("lambd", 0.0), ("threshold", -1.0), ("augment", -1), ("invariants", -1)):
        with pytest.raises(ValueError, match=rf"needs .*{name} .*; got .*{value}"):
            speed(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens 'first'; allowed: all, last, padding"):
        speed(tokens="first")  # type: ignore[arg-type]


def test_nothing_is_changed_but_what_learns() -> None:
    net = Net()
    net.block["attn2"].to_k.requires_grad_(False)
    found = Projected(concepts(), 1.0, 0.5, True, 2, 1, "last")(net)
    assert set(found.weights) == {EDITED[1]}
