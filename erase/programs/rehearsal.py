"""A dry run: what a run would learn, hold in memory and do, in lines; nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from erase.config import Saliency, Train, TrainClassifier, arguments
from erase.diffusion.losses import Dropped, Guided, Negate, Redirect
from erase.diffusion.robust import RobustRedirect
from erase.engine import distributed, memory
from erase.engine.backend import LossFn, batch_tensors, trainable
from erase.engine.fisher import default_chunk, evaluating
from erase.engine.losses import Objective, Training
from erase.engine.method import Method
from erase.engine.precision import Precision
from erase.engine.sharding import asked, blocks
from erase.engine.updates import ClosedForm, Epoch
from erase.methods import Entry
from erase.programs.inputs import saliency_losses
from erase.programs.launching import gathered_in


@dataclass(frozen=True)
class Work:
    """What a run would do: all that its memory depends on."""

    config: Any
    """Has `method`, `saliency` and `train`."""
    backend: memory.Model
    """The model, its network in the mode in which it learns."""
    entry: Entry
    """Its method."""
    objectives: Callable[[Any], tuple[Objective, Objective]]
    """Of a network, what is to be done on forget and on remain data."""
    sample: Mapping[str, Any]
    """A batch of one, of any values."""
    sides: tuple[int, int]
    """How many forget and remain samples are cached."""
    precision: Precision
    """Of the forward passes."""

    @property
    def learns(self) -> int:
        """How many weights learn."""
        return sum(p.numel() for p in trainable(self.backend.net).values())

    @property
    def masked(self) -> bool:
        """Whether there is a mask."""
        return "mask" in self.entry.needs and self.config.saliency.kind != "none"

    def held(
        self, *, world: int = 1, data: int = 0, gathered: torch.dtype | None = None
    ) -> tuple[dict[str, dict[str, int]], Method]:
        """Bytes that a process holds for the mask and for the steps, by item and before weights are spread; the method.

        Args:
            world: how many processes share a batch.
            data: bytes that are cached.
            gathered: the dtype of spread weights where they are gathered, if it is not their own.
        """
        wanted: Saliency = self.config.saliency
        train: Train | TrainClassifier = self.config.train
        n, masked = self.learns, self.masked
        found: dict[str, dict[str, int]] = {}
        always = memory.held(self.backend, data)
        with memory.hollow(self.backend) as model:
            net: Any = model.net
            forget, method, copies = build(self.config, self.entry, self.objectives, model, self.sides)
            if isinstance(train, Train) and train.checkpointing:
                net.enable_gradient_checkpointing()
            short = 0
            if gathered is not None:
                for p in trainable(net).values():
                    p.data = p.data.to(gathered)
                short = (4 - gathered.itemsize) * n  # bytes that gradients of that dtype are short of float32
            if masked or "fisher" in self.entry.needs:
                height = mask_height(self.config, model, forget, masked, self.sample, self.precision)
                sums = 4 * n if wanted.kind == "magnitude" and masked else (16 if wanted.per == "image" else 8) * n
                found["mask"] = {**always, "sums": sums, "gradients and activations": height}
            share = train.batch_size // world
            rows = min(train.micro_batch or share, share)
            used = heaviest([o.loss for o in (method.forget, method.remain) if o is not None])
            heights = [memory.passes(model, f, self.sample, rows, self.precision.autocast) for f in used]
            height = max(heights) + short if heights else 0
        density = (wanted.density or 1.0) if masked else None
        if density is not None and train.weight_decay and getattr(method.update, "mask_all", False):
            copies += round(4 * n * (1 - density))  # masked weights, which are restored
        found["steps"] = {**always, **memory.in_step(n, method, train.optimizer, density, copies, height)}
        return found, method


def rehearse(work: Work, conditions: int, more: Sequence[str], command: str) -> list[str]:
    """What a run would learn, hold and do, in lines; nothing is computed.

    Args:
        work: what it would do.
        conditions: how many different conditions are.
        more: lines on what else would be done.
        command: as it was typed.
    """
    wanted: Saliency = work.config.saliency
    train: Train | TrainClassifier = work.config.train
    net, sample, sides = work.backend.net, work.sample, work.sides
    every = sum(p.numel() for p in net.parameters())
    world = distributed.world()
    spread = world > 1 and asked(PartialState()) is not None
    gathered = gathered_in(PartialState().device, work.precision) if spread else None
    told = sum(x.nbytes for x in batch_tensors(sample.get("cond", {})))
    own = sum(x.nbytes for name, part in sample.items() if name not in ("cond", "anchor") for x in batch_tensors(part))
    found, method = work.held(world=world, data=sum(sides) * own + conditions * told, gathered=gathered)
    lines = [f"learns: {work.learns:,} of {every:,} weights ({work.learns / every:.1%})"]
    whose = ""
    if spread:
        whose = f"of each of {world} processes, "
        block = largest_block(net, gathered)
        found = {what: memory.shared(items, world, block) for what, items in found.items()}
    for what, items in found.items():
        parts = ", ".join(f"{name} {in_bytes(value)}" for name, value in items.items() if value)
        lines.append(f"memory for the {what}: {in_bytes(sum(items.values()))} ({whose}{parts})")
    samples = sum(min(wanted.count, side) * wanted.draws for side in sides) if work.masked else 0
    seen = f"data: {sides[0]} forget and {sides[1]} remain samples" if any(sides) else "data: none are needed"
    lines += [
        f"{seen}; {samples} passes for the mask" if samples else seen,
        steps_line(method, train.steps, train.batch_size),
        *more,
        f"command: {command.replace(' --dry-run', '')}",
    ]
    return lines


def build(
    config: Any,
    entry: Entry,
    objectives: Callable[[Any], tuple[Objective, Objective]],
    model: memory.Model,
    sides: tuple[int, int],
) -> tuple[Objective, Method, int]:
    """What is done on forget data, the method, and the bytes of the copies of weights that both hold."""
    net = model.net
    with memory.Made(memory.tensors_of(model)) as made:
        given: dict[str, Any] = dict(zip(("forget", "remain"), objectives(net), strict=True))
        for name in ("fisher", "origin"):
            if name in entry.needs:
                given[name] = {key: p.detach().clone() for key, p in trainable(net).items()}
        given["denoiser"] = model
        given["epoch"] = Epoch(*(max(1, -(-side // config.train.batch_size)) for side in sides))
        teachers = [name for name in ("origin_net", "new_net") if name in entry.needs]
        given |= dict.fromkeys(teachers, net)
        needed = {name: value for name, value in given.items() if name in entry.needs}
        method = entry.build(**arguments(config.method, entry), **needed)
    every = sum(p.numel() for p in net.parameters())
    return given["forget"], method, made.now + 4 * every * len(teachers)


def mask_height(
    config: Any,
    model: memory.Model,
    forget: Objective,
    masked: bool,
    sample: Mapping[str, Any],
    precision: Precision,
) -> int:
    """Bytes of gradients and activations while a mask or a Fisher diagonal is made."""
    wanted: Saliency = config.saliency
    net: Any = model.net
    magnitude = masked and wanted.kind == "magnitude"
    whole = getattr(config.train, "checkpointing", False) or wanted.clip is not None
    chunk = 1 if whole else wanted.chunk or default_chunk(trainable(net))
    one = magnitude or wanted.per != "sample"
    rows = wanted.batch_size if one else min(chunk, wanted.batch_size)
    losses = saliency_losses(wanted, forget)[0 if masked else 1 :]
    kept = magnitude or wanted.clip is not None or wanted.per == "image"
    of: Any = "batch" if kept else "squares" if one or rows == 1 else "samples"
    with evaluating(net):
        return max(memory.passes(model, f, sample, rows, precision.autocast, of) for f in heaviest(losses))


def largest_block(net: nn.Module, gathered: torch.dtype | None = None) -> int:
    """Bytes of the largest part of a network that is gathered at a time, in a dtype or in the weights' own."""
    parts = [set(block.parameters()) for block in [*blocks(net), net]]
    sizes = []
    gone: set[Any] = set()
    for part in parts:  # inner ones first
        sizes.append(sum(p.numel() * (gathered or p.dtype).itemsize for p in part - gone))
        gone |= part
    return max(sizes)


