"""Make a class-conditional DDPM forget classes: `erase run ddpm PRESET [key=value …] --out DIR`.

Read top to bottom: draw the base pictures, gather the data, make the mask, unlearn, save, draw again, judge,
report. The same program trains and retrains: `method.name=retrain` starts from new weights. Every part leaves a
file in the run's folder; with `--resume` parts that are there are not done again.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erase import resources
from erase.config import NEW, DdpmConfig, arguments
from erase.diffusion import class_conditional, condition
from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.data import LatentSet
from erase.diffusion.denoiser import Denoiser
from erase.diffusion.families import family
from erase.diffusion.losses import Redirect, forget_objective, remain_objective
from erase.diffusion.model import Model, open_model
from erase.diffusion.parameters import select
from erase.engine import distributed
from erase.engine.backend import map_batch, seeded
from erase.engine.batches import Batches, some
from erase.engine.method import Method
from erase.engine.precision import Precision
from erase.engine.saliency import Mask, load_mask
from erase.evaluation import classes, fidelity, generate, grid, nudity, report
from erase.evaluation.generate import PromptRow
from erase.evaluation.stats import mcnemar_exact
from erase.methods import Entry, find_method
from erase.programs import saving
from erase.programs.runs import (
    STATE,
    check_needs,
    check_saliency,
    classified,
    denoising,
    draw_pictures,
    drawn_data,
    drop,
    new_report,
    open_folder,
    rehearse,
    resolve_inputs,
    run_steps,
    run_time,
    start,
)
from erase.store import files
from erase.store.labelled import LabelledImages, NoSplitError, class_number, read_labelled, scaled
from erase.store.safetensors import read_safetensors, write_safetensors

AXES = {"forget": ("still named as forgotten", 1.0), "remain": ("remain accuracy", 1.0)}
"""Of a comparison's plot: what they are called, and what is most."""
GOALS = {"forget": -1, "remain": 1, "rte_s": -1}
"""Of a comparison's Pareto front: whether less (-1) or more (1) is better."""
LEAST = 6
"""Pictures of a label: coverage looks at five neighbours, and no outcome of five pairs is beyond chance."""
COLUMNS = 12
"""Of a grid."""
FOLDERS = {"before": "base", "after": "erased", "retrained": "retrained"}
"""Of pictures, by the report's keys."""
NOTHING = 1e-6
"""A Fréchet distance that is rounding: a set's to itself."""


@dataclass(frozen=True)
class Plan:
    """A run's classes, resolved before anything is computed."""

    labels: list[str]
    """Names of all classes, by number."""
    forget: list[int]
    anchors: list[int]
    """One per forgotten class; empty without a redirect."""
    data: LabelledImages | None
    earlier: list[int] = field(default_factory=list)
    """Classes that were forgotten before: they do not come back."""
    among: list[int] = field(default_factory=list)
    """Classes that are drawn by lot in the place of forgotten ones, where the settings name them."""

    @property
    def gone(self) -> list[str]:
        """Names of the classes that are not to be shown, those of this run first."""
        return [self.labels[i] for i in (*self.forget, *self.earlier)]

    @property
    def remain(self) -> list[int]:
        """The classes that stay."""
        return [i for i, name in enumerate(self.labels) if name not in self.gone]

    @property
    def rows(self) -> list[PromptRow]:
        """What is drawn and counted: every class, forgotten ones first."""
        order = (*self.forget, *self.earlier, *self.remain)
        return [PromptRow(self.labels[i], seed=i, object=self.labels[i]) for i in order]


