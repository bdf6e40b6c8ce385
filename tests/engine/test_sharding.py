"""Weights spread over processes by FSDP2 learn what whole weights learn, on gloo."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import launched
import micro
import micro_sd3
import micro_sdxl
import pytest
import torch
import torch.distributed as dist
import toys
from accelerate import Accelerator
from torch import Tensor, nn

from erase.diffusion.denoiser import Denoiser
from erase.diffusion.families import family
from erase.diffusion.losses import Denoise, forget_objective
from erase.diffusion.model import Model
from erase.diffusion.parameters import Learning
from erase.diffusion.robust import Robust
from erase.engine import sharding
from erase.engine.backend import seeded, trainable
from erase.engine.fisher import fisher_diagonal, mean_gradient
from erase.engine.loop import Checkpoint, unlearn
from erase.engine.losses import Objective, plain
from erase.engine.saliency import Mask, fisher_ratio_mask, magnitude_mask, parked
from erase.methods.sfron import sfron
from erase.store.safetensors import read_safetensors, write_safetensors

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
CPU = torch.device("cpu")
FAMILIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "sd": (micro.pipeline, "full"),
    "sdxl": (micro_sdxl.pipeline, "xattn"),
    "sd3": (micro_sd3.pipeline, "xattn"),
}


def open_all(work: Path, names: Sequence[str]) -> dict[str, tuple[Denoiser, list[dict[str, Any]]]]:
    """A denoiser of each family, and a batch of four a side."""
    found = {}
    for name in names:
        pipeline, parameters = FAMILIES[name]
        pipe = pipeline(work / name)
        model = Model(family(name), pipe)
        model.choose(Learning(parameters))
        told = [model.embed([prompt] * 4) for prompt in ("a photo of a cat", "a dog")]
        latents = [torch.randn(4, 4, 8, 8, generator=seeded("cpu", seed)) for seed in (1, 2)]
        forget = {"mean": latents[0], "cond": told[0], "anchor": told[1]}
        found[name] = model.denoiser(model.null()), [forget, {"mean": latents[1], "cond": told[1]}]
    return found


def learn(backend: Denoiser, sides: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A Fisher diagonal, masks, and weights after a step of robust SFR-on and two of SFR-on, whole."""
    forget, remain = ([side] for side in sides)
    given: dict[str, Any] = {"chunk": 1}
    fishers = [fisher_diagonal(backend, data, generator=seeded("cpu", 3), **given) for data in (forget, remain)]
    with TemporaryDirectory() as folder, parked(fishers[0], Path(folder)) as first:
        mask = fisher_ratio_mask(first, fishers[1], density=0.3)
    gradient = mean_gradient(backend, forget, generator=seeded("cpu", 3))
    for g in gradient.values():
        sharding.local(g).abs_()
    by_size = magnitude_mask(gradient, density=0.3)
    chosen = partial(
        sfron,
        mask=mask,
        fast_rate=0.05,
        fast_rule="sgd",
        slow_steps=2,
        outer_rate=0.7,
        clip_remain=0.5,
        forget=forget_objective("redirect", backend.net, "frozen"),
        remain=Objective(Denoise(0.2), 1, "denoise"),
    )
    for method, steps in ((chosen(robust=Robust(images=0.5)), 1), (replace(chosen(), average=0.5), 2)):
        unlearn(
            backend,
            method,
            forget,
            remain,
            steps=steps,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
            seed=5,
            accelerator=Accelerator(cpu=True),
            micro_batch=1,
        )
    found = {f"fisher.{name}": x for name, x in sharding.gathered(fishers[0].named).items()}
    found |= {f"mask.{name}": x for name, x in mask.named.items()}
    found |= {f"by_size.{name}": x for name, x in by_size.named.items()}
    return found | dict(sharding.gathered(trainable(backend.net)))


def shard(net: nn.Module) -> nn.Module:
    """And check that no process holds more than its part."""
    every = sum(p.numel() for p in net.parameters())
    sharding.shard(net, CPU)
    held = sum(sharding.local(p).numel() for p in net.parameters())
    assert every / 2 - 2000 < held < every / 2 + 2000 or int(os.environ["WORLD_SIZE"]) != 2
    return net


def rank() -> int:
    return int(os.environ["RANK"])


def save(path: Path, found: dict[str, Tensor]) -> None:
    if rank() == 0:
        write_safetensors(path, found, {})


# ------------------------------------------------------------ a run that is killed


def fast(path: Path, resume: bool, killed: bool = False, steps: int = 6, precision: str = "no") -> dict[str, Tensor]:
    """SFR-on with moments on both sides, an outer step and a running mean; saved every second step."""
    net = toys.mlp(torch.float32)
    accelerator = Accelerator(cpu=True)
    if "RANK" in os.environ:
        sharding.shard(net, CPU)
    mask = Mask({n: torch.rand(p.shape, generator=toys.gen()) < 0.5 for n, p in net.named_parameters()})

    def log(row: dict[str, Any]) -> None:
        if killed and row["step"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    unlearn(
        toys.Noisy(net),
        replace(sfron(mask=mask, fast_rate=0.02, slow_steps=2, outer_rate=0.7), average=0.5),
        toys.batches(0, dtype=torch.float32),
        toys.batches(1, dtype=torch.float32),
        steps=steps,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, fused=True),
        seed=5,
        accelerator=accelerator,
        precision=precision,
        checkpoint=Checkpoint(path, 2, resume),
        log=log,
    )
    return dict(sharding.gathered(dict(net.named_parameters())))


