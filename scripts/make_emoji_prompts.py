"""Write the prompt sets of the emoji world, `prompts/emoji-*.csv`: which concepts, anchors and partners, all by lot.

    python scripts/make_emoji_prompts.py --source emoji

Concepts that methods are tuned on and those that are reported are disjoint, and no anchor is among either.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import emoji_world as data
import numpy as np
from emoji_world import STYLES, World

ROOT = Path(__file__).resolve().parents[1]
SEED = 17
"""Of every lot."""
TUNE, REPORT, FAR, NEAR, STYLED = 8, 20, 24, 3, 40
Row = dict[str, str]


@dataclass(frozen=True)
class Lots:
    """Concepts by number."""

    tune: tuple[int, ...]
    report: tuple[int, ...]
    anchors: Mapping[int, int]
    """Of each of these, and of the categories' members: one of another subgroup."""
    far: tuple[int, ...]
    categories: Mapping[str, tuple[int, ...]]
    """Birds, weapons, smoking."""

    @property
    def single(self) -> tuple[int, ...]:
        """What is erased alone."""
        return (*self.tune, *self.report)


def draw_lots(world: World, tune: int = TUNE, report: int = REPORT, far: int = FAR) -> Lots:
    """By lot, of concepts that have at least `NEAR` others in their subgroup.

    Raises:
        ValueError: if too few have.
    """
    rng = np.random.default_rng([SEED, 100])
    kinds = [concept.subgroup for concept in world.concepts]
    many = Counter(kinds)
    fit = [k for k, kind in enumerate(kinds) if many[kind] > NEAR]
    if len(fit) < tune + report:
        raise ValueError(f"{len(fit)} concepts have {NEAR} others in their subgroup, expected {tune + report}")
    single = [int(k) for k in rng.choice(fit, tune + report, replace=False)]
    known = {
        "birds": tuple(k for k, kind in enumerate(kinds) if kind == data.BIRDS),
        "weapons": tuple(world.names.index(name) for name in data.WEAPONS if name in world.names),
        "smoking": tuple(world.names.index(name) for name in data.SMOKING if name in world.names),
    }
    erased = list(dict.fromkeys([*single, *(k for some in known.values() for k in some)]))
    rest = [k for k in range(len(kinds)) if k not in erased]
    anchors = {k: int(rng.choice([a for a in rest if kinds[a] != kinds[k]])) for k in erased}
    others = [k for k in rest if k not in anchors.values()]
    away = tuple(int(k) for k in rng.choice(others, min(far, len(others)), replace=False))
    return Lots(tuple(single[:tune]), tuple(single[tune:]), anchors, away, known)


def near(world: World, k: int) -> list[int]:
    """The `NEAR` others of a concept's subgroup whose drawings are most like its own."""
    same = [i for i, concept in enumerate(world.concepts) if concept.subgroup == world.concepts[k].subgroup and i != k]
    apart = data.distances(world.drawings[[k, *same]])[0, 1:]
    return [same[i] for i in np.argsort(apart, kind="stable")[:NEAR]]


def make_sets(world: World, lots: Lots) -> dict[str, list[Row]]:
    """By name: rows without seeds; all but `emoji-held-out` are of cells that generators were trained on."""
    rng = np.random.default_rng([SEED, 101])
    cells = [[int(s) for s in np.flatnonzero(~held)] for held in world.held]
    by_lot = {k: trained_style(world, (k,), rng) for k in range(len(world.names))}
    close = dict.fromkeys(i for k in lots.single for i in near(world, k))
    sets = {
        "tune": [to_anchor(world, lots, k, s) for k in lots.tune for s in cells[k]],
        "report": [to_anchor(world, lots, k, s) for k in lots.report for s in cells[k]],
        "near": [single(world, k, s) for k in close for s in sorted({by_lot[k], trained_style(world, (k,), rng)})],
        "far": [single(world, k, s) for k in lots.far for s in sorted({by_lot[k], trained_style(world, (k,), rng)})],
        "pairs": list(make_pairs(world, lots, rng)),
        "words": list(make_words(world, lots, by_lot)),
        "held-out": [single(world, int(k), int(s)) for k, s in np.argwhere(world.held)],
        "remain": [single(world, k, s) for k, s in by_lot.items()],
    }
    sets["styles"] = list(make_styles(world))
    for name, some in lots.categories.items():
        sets[name] = [to_anchor(world, lots, k, s) for k in some for s in cells[k]]
    return {f"emoji-{name}": rows for name, rows in sets.items() if rows}


