"""A report in one line: what is gone, what was kept, what it cost; or what was attacked; or that nothing was judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from erase.evaluation.page.names import name_of
from erase.evaluation.page.scores import Score
from erase.evaluation.page.verdict import FEWEST, MARGIN, Line, is_classifier
from erase.evaluation.page.words import as_seconds, as_text, is_number

JUDGES = ("classifier", "nudity", "clip")
"""Settings under `eval` that name what judges images."""
PARTS = {"data_s": "data", "saliency_s": "mask", "erase_s": "steps"}
"""Of the time that unlearning takes: keys of a report's `timing`, in words."""
_FALL = {
    "unknown": "Not known whether it is gone",
    "few": f"Fewer than {FEWEST} images, too few to tell whether it is gone",
    "open": "Nothing to forget",
    "bad": "Not gone",
    "none": "Shown, with no base to compare with",
}
_EARLIER = {
    "unknown": "Not known whether what was forgotten earlier is gone",
    "few": f"Fewer than {FEWEST} images, too few to tell whether what was forgotten earlier is gone",
    "open": "Forgotten earlier, no return shown",
    "bad": "Forgotten earlier, came back",
    "good": "Forgotten earlier, still gone",
    "none": "Forgotten earlier",
}
_STAY = {
    "unknown": "Not known what was kept",
    "few": f"Fewer than {FEWEST} images, too few to tell what was kept",
    "bad": "Lost",
}


def headline(report: Mapping[str, Any], run: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """What a reader wants to know first; of nothing judged that, and which settings are off by the run's record."""
    parts = _classifier(report, lines) if is_classifier(report) else _images(lines)
    spent = ", ".join(cost(report))
    parts = parts or [_attacked(report["robustness"]) if report.get("robustness") else nothing(report, run)]
    return " ".join(f"{part}." for part in (*parts, spent) if part)


def nothing(report: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """That nothing was judged, and why, as far as the report or the settings in ``run.json`` tell."""
    if report.get("unjudged"):
        said = str(report["unjudged"])
        return f"Nothing was judged: {said.partition(': ')[2] or said}"
    config = run.get("config")
    settings = config.get("eval") if isinstance(config, dict) else None
    settings = settings if isinstance(settings, dict) else {}
    if settings.get("images") == 0:
        return "Nothing was judged: eval.images=0"
    off = [f"eval.{key}=null" for key in JUDGES if key in settings and settings[key] is None]
    return f"Nothing was judged: {' and '.join(off)}" if off else "Nothing was judged"


def _attacked(found: Mapping[str, Any]) -> str:
    """What was attacked, of a report of attacks alone."""
    return f"Attacks on {as_text(found.get('concept'))}, judged by {as_text(found.get('judge'))}"


def cost(report: Mapping[str, Any]) -> list[str]:
    """Time of all that unlearning takes, with its parts, and the most memory; each where it is known."""
    timing, memory = report.get("timing", {}), report.get("memory", {})
    found = []
    if is_number(timing.get("erase_s")):
        parts = {words: timing[key] for key, words in PARTS.items() if is_number(timing.get(key))}
        total = sum(parts.values())
        told = [f"{words} {as_seconds(seconds)}" for words, seconds in parts.items() if seconds > total / 100]
        found.append(as_seconds(total) + (f" ({', '.join(told)})" if len(told) > 1 else ""))
    for key, what in (("gpu_bytes", " on the GPU"), ("ram_bytes", "")):
        if memory.get(key):
            return [*found, f"{memory[key] / 1e9:.1f} GB{what}"]
    return found


def _images(lines: Sequence[Line]) -> list[str]:
    """A part for each count of whole concepts; anchors, and object and style together, are left to the cards."""
    counts = [line for line in lines if line.side != "rise"]
    shown = [line for line in counts if not line.path[-1].endswith("_pairs")] or counts
    found = []
    for line in shown:
        several = sum(other.side == line.side for other in shown) > 1
        found.append(_part(line, f" (by {name_of('judge', line.path[0]).words})" if several else ""))
    return found


def _part(line: Line, by: str) -> str:
    after = line.after or line.before
    assert after is not None
    count = _count(after)
    if line.mark in ("unknown", "few"):
        words = {"fall": _FALL, "gone": _EARLIER}.get(line.side, _STAY)[line.mark]
        return f"{words}{by}: {count}"
    before = f", before {_count(line.before, after.total)}" if line.before is not None else ""
    if line.side == "gone":
        return f"{_EARLIER[line.mark]}{by}: {count}"
    if line.side == "fall":
        if line.mark in _FALL:
            return f"{_FALL[line.mark]}{by}: {count}{before if line.mark == 'bad' else ''}"
        if after.rate is not None and after.rate > MARGIN:
            return f"Less, not gone{by}: {count}{before}"
        return f"Gone{by}: {count}{_at_most(after)}"
    if line.mark == "bad":
        return f"Lost{by}: {count}{before}"
    unsure = ", a loss not excluded" if line.mark == "open" else ""
    return f"Kept{by}: {count}{unsure}"


def _count(score: Score | None, total: int | None = None) -> str:
    if score is None or score.rate is None:
        return "no images"
    return str(score.hits) if score.total == total else f"{score.hits} of {score.total}"


def _at_most(score: Score) -> str:
    if score.ci95 is None:
        return ""
    most = 100 * score.ci95[1]
    return f", at most {most:.0f} %" if most >= 1 else f", at most {most:.1g} %"


def _classifier(report: Mapping[str, Any], lines: Sequence[Line]) -> list[str]:
    """Accuracies, with the retrained model's as the goal."""
    found = []
    for key, what in (("forget", "FA"), ("test", "TA")):
        line = next((line for line in lines if line.path[-1] == key), None)
        if line is None or line.after is None or line.after.rate is None:
            continue
        beside = [
            f"{name} {score.percent} %"
            for name, score in (("retrained", line.retrained), ("before", line.before))
            if score is not None and score.rate is not None
        ]
        found.append(f"{name_of(what).words} {line.after.percent} %" + (f" ({', '.join(beside)})" if beside else ""))
    mean = report["after"]["metrics"].get("avg_d")
    if is_number(mean):
        found.append(f"Mean gap to the retrained model {mean:.1f} points")
    elif found and "retrained" not in report:
        found.append("No retrained model to compare with")
    return found