def first_launch(models: dict[str, Any], out: Path) -> None:
    for name, (backend, sides) in models.items():
        shard(backend.net)
        save(out / f"{name}.safetensors", learn(backend, sides))
    save(out / "straight.safetensors", fast(out / "straight" / "state.safetensors", False))
    fast(out / "killed" / "state.safetensors", False, killed=True)


def overflow(out: Path) -> None:
    """Under fp16, of one process's share of a batch."""
    net = toys.mlp(torch.float32)
    accelerator = Accelerator(cpu=True)
    sharding.shard(net, CPU, torch.float16)
    seen = 0

    def loss(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:
        nonlocal seen
        seen += 1
        return plain(backend, batch, generator) * (1e38 if seen == 2 and rank() == 1 else 1.0)

    result = unlearn(
        toys.Noisy(net),
        sfron(fast_rate=0.01, forget=Objective(loss, -1), lambd=0),
        toys.batches(1, dtype=torch.float32),
        toys.batches(2, dtype=torch.float32),
        steps=3,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
        seed=0,
        accelerator=accelerator,
        precision="fp16",
    )
    (out / f"skipped.{rank()}").write_text(f"{result.skipped_fast} {result.skipped_slow}")


def second_launch(out: Path) -> None:
    overflow(out)
    save(out / "again.safetensors", fast(out / "killed" / "state.safetensors", True))


def launch(out: Path, *names: str) -> tuple[Path, dict[str, Any]]:
    models = open_all(out, names)
    statuses = launched.two(partial(first_launch, models, out), out / "first", **FSDP)
    said = "".join((out / f"first.{rank}").read_text() for rank in range(2))
    assert statuses == [-signal.SIGKILL] * 2, said
    return out, models


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return launch(tmp_path_factory.mktemp("sharding"), "sd3")


def test_a_torch_that_sums_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.7 does over CPU processes."""
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "reduce_scatter_tensor", lambda found, given, op, group: found.fill_(given.sum()))
    with pytest.raises(ValueError, match=r"torch .* sums gradients over cpu processes.*--use_fsdp"):
        sharding.check_average(None, CPU)  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(story: Any) -> None:
    out, models = story
    check_learned(out / "sd3.safetensors", *models["sd3"])


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_of_unets(tmp_path: Path) -> None:
    out, models = launch(tmp_path, "sd", "sdxl")
    for name, opened in models.items():
        check_learned(out / f"{name}.safetensors", *opened)


def check_learned(path: Path, backend: Denoiser, sides: list[dict[str, Any]]) -> None:
    """What processes learned together is what this one learns: masks to the bit."""
    two, _ = read_safetensors(path)
    start = {key: p.detach().clone() for key, p in trainable(backend.net).items()}
    one = learn(backend, sides)
    assert two.keys() == one.keys()
    moved = 0.0
    for key, value in one.items():
        if key.startswith(("mask", "by_size")):
            assert torch.equal(two[key], value), key
        elif key.startswith("fisher"):
            torch.testing.assert_close(two[key], value, rtol=1e-5, atol=0)
        else:  # float32, gradients of halves of a batch added in another order
            torch.testing.assert_close(two[key], value, rtol=1e-6, atol=1e-6)
            moved = max(moved, float((value - start[key]).abs().max()))
    assert moved > 1e-3


@pytest.mark.slow
def test_a_killed_run_resumes_bit_identically_and_on_one_process_and_overflows_are_seen_by_all(story: Any) -> None:
    out, _ = story
    folder = out / "killed" / "state"
    assert len(list(folder.glob("*.safetensors"))) == 2  # files of earlier states are gone
    state = {path: path.read_bytes() for path in folder.iterdir()}
    statuses = launched.two(partial(second_launch, out), out / "second", **FSDP)
    assert statuses == [0, 0], "".join((out / f"second.{rank}").read_text() for rank in range(2))
    assert [(out / f"skipped.{number}").read_text() for number in range(2)] == ["1 0"] * 2
    straight, again = (read_safetensors(out / f"{name}.safetensors")[0] for name in ("straight", "again"))
    assert toys.same(straight, again)
    for path in folder.iterdir():
        path.unlink()
    for path, data in state.items():
        path.write_bytes(data)
    one = fast(out / "killed" / "state.safetensors", True)
    assert not folder.exists()  # else the next resume would read it, and not what one process saved
    for key, value in straight.items():
        torch.testing.assert_close(one[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_four_processes_and_a_resume_on_half_of_them(tmp_path: Path) -> None:
    backend, sides = open_all(tmp_path, ["sd"])["sd"]
    state = tmp_path / "state.safetensors"

    def four() -> None:
        shard(backend.net)
        save(tmp_path / "sd.safetensors", learn(backend, sides))
        save(tmp_path / "straight.safetensors", fast(tmp_path / "straight" / "state.safetensors", False))
        fast(state, False, killed=True)

    statuses = launched.two(four, tmp_path / "four", 4, **FSDP)
    said = "".join((tmp_path / f"four.{rank}").read_text() for rank in range(4))
    assert statuses == [-signal.SIGKILL] * 4, said
    half = partial(fast, state, True)
    statuses = launched.two(lambda: save(tmp_path / "half.safetensors", half()), tmp_path / "half", **FSDP)
    assert statuses == [0, 0], "".join((tmp_path / f"half.{rank}").read_text() for rank in range(2))
    straight, resumed = (read_safetensors(tmp_path / f"{name}.safetensors")[0] for name in ("straight", "half"))
    for key, value in straight.items():
        torch.testing.assert_close(resumed[key], value, rtol=1e-6, atol=1e-6)
    check_learned(tmp_path / "sd.safetensors", backend, sides)
