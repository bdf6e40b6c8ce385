"""`scripts/scale.py`: what a step receives where weights are spread."""

import pytest
import torch
from scale import received
from torch import nn


@pytest.mark.parametrize(("world", "share"), [(1, 0), (2, 0.5), (64, 63 / 64)])
def test_a_step_gathers_weights_and_averages_gradients(world: int, share: float) -> None:
    """Two passes: each with three gatherings of all weights, and one averaging of what learns."""
    net = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 5, bias=False))
    net[1].to(torch.bfloat16).requires_grad_(False)
    assert received(net, None, world) == 2 * (3 * (4 * 100 + 2 * 50) + 4 * 100) * share
    assert received(net, torch.bfloat16, world) == 2 * (3 * 2 * 150 + 4 * 100) * share
    assert received(net, torch.bfloat16, world, averaging=2) == 2 * (3 * 2 * 150 + 2 * 4 * 100) * share
