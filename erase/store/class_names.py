"""Names of classes: which one a label names, and whether two lists name the same classes."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence

MANY = 100
"""Classes: of more, a message does not list all."""


def distinct(names: Sequence[str]) -> list[str]:
    """Names of classes, by number; one that several have gets their numbers: ImageNet's `crane (134)`."""
    counts = Counter(names)
    return [f"{name} ({i})" if counts[name] > 1 else name for i, name in enumerate(names)]


def class_names(given: int | Sequence[str]) -> tuple[str, ...]:
    """Names of classes: those that are given, or the numbers of so many.

    Raises:
        ValueError: for no class.
    """
    names = tuple(str(i) for i in range(given)) if isinstance(given, int) else tuple(name.strip() for name in given)
    if not all(names) or not names:
        raise ValueError(f"classes are given by their number or their names; got {given!r}")
    return names


def class_number(label: str | int, names: Sequence[str]) -> int:
    """The number of a class, by its name, one of the synonyms in it (`tench, Tinca tinca`), or its number.

    Raises:
        ValueError: for a label that is no class, or a synonym that several have.
    """
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    text = str(label)
    if text in names:
        return list(names).index(text)
    synonyms = [[word.strip() for word in name.removesuffix(f" ({i})").split(",")] for i, name in enumerate(names)]
    meant = [i for i, words in enumerate(synonyms) if text in words]
    if len(meant) == 1:
        return meant[0]
    if meant:
        several = ", ".join(f"{i} {names[i]}" for i in meant)
        raise ValueError(f"several classes are called {text!r}: {several}; give a number")
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    if len(names) <= MANY:
        numbered = ", ".join(name if name == str(i) else f"{i} {name}" for i, name in enumerate(names))
        raise ValueError(f"no class {label!r}; the classes are: {numbered}")
    if all(name.isdecimal() for name in names):
        raise ValueError(f"no class {label!r}; the model's classes have no names: give a number, 0 to {len(names) - 1}")
    close = _closest(text, [word for words in synonyms for word in words])
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"no class {label!r}; the model has {len(names)}, 0 {names[0]} to {len(names) - 1} {names[-1]}{hint}"
    )


def _closest(text: str, names: Sequence[str]) -> list[str]:
    """Up to three names: those that are alike, then those that have a word in common, in whatever case."""
    known = {name.casefold(): name for name in names}
    asked = text.casefold()
    alike = difflib.get_close_matches(asked, known, n=3, cutoff=0.75)
    sharing = [name for name in known if not {*asked.split()}.isdisjoint(name.split())]
    rest = difflib.get_close_matches(asked, known, n=3, cutoff=0.4)
    return [known[name] for name in list(dict.fromkeys([*alike, *sharing, *rest]))[:3]]


def same_classes(ours: Sequence[str], theirs: Sequence[str]) -> list[int] | None:
    """Where the classes of a list stand in another one, by name, synonym or number; None unless both have the same."""
    try:
        numbers = [class_number(name, theirs) for name in ours]
    except ValueError:
        return None
    return numbers if sorted(numbers) == list(range(len(theirs))) else None
