"""Erase a concept from a Stable Diffusion checkpoint: `erase run sd PRESET [key=value …] --out DIR`.

Read top to bottom: draw the base pictures, cache the data, make the mask, unlearn, save, draw again, count, attack,
report. Every part leaves a file in the run's folder; with `--resume` parts that are there are not done again.
"""

from __future__ import annotations

import gc
import inspect
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase.config import SdConfig, arguments
from erase.diffusion import stable_diffusion as sd
from erase.diffusion.checkpoints import folders
from erase.diffusion.data import ImageItem, LatentSet, encode_in_batches
from erase.diffusion.losses import forget_objective, remain_objective
from erase.diffusion.parameters import select
from erase.engine import distributed
from erase.engine.batches import Batches, some
from erase.engine.loop import Probe
from erase.engine.method import Method
from erase.engine.precision import Precision
from erase.engine.saliency import Mask, load_mask
from erase.engine.updates import ClosedForm
from erase.evaluation import generate, grid, nudity, report
from erase.evaluation.generate import PromptRow
from erase.evaluation.stats import mcnemar_exact
from erase.methods import builder
from erase.programs import saving
from erase.programs.attack import attack, check_attacks
from erase.programs.drawing import draw_rows, drawn_latents
from erase.programs.judge import (
    check_evaluators,
    count_classes,
    count_nudity,
    count_preset,
    judged,
    look_for_nudity,
)
from erase.programs.prompts import Plan, anchors_of, label_of, make_plan, marks
from erase.programs.runs import (
    STATE,
    check_needs,
    check_saliency,
    denoising,
    drop,
    equip,
    new_report,
    open_folder,
    rehearse,
    run_steps,
    run_time,
    start,
)
from erase.store import files
from erase.store.safetensors import read_safetensors, write_safetensors

AXES = {"ua": ("unlearning accuracy", 1.0), "ira": ("in-domain retain accuracy", 1.0)}
"""Of a comparison's plot: what they are called, and what is most."""
GOALS = {"ua": 1, "ira": 1, "rte_s": -1}
"""Of a comparison's Pareto front: whether less (-1) or more (1) is better."""


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
        say("\n".join(foretell(config, plan, pipe, build, method, precision, command)))
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
    distributed.on_main(lambda: open_folder(config, out, record, command, resume))
    model, trained_path = out / saving.MODEL, out / "trained.safetensors"
    if resume and distributed.on_main(lambda: saving.finished(out)):
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
    if resume and distributed.on_main(trained_path.exists):
        values, stored = read_safetensors(trained_path)
        timing = json.loads(stored["timing"])
        mask = load_mask(mask_path) if mask_path.exists() else None
    else:
        began = time.perf_counter()
        pipe.vae.enable_slicing()  # a picture at a time
        wanted, concepts = config.saliency, None
        if isinstance(method.update, ClosedForm):
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

        if config.train.checkpointing:  # not before: per-sample gradients cannot have it
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
        distributed.on_main(partial(write_safetensors, trained_path, values, {"timing": json.dumps(timing)}))
        del backend, given, objective, forget, remain
    target = saving.hidden({"forget": plan.forget, "anchors": plan.anchors})
    meta = distributed.on_main(partial(saving.provenance, config, preset, source, target, mask, timing["steps"]))
    meta |= {folders.FORGOTTEN: json.dumps(list(dict.fromkeys([*gone, *marks(config, plan)])))}
    distributed.on_main(partial(saving.save, source, values, out, meta, form))
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
    distributed.on_main(lambda: saving.settle(out, form))
    distributed.on_main(lambda: files.write_json(out / "report.json", result))
    drop(out, trained_path.name)
    for line in [*report.verdict(result), *report.robustness_lines(result.get("robustness", {}))]:
        say(line)
    say(f"report: {draw_report(config, out)}")
    return out / "report.html"


# ---------------------------------------------------------------- before anything is computed