def main(
    config: DdpmConfig,
    out: Path,
    *,
    resume: bool = False,
    command: str = "",
    say: Callable[[str], None] = print,
    preset: str = "",
    form: saving.Form = "full",
    dry_run: bool = False,
) -> Path:
    """Run it all; the path of the report. `preset` is named in the model's card, `form` is what is kept of it.

    A dry run says what would be done, and writes nothing.

    Raises:
        ValueError: for settings, labels, models or data that cannot be used.
    """
    config, accelerator, precision, say = start(config, say)
    device = accelerator.device
    entry = find_method(str(config.method.get("name", "")))
    settings = arguments(config.method, entry)
    method = entry.build(**settings)  # refuses values out of range now, not after the saliency
    check_needs(entry, ("new_net", "denoiser"))
    fresh = entry.fresh
    source = None if config.model == NEW else find(config, config.model)
    if source is None and form == "delta":
        raise ValueError("--save delta needs a base; model=new has none")
    data = read_data(config, source)
    diffuser = open_base(config, source, data, device)
    plan = make_plan(config, diffuser.pipe, data, fresh, [] if source is None else folders.forgotten(source))
    trained = select(diffuser.net, config.train.parameters, diffuser.family.PARAMETERS)
    check_saliency(config.saliency, entry)
    check(config, plan, diffuser.pipe, method)
    if dry_run:
        say("\n".join(foretell(config, plan, diffuser, entry, precision, fresh, command)))
        return out / "report.html"
    weights = {} if source is None else folders.fingerprint(source)
    record = {
        "plan": {"forget": plan.forget, "anchors": plan.anchors, "earlier": plan.earlier, "labels": plan.labels},
        "base": {"model": config.model, "weights": weights},
        "data": {} if data is None else {"images": len(data), "sha256": data.digest},
    }
    distributed.on_main(lambda: open_folder(config, out, record, command, resume))
    model, trained_path = out / saving.MODEL, out / "trained.safetensors"
    if resume and distributed.on_main(lambda: saving.finished(out)):
        drop(out, *STATE, trained_path.name)
        say(f"finished before: {distributed.on_main(lambda: draw_report(config, plan, out))}")
        return out / "report.html"
    names = ", ".join(plan.labels[i] for i in plan.forget)
    say(
        f"{config.model}: {sum(p.numel() for p in diffuser.net.parameters() if p.requires_grad):,} weights in "
        f"{len(trained)} tensors learn; {'training without' if fresh else 'forgetting'} {names or 'nothing'}"
    )
    if source is not None:
        draw_images(config, plan, diffuser, precision, out, "base", resume, weights, config.eval.base)
    drawn = {"base": weights}

    mask_path = out / "saliency.safetensors"
    if resume and distributed.on_main(trained_path.exists):
        values, stored = read_safetensors(trained_path)
        timing = json.loads(stored["timing"])
        mask = load_mask(mask_path) if mask_path.exists() else None
    else:
        began = time.perf_counter()
        forget, remain = gather(config, plan, diffuser, precision, fresh, say)
        timing = {"data_s": time.perf_counter() - began}
        if fresh:
            if source is not None:
                diffuser.pipe.unet = class_conditional.renew(diffuser.pipe.unet, config.seed)
            select(diffuser.net, config.train.parameters, diffuser.family.PARAMETERS)
        backend = diffuser.denoiser(diffuser.null())
        keeping = remain_objective(config.remain.loss, diffuser.net, config.train.dropout)
        given: dict[str, Any] = {"remain": keeping}
        if forget is not None:
            began = time.perf_counter()
            wanted = config.saliency
            batches = tuple(some(side, wanted.count, wanted.batch_size, config.seed) for side in (forget, remain))
            objective = forget_objective(config.forget.loss, diffuser.net, config.forget.target)
            given = resolve_inputs(
                entry,
                config,
                backend,
                objective,
                keeping,
                batches,
                precision,
                mask_path,
                resume,
                renew=lambda: class_conditional.renew(diffuser.pipe.unet, config.seed + 1),  # not as the model began
            )
            timing["saliency_s"] = time.perf_counter() - began
        mask = given.get("mask")
        if config.train.checkpointing:  # not before: per-sample gradients cannot have it
            diffuser.checkpoint_activations()
        done = run_steps(
            config,
            backend,
            entry.build(**settings, **given),
            None if forget is None else Batches(forget, config.train.batch_size, config.seed),
            Batches(remain, config.train.batch_size, config.seed + 1),
            accelerator,
            out,
            resume,
            "training" if fresh else "unlearning",
        )
        timing |= done.timing
        values = {name: p.detach() for name, p in diffuser.net.named_parameters() if p.requires_grad}
        distributed.on_main(partial(write_safetensors, trained_path, values, {"timing": json.dumps(timing)}))
        del backend, forget, remain
    distributed.on_main(partial(save, config, plan, source, diffuser.pipe, values, out, mask, preset, form))
    drop(out, *STATE)
    del values
    gc.collect()

    if config.eval.images:
        for what, where, reuse in (
            ("erased", str(model), None),
            ("retrained", config.eval.retrained, config.eval.retrained_base),
        ):
            if where is not None:
                other = open_retrained(where, config, plan, device)
                drawn[what] = folders.fingerprint(locate(where, "label"))
                draw_images(config, plan, other, precision, out, what, resume, drawn[what], reuse)
    result = make_report(config, plan, out, mask, timing, command, drawn)
    distributed.on_main(lambda: saving.settle(out, form))
    distributed.on_main(lambda: files.write_json(out / "report.json", result))
    drop(out, trained_path.name)
    for line in report.verdict(result):
        say(line)
    say(f"report: {distributed.on_main(lambda: draw_report(config, plan, out))}")
    return out / "report.html"