def in_bytes(count: float) -> str:
    """Bytes in GB, or of small models in MB."""
    return f"{count / 1e9:.3f} GB" if count >= 1e8 else f"{count / 1e6:.3f} MB"


def steps_line(method: Method, steps: int, batch: int) -> str:
    """How often a run computes what."""
    if isinstance(method.update, ClosedForm):
        return f"steps: {steps}, computed in closed form without batches"
    phases = method.update.phases(steps)
    done = {
        "fast": phases["forget"] if method.forget is not None else 0,
        "slow": phases["remain"] if method.remain is not None else 0,
    }
    told = " and ".join(f"{count} {name}" for name, count in done.items() if count)
    return f"steps: {steps}, in them {told} phases with a batch of {batch} each"


def heaviest(losses: Sequence[LossFn]) -> list[LossFn]:
    """The losses that take most memory: one that asks a second network, at least as much as those that ask none.

    Following a pass of a large network takes seconds, so that no pass is followed whose height is known to be lower.
    """

    def of(loss: Any) -> Any:
        return of(loss.loss) if isinstance(loss, Dropped | Training) else loss

    second = [
        f
        for f in losses
        if isinstance(of(f), Guided | Redirect | RobustRedirect | Negate) or getattr(of(f), "teacher", None)
    ]
    return second[:1] or list(losses)
