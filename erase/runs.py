"""What every program does around the loop: the run's folder, the mask, the slow optimizer, progress and timing."""

from __future__ import annotations

import copy
import inspect
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from tqdm import tqdm

from erase import files
from erase.backend import Backend, LossFn, batch_size, device_of, map_batch, seeded, trainable
from erase.config import ClassifyConfig, DdpmConfig, Saliency, SdConfig, Train, TrainClassifier, dump
from erase.evaluation.generate import PromptRow, Sampler, generate
from erase.fisher import Fisher, fisher_diagonal, mean_gradient
from erase.loop import Checkpoint, unlearn
from erase.losses import Objective, plain
from erase.method import Method
from erase.precision import Precision, notice, resolve
from erase.saliency import Mask, fisher_ratio_mask, load_mask, magnitude_mask, save_mask
from erase.tracking import JsonlTracker

C = TypeVar("C", SdConfig, DdpmConfig, ClassifyConfig)
PACKAGES = ("erase", "torch", "diffusers", "transformers", "accelerate", "safetensors", "nudenet", "pillow")


def versions() -> dict[str, str]:
    """Of the packages that results depend on."""
    return {name: version(name) for name in PACKAGES}


def start(config: C, say: Callable[[str], None]) -> tuple[C, Accelerator, Precision]:
    """The settings with `precision: auto` resolved, the launch, and its precision.

    Raises:
        ValueError: if there are several processes.
    """
    name: Any = resolve(config.precision, PartialState().device)
    accelerator = Accelerator(mixed_precision=name)
    if accelerator.num_processes > 1:
        raise ValueError(
            f"erase run {config.pipeline} runs in one process so far; launched with {accelerator.num_processes}"
        )
    line = notice(name, accelerator.device)
    if line is not None:
        say(line)
    return replace(config, precision=name), accelerator, Precision(name, accelerator.device)


