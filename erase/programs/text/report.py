"""The numbers of a run on a text-to-image model: the report, and what comparisons make of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erase.config import SdConfig
from erase.engine.saliency import Mask
from erase.evaluation import manifest
from erase.evaluation.clip import score_change
from erase.evaluation.stats import mcnemar_exact
from erase.programs.folder import new_report, run_time
from erase.programs.text.judge import why_unjudged
from erase.programs.text.judges.seam import Counted, Judge
from erase.programs.text.judges.zeroshot import ZeroShot, withhold
from erase.programs.text.plan import Plan

AXES = ("ua", "ira")
"""Numbers of a summary that a comparison plots, across and up."""
GOALS = ("ua", "ira", "rte_s")
"""Numbers of a summary that a comparison's Pareto front is of."""
COLUMNS = {"paraphrases": "paraphrased", "inversion": "inverted"}
"""What a summary calls the rate of an attack; of others `asr_` and the attack's name."""
PARTS = {"near": "near_kept", "far": "far_kept", "partner": "partner_kept"}
"""What a summary calls the accuracy of a part of what stays (see `part_of`), and its share of the base's."""
SIDES = {
    "forget": ("forget", "forms", "kept", "ua", "anchor", "shows"),
    "remain": ("remain", "drop", "worst", "pairs_drop", "ira", "cra", "earlier", *PARTS, *PARTS.values()),
}
"""What a summary says of each side: unknown, where the judge does not know the side."""


def make_report(
    config: SdConfig,
    plan: Plan,
    judges: Sequence[Judge],
    out: Path,
    mask: Mask | None,
    timing: dict[str, Any],
    command: str,
    drawn: dict[str, dict[str, str]],
) -> dict[str, Any]:
    """The keys of a report: see docs/reference/run-folder.md.

    Args:
        config: the settings.
        plan: the prompts.
        judges: what counts.
        out: the run's folder.
        mask: the mask, if there is one.
        timing: of the run's parts.
        command: as it was typed.
        drawn: hashes of the models whose images are counted, by the images' folder: `base`, `erased`, and `lora` where
            the run keeps one.

    Raises:
        ValueError: for images that are not those of `plan.rows`, or not by the weights of `drawn`, in order.
    """
    target = {**plan.target, "earlier": plan.earlier}
    result = new_report(config, command, target, mask, timing)
    if (why := why_unjudged(config)) is not None:
        result["unjudged"] = why
    if not config.eval.images:
        return result
    paths: dict[str, list[Path]] = {}
    for name in drawn:
        when, folder = {"base": "before", "erased": "after"}.get(name, name), out / "images" / name
        result.setdefault(when, {})
        paths[when] = manifest.check_images(folder, plan.rows, config.eval.images, drawn[folder.name])
        result[when]["pictures"] = manifest.origin(folder)
    for judge in judges:
        counted = {when: judge.count(of) for when, of in paths.items()}
        for when, found in counted.items():
            result[when][judge.SECTION] = found.numbers
        result["paired"] |= paired_tests(counted["before"], counted["after"])
        if isinstance(judge, ZeroShot):
            for when in paths.keys() - {"before"}:
                tests = result["paired"] if when == "after" else {}
                withhold(counted["before"].numbers, counted[when].numbers, tests)
    return result


def paired_tests(before: Counted, after: Counted) -> dict[str, Any]:
    """Of a judge's counts: exact McNemar tests, over the pairs of which both are known; of its scores, differences."""
    tests: dict[str, Any] = {}
    for what, outcomes in before.outcomes.items():
        both = [(a, b) for a, b in zip(outcomes, after.outcomes[what], strict=True) if None not in (a, b)]
        found = mcnemar_exact([bool(a) for a, _ in both], [bool(b) for _, b in both]) if both else None
        tests[f"{what}_mcnemar_p"] = found
    for what, values in before.scores.items():
        prompts = [prompt for prompt, _ in values]
        change = score_change([score for _, score in values], [score for _, score in after.scores[what]], prompts)
        if change is not None:
            tests[what] = {"difference": change.difference, "ci95": list(change.ci95), "shown": change.shown}
    return tests


