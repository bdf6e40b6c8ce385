"""What every program does around the loop: the run's folder, the mask, the slow optimizer, progress and timing."""

from __future__ import annotations

import copy
import platform
import signal
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from erase.config import ClassifyConfig, DdpmConfig, Saliency, SdConfig, Train, TrainClassifier, arguments, dump
from erase.diffusion.denoiser import Denoiser
from erase.diffusion.losses import forget_objective, remain_objective
from erase.diffusion.text import Concepts
from erase.engine import distributed, memory
from erase.engine.backend import Backend, LossFn, batch_size, batch_tensors, device_of, map_batch, seeded, trainable
from erase.engine.fisher import Fisher, default_chunk, fisher_diagonal, mean_gradient
from erase.engine.loop import Probe, check_launch, unlearn
from erase.engine.losses import Objective, plain
from erase.engine.method import Method
from erase.engine.precision import Precision, notice, resolve
from erase.engine.saliency import Mask, fisher_ratio_mask, load_mask, magnitude_mask, save_mask
from erase.engine.state import Checkpoint
from erase.engine.updates import ClosedForm
from erase.evaluation import classes
from erase.evaluation.generate import Sampler, generate
from erase.evaluation.prompt_files import PromptRow
from erase.methods import NEEDS, Entry
from erase.programs.tracking import JsonlTracker, OtherTracker, check_tracker
from erase.store import files

C = TypeVar("C", SdConfig, DdpmConfig, ClassifyConfig)
TIMING = "timing.json"
STATE = ("state.safetensors", "fisher-forget.safetensors", "fisher-remain.safetensors", TIMING)
"""Files of a run that is not trained yet."""
COMMON = frozenset({"forget", "remain", "mask", "fisher", "origin", "origin_net"})
"""What every program can give a method, of `erase.methods.NEEDS`."""
PACKAGES = ("erase", "torch", "diffusers", "transformers", "accelerate", "safetensors", "nudenet", "pillow")


def versions() -> dict[str, str]:
    """Of the packages that results depend on."""
    return {name: version(name) for name in PACKAGES}


def launch(precision: str = "no") -> Accelerator:
    """Join the other processes of this launch, if there are any; `precision` may be `auto`.

    Raises:
        ValueError: for FSDP or DeepSpeed.
    """
    cpu = not torch.accelerator.is_available()  # unsaid, processes on CPUs would run side by side
    # The others wait while the first one writes: longer than the ten minutes that NCCL would.
    state = PartialState(cpu=cpu, timeout=timedelta(hours=6))
    name: Any = resolve(precision, state.device)
    AcceleratorState._reset_state()  # a comparison's next run may have another precision; the processes stay joined
    accelerator = Accelerator(mixed_precision=name, cpu=cpu)
    check_launch(accelerator)
    return accelerator


def start(config: C, say: Callable[[str], None]) -> tuple[C, Accelerator, Precision, Callable[[str], None]]:
    """The settings with `precision: auto` resolved, the launch, its precision, and `say` of the first process alone.

    Raises:
        ValueError: for FSDP or DeepSpeed, a batch that does not divide over the processes, or an optional package
            that is missing.
    """
    memory.give_back()
    accelerator = launch(config.precision)
    device: torch.device = accelerator.device
    name: Any = resolve(config.precision, device)
    train: Any = config.train
    if train is not None and train.batch_size % distributed.world():
        raise ValueError(f"train.batch_size {train.batch_size} does not divide over {distributed.world()} processes")
    check_tracker(config.tracker)
    if train is not None and train.optimizer == "adam8bit":
        if find_spec("bitsandbytes") is None:
            raise ValueError("train.optimizer=adam8bit needs bitsandbytes: pip install 'erase[adam8bit]', or use adam")
        check_adam8bit(device)
    heard = say if distributed.rank() == 0 else lambda line: None
    line = notice(name, device)
    if line is not None:
        heard(line)
    return replace(config, precision=name), accelerator, Precision(name, device), heard


def bar(total: int, desc: str) -> Any:
    """A progress bar; of the first process alone."""
    return tqdm(total=total, desc=desc, disable=distributed.rank() > 0)


