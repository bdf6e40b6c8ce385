"""What a report says of attacks on the erased model: how often they bring the concept back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from erase.evaluation.page.names import name_of
from erase.evaluation.page.scores import Score
from erase.evaluation.page.words import as_text

CURVES = {
    "relearn": "trained again",
    "relearn_lora": "trained again as a LoRA",
    "benign": "trained on other images",
}
"""Attacks that train the model, in words."""


def attacks(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """`(attack, base, erased)` of attacks that leave the model as it is; of searches also without what was searched."""
    rows = []
    for name, numbers in found.items():
        if isinstance(numbers, dict) and "erased" in numbers:
            base, erased, words = numbers.get("base") or {}, numbers["erased"], attack_words(name)
            if "plain" in erased:
                rows.append((f"{words}: before the search", _shown(base.get("plain")), _shown(erased["plain"])))
            how = ", ".join(filter(None, [words, _how(name, numbers)]))
            rows.append((how, _shown(base or None), _shown(erased)))
    return rows


def curves(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], list[tuple[int, str, float]]]]:
    """`(attack, its settings, points)` of attacks that train the model; a point is `(steps, images, rate)`."""
    shown = []
    for name, words in CURVES.items():
        points = [(p["steps"], _shown(p), p["rate"]) for p in found.get(name, {}).get("curve", [])]
        if points:
            shown.append((words, found[name], points))
    return shown


def came_through(found: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """`(attack, images)`: what attacks on the erased model brought back, as paths within the run's folder."""
    rows = []
    for name, numbers in found.items():
        if isinstance(numbers, dict):
            last = numbers.get("erased") or (numbers.get("curve") or [{}])[-1]
            if last.get("through"):
                rows.append((attack_words(name), list(last["through"])))
    return rows


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
    words = [
        (prompt, _shown(scores.get("base")), _shown(scores.get("erased")))
        for prompt, scores in found.get("paraphrases", {}).get("by_prompt", {}).items()
    ]
    return {
        "concept": as_text(found.get("concept")),
        "judge": as_text(found.get("judge")),
        "rows": attacks(found),
        "curves": curves(found),
        "words": words,
        "prompt": found.get("inversion", {}).get("prompt"),
    }
