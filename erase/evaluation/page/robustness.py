"""What a report says of attacks on the erased model: how often they bring the concept back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from erase.evaluation.page.scores import Score
from erase.evaluation.page.words import as_text


def attacks(found: Mapping[str, Any]) -> tuple[list[tuple[str, str, str]], list[tuple[int, str, float]]]:
    """`(attack, base, erased)` of attacks from outside, and `(steps, pictures, rate)` of training on the concept."""
    rows = []
    for name in ("paraphrases", "inversion"):
        if name in found:
            how = f"{found[name]['prompts']} prompts" if name == "paraphrases" else f"{found[name]['steps']} steps"
            rows.append((f"{name}, {how}", _shown(found[name].get("base")), _shown(found[name].get("erased"))))
    curve = [(p["steps"], _shown(p), p["rate"]) for p in found.get("relearn", {}).get("curve", [])]
    return rows, curve


def _shown(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return "–"
    low, high = share["ci95"]
    return str(Score(share["shown"], share["n"], share["rate"], (low, high)))


def section(found: Any) -> dict[str, Any] | None:
    """What the page's section on attacks shows; ``None`` without any."""
    if not isinstance(found, dict):
        return None
    rows, curve = attacks(found)
    words = [
        (prompt, _shown(scores.get("base")), _shown(scores.get("erased")))
        for prompt, scores in found.get("paraphrases", {}).get("by_prompt", {}).items()
    ]
    return {
        "concept": as_text(found.get("concept")),
        "judge": as_text(found.get("judge")),
        "rows": rows,
        "curve": curve,
        "words": words,
        "prompt": found.get("inversion", {}).get("prompt"),
        "relearn": found.get("relearn", {}),
    }
