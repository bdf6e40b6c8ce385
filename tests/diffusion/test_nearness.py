"""Which prompts are near a forgotten one in meaning."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from erase.diffusion import nearness as module
from erase.diffusion.condition import take
from erase.diffusion.nearness import nearness, summary

STAY, GONE = [f"stay {k}" for k in range(5)], ["gone 0", "gone 1"]


def told(*leaves: str) -> dict[str, Tensor]:
    """Random conditions of seven prompts, the first two rows of text alone read where there is a mask."""
    g = torch.Generator().manual_seed(0)
    shapes = {"text": (7, 4, 6), "pooled": (7, 3)}
    found = {name: torch.randn(shapes[name], generator=g) for name in leaves if name in shapes}
    if "mask" in leaves:
        found["mask"] = torch.tensor([[1, 1, 0, 0]] * 7)
    return found


def asked(table: Mapping[str, Tensor], seen: list[int] | None = None) -> list[float]:
    def embed(prompts: Sequence[str]) -> dict[str, Tensor]:
        if seen is not None:
            seen.append(len(prompts))
        return take(table, torch.tensor([(STAY + GONE).index(prompt) for prompt in prompts]))

    return nearness(embed, STAY, GONE)


@pytest.mark.parametrize("leaves", [("text",), ("text", "mask"), ("text", "pooled")])
def test_nearness_is_the_largest_cosine(leaves: tuple[str, ...]) -> None:
    table = told(*leaves)
    rows = table["text"].double()[:, : 2 if "mask" in leaves else 4].mean(1).numpy()
    found = np.zeros((5, 2))
    vectors = [rows, *([table["pooled"].double().numpy()] if "pooled" in leaves else [])]
    for x in vectors:
        own = x - x[:5].mean(0)
        for i in range(5):
            for j in range(2):
                a, b = own[i], own[5 + j]
                found[i, j] += a @ b / np.linalg.norm(a) / np.linalg.norm(b) / len(vectors)
    np.testing.assert_allclose(asked(table), found.max(1), atol=1e-6)  # means over tokens are float32


def test_what_all_prompts_share_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do other leaves, or how many prompts are read at once."""
    table, seen = told("text"), list[int]()
    first = asked(table)
    monkeypatch.setattr(module, "AT_ONCE", 2)
    shared = {"text": table["text"] + 100 * torch.ones(4, 6), "time_ids": torch.rand(7, 6)}
    np.testing.assert_allclose(asked(shared, seen), first, rtol=1e-3)  # float32 of values near 100
    assert seen == [2, 2, 1, 2]
    assert summary(shared).keys() == {"text"}
