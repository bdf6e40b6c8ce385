"""What a report says of attacks on the erased model: how often they bring the concept back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from erase.evaluation.page.names import name_of
from erase.evaluation.page.scores import Score
from erase.evaluation.page.words import as_text


def attacks(found: Mapping[str, Any]) -> tuple[list[tuple[str, str, str]], list[tuple[int, str, float]]]:
    """`(attack, base, erased)` of attacks from outside, and `(steps, pictures, rate)` of training on the concept."""
    rows = []
    for name, numbers in found.items():
        if isinstance(numbers, dict) and "erased" in numbers:
            base, erased = _shown(numbers.get("base")), _shown(numbers["erased"])
            rows.append((", ".join(filter(None, [attack_words(name), _how(name, numbers)])), base, erased))
    curve = [(p["steps"], _shown(p), p["rate"]) for p in found.get("relearn", {}).get("curve", [])]
    return rows, curve


def attack_words(name: str) -> str:
    """What an attack is called within a sentence."""
    found = name_of(name).words
    return found[:1].lower() + found[1:]


def _how(name: str, numbers: Mapping[str, Any]) -> str:
    """How much was done, in words."""
    if name == "paraphrases":
        return f"{numbers['prompts']} prompts"
    if "tokens" in numbers and "times" in numbers:
        return f"{numbers['tokens']} words, {numbers['steps']} × {numbers['times']} steps"
    return f"{numbers['steps']} steps" if "steps" in numbers else ""


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
