import numpy as np
import pytest
import torch
import toys
from torch import Tensor
from toy_text import Net, go

from erase.diffusion.families.sd import TEXT_KV
from erase.diffusion.text import Concepts
from erase.methods.uce import uce

KEYS = "block.attn2.to_k.weight"


def concepts(erased: int = 4, kept: int = 5) -> Concepts:
    g = toys.gen(5)
    tokens = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (erased, erased, kept))
    return Concepts(*tokens, torch.arange(kept) + 1, torch.zeros(1, 6), torch.zeros(2, 6), str(TEXT_KV))


def least_squares(before: Tensor, data: Concepts, preserve: float, lambd: float) -> np.ndarray:
    """What `W` minimises the sum of all squares, a row of equations a token: solved as they stand, not squared."""
    W0, width = before.numpy(), before.shape[1]
    tokens = [data.erased, preserve**0.5 * data.kept, lambd**0.5 * torch.eye(width, dtype=torch.float64)]
    meant = [data.targets, *tokens[1:]]
    left, right = (np.concatenate([x.numpy() for x in parts]) for parts in (tokens, meant))
    found: np.ndarray = np.linalg.lstsq(left, right @ W0.T, rcond=None)[0].T
    return found


@pytest.mark.parametrize(("erased", "kept"), [(4, 5), (1, 0), (20, 30)])  # several at once; under- and overdetermined
@pytest.mark.parametrize(("preserve", "lambd"), [(1.0, 0.1), (0.3, 2.0), (0.0, 0.1)])
def test_it_is_the_least_squares_solution(erased: int, kept: int, preserve: float, lambd: float) -> None:
    net, data = Net(), concepts(erased, kept)
    before = toys.weights(net)
    go(uce(preserve=preserve, lambd=lambd, concepts=data), net)
    after = toys.weights(net)
    for name, old in before.items():
        if ".attn2.to_k." in name or ".attn2.to_v." in name:
            expected = least_squares(old, data, preserve, lambd)
            np.testing.assert_allclose(after[name].numpy(), expected, rtol=1e-9, atol=1e-11)
            assert not torch.equal(after[name], old)
        else:
            assert torch.equal(after[name], old)


def test_concepts_take_on_their_targets_and_the_others_keep_their_meaning() -> None:
    """Where there is room for both, λ → 0 reaches both to rounding."""
    net, data = Net(), concepts(erased=2, kept=3)
    before = toys.weights(net)[KEYS]
    go(uce(lambd=1e-10, concepts=data), net)
    after = toys.weights(net)[KEYS]
    torch.testing.assert_close(data.erased @ after.T, data.targets @ before.T, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(data.kept @ after.T, data.kept @ before.T, rtol=1e-6, atol=1e-7)


def test_a_share_of_the_way_and_a_mask() -> None:
    whole, half, masked = Net(), Net(), Net()
    before, mask = toys.weights(whole), toys.some_mask(masked)
    go(uce(concepts=concepts()), whole)
    (row,) = go(uce(concepts=concepts(), fast_rate=0.5), half)
    go(uce(concepts=concepts(), mask=mask), masked)
    ends = {name: toys.weights(whole)[name] for name in before}
    toys.close(toys.weights(half), {name: (before[name] + ends[name]) / 2 for name in before})
    assert toys.same(toys.weights(masked), {name: torch.where(mask[name], ends[name], before[name]) for name in before})
    norm = sum(float((ends[name] - before[name]).square().sum()) for name in before) ** 0.5
    assert row["edit_norm"] == pytest.approx(norm / 2)
    assert row.keys() >= {"step", "fast_rate", "seconds"}
    assert not any(key.startswith(("forget", "remain")) for key in row)


def test_what_it_cannot_do_without() -> None:
    net = Net()
    net.block["attn2"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"set train\.parameters"):
        go(uce(concepts=concepts()), net)
    with pytest.raises(ValueError, match="uce needs text embeddings"):
        go(uce(), Net())
    for name, value in (("preserve", -1.0), ("lambd", 0.0)):
        with pytest.raises(ValueError, match="needs preserve ≥ 0 and lambd > 0; got"):
            uce(**{name: value})
