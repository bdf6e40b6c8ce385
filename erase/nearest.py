"""What was meant by a name that is not known: the few most like it, and all that are allowed where those are few."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

FEW = 20
"""Names that a message lists; of more it gives the nearest ones."""


def nearest(text: str, names: Sequence[str], count: int = 3) -> list[str]:
    """Up to `count` names, in whatever case: those that are alike, then those that have words in common."""
    known = {name.casefold(): name for name in names}
    asked = text.casefold()
    words = _words(asked)
    alike = get_close_matches(asked, known, count, 0.75)
    sharing = [name for name in known if words & _words(name)]
    sharing.sort(key=lambda name: (-len(words & _words(name)), len(_words(name))))
    rest = get_close_matches(asked, known, count, 0.45)
    return [known[name] for name in list(dict.fromkeys([*alike, *sharing, *rest]))[:count]]


def _words(name: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", name))


def either(names: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def some(names: Sequence[str]) -> str:
    """All names, or of many the first few and how many there are: `a, b, c, … (400 in all)`."""
    few = len(names) <= FEW
    return ", ".join(names) if few else f"{', '.join(names[:5])}, … ({len(names)} in all)"


def meant(text: str, names: Sequence[str], listed: str, more: str, before: str = "") -> str:
    """How a message on an unknown name goes on: `; did you mean 'a'? presets: a, b`.

    Args:
        text: what was given.
        names: what is known.
        listed: what is before a list of all.
        more: of many, where the others are found.
        before: put before each name that is meant, such as the group of a setting.
    """
    few = len(names) <= FEW
    found = nearest(text, names, 1 if few else 3)
    hint = f"; did you mean {either([before + name for name in found])}?" if found else ";"
    return f"{hint} {listed}: {', '.join(names) or 'none'}" if few else f"{hint} {more}"
