"""The numbers of a run on a class-conditional model: the report, and what comparisons make of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from erase import resources
from erase.config import DdpmConfig
from erase.engine import distributed
from erase.engine.saliency import Mask
from erase.evaluation import classes, fidelity, manifest
from erase.evaluation.prompt_files import MAX_SEED, PromptRow
from erase.evaluation.stats import mcnemar_exact
from erase.programs.folder import new_report, run_time, unjudged
from erase.programs.images import classified
from erase.programs.labels.plan import Plan, names_given
from erase.store.labelled import NoSplitError, read_labelled

AXES = ("forget", "remain")
"""Numbers of a summary that a comparison plots, across and up."""
GOALS = ("forget", "remain", "rte_s")
"""Numbers of a summary that a comparison's Pareto front is of."""
FOLDERS = {"before": "base", "after": "erased", "retrained": "retrained"}
"""Of images, by the report's keys."""
NOTHING = 1e-6
"""A Fréchet distance that is rounding: a set's to itself."""


def image_rows(config: DdpmConfig, plan: Plan) -> list[PromptRow]:
    """The rows of every model's images, from other noise than images to train on, which have the run's own seed."""
    return [
        PromptRow(row.prompt, (config.seed + 1 + row.seed) % (MAX_SEED + 1), object=row.object) for row in plan.rows
    ]


def why_unjudged(config: DdpmConfig) -> str | None:
    """Why nothing will be known of what a run does; `None` if something judges it."""
    return unjudged([config.eval.classifier], config.eval.images > 0, "eval.classifier")


def make_report(
    config: DdpmConfig,
    plan: Plan,
    out: Path,
    mask: Mask | None,
    timing: dict[str, Any],
    command: str,
    drawn: dict[str, dict[str, str]],
) -> dict[str, Any]:
    """The keys of a report: see docs/reference/run-folder.md.

    Raises:
        ValueError: for images that are not of the plan's rows, or not by the weights of `drawn`.
    """
    target = {side: [plan.labels[i] for i in of] for side, of in (("forget", plan.forget), ("anchors", plan.anchors))}
    target["earlier"] = [plan.labels[i] for i in plan.earlier]
    result = new_report(config, command, target, mask, timing)
    if (why := why_unjudged(config)) is not None:
        return result | {"unjudged": why}
    assert config.eval.classifier is not None
    judge = resources.tiny_path(config.eval.classifier)
    seen: dict[str, classes.ClassPredictions] = {}
    for key, what in FOLDERS.items():
        folder = out / "images" / what
        if distributed.on_main(folder.is_dir):
            paths = manifest.check_images(folder, image_rows(config, plan), config.eval.images, drawn.get(what))
            seen[key] = classified(paths, judge, features=True)
    real, real_labels = reference(config, plan, judge, seen)
    asked = [row.prompt for row in plan.rows for _ in range(config.eval.images)]
    forget, earlier = target["forget"], target["earlier"]
    for key, guess in seen.items():
        result[key] = {
            "pictures": manifest.origin(out / "images" / FOLDERS[key]),
            "classes": judge_classes(guess, asked, forget, earlier),
            "fidelity": judge_fidelity(fidelity.features_of(guess), asked, forget, real, real_labels, earlier),
        }
    if "before" in seen:
        right = {
            key: [shown == name for shown, name in zip(seen[key].predicted, asked, strict=True)]
            for key in ("before", "after")
        }
        stay = [name for name in dict.fromkeys(asked) if name not in plan.gone]
        for side, names in (("forget", forget), ("earlier", earlier), ("remain", stay)):
            if index := [i for i, name in enumerate(asked) if name in names]:
                both = [[right[key][i] for i in index] for key in ("before", "after")]
                result["paired"][f"{side}_mcnemar_p"] = mcnemar_exact(*both)
    if "retrained" in seen and forget:
        result["gap"] = gap(result, seen, asked, forget)
    return result


def reference(
    config: DdpmConfig, plan: Plan, judge: Path, seen: dict[str, classes.ClassPredictions]
) -> tuple[fidelity.Features, list[str]]:
    """Features of real images, as many of each class as are drawn: the test split's, or else the training images.

    Without data, base images stand in for them.
    """
    if config.data is None:
        asked = [row.prompt for row in plan.rows for _ in range(config.eval.images)]
        return fidelity.features_of(seen["before"]), asked
    names = list(plan.labels)
    try:
        data = read_labelled(config.data.source, "test", names=names_given(config), size=config.data.size)
        data = data.ordered(names) or data
    except NoSplitError:
        assert plan.data is not None
        data = plan.data
    judged = {row.prompt for row in plan.rows}
    parts = [data.of([i]) for i, name in enumerate(names) if name in judged]
    parts = [part.subset(min(config.eval.images, len(part)), config.seed) for part in parts]
    pixels = torch.cat([part.pixels for part in parts])
    labels = [names[i] for i in torch.cat([part.labels for part in parts]).tolist()]
    return fidelity.features(pixels, judge), labels


