"""Names of classes: which one a label names, and whether two lists name the same classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from erase.nearest import FEW, either, nearest


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


def short(names: Sequence[str]) -> str:
    """Names in a line, the first dozen of them."""
    return ", ".join(names[:12]) + (f" … ({len(names)})" if len(names) > 12 else "")


def class_number(label: str | int, names: Sequence[str], where: str = "") -> int:
    """The number of a class, by its name, one of the synonyms in it (`tench, Tinca tinca`), or its number.

    `where` is whose classes these are, for messages.

    Raises:
        ValueError: for a label that is no class, or a synonym that several have.
    """
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    text, of = str(label), where and f" of {where}"
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
    if all(name.isdecimal() for name in names):
        raise ValueError(f"no class {label!r}{of}; its classes have no names: give a number, 0 to {len(names) - 1}")
    numbered = [name if name == str(i) else f"{i} {name}" for i, name in enumerate(names)]
    few, some = len(names) <= FEW, f"its {len(names)} classes go from {numbered[0]} to {numbered[-1]}"
    listed = f"the classes are: {', '.join(numbered)}" if few else some
    close = nearest(text, [word for words in synonyms for word in words])
    hint = f"did you mean {either([repr(name) for name in close])}? " if close else ""
    raise ValueError(f"no class {label!r}{of}; {hint}{listed}")


def same_classes(ours: Sequence[str], theirs: Sequence[str]) -> list[int] | None:
    """Where the classes of a list stand in another one, by name, synonym or number; None unless both have the same."""
    try:
        numbers = [class_number(name, theirs) for name in ours]
    except ValueError:
        return None
    return numbers if sorted(numbers) == list(range(len(theirs))) else None
