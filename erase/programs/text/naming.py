"""Whether a prompt names a concept: by whole words, in singular or plural."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_FRAME = """
    a an the of in on at by with and or for to from this that some any my your is are being as style
    photo photograph picture image painting drawing sketch portrait illustration render
"""
FRAME = frozenset(_FRAME.split())
"""Words of a prompt that say nothing of what it shows."""
_PLURALS = """
    men man women woman children child people person feet foot teeth tooth mice mouse geese goose wolves wolf
    calves calf knives knife leaves leaf loaves loaf shelves shelf scarves scarf hooves hoof thieves thief
"""
IRREGULAR = dict(zip(_PLURALS.split()[::2], _PLURALS.split()[1::2], strict=True))
"""Plurals and their singulars."""


def words_of(prompt: str) -> set[str]:
    """The words of a prompt, in lower case and singular."""
    return {_singular(word) for word in re.findall(r"[^\W_]+", re.sub(r"['’]s\b", "", prompt.lower()))}


def _singular(word: str) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if re.search(r"(s|x|z|ch|sh)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 2 and re.search(r"[^sui]s$", word) else word


def content(prompt: str) -> set[str]:
    """The words that say what a prompt shows; all of them where there are no others."""
    words = words_of(prompt)
    return words - FRAME or words


def label_in(prompt: str, labels: Iterable[str]) -> str | None:
    """The label that a prompt names: of those whose words are all in it, the longest. `FRAME` aside."""
    words = content(prompt)
    named = [label for label in labels if content(label) <= words]
    return max(named, key=len, default=None)


def names(prompt: str, concepts: Sequence[str]) -> bool:
    """Whether a prompt has every word of one of the concepts, `FRAME` aside.

    "A tabby cat asleep" names "a photo of a cat"; "a car" does not name "a red car", nor "a kitten" "a cat".
    """
    words = words_of(prompt)
    return any(content(concept) <= words for concept in concepts)
