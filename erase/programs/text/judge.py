"""Judge images of `erase run sd`: which judges a run has, whether they can judge it, and who decides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erase.config import SdConfig
from erase.evaluation.manifest import check_images
from erase.evaluation.stats import wilson
from erase.evaluation.zeroshot import FEWEST, Calibration
from erase.programs.folder import unjudged
from erase.programs.text.judges.labels import Flags, Labels
from erase.programs.text.judges.nudity import NudeNet
from erase.programs.text.judges.seam import Judge
from erase.programs.text.judges.zeroshot import ZeroShot, calibration
from erase.programs.text.plan import Plan

SETTINGS = "eval.clip (any concept), eval.classifier (its labels) or eval.nudity"
"""What makes a judge."""


def judges_of(config: SdConfig, plan: Plan) -> list[Judge]:
    """A run's judges, made once; the first decides where one is asked: early stopping, attacks, comparisons."""
    found: list[Judge] = []
    if config.eval.classifier is not None:
        found.append(Flags(config, plan) if config.eval.flag else Labels(config, plan))
    if config.eval.clip is not None:
        found.append(ZeroShot(config, plan))
    if config.eval.nudity is not None:
        found.append(NudeNet(config, plan))
    return found


def check_evaluators(config: SdConfig, plan: Plan, judges: Sequence[Judge]) -> None:
    """Find out now, not after the training, that an evaluator cannot run.

    Raises:
        ValueError: for a judge that cannot be loaded or whose labels do not fit; for settings of a judge that is not
            set; and for early stopping or attacks that nothing can judge.
    """
    for key, of in (("flag", "classifier"), ("alternatives", "clip")):
        if getattr(config.eval, key) and getattr(config.eval, of) is None:
            raise ValueError(f"eval.{key} needs eval.{of}, which is not set: set eval.{of}, or unset eval.{key}")
    if config.until is not None:
        check_until(config, plan, judges)
    if config.eval.attacks and not judges:
        raise ValueError(f"eval.attacks needs a judge of the images: set {SETTINGS}")
    if not (config.eval.images or config.until or config.eval.attacks):
        return
    for judge in judges:
        judge.check()
    if decides(config, judges) and config.eval.images * sum(plan.forgotten) < FEWEST:
        raise ValueError(
            f"until and eval.attacks judged by eval.clip need {FEWEST} base images of the concept to calibrate it on; "
            f"eval.images={config.eval.images} gives {config.eval.images * sum(plan.forgotten)}: run with more, or use "
            "eval.classifier or eval.nudity"
        )


def check_until(config: SdConfig, plan: Plan, judges: Sequence[Judge]) -> None:
    """Find out now that looks at the model could tell nothing.

    Raises:
        ValueError: for images that nothing judges, or a share of remaining ones that there are none of.
    """
    assert config.until is not None
    if not judges:
        raise ValueError(f"until needs a judge of the images: set {SETTINGS}")
    if config.until.remain is not None and (not judges[0].KNOWS_REST or all(plan.forgotten)):
        raise ValueError(
            "until.remain needs eval.classifier (without eval.flag) or eval.clip, and prompts in eval.prompts that are "
            "not forgotten: give them, or until.remain=null"
        )


def decides(config: SdConfig, judges: Sequence[Judge]) -> bool:
    """Whether early stopping or attacks depend on a judge that must be calibrated."""
    return bool(config.until or config.eval.attacks) and bool(judges) and isinstance(judges[0], ZeroShot)


def calibrate(config: SdConfig, plan: Plan, judges: Sequence[Judge], base: Path) -> Calibration | None:
    """What `eval.clip` makes of the base's images; `None` where there is none of it, or of them.

    Raises:
        ValueError: if early stopping or attacks depend on it, and it does not know the concept, or not what remains;
            or images are not those of `plan.rows`.
    """
    zero = next((judge for judge in judges if isinstance(judge, ZeroShot)), None)
    if zero is None or not config.eval.images:
        return None
    paths = check_images(base, plan.rows, config.eval.images)
    found = calibration(zero.count(paths).numbers)
    asked = ["forget"] if decides(config, judges) else []
    asked += ["remain"] if asked and config.until is not None and config.until.remain is not None else []
    for side in asked:
        if side in found.doubts:
            raise ValueError(
                f"eval.clip={zero.name} cannot judge until or eval.attacks: {found.doubts[side]}; name other "
                "eval.alternatives or another judge, or unset until and eval.attacks"
            )
    return found


def why_unjudged(config: SdConfig) -> str | None:
    """Why nothing will be known of what a run does; `None` if something judges it."""
    judges = (config.eval.classifier, config.eval.clip, config.eval.nudity)
    return unjudged(judges, bool(config.eval.images or config.until or config.eval.attacks), SETTINGS)


def share(shown: Sequence[bool]) -> dict[str, Any]:
    """How many of N images show the concept: `n, shown, rate, ci95` (Wilson; fractions of 1)."""
    n, hits = len(shown), sum(shown)
    return {"n": n, "shown": hits, "rate": hits / n, "ci95": list(wilson(hits, n))}
