"""What a run forgets: prompts, what they should become, and how much each counts; from settings, or from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erase import resources
from erase.config import Forget, SdConfig
from erase.evaluation.prompt_files import ConceptRow, is_file_name, read_concepts, refuse_path
from erase.methods import find_method
from erase.nearest import meant


@dataclass(frozen=True)
class Targets:
    """Prompts whose meaning changes; the other lists have one for each of them, or are empty."""

    prompts: list[str]
    anchors: list[str] = field(default_factory=list)
    """What they should become; empty where nothing asks for them."""
    attributes: list[str] = field(default_factory=list)
    """What they should lose, where they keep the rest (`forget.erase_from`)."""
    weights: list[float] = field(default_factory=list)
    """Their shares of the loss, 1 on average."""


def make_targets(config: SdConfig) -> Targets:
    """Read files, and give each prompt what is its own.

    Raises:
        ValueError: for no prompts, one with two anchors or weights, lists that do not match them, and what the method
            has no use for.
    """
    wanted, method = config.forget, str(config.method.get("name", ""))
    prompts, anchors, weights = read(wanted)
    if not prompts:
        raise ValueError("forget.prompts is empty: name what to erase, such as forget.prompts='a photo of a cat'")
    anchors = make_anchors(config, prompts, anchors)
    if len(weights) not in (0, len(prompts)):
        raise ValueError(
            f"forget.weights has {len(weights)} numbers for {len(prompts)} forget prompts: give one for each"
        )
    if not wanted.erase_from:
        return Targets(*merge_repeats(prompts, anchors, weights))
    weights = on_average(weights)
    if "denoiser" not in find_method(method).needs:
        raise ValueError(f"forget.erase_from is for method.name=esd; got {method}: leave it out")
    places = list(wanted.erase_from)
    if len(prompts) not in (1, len(places)) or len({*places}) < len(places):
        raise ValueError(
            f"forget.erase_from has {len(places)} prompts for {len(prompts)} forget prompts: give one for each, or "
            "several different ones for a single forget prompt"
        )
    times = len(places) // len(prompts)
    return Targets(places, [], prompts * times, weights * times)


def merge_repeats(
    prompts: list[str], anchors: list[str], weights: list[float]
) -> tuple[list[str], list[str], list[str], list[float]]:
    """As `Targets`; a prompt that stands twice, with the same anchor and weight, is named once.

    Raises:
        ValueError: for one with two anchors or weights.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for n, prompt in enumerate(prompts):
        own = anchors[n] if anchors else None, weights[n] if weights else None
        first = found.setdefault(prompt, own)
        for what, a, b in zip(("anchors", "weights"), first, own, strict=True):
            if a != b:
                raise ValueError(f"forget.prompts has {prompt!r} twice, with the {what} {a!r} and {b!r}: give it one")
    names, ours = list(found), list(found.values())
    shares = on_average([weight for _, weight in ours]) if weights else []
    return names, [anchor for anchor, _ in ours] if anchors else [], [], shares


def on_average(weights: list[float]) -> list[float]:
    """Weights that are 1 on average."""
    return [weight * len(weights) / sum(weights) for weight in weights]


def read(wanted: Forget) -> tuple[list[str], list[str], list[float]]:
    """Forget prompts, anchors and weights, from the settings and from the files that they name.

    Raises:
        ValueError: for a file that cannot be read, anchors or weights from two sources, a prompt without an anchor
            where others have one from a file, and labels that no row has.
    """
    rows = [row for prompt in wanted.prompts for row in rows_of(prompt)]
    if wanted.only:
        known = list(dict.fromkeys(label for row in rows for label in row.labels))
        if odd := [label for label in wanted.only if label not in known]:
            raise ValueError(
                f"forget.only has {odd[0]!r}, which no row of forget.prompts is labelled"
                + meant(odd[0], known, "labels", "labels are in the columns object and style")
                if known
                else "forget.only needs a file in forget.prompts: labels are in its columns object and style"
            )
        rows = [row for row in rows if not set(wanted.only).isdisjoint(row.labels)]
    anchors = [row.anchor for row in rows if row.anchor is not None]
    weights = [1.0 if row.weight is None else row.weight for row in rows]
    weighted = any(row.weight is not None for row in rows)
    for name, own, given in (("anchors", bool(anchors), wanted.anchors), ("weights", weighted, wanted.weights)):
        if own and given:
            raise ValueError(
                f"forget.{name} is given twice, as a setting and in the file of forget.prompts: remove one of them"
            )
    if anchors and len(anchors) < len(rows):
        lost = next(row.prompt for row in rows if row.anchor is None)
        raise ValueError(
            f"forget.prompts has an anchor for some prompts but not for {lost!r}: give one for each, or none"
        )
    found = anchors or [row.prompt for anchor in wanted.anchors for row in rows_of(anchor)]
    return [row.prompt for row in rows], found, weights if weighted else list(wanted.weights)


def rows_of(prompt: str) -> list[ConceptRow]:
    """A prompt as a row of its own; of the path of a file, or of `NAME.csv` of a set that we ship, its rows."""
    if not is_file_name(prompt):
        refuse_path(prompt)
        return [ConceptRow(prompt)]
    path, own = Path(prompt), prompt.removesuffix(".csv")
    return read_concepts(resources.prompt_path(own) if not path.exists() and own in resources.list_prompts() else path)


def concepts_and_anchors(wanted: Forget) -> list[tuple[str, str]]:
    """Each concept and its anchor, the empty prompt where there is none; whatever the method looks at.

    Raises:
        ValueError: as `read`, and for anchors that do not match.
    """
    concepts, anchors, _ = read(wanted)
    if len(anchors) < 2:
        anchors = (anchors or [""]) * len(concepts)
    check_anchors(concepts, anchors)
    return list(zip(concepts, anchors, strict=True))


def check_anchors(forget: Sequence[str], anchors: Sequence[str]) -> None:
    """Refuse anchors that are not one for each prompt.

    Raises:
        ValueError: for these.
    """
    if len(anchors) != len(forget):
        raise ValueError(
            f"forget.anchors has {len(anchors)} prompts for {len(forget)} forget prompts: "
            "give one for each, or one for all"
        )


def make_anchors(config: SdConfig, forget: Sequence[str], anchors: list[str]) -> list[str]:
    """One per forget prompt, the empty prompt where a redirect is given none; none where nothing looks at them.

    Raises:
        ValueError: for anchors that do not match, or are missing.
    """
    pictures = config.forget.pictures
    needs = find_method(str(config.method.get("name", ""))).needs
    loss = config.forget.loss if "forget" in needs else None
    if loss == "redirect" and not anchors:
        return [""] * len(forget)
    if loss in ("redirect", "surrogate") or ("concepts" in needs and anchors):
        if len(anchors) == 1:
            anchors = anchors * len(forget)
        check_anchors(forget, anchors)
        if loss == "surrogate" and pictures != "anchor":
            raise ValueError(
                f"forget.loss=surrogate learns from images of the anchors: set forget.pictures=anchor; got {pictures}"
            )
        return list(anchors)
    if pictures != "own":
        what = f"method {config.method['name']}" if loss is None else f"forget.loss={loss}"
        raise ValueError(f"forget.pictures={pictures} needs anchors, and {what} has none: set forget.pictures=own")
    return []
