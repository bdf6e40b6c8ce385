"""Networks of the user's own, small."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DModel
from PIL import Image
from torch import Tensor, nn


def unet(rows: int = 4) -> UNet2DModel:
    """Conditional on classes, of random weights."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            num_class_embeds=rows,
        )


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches(seed: int, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(5, 4, generator=g), torch.randint(3, (5,), generator=g)) for _ in range(count)]


def losses(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


def images(count: int, side: int = 20) -> list[Image.Image]:
    """Of different sizes."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (side + i, side, 3), np.uint8)) for i in range(count)]


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in net.state_dict().items()}


def changed(net: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of what differs, in dtype too."""
    after = net.state_dict()
    return {name for name, x in before.items() if x.dtype != after[name].dtype or not torch.equal(x, after[name])}


def configuration(pipe: Any) -> Any:
    """What must not change of a pipeline."""
    return {
        "config": dict(pipe.config),
        "scheduler": dict(pipe.scheduler.config),
        "timesteps": pipe.scheduler.timesteps.tolist(),
        "bar": getattr(pipe, "_progress_bar_config", None),
        "attributes": sorted(vars(pipe)),
        "parts": {name: id(part) for name, part in pipe.components.items()},
    }