def looks_at(config: SdConfig, method: Method, build: Callable[..., Method]) -> tuple[bool, bool]:
    """Whether a run learns from pictures of what is forgotten, and of what stays; those alone are drawn."""
    takes = inspect.signature(build).parameters
    masked = config.saliency.kind != "none" and "mask" in takes
    return method.forget is not None or masked, method.remain is not None or masked or "fisher" in takes


def foretell(
    config: SdConfig,
    plan: Plan,
    pipe: Any,
    build: Callable[..., Method],
    method: Method,
    precision: Precision,
    command: str,
) -> list[str]:
    """What the run would learn, hold and do; `method` is built of plain settings alone."""
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
    sides = looks_at(config, method, build)
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
    for what, before in right.get("before", {}).items():
        result["paired"][f"{what}_mcnemar_p"] = mcnemar_exact(before, right["after"][what])
    return result


# ---------------------------------------------------------------- looks between steps


def looker(config: SdConfig, plan: Plan, pipe: Any, precision: Precision, out: Path) -> Callable[[int], Probe | None]:
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

    def look(done: int) -> Probe | None:
        if done % wanted.every or done == config.train.steps:  # after the last step there is the evaluation
            return None
        work = Path(distributed.on_main(lambda: tempfile.mkdtemp(prefix=".until.", suffix=".tmp", dir=out)))
        folder = work / f"after step {done}"
        draw_rows(config, rows, 1, pipe, precision, folder, False, {})
        shown, labels = judged(config, plan, folder)
        distributed.on_main(lambda: shutil.rmtree(work))
        forget = sum(shown[: wanted.images]) / wanted.images
        remain = None
        if labels is not None and expected:
            remain = sum(a == b for a, b in zip(labels[wanted.images :], expected, strict=True)) / len(expected)
        kept = wanted.remain is None or (remain is not None and remain >= wanted.remain)
        return Probe({"until_forget": forget, "until_remain": remain}, forget <= wanted.forget and kept)

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


# ---------------------------------------------------------------- the report in numbers and as a page


def summary(report: dict[str, Any]) -> dict[str, float | str | None]:
    """A report as the numbers that comparisons are made of.

    `earlier`, where there are such: share of what was forgotten before that shows all that was asked; `forget`: share
    of the forget prompts' pictures that still show the concept (the classifier's word, else the detector's); `forms`:
    the same for its other forms; `kept`: share of all these that still show the other half of what was asked (the
    style, where an object was erased); `remain`: accuracy on the other prompts of the forget prompts' kind (the plain
    ones, where a plain object was erased), `drop` from the base and `worst` of one prompt, in points; `pairs_drop`:
    the mean drop of all other pairs, likewise; `shows`: what the pictures of the erased concept, other forms included,
    show most. `ua`, `ira`, `cra`: unlearning accuracy (share of the concept's pictures, in all forms, that do not show
    it), in-domain retain accuracy (of all other concepts' pictures) and cross-domain (of the other half of what was
    asked, in all pictures), means over prompts as in UnlearnCanvas (Zhang et al., NeurIPS 2024, arXiv 2402.11846).
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
        out["ua"] = mean([1 - row["accuracy"] for row in own])
        out["ira"] = mean([row["accuracy"] for row in rows.values() if row["side"] == "remain"])
        out["cra"] = mean(
            [row["other_accuracy"] for row in rows.values() if after["pairs"] and row["side"] != "earlier"]
        )
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
    distributed.on_main(lambda: write_report(config, out, blur))
    return out / "report.html"


def write_report(config: SdConfig, out: Path, blur: Any) -> None:
    """Both files."""
    base, erased = out / "images" / "base", out / "images" / "erased"
    if config.eval.images:
        shown = grid.grid_from_folders([base, erased], names=["base", "erased"], max_columns=8, blur=blur)
        grid.save_image(shown, out / "grid.png")
    report.write_html(out, blur=blur)