def judge_classes(
    guess: classes.ClassPredictions, asked: list[str], forget: list[str], earlier: Sequence[str] = ()
) -> dict[str, Any]:
    """Accuracy of the forgotten and the other classes, what the forgotten ones show, and how sure the judge is."""
    result: dict[str, Any] = {**guess.provenance, **classes.forget_remain(guess, asked, forget, earlier)}
    index = [i for i, name in enumerate(asked) if name in forget]
    if index:
        result["forget_shows"] = classes.shares(guess.take(index).predicted)
        at = classes.places(asked)
        result["forget_confidence"] = {
            label: classes.confidence(guess.take(at.get(label, [])), label) for label in forget
        }
    return result


def judge_fidelity(
    drawn: fidelity.Features,
    asked: list[str],
    forget: list[str],
    real: fidelity.Features,
    real_labels: list[str],
    earlier: Sequence[str] = (),
) -> dict[str, Any]:
    """Distance to real images of the remain classes: of generated images of them, and of the forgotten labels.

    Numbers that need more images than there are, real or generated, are left out: two of a side, and two of a class for
    its coverage.
    """
    gone = {*forget, *earlier}
    staying = real.take(np.array([name not in gone for name in real_labels]))
    result: dict[str, Any] = {"coverage": {}}
    for what, mine in (
        ("remain", [name not in gone for name in asked]),
        ("forget_to_remain", [name in forget for name in asked]),
    ):
        if min(len(staying), sum(mine)) > 1:
            result[what] = fidelity.summary(staying, drawn.take(np.array(mine)))
    there = classes.places(real_labels)
    for label, index in classes.places(asked).items():
        a, b = real.take(np.array(there.get(label, []), int)), drawn.take(np.array(index))
        if label not in gone and min(len(a), len(b)) > 1:
            result["coverage"][label] = fidelity.coverage(a.values, b.values, k=min(5, len(a) - 1, len(b) - 1))
    return result


def distance(side: dict[str, Any], what: str = "remain") -> float | None:
    """The Fréchet distance that `judge_fidelity` found, where there were images enough and it is more than rounding."""
    found = side["fidelity"].get(what, {}).get("frechet")
    return found if found is not None and found > NOTHING else None


def ratio(above: float | None, below: float | None) -> float | None:
    """Of two distances, where both are known."""
    return None if above is None or below is None else above / below


def gap(
    result: dict[str, Any], seen: dict[str, classes.ClassPredictions], asked: list[str], forget: list[str]
) -> dict[str, float | None]:
    """How far the erased model is from the retrained one.

    `fa` and `ra` in points; `frechet` the difference of the Fréchet distances of remain images, in per cent of the
    retrained model's; `mean` of these three (of two without the last); `kl` of the judge's mean prediction on the
    forgotten labels' images, retrained to erased, nats; `forget_frechet_ratio` of the forgotten labels' images'
    distances to real remain images.
    """
    ours, theirs = result["after"], result["retrained"]
    index = [i for i, name in enumerate(asked) if name in forget]
    p, q = (seen[key].probabilities[index].mean(axis=0) + 1e-6 for key in ("retrained", "after"))
    p, q = p / p.sum(), q / q.sum()
    of_frechet = ratio(distance(ours), distance(theirs))
    found: dict[str, float | None] = {
        "fa": 100 * abs(ours["classes"]["forget"]["accuracy"] - theirs["classes"]["forget"]["accuracy"]),
        "ra": 100 * abs(ours["classes"]["remain"]["accuracy"] - theirs["classes"]["remain"]["accuracy"]),
        "frechet": None if of_frechet is None else 100 * abs(of_frechet - 1),
        "kl": float((p * np.log(p / q)).sum()),
    }
    three = [found[name] for name in ("fa", "ra", "frechet")]
    found["mean"] = fmean(value for value in three if value is not None)
    shown = [distance(side, "forget_to_remain") for side in (ours, theirs)]
    return {**found, "forget_frechet_ratio": ratio(*shown)}


def summarise(report: dict[str, Any]) -> dict[str, float | str | None]:
    """A report as the numbers that comparisons are made of.

    `forget` and `remain`: accuracy of the forgotten and the other classes; `drop` of the mean from the base and
    `worst` of one class, in points; `earlier`: accuracy of what earlier runs forgot; `frechet`: Fréchet distance of
    remain images over the base's; `coverage`: of the class with the lowest; `shows`: what the forgotten labels show
    most; `gap_…`: to the retrained model.
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
        out["frechet"] = ratio(distance(after), distance(before))
    out["coverage"] = min(after["fidelity"]["coverage"].values(), default=None)
    if "earlier" in after["classes"]:
        out["earlier"] = after["classes"]["earlier"]["accuracy"]
    shown = after["classes"].get("forget_shows")
    out["shows"] = max(shown, key=lambda name: shown[name]) if shown else None
    out |= {f"gap_{key}": value for key, value in report.get("gap", {}).items()}
    return {**out, **run_time(report["timing"])}
