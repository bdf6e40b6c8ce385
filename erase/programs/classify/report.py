"""The numbers of a run on a classifier: the report, its table, and what comparisons make of it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from erase.classification import metrics
from erase.config import ClassifyConfig
from erase.engine.saliency import Mask
from erase.evaluation.classes import score
from erase.evaluation.stats import mcnemar_exact
from erase.programs.classify.plan import Plan
from erase.programs.classify.predictions import Seen, parts
from erase.programs.classify.trained import Place
from erase.programs.folder import new_report, run_time

AXES = ("FA", "TA")
"""Numbers of a summary that a comparison plots, across and up."""
GOALS = ("avg_d", "rte_s")
"""Numbers of a summary that a comparison's Pareto front is of."""


def make_report(
    config: ClassifyConfig,
    plan: Plan,
    places: dict[str, Place],
    seen: dict[str, Seen],
    mask: Mask | None,
    timing: dict[str, Any],
    command: str,
) -> dict[str, Any]:
    """The keys of a report: see docs/reference/run-folder.md.

    Models are `before`, `after` and, where there is one, `retrained`.
    """
    result = new_report(config, command, {"forget": plan.target, "labels": plan.labels}, mask, timing)
    result["versions"]["scikit-learn"] = version("scikit-learn")
    for key, found in seen.items():
        result[key] = {"metrics": measure(config, plan, found), "classes": scores(plan, found)}
    if "retrained" in seen:
        ideal = result["retrained"]["metrics"]
        for key, found in seen.items():
            result[key]["metrics"] |= compare(plan, found, seen["retrained"], result[key]["metrics"], ideal)
        result["gap"] = metrics.gaps(result["after"]["metrics"], ideal)
        ideal["rte_s"] = places["retrained"].seconds
    result["after"]["metrics"]["rte_s"] = run_time(timing)["rte_s"]
    before, after = (parts(plan, seen[key]) for key in ("before", "after"))
    for part, of in before.items():
        if len(of[1]):
            p = mcnemar_exact(metrics.correct(*of).tolist(), metrics.correct(*after[part]).tolist())
            result["paired"][f"{part}_mcnemar_p"] = p
    return result


def measure(config: ClassifyConfig, plan: Plan, seen: Seen) -> dict[str, float | None]:
    """FA, RA, TA, MIA and MIA_SVC, percent; VA and MIA_V have validation images in the place of test images."""
    of = parts(plan, seen)
    found: dict[str, float | None] = {
        name: metrics.accuracy(*of[part])
        for name, part in (("FA", "forget"), ("RA", "remain"), ("TA", "test"), ("VA", "validation"))
    }
    for name, part in (("MIA", "test"), ("MIA_V", "validation")):
        whole = len(of["forget"][0]) and len(of[part][0])
        found[name] = metrics.membership(of["forget"][0], of["remain"][0], of[part][0]) if whole else None
    if config.eval.svc:
        whole = len(of["forget"][0]) and len(of["test"][0])
        found["MIA_SVC"] = (
            metrics.membership_svc(of["forget"], of["remain"], of["test"], config.seed) if whole else None
        )
    return found


def compare(
    plan: Plan, ours: Seen, theirs: Seen, here: dict[str, float | None], ideal: dict[str, float | None]
) -> dict[str, float | None]:
    """Mean gap to the retrained model, the same on validation images (to choose settings by), and D_KL."""
    as_validation = [{**m, "TA": m["VA"], "MIA": m["MIA_V"]} for m in (here, ideal)]
    p, q = (parts(plan, seen)["forget"][0] for seen in (theirs, ours))
    return {
        "avg_d": metrics.average_gap(here, ideal),
        "avg_d_v": None if here["VA"] is None else metrics.average_gap(*as_validation),
        "kl": metrics.divergence(p, q) if len(p) else None,
    }


def scores(plan: Plan, seen: Seen) -> dict[str, Any]:
    """Right answers of each part, with intervals."""
    return {name: score(metrics.correct(*of).tolist()) for name, of in parts(plan, seen).items() if len(of[1])}


COLUMNS = {"FA": 2, "RA": 2, "TA": 2, "MIA": 2, "MIA_SVC": 2, "avg_d": 2, "kl": 4, "rte_s": 1}
"""Of the table, with digits after the point."""


def table(result: dict[str, Any]) -> list[str]:
    """The field's table of a run: before, after, retrained."""
    lines = [" " * 9 + "".join(f"{name:>9}" for name in COLUMNS)]
    for key in ("before", "after", "retrained"):
        if key in result:
            found = result[key]["metrics"]
            cells = [found.get(name) for name in COLUMNS]
            texts = ["–" if v is None else f"{v:.{d}f}" for v, d in zip(cells, COLUMNS.values(), strict=True)]
            lines.append(f"{key:9}" + "".join(f"{text:>9}" for text in texts))
    return lines


def summarise(result: dict[str, Any]) -> dict[str, float | str | None]:
    """A report as the numbers that comparisons are made of: those of the table and two more.

    `avg_d_v` is of the validation images, `rte_share` the run time over that of retraining.
    """
    found = result["after"]["metrics"]
    own, whole = found["rte_s"], result.get("retrained", {}).get("metrics", {}).get("rte_s")
    return {
        **{name: found.get(name) for name in COLUMNS},
        "avg_d_v": found.get("avg_d_v"),
        "rte_share": own / whole if own is not None and whole else None,
    }