def save(
    config: DdpmConfig,
    plan: Plan,
    source: folders.Source | None,
    pipe: class_conditional.ClassConditionalPipeline,
    values: dict[str, Tensor],
    out: Path,
    mask: Mask | None,
    preset: str,
    form: saving.Form,
) -> None:
    """The model, in the form it came in; a new one as a pipeline."""
    if source is not None:
        target = saving.hidden({"forget": plan.forget, "anchors": plan.anchors})
        meta = saving.provenance(config, preset, source, target, mask) | {folders.FORGOTTEN: json.dumps(plan.gone)}
        saving.save(source, values, out, meta, form)
    elif not (out / saving.MODEL).exists():
        with torch.no_grad():
            for name, p in pipe.unet.named_parameters():
                p.copy_(values[name])
        class_conditional.save_new(pipe, out / saving.MODEL)


# ---------------------------------------------------------------- before anything is computed


def read_data(config: DdpmConfig, source: folders.Source | None) -> LabelledImages | None:
    """The training images, if the run has any.

    Raises:
        ValueError: for data that cannot be read, or a new model without.
    """
    if config.data is None:
        if source is None:
            raise ValueError("model=new needs data.source: labelled images to train on")
        return None
    return read_labelled(config.data.source, "train", names=config.data.names or config.labels or None)


def find(config: DdpmConfig, model: str) -> folders.Source:
    """A checkpoint of the run."""
    found = locate(model, "label", labels=config.labels)
    assert isinstance(found, folders.Source)
    return found


def open_base(
    config: DdpmConfig, source: folders.Source | None, data: LabelledImages | None, device: torch.device
) -> Model:
    """The model of the run.

    Raises:
        ValueError: for an architecture where there is none to choose, or a missing one.
    """
    if source is not None:
        if config.architecture is not None:
            raise ValueError(f"architecture is for model=new; {config.model} has its own: take one of the two back")
        return open_model(source, device)
    if config.architecture is None:
        raise ValueError("model=new needs an architecture: give architecture.channels=[64,128] and so on")
    assert data is not None
    depth, height, width = data.pixels.shape[1:]
    pipe = class_conditional.new(data.names, (depth, height, width), **asdict(config.architecture), seed=config.seed)
    return Model(family("ddpm"), pipe.to(device))


def make_plan(
    config: DdpmConfig,
    pipe: Any,
    data: LabelledImages | None,
    fresh: bool,
    forgotten: Sequence[str] = (),
) -> Plan:
    """Resolve labels, and check that model and data fit.

    Args:
        config: the settings.
        pipe: the model.
        data: the training images.
        fresh: whether the weights are new.
        forgotten: names of the classes that the model's weight file says were forgotten.

    Raises:
        ValueError: for a label that is no class, labels twice or all of them, anchors that do not match, or data of
            other classes or another shape than the model's.
    """
    labels = pipe.labels
    if data is not None:
        if list(data.names) != labels:
            raise ValueError(
                f"the data's classes are {', '.join(data.names)}, the model's are {', '.join(labels)}: give data.names "
                "in the model's order"
            )
        if tuple(data.pixels.shape[1:]) != pipe.shape:
            raise ValueError(
                f"the data's images are {list(data.pixels.shape[1:])} (channels, height, width), the model takes "
                f"{list(pipe.shape)}: convert the files first"
            )

    forget = [class_number(label, labels) for label in config.forget.labels]
    if len(set(forget)) != len(forget):
        raise ValueError(f"forget.labels names a class twice: {config.forget.labels}")
    before = dict.fromkeys(
        class_number(label, labels) for label in (*config.forget.earlier, *([] if fresh else forgotten))
    )
    earlier = [i for i in before if i not in forget]
    if len({*forget, *earlier}) == len(labels):
        raise ValueError("every class is named in forget.labels or was forgotten before: something must stay")
    if not forget and not fresh:
        raise ValueError("forget.labels is empty: name what to forget, such as forget.labels=[trouser]")
    if config.forget.pictures != "own" and config.forget.loss != "redirect":
        raise ValueError(f"forget.pictures={config.forget.pictures} is for forget.loss=redirect; with the others: own")
    anchors: list[int] = []
    if config.forget.loss == "redirect" and not fresh:
        anchors = [class_number(label, labels) for label in config.forget.anchors]
        anchors = anchors * len(forget) if len(anchors) == 1 else anchors
        if anchors and len(anchors) != len(forget):
            raise ValueError(
                f"forget.anchors has {len(anchors)} labels for {len(forget)}: give one for each, or one for all"
            )
        if set(anchors) & {*forget, *earlier}:
            raise ValueError("a forgotten class cannot be an anchor: choose one that stays")
    among = (
        [] if isinstance(config.forget.among, str) else [class_number(label, labels) for label in config.forget.among]
    )
    if set(among) & {*forget, *earlier}:
        raise ValueError("forget.among names a forgotten class: choose classes that stay")
    if config.forget.among != "all" and (config.forget.loss != "redirect" or anchors):
        raise ValueError("forget.among is for forget.loss=redirect without forget.anchors: take one back")
    return Plan(labels, forget, anchors, data, earlier, among)


