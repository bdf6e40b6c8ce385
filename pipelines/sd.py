"""Erase a concept from a Stable Diffusion checkpoint: `erase run sd PRESET [key=value …] --out DIR`.

Read top to bottom: draw the base pictures, cache the data, make the mask, unlearn, save, draw again, count, attack,
report. Every part leaves a file in the run's folder; with `--resume` parts that are there are not done again.
`erase attack RUN [key=value …] --out DIR` attacks the model of a run that is finished.
"""

from __future__ import annotations

import gc
import inspect
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from erase import attacks, files, processes, resources, saving
from erase.batches import Batches, some
from erase.checkpoint import digest, read_safetensors, write_safetensors
from erase.config import AttackName, SdConfig, arguments, override, parse
from erase.diffusion import folders
from erase.diffusion import stable_diffusion as sd
from erase.diffusion.data import ImageItem, LatentSet, check_images, encode_in_batches, read_folder
from erase.diffusion.losses import forget_objective, remain_objective
from erase.diffusion.parameters import select
from erase.evaluation import classes, generate, grid, nudity, report
from erase.evaluation.generate import PromptRow
from erase.evaluation.stats import mcnemar_exact, wilson
from erase.loop import Look
from erase.method import Method
from erase.methods import builder
from erase.precision import Precision
from erase.runs import (
    STATE,
    bar,
    check_needs,
    check_saliency,
    classified,
    denoising,
    draw_pictures,
    drawn_data,
    drop,
    equip,
    new_report,
    open_folder,
    rehearse,
    run_steps,
    run_time,
    start,
)
from erase.saliency import Mask, load_mask

config_type = SdConfig


AXES = {"forget": "still named as forgotten", "remain": "remain accuracy"}
"""Of a comparison's plot."""
GOALS = {"forget": -1, "remain": 1, "rte_s": -1}
"""Of a comparison's Pareto front: whether less (-1) or more (1) is better."""
ATTACKER = 2**20
"""The first sample of a seed that is an attacker's: no picture of them is trained on or counted."""


@dataclass(frozen=True)
class Plan:
    """Every prompt of a run, resolved before anything is computed."""

    forget: list[str]
    anchors: list[str]
    """One per forget prompt; empty where nothing asks for them."""
    remain: list[str]
    rows: list[PromptRow]
    """What is drawn and counted; forget prompts first."""
    forgotten: list[bool]
    """Per row: does it ask for the erased concept?"""
    earlier: list[str] = field(default_factory=list)
    """Prompts, drawn or left out, of concepts that were forgotten before: they do not come back."""
    forget_images: list[ImageItem] | None = None
    """Given images, instead of drawn ones."""
    remain_images: list[ImageItem] | None = None

    @property
    def words(self) -> list[str]:
        """Every prompt that is embedded."""
        given = [item.prompt for items in (self.forget_images, self.remain_images) for item in items or []]
        return list(dict.fromkeys([*self.forget, *self.anchors, *self.remain, *given]))


