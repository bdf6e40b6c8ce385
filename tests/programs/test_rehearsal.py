"""The lines of a dry run."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from toys import denoiser, latents, unet

from erase.config import SdConfig
from erase.config.read import parse, put, read_preset
from erase.engine.memory import shared
from erase.engine.precision import Precision
from erase.methods import find_method
from erase.programs.inputs import denoising
from erase.programs.rehearsal import Work, in_bytes, largest_block, steps_line
from erase.resources import preset_path


@pytest.mark.parametrize(
    ("count", "said"), [(24e9, "24.000 GB"), (1.5e8, "0.150 GB"), (1.679e7, "16.790 MB"), (4100, "0.004 MB")]
)
def test_small_sizes_are_told_in_megabytes(count: float, said: str) -> None:
    assert in_bytes(count) == said


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("sfron", {"fast_rate": 1.0, "slow_steps": 4}, ["30", "30 fast", "120 slow"]),
        ("sfron", {"fast_rate": 1.0, "every": 3}, ["30", "10 fast", "30 slow"]),
        ("finetune", {}, ["30", "30 slow"]),
        ("uce", {}, ["30", "closed form"]),
        ("speed", {}, ["30", "closed form"]),
    ],
)
def test_how_often_a_run_computes_what(name: str, settings: dict[str, Any], told: list[str]) -> None:
    needs = find_method(name).needs
    objectives = {side: side for side in ("forget", "remain") if side in needs}  # only looked at for being there
    said = steps_line(find_method(name).build(**settings, **objectives), 30, 16)
    assert all(part in said for part in told)
    assert " 0 " not in said
    assert ("16" in said) is (name not in ("uce", "speed"))


def test_processes_share_what_is_spread_and_gather_a_block_at_a_time() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 2))
    block = largest_block(net)
    assert block == 4 * (4 * 8 + 8)
    whole = {"weights": 1000, "optimizer": 801, "mask": 40, "activations": 500, "cached data": 7}
    assert shared(whole, 4, block) == {
        "weights": 250,
        "optimizer": 201,
        "mask": 40,
        "activations": 500,
        "cached data": 7,
        "gathered weights": 3 * block,
    }


@pytest.mark.slow
def test_weights_that_are_gathered_in_half_precision_leave_casts_out() -> None:
    """As on GPUs: masters stay float32, autocast has nothing to cast, and gradients are float32 once averaged."""
    backend = denoiser(unet().requires_grad_(True))
    own_settings = {"forget.prompts": ["a cat"], "train.parameters": "full", "train.checkpointing": False}
    config = parse(put(read_preset(preset_path("sd_concept_sfron")), own_settings), SdConfig)
    n = sum(p.numel() for p in backend.net.parameters())
    own, gathered = (
        Work(
            config,
            backend,
            find_method("sfron"),
            partial(denoising, config),
            latents(size=1),
            (8, 8),
            Precision("bf16", torch.device("cpu")),
        ).held(gathered=dtype)[0]
        for dtype in (None, torch.bfloat16)
    )
    for what in ("mask", "steps"):
        assert own[what]["weights"] == gathered[what]["weights"] >= 4 * n
    assert own["mask"]["gradients and activations"] - gathered["mask"]["gradients and activations"] > n
    assert own["steps"]["gradients"] == gathered["steps"]["gradients"] == 4 * n
    # at the end of a backward pass all gradients are there, and no cast
    assert abs(own["steps"]["activations"] - gathered["steps"]["activations"]) < n / 10