def check(config: DdpmConfig, plan: Plan, pipe: Any, method: Method) -> None:
    """Find out now, not after the training, what cannot work; `method` is built of plain settings alone.

    Raises:
        ValueError: for dropout or guidance without a null class, a classifier that cannot be loaded or has other
            labels, or a retrained model that is not there.
    """
    if config.train.dropout > 0 and pipe.null is None:
        raise ValueError(
            f"train.dropout {config.train.dropout} needs a null class, which {config.model} lacks: set it to 0"
        )
    drawing = bool(config.eval.images) or plan.data is None
    if drawing:
        class_conditional.check_guidance(pipe, config.draw.guidance)
    entry = find_method(method.name)
    if entry.fresh and plan.data is None:
        raise ValueError("training needs data.source: labelled images")
    if entry.fresh and config.train.parameters != "full":
        raise ValueError(f"{method.name} starts from new weights, all of which must learn: set train.parameters=full")
    asked = "forget" in entry.needs  # others bring their own target
    if asked and method.forget is not None and method.forget.sense > 0 and config.forget.loss == "ascent":
        raise ValueError(
            f"{method.name} fits other targets: set forget.loss to redirect (another label) or surrogate (noise)"
        )
    if not config.eval.images:
        return
    for folder in (config.eval.base, config.eval.retrained_base):
        if folder is not None:
            generate.check_reuse(folder)
    if config.eval.retrained_base is not None and config.eval.retrained is None:
        raise ValueError("eval.retrained_base holds pictures of a retrained model: name it by eval.retrained")
    if config.eval.classifier is not None and config.eval.images < LEAST:
        raise ValueError(
            f"eval.images must be at least {LEAST} (per label) to be judged, or 0; got {config.eval.images}"
        )
    if config.eval.classifier is not None:
        known = classes.labels_of(resources.tiny_path(config.eval.classifier))
        if set(known) != set(plan.labels):
            raise ValueError(
                f"eval.classifier {config.eval.classifier} knows {short(known)}; the model's classes are "
                f"{short(plan.labels)}: name a classifier of these classes, or set eval.classifier=null"
            )
    if config.eval.retrained is not None:
        open_retrained(config.eval.retrained, config, plan, "cpu")


