"""Attack the model of a finished run of `erase run sd`: `erase attack RUN [key=value …] --out DIR`.

A run with `eval.attacks` does the same at its end. Pictures and learned words are kept; with `--resume` those that are
there are not made again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from erase.attacks import inversion, relearning
from erase.config import AttackName, SdConfig, override, parse
from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.data import LatentSet, encode_in_batches
from erase.diffusion.model import Model, open_model
from erase.diffusion.parameters import select
from erase.engine import distributed
from erase.engine.precision import Precision
from erase.evaluation import report
from erase.evaluation.manifest import images_of
from erase.evaluation.prompt_files import PromptRow
from erase.programs import saving
from erase.programs.folder import new_report, open_folder, working_in
from erase.programs.launching import start
from erase.programs.progress import bar
from erase.programs.text.drawing import draw_rows, drawn_latents
from erase.programs.text.judge import calibrate, check_evaluators, judges_of, share
from erase.programs.text.judges.seam import Judge, concept
from erase.programs.text.plan import Plan, expand, label_of, make_plan
from erase.store import files
from erase.store.safetensors import digest, read_safetensors, write_safetensors

ATTACKER = 2**20
"""The first sample of a seed that is an attacker's: no picture of them is trained on or counted."""
JUDGES = ("eval.classifier", "eval.flag", "eval.clip", "eval.alternatives", "eval.nudity")
TAKES = ("attack.", "eval.attacks", *JUDGES, "precision")
"""How settings begin that do not belong to the run."""


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
    made = record.get("config") if isinstance(record, dict) else None
    if (
        not isinstance(made, dict)
        or made.get("pipeline") != "sd"
        or "plan" not in record
        or not (run / "report.json").exists()
    ):
        raise ValueError(f"{run} is no finished run of erase run sd")
    if not (run / saving.MODEL).exists():
        raise ValueError(
            f"{run} keeps no model: erase apply {record['config']['model']} {run / saving.DELTA} "
            f"--out {run / saving.MODEL} makes it again"
        )
    for word in words:
        key = word.partition("=")[0].strip()
        if not key.startswith(TAKES):
            raise ValueError(f"{key} belongs to the run; erase attack takes {', '.join(TAKES)}")
    every: list[AttackName] = ["paraphrases", "inversion", "relearn"]
    kept = override(record["config"], words)
    kept["eval"]["attacks"] = kept["eval"].get("attacks") or every
    config, accelerator, precision, say = start(parse(kept, SdConfig), say)
    source, erased = locate(config.model, "text"), locate(run / saving.MODEL)
    if folders.fingerprint(source) != record["base"]["weights"]:
        raise ValueError(f"{config.model} is not the model that {run} began with any more")
    plan = make_plan(config, folders.forgotten(source))
    check_evaluators(config, plan)
    check_attacks(config, plan, open_model(source))
    if (found := calibrate(config, plan, run / "images" / "base")) is not None:
        say(f"{config.eval.clip}: {found}")
    about = {"base": record["base"], "erased": folders.fingerprint(erased)}
    target = {**plan.target, "earlier": plan.earlier}
    with working_in(out):
        distributed.on_main(lambda: open_folder(config, out, about, command, resume))
        result = new_report(config, command, target, None, {})
        result["robustness"] = attack(config, plan, erased, out, accelerator, precision, resume)
        distributed.on_main(lambda: files.write_json(out / "report.json", result))
    for line in report.robustness_lines(result["robustness"]):
        say(line)
    say(f"report: {distributed.on_main(lambda: report.write_html(out))}")
    return out / "report.html"


