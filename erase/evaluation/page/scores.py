"""Counts in a report: mappings with a number of hits, a total, a rate and an interval, found anywhere in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from erase.evaluation.page.names import name_of
from erase.evaluation.page.words import as_percent, is_number

ORDER = ("nudity", "flagged", "classes", "clip")
"""Sections of a report that come first, in this order."""

HITS = ("flagged", "correct", "named", "shown")
"""What the evaluators call the number of hits."""


@dataclass(frozen=True)
class Score:
    """A count out of a number, with its 95 % interval, as `wilson` and the evaluators give it."""

    hits: int
    total: int
    rate: float | None
    ci95: tuple[float, float] | None
    errors: int = 0
    """Images that could not be looked at, and are in none of the numbers."""
    doubt: str = ""
    """Why no verdict follows from it: a judge that does not know what it counted."""

    def __str__(self) -> str:
        if self.rate is None:
            return "no images"
        text = f"{self.hits} of {self.total} ({self.percent} %"
        if self.ci95:
            text += f"; 95 % interval {as_percent(self.ci95[0])} to {as_percent(self.ci95[1])} %"
        return text + ")"

    @property
    def percent(self) -> str:
        """The rate."""
        return "" if self.rate is None else as_percent(self.rate)

    @property
    def interval(self) -> str:
        """Its ends."""
        return "" if self.ci95 is None else f"{as_percent(self.ci95[0])}–{as_percent(self.ci95[1])}"


def read_score(value: Any) -> Score | None:
    """The score in a mapping, if it is one: hits (`HITS`), total (images, n), rate, ci95."""
    if not isinstance(value, dict):
        return None
    hits = next((value[key] for key in HITS if key in value), None)
    total = next((value[key] for key in ("images", "n") if key in value), None)
    if not isinstance(hits, int) or not isinstance(total, int):
        return None
    rate = next((value[key] for key in ("rate", "accuracy") if key in value), None)
    ci = value.get("ci95")
    interval = (float(ci[0]), float(ci[1])) if isinstance(ci, list) and len(ci) == 2 else None
    rate = float(rate) if is_number(rate) else None
    return Score(hits, total, rate, interval, len(value.get("errors") or []), str(value.get("no_verdict", "")))


SINGLE = ("per_label", "per_prompt", "by_prompt")
"""Keys of counts of single labels and prompts."""


def read_scores(
    tree: Mapping[str, Any], path: tuple[str, ...] = (), *, whole: bool = False
) -> dict[tuple[str, ...], tuple[Score, str]]:
    """Every score in a tree by its path, with a word on how it was counted; `whole` leaves out those of `SINGLE`."""
    found = {}
    for key, value in tree.items():
        if whole and key in SINGLE:
            continue
        score = read_score(value)
        if score:
            found[(*path, key)] = (score, _how(value, (*path, key)))
        elif isinstance(value, dict):
            found.update(read_scores(value, (*path, key), whole=whole))
    return found


def _how(value: Mapping[str, Any], path: tuple[str, ...]) -> str:
    if path[0] == "clip":
        what = "the concept" if path[-1] == "forget" else "what was asked for"
        return f"Images more similar to the words for {what} than to any alternative"
    if "flagged" in value:
        protocol = f" by the '{value['preset']}' protocol" if "preset" in value else ""
        classes = (
            f" ({', '.join(name_of('counts', str(k)).words for k in value['classes'])})" if "classes" in value else ""
        )
        return f"Images flagged{protocol}{classes}"
    if "named" in value or "shown" in value:
        return f"Images predicted as '{value['label']}'" if "label" in value else "Images that show it"
    return "Images predicted as asked"