def drawn_data(draw: Callable[[slice], Tensor], total: int, batch_size: int, what: str) -> Tensor:
    """What a model draws to learn from, a batch at a time with a progress bar, shared by the processes: `[N, C, H, W]`.

    Args:
        draw: the latents of a part of what is asked for, `[B, C, H, W]`.
        total: N.
        batch_size: B.
        what: the side's name, for the bar.
    """
    with bar(total, f"drawing {what} data") as shown:

        def part(start: int) -> Tensor:
            drawn = draw(slice(start, start + batch_size))
            shown.update(len(drawn) * distributed.world())
            return drawn

        return torch.cat(distributed.spread(part, range(0, total, batch_size)))


@contextmanager
def held() -> Iterator[Callable[[], bool]]:
    """Hold SIGTERM and SIGINT back: the callable says whether one came.

    It takes effect at the end; a second one, at once.
    """
    came: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def hold(number: int, _: Any) -> None:
        if came:
            restore()
            signal.raise_signal(number)
        came.append(number)

    before = {number: signal.signal(number, hold) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        restore()
        if came:
            signal.raise_signal(came[0])


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
    if resume and out.is_dir():
        files.sweep(out)
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
            if changed := files.differences(_same(old.get(key)), _same(whole[key])):
                raise ValueError(
                    f"{out} holds a run with another {key} ({changed[0]}): resume with the same settings, or "
                    "use a new folder"
                )
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: --out names a folder")
    if out.exists() and any(out.iterdir()):
        raise ValueError(
            f"{out} holds no run to go on with: choose another --out"
            if resume
            else f"{out} is not empty: choose another --out, or --resume the run that is there"
        )
    files.write_json(path, whole)


def _same(part: Any) -> Any:
    """Without where pictures were copied from: they are the same pictures wherever they were."""
    if isinstance(part, dict) and isinstance(part.get("eval"), dict):
        return {**part, "eval": {k: v for k, v in part["eval"].items() if k not in ("base", "retrained_base")}}
    return part


def check_saliency(wanted: Saliency, entry: Entry) -> None:
    """Check before the Fisher diagonals are computed that a mask can be made of them.

    Raises:
        ValueError: unless exactly one of threshold and density is given, for a method that takes a mask.
    """
    if "mask" not in entry.needs:
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


def check_needs(entry: Entry, rare: Collection[str]) -> None:
    """Check that a program, which has some `rare` needs besides the `COMMON` ones, has what a method needs.

    Raises:
        ValueError: if it has not.
    """
    for need in entry.needs:
        if need not in COMMON and need not in rare:
            raise ValueError(f"method {entry.name} needs {NEEDS[need]}, which this program does not make")


def resolve_inputs(
    entry: Entry,
    config: Any,
    backend: Backend[Any],
    forget: Objective,
    remain: Objective,
    batches: Sequence[Sequence[Any]],
    precision: Precision,
    mask_path: Path,
    resume: bool = False,
    renew: Callable[[], nn.Module] | None = None,
    concepts: Concepts | None = None,
) -> dict[str, Any]:
    """Compute what a method's builder takes besides settings: objectives, a mask, a Fisher diagonal, and so on.

    Args:
        entry: says what the method needs.
        config: has `saliency`, `seed` and `checkpoint_every`.
        backend: the model, at θ0.
        forget: what is to be done on forget data.
        remain: what is to be done on remain data.
        batches: some of the forget and of the remain data, for Fisher diagonals.
        precision: of the forward passes.
        mask_path: where the mask is kept; Fisher sums are kept beside it.
        resume: whether to resume from Fisher sums that are there.
        renew: makes the network anew, with new weights.
        concepts: text embeddings, for closed forms.

    Raises:
        ValueError: for a method that needs something else; nothing is computed then.
    """
    rare = {"new_net": renew, "concepts": concepts, "denoiser": backend if isinstance(backend, Denoiser) else None}
    check_needs(entry, [name for name, value in rare.items() if value is not None])
    given: dict[str, Any] = {"forget": forget, "remain": remain, **rare}
    if "mask" in entry.needs:
        sides = [("forget", batches[0], forget.loss), ("remain", batches[1], plain)]
        given["mask"] = make_mask(config, backend, sides, precision, mask_path, resume)
    if "fisher" in entry.needs:
        side = ("remain", batches[1], plain)
        found = diagonal(config, backend, side, precision, mask_path.parent, resume)
        given["fisher"] = found.named
    if "origin" in entry.needs:
        given["origin"] = {name: p.detach().clone() for name, p in trainable(backend.net).items()}
    if "origin_net" in entry.needs:
        given["origin_net"] = copy.deepcopy(backend.net).eval().requires_grad_(False)
    if "new_net" in entry.needs and renew is not None:  # made only now: it is as large as the model
        given["new_net"] = renew().eval().requires_grad_(False)
    return {need: given[need] for need in entry.needs}


def make_mask(
    config: Any,
    backend: Backend[Any],
    sides: Sequence[tuple[str, Sequence[Any], LossFn]],
    precision: Precision,
    path: Path,
    resume: bool = False,
) -> Mask | None:
    """S: the mask, kept in `path` and read from there if it exists; `None` if it is off.

    Args:
        config: has `saliency`, `seed` (of timesteps and noise, the same on both sides) and `checkpoint_every`.
        backend: the model.
        sides: forget and remain, in this order: a name, the batches, the loss.
        precision: of the forward passes.
        path: where the mask is kept; Fisher sums are, beside it, until it is there.
        resume: whether to go on with Fisher sums that are there.
    """
    wanted: Saliency = config.saliency
    if wanted.kind == "none":
        return None
    if distributed.on_main(path.exists):
        return load_mask(path)
    if wanted.kind == "magnitude":
        gradient = mean_gradient(
            backend,
            to_device(sides[0][1], backend),
            draws=wanted.draws,
            generator=seeded(precision.device, config.seed, 1),
            loss=sides[0][2],
            autocast=precision.autocast,
            scale=precision.scale,
            share=(distributed.rank(), distributed.world()),
            total=distributed.total,
        )
        mask = magnitude_mask({name: g.abs_() for name, g in gradient.items()}, density=wanted.density or 0)
    else:
        diagonals = [diagonal(config, backend, side, precision, path.parent, resume) for side in sides]
        mask = fisher_ratio_mask(diagonals[0], diagonals[1], threshold=wanted.threshold, density=wanted.density)
    if distributed.rank() == 0:
        save_mask(mask, path)
        for side in sides:
            sums_path(path.parent, side[0]).unlink(missing_ok=True)
    return mask


def sums_path(out: Path, side: str) -> Path:
    """Where the Fisher sums of a side are kept."""
    return out / f"fisher-{side}.safetensors"


def diagonal(
    config: Any,
    backend: Backend[Any],
    side: tuple[str, Sequence[Any], LossFn],
    precision: Precision,
    out: Path,
    resume: bool = False,
) -> Fisher:
    """The Fisher diagonal of one side, with a progress bar; its sums are kept in the folder `out`."""
    what, batches, loss = side
    wanted: Saliency = config.saliency
    with bar(sum(map(batch_size, batches)), f"saliency: {what}") as shown:
        advance: Callable[[int], None] = partial(_advance, shown)
        return fisher_diagonal(
            backend,
            to_device(batches, backend),
            per=wanted.per,
            draws=wanted.draws,
            generator=seeded(precision.device, config.seed, 1),
            loss=loss,
            chunk=wanted.chunk,
            autocast=precision.autocast,
            scale=precision.scale,
            share=(distributed.rank(), distributed.world()),
            total=distributed.total,
            checkpoint=Checkpoint(sums_path(out, what), config.checkpoint_every, resume),
            progress=advance,
        )


def to_device(batches: Sequence[Any], backend: Backend[Any]) -> Iterator[Any]:
    """The batches on the network's device, moved one at a time: data are cached on the CPU."""
    device = device_of(backend.net)
    return (map_batch(lambda x: x.to(device), batch) for batch in batches)


def _advance(shown: Any, done: int) -> None:
    shown.update(done - shown.n)


def make_optimizer(train: Train | TrainClassifier, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The slow optimizer."""
    if train.optimizer == "sgd":
        return torch.optim.SGD(params, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
    if train.optimizer == "adam8bit":
        import bitsandbytes

        small: torch.optim.Optimizer = bitsandbytes.optim.Adam8bit(params, lr=train.lr, weight_decay=train.weight_decay)
        return small
    kind = torch.optim.Adam if train.optimizer == "adam" else torch.optim.AdamW
    return kind(params, lr=train.lr, weight_decay=train.weight_decay, fused=True)


def check_adam8bit(device: torch.device) -> None:
    """One step of eight-bit Adam on a tensor of the device: old versions of bitsandbytes have none for a CPU.

    Raises:
        ValueError: where it fails.
    """
    weight = torch.nn.Parameter(torch.ones(4096, device=device))  # fewer elements are kept in 32 bits
    weight.grad = torch.ones_like(weight)
    try:
        make_optimizer(Train(steps=1, optimizer="adam8bit"), [weight]).step()
    except Exception as error:  # what it raises is the library's affair, and differs from version to version
        raise ValueError(
            f"train.optimizer=adam8bit: bitsandbytes {version('bitsandbytes')} does not run on {device.type} "
            f"({error}): update it, or use adam"
        ) from error


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
    """The evaluation's pictures of one model, with a progress bar; arguments as those of `generate`.

    Several processes draw a batch each at a time; the first one asks for them and writes.
    """
    world = distributed.world()
    if distributed.rank() > 0:
        asked: Callable[[], Any] = lambda: None  # noqa: E731
        while (wanted := distributed.on_main(asked)) is not None:
            _draw_part(sample, wanted, batch_size)
        return

    def together(prompts: list[str], generators: list[torch.Generator], **given: Any) -> list[Image.Image]:
        wanted = (prompts, [g.initial_seed() for g in generators], given)
        distributed.on_main(lambda: wanted)
        return _draw_part(sample, wanted, batch_size)

    with bar(len(rows) * images, f"pictures: {folder.name}") as shown:
        generate(
            sample if world == 1 else together,
            rows,
            folder,
            per_prompt=images,
            batch_size=batch_size * world,
            resume=resume and folder.exists(),
            reuse=reuse,
            progress=lambda done, total: _advance(shown, done),
            settings=settings,
        )
    distributed.on_main(lambda: None)


def _draw_part(sample: Sampler, wanted: tuple[list[str], list[int], dict[str, Any]], size: int) -> list[Image.Image]:
    """A batch by each process, from the seeds of generators on the CPU; all pictures, in order."""
    prompts, seeds, given = wanted

    def draw(start: int) -> list[Image.Image]:
        part = slice(start, start + size)
        return sample(prompts[part], [torch.Generator("cpu").manual_seed(s) for s in seeds[part]], **given)

    return [image for part in distributed.spread(draw, range(0, len(prompts), size)) for image in part]


def classified(paths: Sequence[Path], classifier: Path, **settings: Any) -> classes.ClassPredictions:
    """What a classifier sees, each process looking at its share; arguments as those of `classify`."""
    parts = distributed.spread(lambda share: classes.classify(share, classifier, **settings), distributed.shares(paths))
    return classes.joined(parts)


def denoising(config: Any, net: nn.Module) -> tuple[Objective, Objective]:
    """What the runs of diffusion models do on forget and on remain data."""
    return (
        forget_objective(config.forget.loss, net, config.forget.target),
        remain_objective(config.remain.loss, net, config.train.dropout),
    )


def rehearse(
    config: Any,
    backend: memory.Model,
    entry: Entry,
    objectives: Callable[[Any], tuple[Objective, Objective]],
    sample: Mapping[str, Any],
    sides: tuple[int, int],
    precision: Precision,
    more: Sequence[str],
    command: str,
) -> list[str]:
    """What a run would learn, hold and do, in lines; nothing is computed.

    Args:
        config: has `method`, `saliency` and `train`.
        backend: the model, its network in the mode in which it learns.
        entry: its method.
        objectives: of a network, what is to be done on forget and on remain data.
        sample: a batch of one, of any values.
        sides: how many forget and remain samples are cached.
        precision: of the forward passes.
        more: lines on what else would be done.
        command: as it was typed.
    """
    wanted: Saliency = config.saliency
    train: Train | TrainClassifier = config.train
    masked = "mask" in entry.needs and wanted.kind != "none"
    n = sum(p.numel() for p in trainable(backend.net).values())
    every = sum(p.numel() for p in backend.net.parameters())
    found: dict[str, dict[str, int]] = {}
    always = memory.held(backend, sum(sides) * sum(x.nbytes for x in batch_tensors(sample)))
    with memory.hollow(backend) as model:
        net: Any = model.net
        with memory.Made(memory.tensors_of(model)) as made:
            given: dict[str, Any] = dict(zip(("forget", "remain"), objectives(net), strict=True))
            for name in ("fisher", "origin"):
                if name in entry.needs:
                    given[name] = {key: p.detach().clone() for key, p in trainable(net).items()}
            given["denoiser"] = model
            teachers = [name for name in ("origin_net", "new_net") if name in entry.needs]
            given |= dict.fromkeys(teachers, net)
            needed = {name: value for name, value in given.items() if name in entry.needs}
            method = entry.build(**arguments(config.method, entry), **needed)
        copies = made.now + 4 * every * len(teachers)
        used = [o.loss for o in (method.forget, method.remain) if o is not None]
        mode = net.training
        net.eval()  # as it is while a mask is made
        if masked or "fisher" in entry.needs:
            sums = 4 * n if wanted.kind == "magnitude" and masked else 12 * n
            one = (masked and wanted.kind == "magnitude") or wanted.per == "batch"
            rows = wanted.batch_size if one else min(wanted.chunk or default_chunk(trainable(net)), wanted.batch_size)
            losses = [given["forget"].loss, plain] if masked else [plain]
            of: Any = "batch" if masked and wanted.kind == "magnitude" else "squares" if one or rows == 1 else "samples"
            height = max(memory.passes(model, f, sample, rows, precision.autocast, of) for f in losses)
            found["mask"] = {**always, "sums": sums, "gradients and activations": height}
        net.train(mode)
        if isinstance(train, Train) and train.checkpointing:
            net.enable_gradient_checkpointing()
        share = train.batch_size // distributed.world()
        rows = min(train.micro_batch or share, share)
        height = max((memory.passes(model, f, sample, rows, precision.autocast) for f in used), default=0)
    kept = (wanted.density or 1.0) if masked else None
    found["steps"] = {**always, **memory.in_step(n, method, train.optimizer, kept, copies, height)}
    lines = [f"learns: {n:,} of {every:,} weights ({n / every:.1%})"]
    for what, items in found.items():
        parts = ", ".join(f"{name} {value / 1e9:.3f}" for name, value in items.items() if value)
        lines.append(f"memory for the {what}: {sum(items.values()) / 1e9:.3f} GB ({parts})")
    phases = method.update.phases(train.steps)
    forgets = train.steps if isinstance(method.update, ClosedForm) else phases["forget"] if method.forget else 0
    remains = 0 if method.remain is None else phases["remain"]
    samples = sum(min(wanted.count, side) * wanted.draws for side in sides) if masked else 0
    lines += [
        f"data: {sides[0]} forget and {sides[1]} remain samples; {samples} passes for the mask",
        f"steps: {train.steps} of {train.batch_size} samples, {forgets} fast and {remains} slow phases",
        *more,
        f"command: {command.replace(' --dry-run', '')}",
    ]
    return lines


def drop(out: Path, *names: str) -> None:
    """Remove files that the run needs no more, where they are."""
    if distributed.rank() == 0:
        for name in names:
            (out / name).unlink(missing_ok=True)


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
        "memory": memory.peak(),
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


def run_time(timing: Mapping[str, Any]) -> dict[str, float | None]:
    """Seconds of a report that a comparison tells: `saliency_s`, `erase_s`, and both together, `rte_s`."""
    saliency, erase = timing.get("saliency_s"), timing["erase_s"]
    return {"saliency_s": saliency, "erase_s": erase, "rte_s": None if erase is None else erase + (saliency or 0.0)}


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
    until: Callable[[int], Probe | None] | None = None,
) -> Steps:
    """The loop with a progress bar, `metrics.jsonl`, and run state in `state.safetensors`.

    `config` has `train`, `seed` and `checkpoint_every`; `until` may end it early. SIGTERM and SIGINT save first.
    """
    seconds: list[float] = []
    with held() as stop, bar(config.train.steps, desc) as shown, ExitStack() as stack:
        tracker: JsonlTracker | None = None
        other: OtherTracker | None = None
        if config.tracker != "jsonl" and distributed.rank() == 0:
            other = OtherTracker(config.tracker, out / config.tracker, dump(config))
            stack.callback(other.close)

        def log(row: dict[str, Any]) -> None:
            nonlocal tracker
            if tracker is None:  # rows of steps that a resumed run does again are dropped
                tracker = JsonlTracker(out / "metrics.jsonl", keep=row["step"])
            tracker(row)
            if other is not None:
                other(row)
            seconds.append(row["seconds"])
            _advance(shown, row["step"] + 1)

        result = unlearn(
            backend,
            method,
            forget,
            remain,
            steps=config.train.steps,
            optimizer=lambda params: make_optimizer(config.train, params),
            seed=config.seed,
            accelerator=accelerator,
            log=log if distributed.rank() == 0 else None,
            checkpoint=Checkpoint(out / "state.safetensors", config.checkpoint_every, resume),
            stop=stop,
            until=until,
            micro_batch=config.train.micro_batch,
        )
    return Steps(result.steps, sum(seconds) / len(seconds) if seconds else None)
