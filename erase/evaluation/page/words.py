"""Single values of a report: which are numbers, and how each is shown."""

from __future__ import annotations

import json
import math
from typing import Any, TypeGuard


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value can be plotted or compared; ``True`` and NaN cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def as_percent(fraction: float) -> str:
    """A fraction of 1 as per cent, to a tenth."""
    return f"{100 * fraction:.1f}"


def signed(points: float) -> str:
    """A difference in percentage points, with its sign, to a tenth."""
    return f"{points:+.1f}".replace("-", "−")


def as_p(p: float) -> str:
    """The p of a test."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def capital(text: str) -> str:
    """With a capital at its beginning."""
    return text[:1].upper() + text[1:]


def as_text(value: Any) -> str:
    """Any value of a report; lists with commas, mappings as JSON."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(as_text, value))
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def as_seconds(value: float) -> str:
    """Seconds as a person says them."""
    if value < 120:
        return f"{value:.3g} s" if value < 10 else f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