def trained_style(world: World, objects: Sequence[int], rng: np.random.Generator) -> int:
    """A style by lot, in which a generator was trained on all of some concepts."""
    return int(rng.choice(np.flatnonzero(~world.held[list(objects)].any(0))))


def single(world: World, k: int, s: int) -> Row:
    name, style = world.names[k], list(STYLES)[s]
    prompt = data.phrase([data.with_article(name)], style)
    return {"prompt": prompt, "object": name, "style": style, "group": world.concepts[k].subgroup}


def to_anchor(world: World, lots: Lots, k: int, s: int) -> Row:
    """A concept that becomes its anchor in the same style."""
    return with_anchor(single(world, k, s), single(world, lots.anchors[k], s))


def with_anchor(row: Row, anchor: Row) -> Row:
    return {"prompt": row["prompt"], "anchor": anchor["prompt"], **row}


def make_pairs(world: World, lots: Lots, rng: np.random.Generator) -> Iterator[Row]:
    """Each single concept beside six partners by lot, now on the left and now on the right."""
    for k in lots.single:
        for i, partner in enumerate(rng.choice(lots.far, len(STYLES), replace=len(lots.far) < len(STYLES))):
            both = (k, int(partner)) if i % 2 else (int(partner), k)
            style = list(STYLES)[trained_style(world, both, rng)]
            names = [world.names[one] for one in both]
            prompt = data.phrase([data.with_article(name) for name in names], style)
            yield {"prompt": prompt, "object": "+".join(names), "style": style}


def make_styles(world: World) -> Iterator[Row]:
    """Objects by lot in each style, and as anchors in another style, the same for all of them."""
    rng = np.random.default_rng([SEED, 103])
    turn = rng.permutation(len(STYLES))
    for i, s in enumerate(turn.tolist()):
        other = int(turn[(i + 1) % len(turn)])
        known = np.flatnonzero(~world.held[:, [s, other]].any(1))
        for k in rng.choice(known, min(STYLED, len(known)), replace=False).tolist():
            yield with_anchor(single(world, k, s), single(world, k, other))


def make_words(world: World, lots: Lots, by_lot: Mapping[int, int]) -> Iterator[Row]:
    """Each single concept by its other names, English and foreign."""
    for k in lots.single:
        concept, style = world.concepts[k], list(STYLES)[by_lot[k]]
        for language, name in [*(("en", data.with_article(s)) for s in concept.synonyms), *concept.names]:
            yield {
                "prompt": data.phrase([name], style),
                "object": concept.name,
                "language": language,
                "style": style,
                "group": concept.subgroup,
            }


def write_sets(sets: Mapping[str, list[Row]], out: Path) -> None:
    """A file a set; seeds are distinct over all of them."""
    total = sum(map(len, sets.values()))
    seeds = iter(np.random.default_rng([SEED, 102]).choice(2**31, total, replace=False).tolist())
    for name, rows in sets.items():
        with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], "seed"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | {"seed": str(next(seeds))} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder with emoji64.npz and concepts.json")
    parser.add_argument("--out", type=Path, default=ROOT / "prompts")
    args = parser.parse_args()
    world = data.read_world(args.source)
    sets = make_sets(world, draw_lots(world))
    write_sets(sets, args.out)
    print("\n".join(f"{len(rows):4d}  {name}" for name, rows in sets.items()))


if __name__ == "__main__":
    main()