def main(
    config: SdConfig,
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
        ValueError: for settings, prompts, models or data that cannot be used.
    """
    config, accelerator, precision, say = start(config, say)
    device = accelerator.device
    build = builder(str(config.method.get("name", "")))
    settings = arguments(config.method, build)
    method = build(**settings)  # refuses values out of range now, not after the saliency
    if method.fresh:
        raise ValueError(f"{config.method['name']} trains new weights, which erase run sd does not do")
    check_needs(build, ("concepts", "denoiser"))
    source = sd.locate(config.model)
    gone = folders.forgotten(source)
    plan = make_plan(config, gone)
    pipe = sd.open_pipeline(source, device)
    sd.check_prompts(pipe, plan.words)
    trained = select(pipe.unet, config.train.parameters)
    check_saliency(config.saliency, build)
    check_evaluators(config, plan)
    if cut := sd.cut_prompts(pipe, [row.prompt for row in plan.rows]):
        say(sd.say_cut(pipe, cut, len(plan.rows)))
    if dry_run:
        say("\n".join(foretell(config, plan, pipe, build, precision, command)))
        return out / "report.html"
    weights = folders.fingerprint(source)
    record = {
        "plan": {
            "forget": plan.forget,
            "anchors": plan.anchors,
            "earlier": plan.earlier,
            "remain": plan.remain,
            "rows": len(plan.rows),
        },
        "base": {"model": config.model, "weights": weights},
        "data": {
            side: {str(item.path): files.sha256(item.path) for item in items}
            for side, items in (("forget", plan.forget_images), ("remain", plan.remain_images))
            if items is not None
        },
    }
    if config.eval.images and config.eval.base is not None:
        generate.check_reuse(config.eval.base)
    if config.eval.attacks:
        check_attacks(config, plan, pipe)
    processes.first(lambda: open_folder(config, out, record, command, resume))
    model, trained_path = out / saving.MODEL, out / "trained.safetensors"
    if resume and processes.first(lambda: saving.finished(out)):
        drop(out, *STATE, trained_path.name)
        say(f"finished before: {draw_report(config, out)}")
        return out / "report.html"
    say(
        f"{config.model}: {sum(p.numel() for p in pipe.unet.parameters() if p.requires_grad):,} weights in "
        f"{len(trained)} tensors learn; forgetting {', '.join(plan.forget)}"
    )

    draw_images(config, plan, pipe, precision, out / "images" / "base", resume, weights, config.eval.base)
    drawn = {"base": weights}

    mask_path = out / "saliency.safetensors"
    if resume and processes.first(trained_path.exists):
        values, stored = read_safetensors(trained_path)
        timing = json.loads(stored["timing"])
        mask = load_mask(mask_path) if mask_path.exists() else None
    else:
        began = time.perf_counter()
        pipe.vae.enable_slicing()  # a picture at a time
        wanted, concepts = config.saliency, None
        if method.edit is not None:
            concepts = sd.concepts(pipe, plan.forget, plan.anchors or [""] * len(plan.forget), ["", *plan.remain])
        forget, remain, null = cache(config, plan, pipe, precision, looks_at(config, method, build))
        data_s = time.perf_counter() - began
        backend = sd.denoiser(pipe, null)
        if config.until is None:
            pipe.vae, pipe.text_encoder = None, None
            gc.collect()

        began = time.perf_counter()
        batches = tuple(
            [] if side is None else some(side, wanted.count, wanted.batch_size, config.seed)
            for side in (forget, remain)
        )
        objective = forget_objective(config.forget.loss, pipe.unet, config.forget.target)
        keeping = remain_objective(config.remain.loss, pipe.unet, config.train.dropout)
        given = equip(
            build, config, backend, objective, keeping, batches, precision, mask_path, resume, concepts=concepts
        )
        mask = given.get("mask")
        saliency_s = time.perf_counter() - began

        if config.train.checkpointing:  # not before: per-sample gradients by vmap cannot have it
            pipe.unet.enable_gradient_checkpointing()
        done = run_steps(
            config,
            backend,
            build(**settings, **given),
            None if forget is None else Batches(forget, config.train.batch_size, config.seed),
            None if remain is None else Batches(remain, config.train.batch_size, config.seed + 1),
            accelerator,
            out,
            resume,
            until=None if config.until is None else looker(config, plan, pipe, precision, out),
        )
        timing = {"data_s": data_s, "saliency_s": saliency_s, **done.timing}
        values = {name: p.detach() for name, p in pipe.unet.named_parameters() if p.requires_grad}
        processes.first(partial(write_safetensors, trained_path, values, {"timing": json.dumps(timing)}))
        del backend, given, objective, forget, remain
    target = saving.hidden({"forget": plan.forget, "anchors": plan.anchors})
    meta = processes.first(partial(saving.provenance, config, preset, source, target, mask, timing["steps"]))
    meta |= {folders.FORGOTTEN: json.dumps(list(dict.fromkeys([*gone, *marks(config, plan)])))}
    processes.first(partial(saving.save, source, values, out, meta, form))
    drop(out, *STATE)
    del pipe, values
    gc.collect()

    if config.eval.images:
        erased = sd.open_pipeline(sd.locate(model), device)
        drawn["erased"] = folders.fingerprint(sd.locate(model))
        draw_images(config, plan, erased, precision, out / "images" / "erased", resume, drawn["erased"])
    result = make_report(config, plan, out, mask, timing, command, drawn)
    if config.until is not None:
        result["until"] = looked(config, out)
    if config.eval.attacks:
        result["robustness"] = attack(config, plan, sd.locate(model), out, accelerator, precision, resume)
    processes.first(lambda: saving.settle(out, form))
    processes.first(lambda: files.write_json(out / "report.json", result))
    drop(out, trained_path.name)
    for line in [*report.verdict(result), *report.robustness_lines(result.get("robustness", {}))]:
        say(line)
    say(f"report: {draw_report(config, out)}")
    return out / "report.html"


# ---------------------------------------------------------------- before anything is computed


def make_plan(config: SdConfig, gone: Collection[str] = ()) -> Plan:
    """Resolve prompts and prompt sets.

    Args:
        config: the settings.
        gone: marks of what the model's weight file says was forgotten before (see `marks`).

    Raises:
        ValueError: for anchors that do not match or are forgotten, a set whose rows are all forgotten, or remain
            images of a forgotten prompt.
    """
    forget, anchors = config.forget.prompts, make_anchors(config)
    if not forget:
        raise ValueError("forget.prompts is empty: name what to erase, such as forget.prompts='a photo of a cat'")
    if config.forget.pictures == "anchor" and config.forget.images is not None:
        raise ValueError("forget.images are not used with forget.pictures=anchor: take one back, or use both")
    rows = expand(config.eval.prompts, config.seed)
    known = {row.prompt for row in rows}
    missing = [p for p in forget if p not in known]
    rows = [*(PromptRow(p, config.seed) for p in missing), *rows]
    axis = config.forget.axis
    labelled = [*rows, *expand(config.remain.prompts, config.seed)]
    erased, before = (
        {label_of(row, axis) for row in labelled if row.prompt in prompts} - {None}
        for prompts in (forget, config.forget.earlier)
    )

    def is_forgotten(row: PromptRow) -> bool:
        return row.prompt in forget or label_of(row, axis) in erased

    def is_gone(row: PromptRow) -> bool:
        """Not by this run."""
        known = row.prompt in config.forget.earlier or label_of(row, axis) in before
        return not is_forgotten(row) and (known or not marks_of(row).isdisjoint(gone))

    remain = [
        row.prompt for row in expand(config.remain.prompts, config.seed) if not is_forgotten(row) and not is_gone(row)
    ]
    if not remain:
        raise ValueError("remain.prompts holds nothing but forgotten prompts: name what must stay")
    rows = sorted(rows, key=lambda row: (not is_forgotten(row), not is_gone(row)))
    plan = Plan(
        list(forget),
        list(anchors),
        list(dict.fromkeys(remain)),
        rows,
        [is_forgotten(row) for row in rows],
        list(dict.fromkeys(row.prompt for row in labelled if is_gone(row))),
        given_images(config.forget.images, forget),
        given_images(config.remain.images, remain),
    )
    away = {*forget, *plan.earlier}
    for what, prompts in (
        ("forget.anchors", anchors),
        ("remain.images", [item.prompt for item in plan.remain_images or []]),
    ):
        lost = [prompt for prompt in prompts if prompt in away or saving.mark(prompt) in gone]
        if lost:
            raise ValueError(f"{what} has {lost[0]!r}, which is to be forgotten or was before: choose what stays")
    anchors_of(plan, [item.prompt for item in plan.forget_images or []])
    return plan


def make_anchors(config: SdConfig) -> list[str]:
    """One per forget prompt; none where neither the loss nor the method looks at them.

    Raises:
        ValueError: for anchors that do not match, or are missing.
    """
    forget, anchors, pictures = config.forget.prompts, config.forget.anchors, config.forget.pictures
    takes = inspect.signature(builder(str(config.method.get("name", "")))).parameters
    loss = config.forget.loss if "forget" in takes else None
    if loss in ("redirect", "surrogate") or ("concepts" in takes and anchors):
        if len(anchors) == 1:
            anchors = anchors * len(forget)
        if len(anchors) != len(forget):
            raise ValueError(
                f"forget.anchors has {len(anchors)} prompts for {len(forget)} forget prompts: "
                "give one for each, or one for all"
            )
        if loss == "surrogate" and pictures != "anchor":
            raise ValueError(
                f"forget.loss=surrogate learns from pictures of the anchors: set forget.pictures=anchor; got {pictures}"
            )
        return list(anchors)
    if pictures != "own":
        what = f"method {config.method['name']}" if loss is None else f"forget.loss={loss}"
        raise ValueError(f"forget.pictures={pictures} needs anchors, and {what} has none: own")
    return []


def marks_of(row: PromptRow) -> set[str]:
    """By which a row is known in the weight file of a model that forgot it: its prompt, its object, its style."""
    names = [row.prompt, *(f"{axis}: {label_of(row, axis)}" for axis in ("object", "style") if label_of(row, axis))]
    return {saving.mark(name) for name in names}


def marks(config: SdConfig, plan: Plan) -> list[str]:
    """Of all that this run forgets, and of what was named as forgotten before: prompts, and labels on the axis."""
    axis = config.forget.axis
    prompts = [*plan.forget, *config.forget.earlier]
    rows = [*plan.rows, *expand(config.remain.prompts, config.seed)]
    labels = dict.fromkeys(label_of(row, axis) for row in rows if row.prompt in prompts)
    return [saving.mark(name) for name in (*prompts, *(f"{axis}: {label}" for label in labels if label))]


def looks_at(config: SdConfig, method: Method, build: Callable[..., Method]) -> tuple[bool, bool]:
    """Whether a run learns from pictures of what is forgotten, and of what stays; those alone are drawn."""
    takes = inspect.signature(build).parameters
    masked = config.saliency.kind != "none" and "mask" in takes
    return method.forget is not None or masked, method.remain is not None or masked or "fisher" in takes


def foretell(
    config: SdConfig, plan: Plan, pipe: Any, build: Callable[..., Method], precision: Precision, command: str
) -> list[str]:
    """What the run would learn, hold and do."""
    unet = pipe.unet.config
    text = torch.zeros(1, pipe.tokenizer.model_max_length, unet.cross_attention_dim, device=pipe.device)
    latents = torch.zeros(1, unet.in_channels, unet.sample_size, unet.sample_size, device=pipe.device)
    sample = {"mean": latents, "std": latents, "cond": text}
    if plan.anchors:
        sample["anchor"] = text
    own, drawn = plan.forget_images, len(plan.forget) * config.forget.count
    parts = {"own": drawn if own is None else len(own), "anchor": drawn}
    forget = sum(parts.values()) if config.forget.pictures == "both" else parts[config.forget.pictures]
    remain = len(plan.remain) * config.remain.count if plan.remain_images is None else len(plan.remain_images)
    sides = looks_at(config, build(**arguments(config.method, build)), build)
    forget, remain = (count if looked else 0 for count, looked in zip((forget, remain), sides, strict=True))
    if config.until is None:
        pipe.vae, pipe.text_encoder = None, None  # as they will be
        gc.collect()
    more = [f"pictures: {len(plan.rows) * config.eval.images} of each model, {config.draw.steps} sampler steps each"]
    if config.until is not None:
        stay = sum(p.nbytes for part in (pipe.vae, pipe.text_encoder) for p in part.parameters())
        more.append(
            f"looks: {2 * config.until.images} pictures every {config.until.every} steps; the VAE and the text encoder "
            f"stay for them, {stay / 1e9:.3f} GB"
        )

    backend = sd.denoiser(pipe, text)
    return rehearse(
        config, backend, build, partial(denoising, config), sample, (forget, remain), precision, more, command
    )


def given_images(folder: Path | None, prompts: Sequence[str]) -> list[ImageItem] | None:
    """A folder's images; without prompts of their own they have the only one there is."""
    if folder is None:
        return None
    items = read_folder(folder, prompts[0] if len(prompts) == 1 else None)
    check_images(items)
    return items


def anchors_of(plan: Plan, words: Sequence[str]) -> dict[str, str]:
    """The anchor of each forget prompt, those of given images among them; empty without a redirect.

    Raises:
        ValueError: for a given image whose prompt has no anchor.
    """
    found = dict(zip(plan.forget, plan.anchors, strict=True)) if plan.anchors else {}
    unknown = [word for word in words if found and word not in found]
    if unknown and len(set(plan.anchors)) > 1:
        raise ValueError(f"the forget image with prompt {unknown[0]!r} has no anchor: add the prompt to forget.prompts")
    return {**found, **dict.fromkeys(unknown, plan.anchors[0] if plan.anchors else "")}


def expand(prompts: Sequence[str], seed: int) -> list[PromptRow]:
    """Prompts as rows; a name or path of a prompt set gives the set's rows."""
    rows: list[PromptRow] = []
    for prompt in prompts:
        if prompt in resources.list_prompts() or prompt.endswith((".csv", ".txt")):
            rows += generate.read_prompts(resources.prompt_path(prompt))
        else:
            rows.append(PromptRow(prompt, seed))
    return rows


def label_of(row: PromptRow, axis: str | None) -> str | None:
    """The row's label on the axis that is erased."""
    return None if axis is None else row.object if axis == "object" else row.style


def check_evaluators(config: SdConfig, plan: Plan) -> None:
    """Find out now, not after the training, that an evaluator cannot run.

    Raises:
        ValueError: for an unknown counting preset, a classifier that cannot be loaded, or a prompt of which it
            is not known what the classifier should see.
    """
    if config.until is not None:
        check_until(config, plan)
    if not (config.eval.images or config.until or config.eval.attacks):
        return
    if config.eval.nudity is not None:
        count_preset(config)
    if config.eval.classifier is not None:
        known = classes.labels_of(resources.tiny_path(config.eval.classifier))
        if paired(plan.rows, known):
            known = tuple(label.split("/")[0 if config.forget.axis != "style" else 1] for label in known)
        for row in plan.rows:
            label = label_of(row, config.forget.axis or "object")
            if label not in known:
                raise ValueError(
                    f"eval.classifier needs to know what a picture should show; the prompt {row.prompt!r} is labelled "
                    f"{label!r}, the classifier knows {', '.join(dict.fromkeys(known))}: use a prompt set with such "
                    "object (and style) columns"
                )


def check_until(config: SdConfig, plan: Plan) -> None:
    """Find out now that looks at the model could tell nothing.

    Raises:
        ValueError: for pictures that nothing judges, or a share of remaining ones that there are none of.
    """
    assert config.until is not None
    if config.eval.classifier is None and config.eval.nudity is None:
        raise ValueError("until needs eval.classifier or eval.nudity, to judge pictures by")
    if config.until.remain is not None and (config.eval.classifier is None or all(plan.forgotten)):
        raise ValueError(
            "until.remain needs eval.classifier, and prompts in eval.prompts that are not forgotten: give them, or "
            "until.remain=null"
        )


def check_attacks(config: SdConfig, plan: Plan, pipe: Any) -> None:
    """Find out now, not after the training, that an attack cannot be made.

    Raises:
        ValueError: for pictures that nothing judges, other words that there are none of, a prompt without the learned
            word, parameters that the model has not, or a batch that does not divide over the processes.
    """
    names, wanted = config.eval.attacks, config.attack
    if config.eval.classifier is None and config.eval.nudity is None:
        raise ValueError("eval.attacks need eval.classifier or eval.nudity, to judge pictures by")
    if "paraphrases" in names:
        other_words(config, plan)
    if "inversion" in names:
        attacks.check_word(pipe, wanted.inversion.prompt)
    if "relearn" in names:
        chosen = [name for name, p in pipe.unet.named_parameters() if p.requires_grad]
        select(pipe.unet, wanted.relearn.parameters)
        for name, p in pipe.unet.named_parameters():
            p.requires_grad_(name in chosen)
    for name, size in (("inversion", wanted.inversion.batch_size), ("relearn", wanted.relearn.batch_size)):
        if name in names and size % processes.world():
            raise ValueError(f"attack.{name}.batch_size {size} does not divide over {processes.world()} processes")


def paired(rows: Sequence[PromptRow], labels: Sequence[str]) -> bool:
    """Whether rows and a classifier's labels both tell object and style."""
    return all(row.style is not None for row in rows) and all("/" in label for label in labels)


# ---------------------------------------------------------------- data


def cache(
    config: SdConfig, plan: Plan, pipe: Any, precision: Precision, wanted: tuple[bool, bool] = (True, True)
) -> tuple[LatentSet | None, LatentSet | None, Tensor]:
    """Latents and embeddings of both sides, computed once, where wanted; and the empty prompt's embedding."""
    res = sd.resolution(pipe)

    def side(
        prompts: Sequence[str], items: list[ImageItem] | None, count: int, what: str
    ) -> tuple[list[str], Tensor, Tensor | None]:
        if items is not None:
            mean, std = encode_in_batches(items, lambda x: sd.encode(pipe, x), res)
            return [item.prompt for item in items], mean, std
        words = [p for p in prompts for _ in range(count)]
        samples = [i for _ in prompts for i in range(count)]
        return words, drawn_latents(config, pipe, precision, words, samples, what), None

    forget_words: list[str] = []
    means: list[Tensor] = []
    forget_std: Tensor | None = None
    if wanted[0] and config.forget.pictures != "anchor":
        forget_words, mean, forget_std = side(plan.forget, plan.forget_images, config.forget.count, "forget")
        means.append(mean)
    if wanted[0] and config.forget.pictures != "own":
        # What the forget prompts should become: the noisy pictures that the erased model will pass through.
        _, mean, _ = side(plan.anchors, None, config.forget.count, "anchor")
        forget_words += [word for word in plan.forget for _ in range(config.forget.count)]
        means.append(mean)
        if forget_std is not None:
            forget_std = torch.cat([forget_std, torch.zeros_like(mean)])
    kept: tuple[list[str], Any, Tensor | None] = ([], None, None)
    if wanted[1]:
        kept = side(plan.remain, plan.remain_images, config.remain.count, "remain")
    remain_words, remain_mean, remain_std = kept
    anchor_of = anchors_of(plan, forget_words)
    distinct = list(dict.fromkeys([*forget_words, *anchor_of.values(), *remain_words, ""]))
    place = {prompt: i for i, prompt in enumerate(distinct)}
    table = sd.embed(pipe, distinct)

    def rows(words: Sequence[str]) -> Tensor:
        return torch.tensor([place[w] for w in words])

    forget, remain = None, None
    if wanted[0]:
        anchors = rows([anchor_of[w] for w in forget_words]) if anchor_of else None
        forget = LatentSet(torch.cat(means), rows(forget_words), table, forget_std, anchors)
    if wanted[1]:
        remain = LatentSet(remain_mean, rows(remain_words), table, remain_std)
    return forget, remain, table[place[""]].unsqueeze(0)


def drawn_latents(
    config: SdConfig, pipe: Any, precision: Precision, words: Sequence[str], samples: Sequence[int], what: str
) -> Tensor:
    """What the model draws for prompts, one sample of the run's seed each, `[N, C, H, W]`, with a progress bar."""
    generators = [generate.image_generator(config.seed, i) for i in samples]

    def draw(part: slice) -> Tensor:
        return sd.draw_latents(
            pipe,
            words[part],
            generators[part],
            steps=config.draw.steps,
            guidance=config.draw.guidance,
            batch_size=config.draw.batch_size,
            autocast=precision.drawing,
        )

    return drawn_data(draw, len(words), config.draw.batch_size, what)


# ---------------------------------------------------------------- evaluation


def draw_images(
    config: SdConfig,
    plan: Plan,
    pipe: Any,
    precision: Precision,
    out: Path,
    resume: bool,
    weights: dict[str, str],
    reuse: Path | None = None,
) -> None:
    """The evaluation's pictures of one model: the same rows, seeds and settings for base and erased."""
    if not config.eval.images:
        return
    draw_rows(config, plan.rows, config.eval.images, pipe, precision, out, resume, {"weights": weights}, reuse)


def draw_rows(
    config: SdConfig,
    rows: Sequence[PromptRow],
    images: int,
    pipe: Any,
    precision: Precision,
    out: Path,
    resume: bool,
    made: Mapping[str, Any],
    reuse: Path | None = None,
) -> None:
    """Pictures of a model by the run's settings; `made` says what else they depend on."""
    settings: dict[str, Any] = {
        **made,
        "draw": asdict(config.draw),
        "precision": config.precision,
        "scheduler": type(pipe.scheduler).__name__,
    }
    if cut := sd.cut_prompts(pipe, [row.prompt for row in rows]):
        settings["truncated_prompts"] = cut
    draw_pictures(
        sd.sampler(pipe, steps=config.draw.steps, guidance=config.draw.guidance, autocast=precision.drawing),
        rows,
        out,
        images=images,
        batch_size=config.draw.batch_size,
        resume=resume,
        settings=settings,
        reuse=reuse,
    )


def count_preset(config: SdConfig) -> nudity.CountPreset:
    """Which detections count.

    Raises:
        ValueError: unless a known preset, or classes and a threshold, are given.
    """
    wanted = config.eval.nudity
    assert wanted is not None
    if wanted.preset is not None:
        if wanted.preset not in nudity.PRESETS:
            raise ValueError(f"no counting preset {wanted.preset!r}; presets: {', '.join(nudity.PRESETS)}")
        return nudity.PRESETS[wanted.preset]
    if not wanted.classes or wanted.threshold is None:
        raise ValueError(f"eval.nudity needs a preset ({', '.join(nudity.PRESETS)}), or classes and threshold")
    return nudity.custom_preset(wanted.classes, wanted.threshold)


def make_report(
    config: SdConfig,
    plan: Plan,
    out: Path,
    mask: Mask | None,
    timing: dict[str, Any],
    command: str,
    drawn: dict[str, dict[str, str]],
) -> dict[str, Any]:
    """The keys of a report: see the README.

    Raises:
        ValueError: for pictures that are not those of `plan.rows`, or not by the weights of `drawn`, in order.
    """
    target = {"forget": plan.forget, "anchors": plan.anchors, "earlier": plan.earlier}
    result = new_report(config, command, target, mask, timing)
    if not config.eval.images:
        return result
    flags: dict[str, list[bool | None]] = {}
    right: dict[str, dict[str, list[bool]]] = {}
    for when, folder in (("before", out / "images" / "base"), ("after", out / "images" / "erased")):
        paths = generate.check_images(folder, plan.rows, config.eval.images, drawn[folder.name])
        result[when]["pictures"] = report.origin(folder)
        wanted = [forgotten for forgotten in plan.forgotten for _ in range(config.eval.images)]
        if config.eval.nudity is not None:
            found = look_for_nudity(config, paths, folder, strict=False)
            result[when]["nudity"], flags[when] = count_nudity(found, count_preset(config), plan, config.eval.images)
        if config.eval.classifier is not None:
            result[when]["classes"], right[when] = count_classes(config, plan, paths, wanted)
    if flags:
        both = [(a, b) for a, b in zip(flags["before"], flags["after"], strict=True) if None not in (a, b)]
        p = mcnemar_exact([bool(a) for a, _ in both], [bool(b) for _, b in both]) if both else None
        result["paired"]["nudity_mcnemar_p"] = p
    for side in ("forget", "earlier", "remain"):
        if right and right["before"][side]:
            result["paired"][f"{side}_mcnemar_p"] = mcnemar_exact(right["before"][side], right["after"][side])
    return result


def look_for_nudity(config: SdConfig, paths: list[Path], folder: Path, *, strict: bool = True) -> nudity.Detections:
    """Raw detections of a folder's pictures, kept beside it.

    Raises:
        ValueError: if the detector failed on a picture: it is not known to be safe. Unless `strict`, such pictures
            are there as failed.
    """
    kept = folder.with_name(f"{folder.name}-detections.json")
    if processes.first(kept.exists):
        return whole(nudity.load_detections(kept), strict)
    channels = config.eval.nudity.channels if config.eval.nudity is not None else "corrected"
    with bar(len(paths), f"detecting: {folder.name}") as shown:

        def detect(part: Sequence[Path]) -> nudity.Detections:
            return nudity.detect(part, channels=channels, progress=lambda done, total: shown.update(world))

        world = processes.world()
        parts = processes.dealt(detect, processes.shares(paths))
    found = replace(parts[0], images=tuple(image for part in parts for image in part.images))
    processes.first(lambda: nudity.save_detections(found, kept))
    return whole(found, strict)


def whole(found: nudity.Detections, strict: bool) -> nudity.Detections:
    """The same, if it is strict: without pictures on which the detector failed."""
    failed = [image for image in found.images if image.error is not None]
    if strict and failed:
        raise ValueError(f"the detector failed on {len(failed)} pictures, first {failed[0].file}: {failed[0].error}")
    return found


def count_nudity(
    found: nudity.Detections, preset: nudity.CountPreset, plan: Plan, per_prompt: int
) -> tuple[dict[str, Any], list[bool | None]]:
    """The count over pictures of the erased concept, and for every prompt; flags of the former, in order.

    A picture on which the detector failed is in no count and its flag is None, as is the count of its prompt.
    """
    groups: dict[str, tuple[Any, ...]] = {}
    erased: tuple[Any, ...] = ()
    for number, (row, gone) in enumerate(zip(plan.rows, plan.forgotten, strict=True)):
        group = found.images[number * per_prompt : (number + 1) * per_prompt]
        groups[row.prompt] = groups.get(row.prompt, ()) + tuple(group)
        erased += tuple(group) if gone else ()
    part = replace(found, images=erased)
    result = nudity.count(part, preset)
    result["by_prompt"] = {}
    for prompt, group in groups.items():
        counted = nudity.count(replace(found, images=group), preset)
        result["by_prompt"][prompt] = None if counted["errors"] else counted["flagged"]
    flags = nudity.flags(part, preset)
    return result, [flags.get(image.file) for image in erased]


def count_classes(
    config: SdConfig, plan: Plan, paths: list[Path], forgotten: list[bool]
) -> tuple[dict[str, Any], dict[str, list[bool]]]:
    """Forget and remain accuracy, per label and per pair; correctness of each side's pictures, in order."""
    assert config.eval.classifier is not None
    guess = classified(paths, resources.tiny_path(config.eval.classifier))
    rows = [row for row in plan.rows for _ in range(config.eval.images)]
    pairs = paired(rows, guess.labels)
    axis = config.forget.axis or "object"
    along = along_axis(config, plan, guess)
    across = classes.axis(guess, 1 if axis == "object" else 0) if pairs else None
    expected = [str(label_of(row, axis)) for row in rows]
    result: dict[str, Any] = {"classifier": guess.provenance, "axis": axis, "pairs": pairs}
    sides = ["forget" if gone else side_of(plan, row) for row, gone in zip(rows, forgotten, strict=True)]
    for side in ("forget", "earlier", "remain"):
        index = [i for i, found in enumerate(sides) if found == side]
        if side == "earlier" and not index:
            continue
        result[side] = classes.accuracy(along.take(index), [expected[i] for i in index]) if index else None
        if pairs and index:
            both = [f"{rows[i].object}/{rows[i].style}" for i in index]
            result[f"{side}_pairs"] = classes.accuracy(guess.take(index), both)
    result["per_prompt"] = {}
    for row, gone in {row.prompt: (row, gone) for row, gone in zip(plan.rows, plan.forgotten, strict=True)}.values():
        index = [i for i, other in enumerate(rows) if other.prompt == row.prompt]
        score = classes.accuracy(along.take(index), [expected[i] for i in index])
        score |= {"object": row.object, "style": row.style}
        score["side"] = "forget" if row.prompt in plan.forget else "form" if gone else side_of(plan, row)
        if across is not None:
            other = row.style if axis == "object" else row.object
            score["other_accuracy"] = classes.accuracy(across.take(index), [str(other)] * len(index))["accuracy"]
            score["pair_accuracy"] = classes.accuracy(guess.take(index), [f"{row.object}/{row.style}"] * len(index))[
                "accuracy"
            ]
        result["per_prompt"][row.prompt] = score
    shown = along.predicted
    names = sorted({shown[i] for i, gone in enumerate(forgotten) if gone})
    gone_total = sum(forgotten)
    result["forget_shows"] = {
        name: sum(shown[i] == name for i, gone in enumerate(forgotten) if gone) / gone_total for name in names
    }
    right: dict[str, list[bool]] = {side: [] for side in ("forget", "earlier", "remain")}
    for i, side in enumerate(sides):
        right[side].append(shown[i] == expected[i])
    return result, right


def side_of(plan: Plan, row: PromptRow) -> str:
    """Of a row that this run does not forget."""
    return "earlier" if row.prompt in plan.earlier else "remain"


def along_axis(config: SdConfig, plan: Plan, guess: classes.ClassPredictions) -> classes.ClassPredictions:
    """Predictions of the labels that the run forgets some of: of composite ones, the half that it names."""
    if not paired(plan.rows, guess.labels):
        return guess
    return classes.axis(guess, 1 if config.forget.axis == "style" else 0)


def concept(config: SdConfig, plan: Plan) -> list[str]:
    """Labels of what is forgotten, in order; none where prompts have no labels."""
    both = zip(plan.rows, plan.forgotten, strict=True)
    labels = [label_of(row, config.forget.axis or "object") for row, gone in both if gone]
    return [label for label in dict.fromkeys(labels) if label is not None]


def judged(config: SdConfig, plan: Plan, folder: Path) -> tuple[list[bool], list[str] | None]:
    """Of a folder's pictures, in order: whether each shows what is forgotten, and the labels that a classifier gives.

    It is the classifier's word where there is one, else the detector's.
    """
    paths = [folder / row.file for row in generate.read_manifest(folder)]
    if config.eval.classifier is None:
        return list(nudity.flags(look_for_nudity(config, paths, folder), count_preset(config)).values()), None
    seen = along_axis(config, plan, classified(paths, resources.tiny_path(config.eval.classifier))).predicted
    gone = concept(config, plan)
    return [name in gone for name in seen], list(seen)


def share(shown: Sequence[bool]) -> dict[str, Any]:
    """How many of N pictures show the concept: `n, shown, rate, ci95` (Wilson; fractions of 1)."""
    n, hits = len(shown), sum(shown)
    return {"n": n, "shown": hits, "rate": hits / n, "ci95": list(wilson(hits, n))}


# ---------------------------------------------------------------- looks between steps


def looker(config: SdConfig, plan: Plan, pipe: Any, precision: Precision, out: Path) -> Callable[[int], Look | None]:
    """What the loop asks after each step: at some of them it draws a few pictures, judges them and drops them."""
    wanted = config.until
    assert wanted is not None
    rows: list[PromptRow] = []
    for side in (True, False):
        both = zip(plan.rows, plan.forgotten, strict=True)
        those = [row for row, gone in both if gone is side and row.prompt not in plan.earlier]
        spread = [those[k * len(those) // wanted.images] for k in range(wanted.images)] if those else []
        # Seeds apart from the evaluation's: the pictures that end a run are not those that it is counted by.
        rows += [replace(row, seed=(row.seed + 1 + k) % 2**32) for k, row in enumerate(spread)]
    expected = [label_of(row, config.forget.axis or "object") for row in rows[wanted.images :]]

    def look(done: int) -> Look | None:
        if done % wanted.every or done == config.train.steps:  # after the last step there is the evaluation
            return None
        work = Path(processes.first(lambda: tempfile.mkdtemp(prefix=".until.", suffix=".tmp", dir=out)))
        folder = work / f"after step {done}"
        draw_rows(config, rows, 1, pipe, precision, folder, False, {})
        shown, labels = judged(config, plan, folder)
        processes.first(lambda: shutil.rmtree(work))
        forget = sum(shown[: wanted.images]) / wanted.images
        remain = None
        if labels is not None and expected:
            remain = sum(a == b for a, b in zip(labels[wanted.images :], expected, strict=True)) / len(expected)
        kept = wanted.remain is None or (remain is not None and remain >= wanted.remain)
        return Look({"until_forget": forget, "until_remain": remain}, forget <= wanted.forget and kept)

    return look


def looked(config: SdConfig, out: Path) -> dict[str, Any]:
    """Whether a run ended before its last step, why, and all that its looks saw; from `metrics.jsonl`."""
    wanted = config.until
    assert wanted is not None
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    looks = [row for row in rows if "until_forget" in row]
    done, steps = rows[-1]["step"] + 1, config.train.steps
    why = f"none of {len(looks)} looks was enough: all {steps} steps were done"
    if done < steps:
        last = looks[-1]
        right = "" if last["until_remain"] is None else f", {last['until_remain']:.3g} of the others' were right"
        why = f"after step {done} of {steps} {last['until_forget']:.3g} of its pictures showed the concept{right}"
    return {
        **asdict(wanted),
        "ended": done if done < steps else None,
        "why": why,
        "looks": {
            str(row["step"] + 1): {"forget": row["until_forget"], "remain": row["until_remain"]} for row in looks
        },
        "seconds": sum(row["look_seconds"] for row in looks),
    }


# ---------------------------------------------------------------- attacks


def other_words(config: SdConfig, plan: Plan) -> list[PromptRow]:
    """The paraphrases of what is forgotten, without the forget prompts themselves.

    Of labelled rows they are those of the forgotten labels; where forget prompts have no label, those whose label one
    of them names.

    Raises:
        ValueError: if there are none.
    """
    axis, labels = config.forget.axis or "object", concept(config, plan)

    def of_concept(row: PromptRow) -> bool:
        label = label_of(row, axis)
        return label is None or (label in labels if labels else any(label in prompt for prompt in plan.forget))

    rows = [row for row in expand(config.attack.paraphrases.prompts, config.seed) if row.prompt not in plan.forget]
    found = [row for row in rows if of_concept(row)]
    if not found:
        raise ValueError(
            f"attack.paraphrases.prompts has {len(rows)} prompts, none of them of {', '.join(labels or plan.forget)}: "
            "name prompts or a prompt set, such as photos-paraphrases"
        )
    return found


def attack(
    config: SdConfig,
    plan: Plan,
    erased: Any,
    out: Path,
    accelerator: Accelerator,
    precision: Precision,
    resume: bool,
) -> dict[str, Any]:
    """A report's `robustness`: how often each attack brings the concept back, and how often it would on the base.

    Pictures and learned words are kept in the folder `attacks` of `out`.
    """
    names, wanted, top = config.eval.attacks, config.attack, out / "attacks"
    found: dict[str, Any] = {
        "concept": concept(config, plan) or plan.forget,
        "judge": config.eval.classifier or count_preset(config).name,
        **{name: {} for name in names},
    }
    began = time.perf_counter()
    source = sd.locate(config.model)
    learn = "inversion" in names or "relearn" in names
    data: LatentSet | None = None
    for when, where in (("base", source), ("erased", erased)):
        if when == "base" and not (wanted.control or learn):
            continue
        pipe = sd.open_pipeline(where, accelerator.device)
        made = {"weights": folders.fingerprint(where)}
        look = partial(draw_and_judge, config, plan, pipe, precision, resume)
        if data is None and learn:
            data = concept_data(config, plan, pipe, precision)
        if when == "base" and not wanted.control:
            continue
        if "paraphrases" in names:
            rows = other_words(config, plan)
            shown = look(rows, wanted.paraphrases.images, top / "paraphrases" / when, made)
            found["paraphrases"] |= {"prompts": len(rows), when: share(shown)}
            by_prompt = found["paraphrases"].setdefault("by_prompt", {})
            for number, row in enumerate(rows):
                part = shown[number * wanted.paraphrases.images : (number + 1) * wanted.paraphrases.images]
                by_prompt.setdefault(row.prompt, {})[when] = share(part)
        if "inversion" in names:
            assert data is not None
            path = top / "inversion" / f"{when}.safetensors"
            if not (resume and processes.first(path.exists)):
                with bar(wanted.inversion.steps, f"learning a word: {when}") as steps:
                    advance = partial(count_step, steps)
                    word = attacks.learn_word(pipe, data, wanted.inversion, config.seed, accelerator, advance)
                processes.first(partial(write_safetensors, path, {"word": word}, {"prompt": wanted.inversion.prompt}))
            word = read_safetensors(path)[0]["word"].to(pipe.device)
            row = PromptRow(wanted.inversion.prompt, config.seed)
            with attacks.meaning(pipe, word):
                shown = look(
                    [row],
                    wanted.inversion.images,
                    top / "inversion" / when,
                    {**made, "word": digest({"word": word})},
                )
            found["inversion"] |= {**asdict(wanted.inversion), when: share(shown)}
    if "relearn" in names:
        assert data is not None
        curve: list[dict[str, Any]] = []
        asked = [row for row in plan.rows if row.prompt in plan.forget]

        def after(done: int) -> None:
            made_so = {**made, "relearn": {**asdict(wanted.relearn), "count": wanted.count, "steps": done}}
            shown = look(asked, wanted.relearn.images, top / "relearn" / f"{done:05d}", made_so)
            curve.append({"steps": done, **share(shown)})

        attacks.relearn(pipe, data, wanted.relearn, config.seed, after, accelerator)
        found["relearn"] = {**asdict(wanted.relearn), "curve": curve}
    return {**found, "seconds": time.perf_counter() - began}


def count_step(shown: Any, row: Mapping[str, Any]) -> None:
    """A step further on a progress bar."""
    shown.update()


def concept_data(config: SdConfig, plan: Plan, pipe: Any, precision: Precision) -> LatentSet:
    """What attackers learn from: pictures of the concept with their prompts, from a model that draws it."""
    if plan.forget_images is not None:
        words = [item.prompt for item in plan.forget_images]
        mean, std = encode_in_batches(plan.forget_images, lambda x: sd.encode(pipe, x), sd.resolution(pipe))
    else:
        prompts, std = plan.forget, None
        words = [prompts[k % len(prompts)] for k in range(config.attack.count)]
        samples = [ATTACKER + k // len(prompts) for k in range(config.attack.count)]
        mean = drawn_latents(config, pipe, precision, words, samples, "attacker's")
    distinct = list(dict.fromkeys(words))
    return LatentSet(mean, torch.tensor([distinct.index(word) for word in words]), sd.embed(pipe, distinct), std)


def draw_and_judge(
    config: SdConfig,
    plan: Plan,
    pipe: Any,
    precision: Precision,
    resume: bool,
    rows: Sequence[PromptRow],
    images: int,
    folder: Path,
    made: Mapping[str, Any],
) -> list[bool]:
    """Whether each of some pictures shows the concept."""
    draw_rows(config, rows, images, pipe, precision, folder, resume, made)
    return judged(config, plan, folder)[0]


def attack_run(
    run: Path, words: Sequence[str], out: Path, *, resume: bool = False, command: str = "", say: Any = print
) -> Path:
    """`erase attack`: attack the model of a finished run; the path of the report.

    Args:
        run: its folder.
        words: `key=value` settings, of the attacks and of how pictures are judged; all attacks unless they say so.
        out: the folder to write.
        resume: whether to go on with what it holds.
        command: as it was typed.
        say: where lines go.

    Raises:
        ValueError: for a folder that is no finished run of `erase run sd`, or settings that would change the run.
    """
    record = files.read_json(run / "run.json") if (run / "run.json").exists() else {}
    if record.get("config", {}).get("pipeline") != "sd" or "plan" not in record or not (run / "report.json").exists():
        raise ValueError(f"{run} is no finished run of erase run sd")
    if not (run / saving.MODEL).exists():
        raise ValueError(
            f"{run} keeps no model: erase apply {record['config']['model']} {run / saving.DELTA} "
            f"--out {run / saving.MODEL} makes it again"
        )
    for word in words:
        key = word.partition("=")[0].strip()
        if not key.startswith(("attack.", "eval.attacks", "eval.classifier", "eval.nudity", "precision")):
            raise ValueError(
                f"{key} belongs to the run; erase attack takes attack.*, eval.attacks, eval.classifier, eval.nudity "
                "and precision"
            )
    every: list[AttackName] = ["paraphrases", "inversion", "relearn"]
    kept = override(record["config"], words)
    kept["eval"]["attacks"] = kept["eval"].get("attacks") or every
    config, accelerator, precision, say = start(parse(kept, SdConfig), say)
    source, erased = sd.locate(config.model), sd.locate(run / saving.MODEL)
    if folders.fingerprint(source) != record["base"]["weights"]:
        raise ValueError(f"{config.model} is not the model that {run} began with any more")
    plan = make_plan(config, folders.forgotten(source))
    check_evaluators(config, plan)
    check_attacks(config, plan, sd.open_pipeline(source))
    about = {"base": record["base"], "erased": folders.fingerprint(erased)}
    processes.first(lambda: open_folder(config, out, about, command, resume))
    target = {"forget": plan.forget, "anchors": plan.anchors, "earlier": plan.earlier}
    result = new_report(config, command, target, None, {})
    result["robustness"] = attack(config, plan, erased, out, accelerator, precision, resume)
    processes.first(lambda: files.write_json(out / "report.json", result))
    for line in report.robustness_lines(result["robustness"]):
        say(line)
    say(f"report: {processes.first(lambda: report.write_html(out))}")
    return out / "report.html"


def summary(report: dict[str, Any]) -> dict[str, float | str | None]:
    """A report as the numbers that comparisons are made of.

    `earlier`, where there are such: share of what was forgotten before that shows all that was asked; `forget`: share
    of the forget prompts' pictures that still show the concept (the classifier's word, else the detector's); `forms`:
    the same for its other forms; `kept`: share of all these that still show the other half of what was asked (the
    style, where an object was erased); `remain`: accuracy on the other prompts of the forget prompts' kind (the plain
    ones, where a plain object was erased), `drop` from the base and `worst` of one prompt, in points; `pairs_drop`:
    the mean drop of all other pairs, likewise; `shows`: what the pictures of the erased concept, other forms included,
    show most.
    """
    out: dict[str, float | str | None] = {}
    seen = {when: report[when].get("nudity") for when in ("before", "after")}
    before, after = report["before"].get("classes"), report["after"].get("classes")
    if after is not None:
        rows, old = after["per_prompt"], before["per_prompt"]
        other = "style" if after["axis"] == "object" else "object"
        kinds = {row[other] for row in rows.values() if row["side"] == "forget"}
        like = [p for p, row in rows.items() if row["side"] == "remain" and row[other] in kinds]
        rest = [p for p, row in rows.items() if row["side"] == "remain" and row[other] not in kinds]
        forms = [row["accuracy"] for row in rows.values() if row["side"] == "form"]
        drops = [100 * (old[p]["accuracy"] - rows[p]["accuracy"]) for p in like]
        out["forget"] = mean([row["accuracy"] for row in rows.values() if row["side"] == "forget"])
        out["forms"] = mean(forms)
        own = [row for row in rows.values() if row["side"] in ("forget", "form")]
        out["kept"] = mean([row["other_accuracy"] for row in own if after["pairs"]])
        out["remain"] = mean([rows[p]["accuracy"] for p in like])
        out["drop"], out["worst"] = mean(drops), max(drops, default=None)
        key = "pair_accuracy" if after["pairs"] else "accuracy"
        out["pairs_drop"] = mean([100 * (old[p][key] - rows[p][key]) for p in rest])
        out["shows"] = max(after["forget_shows"], key=lambda name: after["forget_shows"][name])
        if "earlier" in after:
            out["earlier"] = after.get("earlier_pairs", after["earlier"])["accuracy"]
    if seen["after"] is not None:
        for name, count in (("flagged_before", seen["before"]), ("flagged", seen["after"])):
            out[name] = None if count.get("errors") else count["rate"]  # who was not looked at is not safe
        out.setdefault("forget", out["flagged"])
    out |= run_time(report["timing"])
    robust = report.get("robustness") or {}
    for name, column in (("paraphrases", "paraphrased"), ("inversion", "inverted")):
        if name in robust:
            out[column] = robust[name]["erased"]["rate"]
    for point in robust.get("relearn", {}).get("curve", []):
        out[f"relearned_{point['steps']}"] = point["rate"]
    if "until" in report:
        out["steps"] = report["timing"]["steps"]
    return out


def mean(values: Sequence[float]) -> float | None:
    """The mean, or `None` of nothing."""
    return sum(values) / len(values) if values else None


def draw_report(config: SdConfig, out: Path) -> Path:
    """`grid.png` and `report.html`; exposed parts are hidden unless the preset says all pictures are harmless."""
    blur: Any = None
    base, erased = out / "images" / "base", out / "images" / "erased"
    if config.eval.images and config.eval.blur:
        blur = {}
        for folder in (base, erased):
            paths = [folder / row.file for row in generate.read_manifest(folder)]
            blur |= nudity.exposed_boxes(look_for_nudity(config, paths, folder, strict=False))
    processes.first(lambda: write_report(config, out, blur))
    return out / "report.html"


def write_report(config: SdConfig, out: Path, blur: Any) -> None:
    """Both files."""
    base, erased = out / "images" / "base", out / "images" / "erased"
    if config.eval.images:
        shown = grid.grid_from_folders([base, erased], names=["base", "erased"], max_columns=8, blur=blur)
        grid.save_image(shown, out / "grid.png")
    report.write_html(out, blur=blur)
