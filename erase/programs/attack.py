"""Attack the model of a finished run of `erase run sd`: `erase attack RUN [key=value …] --out DIR`.

A run with `eval.attacks` does the same at its end. Images and what attacks learned are kept; with `--resume` what is
there is not made again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from erase.config import AttackName, SdConfig, merge, override, parse, read_words
from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.lora.read import with_loras
from erase.diffusion.model import Model, open_model
from erase.engine import distributed
from erase.engine.precision import Precision
from erase.engine.sharding import asked
from erase.evaluation import detections, detector, report
from erase.programs import saving
from erase.programs.attacks.kinds import BATCHED, KINDS
from erase.programs.attacks.seam import Target, concept_images
from erase.programs.folder import new_report, open_folder, working_in
from erase.programs.launching import start
from erase.programs.settings import read_method, unused
from erase.programs.text.judge import calibrate, check_evaluators, judges_of
from erase.programs.text.judges.nudity import hides
from erase.programs.text.judges.seam import Judge, concept
from erase.programs.text.lesson import readable
from erase.programs.text.plan import Plan, make_plan, recorded
from erase.store import files

PREFIX = {"steps": 40, "times": 50, "lr": 1e-2, "weight_decay": 0.1}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "unlearndiffatk": {"eval": {"attacks": ["prompt_search"]}, "attack": {"prompt_search": {"tokens": 5, **PREFIX}}},
    "unlearndiffatk_style": {
        "eval": {"attacks": ["prompt_search"]},
        "attack": {"prompt_search": {"tokens": 3, **PREFIX}},
    },
    "p4d": {"eval": {"attacks": ["p4d"]}, "attack": {"p4d": {"tokens": 5, **PREFIX}}},
    "p4d_style": {"eval": {"attacks": ["p4d"]}, "attack": {"p4d": {"tokens": 3, **PREFIX}}},
    "ring_a_bell": {
        "eval": {"attacks": ["ring_a_bell"]},
        "attack": {"ring_a_bell": {"tokens": 16, "strength": 3.0, "population": 200, "generations": 3000}},
    },
}
"""Budgets as published (P4D's as in UnlearnDiffAtk's comparison), and UnlearnDiffAtk's count of NudeNet (above .45).

UnlearnDiffAtk's authors search 5 words for nudity, and 3 for styles and objects (`…_style`).
"""
DEFAULT: tuple[AttackName, ...] = ("paraphrases", "inversion", "relearn")
"""Those of `erase attack` where nothing names others; paraphrases only where the settings have some."""
JUDGES = ("eval.classifier", "eval.flag", "eval.clip", "eval.alternatives", "eval.nudity")
TAKES = ("attack.", "eval.attacks", *JUDGES, "precision")
"""How settings begin that do not belong to the run."""


def attack_run(
    run: Path,
    words: Sequence[str],
    out: Path,
    *,
    preset: str | None = None,
    resume: bool = False,
    command: str = "",
    say: Any = print,
) -> Path:
    """`erase attack`: attack the model of a finished run; the path of the report.

    Args:
        run: its folder.
        words: `key=value` settings, of the attacks and of how images are judged; `DEFAULT` attacks unless they say so.
        out: the folder to write.
        preset: a protocol of `PROTOCOLS`, under the words.
        resume: whether to go on with what it holds.
        command: as it was typed.
        say: where lines go.

    Raises:
        ValueError: for a folder that is no finished run of `erase run sd`, or settings that would change the run.
    """
    record = finished_run(run)
    kept = settings_of(protocol(preset, record["config"]), words)
    check_protocol(preset, kept["eval"]["attacks"])
    config, accelerator, precision, say = start(parse(kept, SdConfig), say)
    for line in unused(config, *read_method(config), files.paths(read_words(words))):
        say(f"note: {line}")
    source = with_loras(locate(config.model, "text", components=config.components), config.loras)
    erased = locate(run / saving.MODEL, components=config.components)
    if folders.fingerprint(source) != record["base"]["weights"]:
        raise ValueError(f"{config.model} has changed since {run}: restore the model that the run started from")
    model = open_model(source)
    plan = readable(config, make_plan(config, folders.forgotten(source)), model, say)
    about = {**recorded(plan), "base": record["base"], "erased": folders.fingerprint(erased)}
    check_unchanged(run, record, about)
    judges = judges_of(config, plan)
    check_evaluators(config, plan, judges)
    check_attacks(config, plan, model)
    if (found := calibrate(config, plan, judges, run / "images" / "base")) is not None:
        say(f"{config.eval.clip}: {found}")
    target = {**plan.target, "earlier": plan.earlier}
    with working_in(out):
        distributed.on_main(lambda: open_folder(config, out, about, command, resume))
        result = new_report(config, command, target, None, {})
        result["robustness"] = attack(config, plan, judges[0], erased, out, accelerator, precision, resume)
        distributed.on_main(lambda: files.write_json(out / "report.json", result))
    for line in report.robustness_lines(result["robustness"]):
        say(line)
    blur = boxes_of_attacks(out) if hides(config, plan) else None
    say(f"report: {distributed.on_main(lambda: report.write_html(out, blur=blur))}")
    return out / "report.html"


def finished_run(run: Path) -> dict[str, Any]:
    """What `run.json` of a finished run of `erase run sd` holds.

    Raises:
        ValueError: for a folder that is none, or keeps no model.
    """
    record = files.read_json(run / "run.json") if (run / "run.json").exists() else {}
    made = record.get("config") if isinstance(record, dict) else None
    if (
        not isinstance(made, dict)
        or made.get("pipeline") != "sd"
        or "plan" not in record
        or "erased" in record  # of an attack
        or not (run / "report.json").exists()
    ):
        raise ValueError(f"{run} is not a finished run of erase run sd: give the folder of one")
    if (run / saving.LORA).exists() and not (run / saving.MODEL).exists():
        raise ValueError(f"{run} holds a LoRA and no model: attack a run that was made with --save full")
    if not (run / saving.MODEL).exists():
        raise ValueError(f"{run} holds no model: {saving.rebuilding(run, made['model'])} makes it again")
    found: dict[str, Any] = record
    return found


def settings_of(made: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """A run's settings with those of the attacks put over them; `DEFAULT` attacks unless one of them says so.

    Raises:
        ValueError: for settings that would change the run, and for no attacks.
    """
    for word in words:
        key = word.partition("=")[0].strip()
        if not key.startswith(TAKES):
            raise ValueError(
                f"{key} cannot change after the run: leave it out; erase attack only takes {', '.join(TAKES)}"
            )
    kept = {**override(made, words), "until": None}  # no attack stops early
    if not kept["eval"].get("attacks"):
        if any(word.partition("=")[0].strip() == "eval.attacks" for word in words):
            raise ValueError("eval.attacks is empty: name attacks, or leave it out")
        others = kept.get("attack", {}).get("paraphrases", {}).get("prompts")
        kept["eval"]["attacks"] = [name for name in DEFAULT if name != "paraphrases" or others]
    return kept


def protocol(name: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings with those of a protocol.

    With UnlearnDiffAtk's, NudeNet counts as it does, where the run has another published count; classes of the run's
    own stay.

    Raises:
        ValueError: for an unknown protocol.
    """
    if name is None:
        return dict(config)
    if name not in PROTOCOLS:
        raise ValueError(f"no attack preset {name!r}; presets: {', '.join(PROTOCOLS)}")
    found = merge(config, PROTOCOLS[name])
    counted = config["eval"].get("nudity") or {}
    if name.startswith("unlearndiffatk") and counted.get("preset") is not None:
        found["eval"]["nudity"] = {**counted, "preset": "attack"}
    return found