def foretell(
    config: DdpmConfig,
    plan: Plan,
    diffuser: Model,
    entry: Entry,
    precision: Precision,
    fresh: bool,
    command: str,
) -> list[str]:
    """What the run would learn, hold and do."""
    latents, label = diffuser.family.example(diffuser.configs)
    label = condition.to(label, diffuser.device)
    sample = {"mean": latents.to(diffuser.device), "cond": label}
    if config.forget.loss == "redirect" and not fresh:
        sample["anchor"] = label

    def side(which: Sequence[int], count: int | None) -> int:
        there = [count if plan.data is None else len(plan.data.of([i])) for i in which]
        return sum(x if count is None else min(count, x) for x in there if x is not None)

    balanced = None if fresh else -(-config.forget.count * len(plan.forget) // len(plan.remain))
    forget = 0 if fresh else side(plan.forget, config.forget.count) * (2 if config.forget.pictures == "both" else 1)
    return rehearse(
        config,
        diffuser.denoiser(diffuser.null()),
        entry,
        partial(denoising, config),
        sample,
        (forget, side(plan.remain, config.remain.count or balanced)),
        precision,
        [f"pictures: {len(plan.rows) * config.eval.images} of each model, {config.draw.steps} sampler steps each"],
        command,
    )


def short(names: Sequence[str]) -> str:
    """Names in a line, the first dozen of them."""
    return ", ".join(names[:12]) + (f" … ({len(names)})" if len(names) > 12 else "")


def open_retrained(model: str, config: DdpmConfig, plan: Plan, device: torch.device | str) -> Model:
    """The model that was trained without the forgotten classes.

    Raises:
        ValueError: if it cannot be loaded, or does not fit the run.
    """
    found = open_model(find(config, model), device)
    pipe = found.pipe
    if pipe.labels != plan.labels:
        raise ValueError(f"{model} has other classes ({', '.join(pipe.labels)}) than {config.model}")
    class_conditional.check_guidance(pipe, config.draw.guidance)
    return found


# ---------------------------------------------------------------- data


def gather(
    config: DdpmConfig,
    plan: Plan,
    diffuser: Model,
    precision: Precision,
    fresh: bool,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[LatentSet | None, LatentSet]:
    """Both sides as the UNet sees them: from the data, or drawn by the model itself."""
    table = {"label": torch.arange(len(plan.labels))}

    def side(which: Sequence[int], count: int | None, what: str) -> tuple[Tensor, Tensor]:
        if plan.data is not None:
            parts = [plan.data.of([i]) for i in which]
            chosen = [p if count is None else p.subset(min(count, len(p)), config.seed) for p in parts]
            pixels, labels = torch.cat([p.pixels for p in chosen]), torch.cat([p.labels for p in chosen])
            return diffuser.encode(scaled(pixels))[0], labels
        assert count is not None
        words = [i for i in which for _ in range(count)]
        drawing = with_sampler(diffuser, config.draw.sampler)
        generators = [generate.image_generator(config.seed, n) for n in range(len(words))]

        def draw(part: slice) -> Tensor:
            return drawing.draw_latents(
                [plan.labels[i] for i in words[part]],
                generators[part],
                steps=config.draw.steps,
                guidance=config.draw.guidance,
                batch_size=config.draw.batch_size,
                autocast=precision.drawing,
            )

        return drawn_data(draw, len(words), config.draw.batch_size, what), torch.tensor(words)

    if fresh:
        mean, cond = side(plan.remain, config.remain.count, "remain")
        return None, LatentSet(mean, cond, table)
    balanced = -(-config.forget.count * len(plan.forget) // len(plan.remain))
    remain = LatentSet(*side(plan.remain, config.remain.count or balanced, "remain"), table)
    lots = dict.fromkeys(plan.forget, plan.among or plan.remain)
    if config.forget.among == "far" or config.remain.share == "near":
        model = diffuser.denoiser()
        apart = {label: distances(plan, model, remain, label, precision, config.seed) for label in plan.forget}
        if config.forget.among == "far":
            for label in plan.forget:
                lots[label] = far(apart[label])
                say(f"{plan.labels[label]} is led to {', '.join(plan.labels[i] for i in lots[label])}")
        if config.remain.share == "near":
            remain = leaning(remain, list(apart.values()))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    """Pictures, the forgotten class that asks for them, and its anchor."""
    if config.forget.pictures != "anchor":
        mean, cond = side(plan.forget, config.forget.count, "forget")
        if plan.anchors:
            of = torch.zeros(len(plan.labels), dtype=torch.long)
            of[plan.forget] = torch.tensor(plan.anchors)
            anchor = of[cond]
        else:  # another class by lot
            generator = seeded("cpu", config.seed, 2)
            anchor = torch.empty_like(cond)
            for label, others in lots.items():
                here = cond == label
                anchor[here] = torch.tensor(others)[torch.randint(len(others), (int(here.sum()),), generator=generator)]
        parts.append((mean, cond, anchor))
    if config.forget.pictures != "own":
        for number, label in enumerate(plan.forget):
            where = [plan.anchors[number]] if plan.anchors else lots[label]
            mean, anchor = side(where, -(-config.forget.count // len(where)), "anchor")
            parts.append((mean, torch.full_like(anchor, label), anchor))
    mean, cond, anchor = (torch.cat([part[i] for part in parts]) for i in range(3))
    if config.forget.loss == "surrogate":
        mean = torch.rand(mean.shape, generator=seeded("cpu", config.seed, 3)) * 2 - 1
    return LatentSet(mean, cond, table, anchor=anchor if config.forget.loss == "redirect" else None), remain


@torch.no_grad()
def distances(
    plan: Plan, model: Denoiser, remain: LatentSet, label: int, precision: Precision, seed: int, count: int = 16
) -> dict[int, float]:
    """How far the classes that stay are from a label.

    The mean of `MSE(ε(x_t, label), ε(x_t, own))` over `count` pictures of the class, each at another timestep.
    """
    apart = {}
    for other in plan.remain:
        index = (remain.cond == other).nonzero().flatten()[:count]
        batch = {**remain.gather(index), "anchor": {"label": torch.full_like(index, other)}}
        batch["cond"] = {"label": torch.full_like(index, label)}
        batch = map_batch(lambda x: x.to(precision.device), batch)
        with precision.autocast():
            apart[other] = float(Redirect()(model, batch, seeded(precision.device, seed, 4)).mean())
    return apart


def far(apart: Mapping[int, float]) -> list[int]:
    """The farther half of the classes, the middle one among them."""
    return sorted(sorted(apart, key=lambda other: -apart[other])[: -(-len(apart) // 2)])


def leaning(remain: LatentSet, apart: Sequence[Mapping[int, float]]) -> LatentSet:
    """As many pictures, of each class the more the nearer it is to a forgotten one: `1 / distance` of each.

    What a class has too few of comes again.
    """
    near = {other: 1 / max(min(one[other] for one in apart), 1e-12) for other in apart[0]}
    index = []
    for other, weight in near.items():
        there = (remain.cond == other).nonzero().flatten()
        index.append(there[torch.arange(max(1, round(len(remain) * weight / sum(near.values())))) % len(there)])
    chosen = torch.cat(index)
    return LatentSet(remain.mean[chosen], remain.cond[chosen], remain.table)


def with_sampler(diffuser: Model, name: class_conditional.Sampler | None) -> Model:
    """The same model with another sampler; `None` keeps its own."""
    return Model(diffuser.family, class_conditional.with_sampler(diffuser.pipe, name))


# ---------------------------------------------------------------- evaluation


def draw_images(
    config: DdpmConfig,
    plan: Plan,
    diffuser: Model,
    precision: Precision,
    out: Path,
    what: str,
    resume: bool,
    weights: dict[str, str],
    reuse: Path | None = None,
) -> None:
    """The evaluation's pictures of one model: the same classes, seeds and settings for all."""
    if not config.eval.images:
        return
    drawing = with_sampler(diffuser, config.draw.sampler)
    settings = {
        "weights": weights,
        "draw": {
            **asdict(config.draw),
            "guidance": diffuser.pipe.guidance if config.draw.guidance is None else config.draw.guidance,
        },
        "precision": config.precision,
        "scheduler": type(drawing.pipe.scheduler).__name__,
    }
    sample = drawing.sampler(steps=config.draw.steps, guidance=config.draw.guidance, autocast=precision.drawing)
    draw_pictures(
        sample,
        drawn_rows(config, plan),
        out / "images" / what,
        images=config.eval.images,
        batch_size=config.draw.batch_size,
        resume=resume,
        settings=settings,
        reuse=reuse,
    )


def drawn_rows(config: DdpmConfig, plan: Plan) -> list[PromptRow]:
    """The rows of every model's pictures."""
    return [PromptRow(row.prompt, config.seed + row.seed, object=row.object) for row in plan.rows]


def make_report(
    config: DdpmConfig,
    plan: Plan,
    out: Path,
    mask: Mask | None,
    timing: dict[str, Any],
    command: str,
    drawn: dict[str, dict[str, str]],
) -> dict[str, Any]:
    """The keys of a report: see the README.

    Raises:
        ValueError: for pictures that are not of the plan's rows, or not by the weights of `drawn`.
    """
    target = {side: [plan.labels[i] for i in of] for side, of in (("forget", plan.forget), ("anchors", plan.anchors))}
    target["earlier"] = [plan.labels[i] for i in plan.earlier]
    result = new_report(config, command, target, mask, timing)
    if not config.eval.images or config.eval.classifier is None:
        return result
    judge = resources.tiny_path(config.eval.classifier)
    seen: dict[str, classes.ClassPredictions] = {}
    for key, what in FOLDERS.items():
        folder = out / "images" / what
        if distributed.on_main(folder.is_dir):
            paths = generate.check_images(folder, drawn_rows(config, plan), config.eval.images, drawn.get(what))
            seen[key] = classified(paths, judge, features=True)
    real, real_labels = reference(config, plan, judge, seen)
    asked = [row.prompt for row in plan.rows for _ in range(config.eval.images)]
    forgotten = plan.gone
    for key, guess in seen.items():
        result[key] = {
            "pictures": report.origin(out / "images" / FOLDERS[key]),
            "classes": judge_classes(guess, asked, forgotten),
            "fidelity": judge_fidelity(fidelity.features_of(guess), asked, forgotten, real, real_labels),
        }
    if "before" in seen:
        right = {
            key: [shown == name for shown, name in zip(seen[key].predicted, asked, strict=True)]
            for key in ("before", "after")
        }
        for side, gone in (("forget", True), ("remain", False)):
            index = [i for i, name in enumerate(asked) if (name in forgotten) is gone]
            if index:
                both = [[right[key][i] for i in index] for key in ("before", "after")]
                result["paired"][f"{side}_mcnemar_p"] = mcnemar_exact(*both)
    if "retrained" in seen and forgotten:
        result["gap"] = gap(result, seen, asked, forgotten)
    return result


def reference(
    config: DdpmConfig, plan: Plan, judge: Path, seen: dict[str, classes.ClassPredictions]
) -> tuple[fidelity.Features, list[str]]:
    """Features of real images, as many of each class as are drawn: the test split's, or else the training images.

    Without data, base pictures stand in for them.
    """
    if config.data is None:
        asked = [row.prompt for row in plan.rows for _ in range(config.eval.images)]
        return fidelity.features_of(seen["before"]), asked
    names = list(plan.labels)
    try:
        data = read_labelled(config.data.source, "test", names=config.data.names or config.labels or None)
    except NoSplitError:
        assert plan.data is not None
        data = plan.data
    parts = [data.of([i]) for i in range(len(names))]
    parts = [part.subset(min(config.eval.images, len(part)), config.seed) for part in parts]
    pixels = torch.cat([part.pixels for part in parts])
    labels = [names[i] for i in torch.cat([part.labels for part in parts]).tolist()]
    return fidelity.features(pixels, judge), labels


def judge_classes(guess: classes.ClassPredictions, asked: list[str], forgotten: list[str]) -> dict[str, Any]:
    """Accuracy of the forgotten and the other classes, what the forgotten ones show, and how sure the judge is."""
    result: dict[str, Any] = {**guess.provenance, **classes.forget_remain(guess, asked, forgotten)}
    index = [i for i, name in enumerate(asked) if name in forgotten]
    if index:
        part = guess.take(index)
        shown = part.predicted
        result["forget_shows"] = {name: shown.count(name) / len(shown) for name in sorted(set(shown))}
        result["forget_confidence"] = {
            label: classes.confidence(guess.take([i for i, name in enumerate(asked) if name == label]), label)
            for label in forgotten
        }
    return result


def judge_fidelity(
    drawn: fidelity.Features, asked: list[str], forgotten: list[str], real: fidelity.Features, real_labels: list[str]
) -> dict[str, Any]:
    """Distance to real images of the remain classes: of pictures of them, and of the forgotten labels' pictures."""
    kept = [name not in forgotten for name in asked]
    real_kept = [name not in forgotten for name in real_labels]
    staying = real.take(np.array(real_kept))
    result: dict[str, Any] = {"remain": fidelity.summary(staying, drawn.take(np.array(kept)))}
    if not all(kept):
        result["forget_to_remain"] = fidelity.summary(staying, drawn.take(~np.array(kept)))
    result["coverage"] = {}
    for label in dict.fromkeys(name for name in asked if name not in forgotten):
        a = real.take(np.array([name == label for name in real_labels]))
        b = drawn.take(np.array([name == label for name in asked]))
        result["coverage"][label] = fidelity.coverage(a.values, b.values, k=min(5, len(a) - 1, len(b) - 1))
    return result


def gap(
    result: dict[str, Any], seen: dict[str, classes.ClassPredictions], asked: list[str], forgotten: list[str]
) -> dict[str, float | None]:
    """How far the erased model is from the retrained one.

    `fa` and `ra` in points; `frechet` the difference of the Fréchet distances of remain pictures, in per cent of the
    retrained model's; `mean` of these three (of two without the last); `kl` of the judge's mean prediction on the
    forgotten labels' pictures, retrained to erased, nats; `forget_frechet_ratio` of the forgotten labels' pictures'
    distances to real remain images.
    """
    ours, theirs = result["after"], result["retrained"]
    index = [i for i, name in enumerate(asked) if name in forgotten]
    p, q = (seen[key].probabilities[index].mean(axis=0) + 1e-6 for key in ("retrained", "after"))
    p, q = p / p.sum(), q / q.sum()
    distances = [side["fidelity"]["remain"]["frechet"] for side in (ours, theirs)]
    found: dict[str, float | None] = {
        "fa": 100 * abs(ours["classes"]["forget"]["accuracy"] - theirs["classes"]["forget"]["accuracy"]),
        "ra": 100 * abs(ours["classes"]["remain"]["accuracy"] - theirs["classes"]["remain"]["accuracy"]),
        "frechet": 100 * abs(distances[0] - distances[1]) / distances[1] if distances[1] > NOTHING else None,
        "kl": float((p * np.log(p / q)).sum()),
    }
    three = [found[name] for name in ("fa", "ra", "frechet")]
    found["mean"] = fmean(value for value in three if value is not None)
    shown = [side["fidelity"]["forget_to_remain"]["frechet"] for side in (ours, theirs)]
    return {**found, "forget_frechet_ratio": shown[0] / shown[1] if shown[1] > NOTHING else None}


def summary(report: dict[str, Any]) -> dict[str, float | str | None]:
    """A report as the numbers that comparisons are made of.

    `forget` and `remain`: accuracy of the forgotten and the other classes; `drop` of the mean from the base and
    `worst` of one class, in points; `frechet`: Fréchet distance of remain pictures over the base's; `coverage`:
    of the class with the lowest; `shows`: what the forgotten labels show most; `gap_…`: to the retrained model.
    """
    before, after = report["before"], report["after"]
    if not after:
        return {**run_time(report["timing"])}
    out: dict[str, float | str | None] = {
        "forget": after["classes"]["forget"]["accuracy"],
        "remain": after["classes"]["remain"]["accuracy"],
    }
    forgotten = {*report["target"]["forget"], *report["target"]["earlier"]}
    if before:
        old, new = before["classes"]["per_label"], after["classes"]["per_label"]
        drops = [100 * (old[name]["accuracy"] - new[name]["accuracy"]) for name in new if name not in forgotten]
        out["drop"], out["worst"] = sum(drops) / len(drops), max(drops)
        base = before["fidelity"]["remain"]["frechet"]
        out["frechet"] = after["fidelity"]["remain"]["frechet"] / base if base > NOTHING else None
    out["coverage"] = min(after["fidelity"]["coverage"].values())
    shown = after["classes"].get("forget_shows")
    out["shows"] = max(shown, key=lambda name: shown[name]) if shown else None
    out |= {f"gap_{key}": value for key, value in report.get("gap", {}).items()}
    return {**out, **run_time(report["timing"])}


def draw_report(config: DdpmConfig, plan: Plan, out: Path) -> Path:
    """`grid.png`, classes in blocks with the same seeds for base, erased and retrained, and `report.html`.

    Exposed parts are hidden unless the preset says all pictures are harmless.
    """
    blur: grid.Blur | None = None
    if config.eval.images:
        names = [what for what in FOLDERS.values() if (out / "images" / what).is_dir()]
        there = [out / "images" / name for name in names]
        if config.eval.blur:
            rows = [(folder, row) for folder in there for row in generate.read_manifest(folder)]
            paths = [folder / row.file for folder, row in rows if row.index < COLUMNS]
            blur = nudity.exposed_boxes(nudity.detect(paths))
        shown = grid.grid_from_folders(there, names=names, max_columns=COLUMNS, max_prompts=len(plan.rows), blur=blur)
        grid.save_image(shown, out / "grid.png")
    return report.write_html(out, blur=blur)
