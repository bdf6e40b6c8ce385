"""Erase a concept from a Stable Diffusion checkpoint: `erase run sd PRESET [key=value …] --out DIR`.

Read top to bottom: draw the base pictures, cache the data, make the mask, unlearn, save, draw again, count,
report. Every part leaves a file in the run's folder; with `--resume` parts that are there are not done again.
"""

from __future__ import annotations

import gc
import inspect
import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase import files, processes, resources, saving
from erase.batches import Batches, some
from erase.checkpoint import read_safetensors, write_safetensors
from erase.config import SdConfig, arguments
from erase.diffusion import folders
from erase.diffusion import stable_diffusion as sd
from erase.diffusion.data import ImageItem, LatentSet, check_images, encode_in_batches, read_folder
from erase.diffusion.losses import forget_objective, remain_objective
from erase.diffusion.parameters import select
from erase.evaluation import classes, generate, grid, nudity, report
from erase.evaluation.generate import PromptRow
from erase.evaluation.stats import mcnemar_exact
from erase.method import Method
from erase.methods import builder
from erase.precision import Precision
from erase.runs import (
    STATE,
    bar,
    check_needs,
    check_saliency,
    classified,
    draw_pictures,
    drop,
    equip,
    new_report,
    open_folder,
    rehearse,
    run_steps,
    start,
)
from erase.saliency import Mask, load_mask

config_type = SdConfig


AXES = {"forget": "still named as forgotten", "remain": "remain accuracy"}
"""Of a comparison's plot."""


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
        )
        timing = {"data_s": data_s, "saliency_s": saliency_s, **done.timing}
        values = {name: p.detach() for name, p in pipe.unet.named_parameters() if p.requires_grad}
        processes.first(partial(write_safetensors, trained_path, values, {"timing": json.dumps(timing)}))
        del backend, given, objective, forget, remain
    target = {"forget": plan.forget, "anchors": plan.anchors}
    meta = processes.first(partial(saving.provenance, config, preset, source, target, mask))
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
    processes.first(lambda: saving.settle(out, form))
    processes.first(lambda: files.write_json(out / "report.json", result))
    drop(out, trained_path.name)
    for line in report.verdict(result):
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
    pipe.vae, pipe.text_encoder = None, None  # as they will be
    gc.collect()
    pictures = len(plan.rows) * config.eval.images
    return rehearse(config, sd.denoiser(pipe, text), build, sample, (forget, remain), pictures, precision, command)


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
    if not config.eval.images:
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
        generators = [generate.image_generator(config.seed, i) for _ in prompts for i in range(count)]
        with bar(len(words), f"drawing {what} data") as shown:

            def draw(start: int) -> Tensor:
                part = slice(start, start + config.draw.batch_size)
                drawn = sd.draw_latents(
                    pipe,
                    words[part],
                    generators[part],
                    steps=config.draw.steps,
                    guidance=config.draw.guidance,
                    batch_size=config.draw.batch_size,
                    autocast=precision.drawing,
                )
                shown.update(len(drawn) * processes.world())
                return drawn

            parts = processes.dealt(draw, range(0, len(words), config.draw.batch_size))
        return words, torch.cat(parts), None

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
    settings = {
        "weights": weights,
        "draw": asdict(config.draw),
        "precision": config.precision,
        "scheduler": type(pipe.scheduler).__name__,
    }
    sample = sd.sampler(pipe, steps=config.draw.steps, guidance=config.draw.guidance, autocast=precision.drawing)
    draw_pictures(
        sample,
        plan.rows,
        out,
        images=config.eval.images,
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
    along = classes.axis(guess, 0 if axis == "object" else 1) if pairs else guess
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
    out["erase_s"] = report["timing"]["erase_s"]
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