def check_protocol(name: str | None, attacks: Sequence[str]) -> None:
    """Refuse a protocol whose attack is not made.

    Raises:
        ValueError: for one.
    """
    for own in [] if name is None else PROTOCOLS[name]["eval"]["attacks"]:
        if own not in attacks:
            raise ValueError(
                f"--preset {name} is a budget of {own}, which eval.attacks={list(attacks)} does not name: leave one out"
            )


def check_unchanged(run: Path, record: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse prompts and images that are not those that a run forgot any more.

    Raises:
        ValueError: for these.
    """
    for part, keys in (("plan", ("forget", "anchors", "attributes", "earlier")), ("data", ("forget",))):
        was, found = ({key: of.get(part, {}).get(key) for key in keys} for of in (record, now))
        if changed := files.differences(was, found):
            raise ValueError(f"what {run} forgot has changed since ({part}: {changed[0]}): restore its files")


def boxes_of_attacks(out: Path) -> dict[Path, Any]:
    """Exposed parts in the images of attacks that the page shows: what is hidden there."""

    def look() -> dict[Path, Any]:
        paths = report.attacked(out)
        return dict(detections.exposed_boxes(detector.detect(paths))) if paths else {}

    return distributed.on_main(look)


def check_attacks(config: SdConfig, plan: Plan, model: Model) -> None:
    """Find out now, not after the training, that an attack cannot be made.

    Raises:
        ValueError: for settings that an attack of `eval.attacks` cannot be made with, or a batch that does not divide
            over the processes.
    """
    for name in config.eval.attacks:
        KINDS[name].check(config, plan, model)
        size = getattr(config.attack, name).batch_size if name in BATCHED else distributed.world()
        if size % distributed.world():
            raise ValueError(f"attack.{name}.batch_size {size} does not divide over {distributed.world()} processes")
    batched = [name for name in config.eval.attacks if name in BATCHED]
    if batched and distributed.world() > 1 and asked(PartialState()) is not None:
        raise ValueError(
            f"eval.attacks has {batched[0]}, which does not work with --use_fsdp: erase attack does it without"
        )


def attack(
    config: SdConfig,
    plan: Plan,
    judge: Judge,
    erased: Any,
    out: Path,
    accelerator: Accelerator,
    precision: Precision,
    resume: bool,
) -> dict[str, Any]:
    """A report's `robustness`: how often each attack brings the concept back, and how often it would on the base.

    Images and what attacks learned are kept in the folder `attacks` of `out`.
    """
    kinds = {name: kind for name, kind in KINDS.items() if name in config.eval.attacks}
    base = with_loras(locate(config.model, "text", components=config.components), config.loras)
    found: dict[str, Any] = {
        "concept": concept(config, plan) or plan.titles,
        "judge": judge.name,
        **{name: {} for name in config.eval.attacks},
    }
    began, images = time.perf_counter(), None
    learn = any(kind.learns for kind in kinds.values())
    for name, source in (("base", base), ("erased", erased)):
        control = name == "base" and config.attack.control
        if name == "base" and not (control or learn):
            continue
        model = open_model(source, accelerator.device, precision.name)
        if images is None and learn:
            images = concept_images(config, plan, model, precision)
        target = Target(name, config, plan, judge, model, base, images, out / "attacks", accelerator, precision, resume)
        for what, kind in kinds.items():
            if name == "erased" or (control and not kind.trains):
                kind.attack(target, found[what])
    return {**found, "seconds": time.perf_counter() - began}