def open_folder(config: Any, out: Path, record: dict[str, Any], command: str, resume: bool) -> None:
    """Write `run.json`, or check that the folder holds this very run.

    Args:
        config: the resolved configuration.
        out: the run's folder.
        record: what else makes the run what it is: `plan`, `base`, `data`.
        command: as it was typed.
        resume: whether the folder may hold the run already.

    Raises:
        ValueError: for a folder in use, or one of another run.
    """
    whole = {
        "schema": 1,
        "command": command,
        "config": dump(config),
        **record,
        "seed": config.seed,
        "versions": versions(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    path = out / "run.json"
    if resume and path.exists():
        old = files.read_json(path)
        for key in ("config", *record):
            if _same(old.get(key)) != _same(whole[key]):
                raise ValueError(
                    f"{out} holds a run with another {key}: resume with the same settings, or use a new folder"
                )
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: --out names a folder")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose another --out, or --resume the run that is there")
    files.write_json(path, whole)


def _same(part: Any) -> Any:
    """Without where pictures were copied from: they are the same pictures wherever they were."""
    if isinstance(part, dict) and isinstance(part.get("eval"), dict):
        return {**part, "eval": {k: v for k, v in part["eval"].items() if k not in ("base", "retrained_base")}}
    return part


def check_saliency(wanted: Saliency, build: Callable[..., Method]) -> None:
    """Find out now, not after the Fisher diagonals, that no mask can be made of them.

    Raises:
        ValueError: unless exactly one of threshold and density is given, for a method that takes a mask.
    """
    if "mask" not in inspect.signature(build).parameters:
        return
    if wanted.kind == "magnitude" and (wanted.density is None or wanted.threshold is not None):
        raise ValueError(
            f"saliency.kind=magnitude needs saliency.density, and no threshold (null takes it back); got "
            f"{wanted.density} and {wanted.threshold}"
        )
    if wanted.kind == "fisher" and (wanted.threshold is None) == (wanted.density is None):
        raise ValueError(
            f"the mask needs saliency.threshold or saliency.density, not both (null takes one back); "
            f"got {wanted.threshold} and {wanted.density}"
        )


def equip(
    build: Callable[..., Method],
    config: Any,
    backend: Backend[Any],
    forget: Objective,
    remain: Objective,
    batches: tuple[Sequence[Any], Sequence[Any]],
    precision: Precision,
    mask_path: Path,
    renew: Callable[[], nn.Module] | None = None,
) -> dict[str, Any]:
    """Whatever a method's builder takes besides plain settings: objectives, a mask, a Fisher diagonal, teachers.

    Args:
        build: the builder; the names of its arguments say what it takes.
        config: has `saliency` and `seed`.
        backend: the model, at θ0.
        forget: what is to be done on forget data.
        remain: what is to be done on remain data.
        batches: some of the forget and of the remain data, for Fisher diagonals.
        precision: of the forward passes.
        mask_path: where the mask is kept.
        renew: makes the network anew, with new weights.

    Raises:
        ValueError: for a method that needs a new network where none can be made.
    """
    takes = inspect.signature(build).parameters
    given: dict[str, Any] = {"forget": forget, "remain": remain}
    if "mask" in takes:
        sides = [("forget", batches[0], forget.loss), ("remain", batches[1], plain)]
        given["mask"] = make_mask(config.saliency, backend, sides, precision, config.seed, mask_path)
    if "fisher" in takes:
        found = diagonal(config.saliency, backend, ("remain", batches[1], plain), precision, config.seed)
        given["fisher"] = found.named
        given["origin"] = {name: p.detach().clone() for name, p in trainable(backend.net).items()}
    if "origin_net" in takes:
        given["origin_net"] = copy.deepcopy(backend.net).eval().requires_grad_(False)
    if "new_net" in takes:
        if renew is None:
            raise ValueError(f"{build.__name__} needs a network with new weights, which this program does not make")
        given["new_net"] = renew().eval().requires_grad_(False)
    return {name: value for name, value in given.items() if name in takes}


def make_mask(
    wanted: Saliency,
    backend: Backend[Any],
    sides: Sequence[tuple[str, Sequence[Any], LossFn]],
    precision: Precision,
    seed: int,
    path: Path,
) -> Mask | None:
    """S: the mask, kept in `path` and read from there if it exists; `None` if it is off.

    Args:
        wanted: the settings.
        backend: the model.
        sides: forget and remain, in this order: a name, the batches, the loss.
        precision: of the forward passes.
        seed: of timesteps and noise, the same on both sides.
        path: where the mask is kept.
    """
    if wanted.kind == "none":
        return None
    if path.exists():
        return load_mask(path)
    if wanted.kind == "magnitude":
        gradient = mean_gradient(
            backend,
            moved(sides[0][1], backend),
            draws=wanted.draws,
            generator=seeded(precision.device, seed, 1),
            loss=sides[0][2],
            autocast=precision.autocast,
            scale=precision.scale,
        )
        mask = magnitude_mask({name: g.abs_() for name, g in gradient.items()}, density=wanted.density or 0)
        save_mask(mask, path)
        return mask
    diagonals = [diagonal(wanted, backend, side, precision, seed) for side in sides]
    mask = fisher_ratio_mask(diagonals[0], diagonals[1], threshold=wanted.threshold, density=wanted.density)
    save_mask(mask, path)
    return mask


def diagonal(
    wanted: Saliency, backend: Backend[Any], side: tuple[str, Sequence[Any], LossFn], precision: Precision, seed: int
) -> Fisher:
    """The Fisher diagonal of one side, with a progress bar."""
    what, batches, loss = side
    with tqdm(total=sum(map(batch_size, batches)), desc=f"saliency: {what}") as bar:
        advance: Callable[[int], None] = partial(_advance, bar)
        return fisher_diagonal(
            backend,
            moved(batches, backend),
            per=wanted.per,
            draws=wanted.draws,
            generator=seeded(precision.device, seed, 1),
            loss=loss,
            chunk=wanted.chunk,
            autocast=precision.autocast,
            scale=precision.scale,
            progress=advance,
        )


def moved(batches: Sequence[Any], backend: Backend[Any]) -> Iterator[Any]:
    """Batches on the network's device, one at a time: data are cached on the CPU."""
    device = device_of(backend.net)
    return (map_batch(lambda x: x.to(device), batch) for batch in batches)


def _advance(bar: Any, done: int) -> None:
    bar.update(done - bar.n)


def make_optimizer(train: Train | TrainClassifier, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The slow optimizer."""
    if train.optimizer == "sgd":
        return torch.optim.SGD(params, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
    kind = torch.optim.Adam if train.optimizer == "adam" else torch.optim.AdamW
    return kind(params, lr=train.lr, weight_decay=train.weight_decay, fused=True)


def draw_pictures(
    sample: Sampler,
    rows: Sequence[PromptRow],
    folder: Path,
    *,
    images: int,
    batch_size: int,
    resume: bool,
    settings: dict[str, Any],
    reuse: Path | None = None,
) -> None:
    """The evaluation's pictures of one model, with a progress bar; arguments as those of `generate`."""
    with tqdm(total=len(rows) * images, desc=f"pictures: {folder.name}") as bar:
        generate(
            sample,
            rows,
            folder,
            per_prompt=images,
            batch_size=batch_size,
            resume=resume and folder.exists(),
            reuse=reuse,
            progress=lambda done, total: _advance(bar, done),
            settings=settings,
        )


def new_report(
    config: Any, command: str, target: dict[str, Any], mask: Mask | None, timing: dict[str, Any]
) -> dict[str, Any]:
    """The keys that every report has; `before`, `after` and `paired` are still empty."""
    return {
        "schema": 1,
        "command": command,
        "method": dict(config.method),
        "seed": config.seed,
        "target": target,
        "mask": None if mask is None else {**mask.meta, "density": mask.density, "per_layer": mask.per_layer()},
        "before": {},
        "after": {},
        "paired": {},
        "timing": timing,
        "versions": versions(),
    }


@dataclass(frozen=True)
class Steps:
    """How long the loop took, for reports; the steps of a resumed run before the interruption count as the others."""

    steps: int
    step_s: float | None

    @property
    def timing(self) -> dict[str, float | int | None]:
        """`erase_s`, `steps`, `step_s`."""
        total = None if self.step_s is None else self.step_s * self.steps
        return {"erase_s": total, "steps": self.steps, "step_s": self.step_s}


def run_steps(
    config: Any,
    backend: Backend[Any],
    method: Method,
    forget: Iterable[Any] | None,
    remain: Iterable[Any] | None,
    accelerator: Accelerator,
    out: Path,
    resume: bool,
    desc: str = "unlearning",
) -> Steps:
    """The loop with a progress bar, `metrics.jsonl`, and run state in `state.safetensors`.

    `config` has `train`, `seed` and `checkpoint_every`.
    """
    seconds: list[float] = []
    with tqdm(total=config.train.steps, desc=desc) as bar:
        tracker: JsonlTracker | None = None

        def log(row: dict[str, Any]) -> None:
            nonlocal tracker
            if tracker is None:  # rows of steps that a resumed run does again are dropped
                tracker = JsonlTracker(out / "metrics.jsonl", keep=row["step"])
            tracker(row)
            seconds.append(row["seconds"])
            bar.update(row["step"] + 1 - bar.n)

        result = unlearn(
            backend,
            method,
            forget,
            remain,
            steps=config.train.steps,
            optimizer=lambda params: make_optimizer(config.train, params),
            seed=config.seed,
            accelerator=accelerator,
            log=log,
            checkpoint=Checkpoint(out / "state.safetensors", config.checkpoint_every, resume),
        )
    return Steps(result.steps, sum(seconds) / len(seconds) if seconds else None)