def check_attacks(config: SdConfig, plan: Plan, diffuser: Model) -> None:
    """Find out now, not after the training, that an attack cannot be made.

    Raises:
        ValueError: for other words that there are none of, a prompt without the learned word, parameters that the
            model has not, or a batch that does not divide over the processes.
    """
    names, wanted = config.eval.attacks, config.attack
    if "paraphrases" in names:
        other_words(config, plan)
    if "inversion" in names:
        inversion.check_word(diffuser, wanted.inversion.prompt)
    if "relearn" in names:
        chosen = [name for name, p in diffuser.net.named_parameters() if p.requires_grad]
        select(diffuser.net, wanted.relearn.parameters, diffuser.family.PARAMETERS)
        for name, p in diffuser.net.named_parameters():
            p.requires_grad_(name in chosen)
    for name, size in (("inversion", wanted.inversion.batch_size), ("relearn", wanted.relearn.batch_size)):
        if name in names and size % distributed.world():
            raise ValueError(f"attack.{name}.batch_size {size} does not divide over {distributed.world()} processes")


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
    judge = judges_of(config, plan)[0]
    found: dict[str, Any] = {
        "concept": concept(config, plan) or plan.forget,
        "judge": judge.name,
        **{name: {} for name in names},
    }
    began = time.perf_counter()
    source = locate(config.model, "text")
    learn = "inversion" in names or "relearn" in names
    data: LatentSet | None = None
    for when, where in (("base", source), ("erased", erased)):
        if when == "base" and not (wanted.control or learn):
            continue
        diffuser = open_model(where, accelerator.device, precision.name)
        made = {"weights": folders.fingerprint(where)}
        look = partial(draw_and_judge, config, judge, diffuser, precision, resume)
        if data is None and learn:
            data = concept_data(config, plan, diffuser, precision)
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
            if not (resume and distributed.on_main(path.exists)):
                with bar(wanted.inversion.steps, f"learning a word: {when}") as steps:
                    advance = partial(count_step, steps)
                    word = inversion.learn_word(diffuser, data, wanted.inversion, config.seed, accelerator, advance)
                distributed.on_main(partial(write_safetensors, path, word, {"prompt": wanted.inversion.prompt}))
            word = {name: x.to(diffuser.device) for name, x in read_safetensors(path)[0].items()}
            row = PromptRow(wanted.inversion.prompt, config.seed)
            with inversion.meaning(diffuser, word):
                shown = look(
                    [row],
                    wanted.inversion.images,
                    top / "inversion" / when,
                    {**made, "word": digest(word)},
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

        relearning.relearn(diffuser, data, wanted.relearn, config.seed, after, accelerator)
        found["relearn"] = {**asdict(wanted.relearn), "curve": curve}
    return {**found, "seconds": time.perf_counter() - began}


def concept_data(config: SdConfig, plan: Plan, diffuser: Model, precision: Precision) -> LatentSet:
    """What attackers learn from: pictures of the concept with their prompts, from a model that draws it."""
    if plan.forget_images is not None:
        words = [item.prompt for item in plan.forget_images]
        mean, std = encode_in_batches(plan.forget_images, diffuser.encode, diffuser.resolution)
    else:
        prompts, std = plan.forget, None
        words = [prompts[k % len(prompts)] for k in range(config.attack.count)]
        samples = [ATTACKER + k // len(prompts) for k in range(config.attack.count)]
        mean = drawn_latents(config, diffuser, precision, words, samples, "attacker's")
    distinct = list(dict.fromkeys(words))
    return LatentSet(mean, torch.tensor([distinct.index(word) for word in words]), diffuser.embed(distinct), std)


def draw_and_judge(
    config: SdConfig,
    judge: Judge,
    diffuser: Model,
    precision: Precision,
    resume: bool,
    rows: Sequence[PromptRow],
    images: int,
    folder: Path,
    made: Mapping[str, Any],
) -> list[bool]:
    """Whether each of some pictures shows the concept."""
    draw_rows(config, rows, images, diffuser, precision, folder, resume, made)
    return judge.judge(images_of(folder), [row for row in rows for _ in range(images)]).shows


def count_step(shown: Any, row: Mapping[str, Any]) -> None:
    """A step further on a progress bar."""
    shown.update()