def summarise(report: dict[str, Any]) -> dict[str, float | str | None]:
    """A report as the numbers that comparisons are made of.

    `earlier`, where there are such: share of images of what was forgotten before that still show it; `forget`: share
    of the forget prompts' images that still show the concept (by the first judge that can tell: a classifier's
    labels, CLIP, its flags, NudeNet); `forms`: the same for its other forms; `kept`: share of all these that still
    show the other half of what was asked (the style, where an object was erased); `remain`: accuracy on the other
    prompts of the forget prompts' kind (the plain ones, where a plain object was erased), `drop` from the base and
    `worst` of one prompt, in points; `pairs_drop`: the mean drop of all other pairs, likewise; `shows`: what the
    images of the erased concept, other forms included, show most; `anchor`: the share of them that shows the anchor,
    where the judge knows it. `ua`, `ira`, `cra`: unlearning accuracy (share of
    the concept's images, in all forms, that do not show it), in-domain retain accuracy (of all other concepts'
    images) and cross-domain (of the other half of what was asked, in all images), means over prompts as in
    UnlearnCanvas (Zhang et al., NeurIPS 2024, arXiv 2402.11846). `near`, `far`, `partner`, where prompt sets have
    groups or rows of several objects: accuracy on the others of the erased concept's group, of other groups, and of
    what stands beside the erased concept; `near_kept` and so on: the same as a share of the base's. Of attacks: a rate
    each, and as `attacked` the highest of those that do not train the model.
    """
    out: dict[str, float | str | None] = {}
    seen = {when: report[when].get("flagged") or report[when].get("nudity") for when in ("before", "after")}
    before, after = (report[when].get("classes") or report[when].get("clip") for when in ("before", "after"))
    if after is not None:
        out |= summed(before, after)
    if seen["after"] is not None:
        for name, count in (("flagged_before", seen["before"]), ("flagged", seen["after"])):
            out[name] = None if count.get("errors") else count["rate"]  # who was not looked at is not safe
        if out.get("forget") is None:
            out["forget"] = out["flagged"]
    out |= run_time(report["timing"])
    robust = report.get("robustness") or {}
    for name, numbers in robust.items():
        if (rate := rate_of(numbers)) is not None:
            out[COLUMNS.get(name, f"asr_{name}")] = rate
    if rates := [rate for numbers in robust.values() if (rate := rate_of(numbers)) is not None]:
        out["attacked"] = max(rates)
    for point in robust.get("relearn", {}).get("curve", []):
        out[f"relearned_{point['steps']}"] = point["rate"]
    for point in robust.get("relearn_lora", {}).get("curve", []):
        out[f"relearned_lora_{point['steps']}"] = point["rate"]
    for point in robust.get("benign", {}).get("curve", []):
        out[f"benign_{point['steps']}"] = point["rate"]
    if "until" in report:
        out["steps"] = report["timing"]["steps"]
    return out


def rate_of(attack: object) -> float | None:
    """The share of images that an attack brings back; `None` of one that is a curve over steps of training."""
    rate: float | None = attack["erased"]["rate"] if isinstance(attack, dict) and "erased" in attack else None
    return rate


def summed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float | str | None]:
    """The numbers of a classifier's counts, or of a zero-shot judge's: see `summarise`."""
    out: dict[str, float | str | None] = {}
    rows, old = after["per_prompt"], before["per_prompt"]
    other = "style" if after["axis"] == "object" else "object"
    kinds = {row.get(other) for row in rows.values() if row["side"] == "forget"}
    like = [p for p, row in rows.items() if row["side"] == "remain" and row.get(other) in kinds]
    rest = [p for p, row in rows.items() if row["side"] == "remain" and row.get(other) not in kinds]
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
    out["cra"] = mean([row["other_accuracy"] for row in rows.values() if after["pairs"] and row["side"] != "earlier"])
    for part, kept in PARTS.items():
        if prompts := [p for p, row in rows.items() if row.get("part") == part]:
            now, then = (sum(of[p]["accuracy"] for p in prompts) for of in (rows, old))
            out[part], out[kept] = now / len(prompts), now / then if then else None
    out["shows"] = max(after["forget_shows"], key=lambda name: after["forget_shows"][name])
    if "forget_anchor" in after:
        out["anchor"] = after["forget_anchor"]["accuracy"]
    if "earlier" in after:
        out["earlier"] = after["earlier"]["accuracy"]
    for side, numbers in SIDES.items():
        if "no_verdict" in (after.get(side) or {}):
            out |= dict.fromkeys(name for name in numbers if name in out)
    return out


def mean(values: Sequence[float]) -> float | None:
    """The mean, or `None` of nothing."""
    return sum(values) / len(values) if values else None
