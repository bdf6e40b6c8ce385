"""The emoji world: concepts drawn in six styles, composed into scenes of 32 × 32 pixels with captions.

The mathematics of the data alone, in numpy and Pillow: which concepts are chosen, which cells (a concept in a style) no
generator is trained on, how a scene is drawn, and what its caption says. `scripts/make_emoji.py` trains on it.

Every cell has one drawing only, so size, place and background vary. The drawings are on white; what is connected to the
border and white becomes transparent.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]

SIZE = 32
"""Side of a scene, in pixels."""
SINGLE, DOUBLE = 24, 16
"""Sides of an object that is alone, in the middle, and of one of two, each in the middle of its half. The text says
what is there but not where: open places would be one more thing to learn. Judges and the VAE see objects anywhere."""
STYLES: dict[str, tuple[str, str]] = {
    "3d": ("a 3d render of {}", "{} in 3d"),
    "icon": ("a black icon of {}", "{} as a black icon"),
    "noto": ("a noto drawing of {}", "{} in noto style"),
    "blob": ("a blob drawing of {}", "{} in blob style"),
    "flat": ("a flat drawing of {}", "{} in flat style"),
    "cartoon": ("a cartoon of {}", "{} as a cartoon"),
}
"""By label: the main phrase and another, in the order of the drawings' second axis."""
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (186, 190, 196),
    "pink": (255, 190, 214),
    "red": (238, 112, 104),
    "orange": (255, 184, 102),
    "yellow": (255, 236, 130),
    "green": (158, 218, 146),
    "teal": (110, 200, 196),
    "blue": (140, 184, 248),
    "purple": (196, 166, 238),
}
GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
LANGUAGES = ("de", "es", "fr", "it")
CLOCKS = "time"
"""A subgroup of 24 clock faces that differ by their hands alone."""
RENAMED = {"bow and arrow": "archery bow"}
"""Names with an "and", which joins two objects in a caption, go; that of a weapon is reworded."""
WEAPONS = ("dagger", "crossed swords", "bomb", "archery bow", "kitchen knife")
SMOKING = ("cigarette",)
BIRDS = "animal-bird"
SIBLINGS = ("animal-mammal", BIRDS)
"""Subgroups that are kept whole, alike as their drawings may be: cat face, cat, tiger and lion."""
MASS = ("bacon", "bread", "popcorn", "spaghetti", "sushi", "oden", "sake", "jeans", "confetti", "rice", "food", "fire")
NOT_SHOWN = re.compile(r"\b(baby|(boy|girl|child|children|men|women|man|woman)s?|love)\b")
"""Words for people: a name that has one is left out, nothing here is about persons."""
VAGUE = re.compile(r"\b(and|on|in|with|without|showing|up|facing|oncoming|incoming|not|done|waxing|waning)\b")
"""Words of names that describe a drawing rather than name a thing."""
LEFT_OUT = ("water pistol", "foggy", "cooking", "locked", "unlocked", "construction", "wedding", "performing arts")
"""The first is a revolver in two of the styles; the others name no thing."""

HELD_SHARE = 0.05
DOUBLES = 0.33
"""Share of scenes of two objects."""
WHITE = 0.7
"""Share of white backgrounds: each of the others makes other latents of every drawing."""
NULL, NO_STYLE, OTHER_PHRASE, FOREIGN, SYNONYM = 0.1, 0.1, 0.2, 0.12, 0.1
"""Shares: of empty captions; of the others, without a style, and in another phrase; of names, foreign and synonyms."""


@dataclass(frozen=True)
class Concept:
    """What is drawn and how it is called; every wording names this concept alone."""

    name: str
    group: str
    subgroup: str
    synonyms: tuple[str, ...] = ()
    names: tuple[tuple[str, str], ...] = ()
    """Language and name, of `LANGUAGES`."""

    @property
    def wordings(self) -> tuple[str, ...]:
        """All that it may be called, the main name first."""
        return (self.name, *self.synonyms, *(name for _, name in self.names))


@dataclass(frozen=True, eq=False)
class World:
    """K concepts in S styles."""

    concepts: tuple[Concept, ...]
    drawings: Pixels
    """`[K, S, 64, 64, 3]`, on white."""
    held: Flags
    """`[K, S]`, cells that no generator is trained on."""

    @property
    def names(self) -> tuple[str, ...]:
        """Main names, `[K]`."""
        return tuple(concept.name for concept in self.concepts)


@dataclass(frozen=True)
class Scene:
    """One or two objects in a style on a background, from left to right."""

    objects: tuple[int, ...]
    style: int
    background: int
    boxes: tuple[tuple[int, int, int], ...]
    """Left, top and side of each object, in pixels."""


# ---------------------------------------------------------------- which concepts


def read_world(source: Path, count: int = 400, seed: int = 17) -> World:
    """Choose `count` well-separated concepts of a folder with `emoji64.npz` and `concepts.json`.

    Raises:
        ValueError: if fewer concepts fit, or the styles are not as many as `STYLES`.
    """
    stored = json.loads((source / "concepts.json").read_text(encoding="utf-8"))
    images = np.load(source / "emoji64.npz")["images"]
    if images.shape[:2] != (len(stored["concepts"]), len(STYLES)):
        raise ValueError(f"{source} holds {images.shape[:2]} drawings, expected [concepts, {len(STYLES)}]")
    rows = [dict(row, name=RENAMED.get(row["name"], row["name"])) for row in stored["concepts"]]
    fit = [i for i, row in enumerate(rows) if fits(row)]
    if len(fit) < count:
        raise ValueError(f"{source} holds {len(fit)} concepts that fit, expected at least {count}")
    named = [plain(rows[i]["name"]) for i in fit]
    kept = [k for k, name in enumerate(named) if name in WEAPONS + SMOKING or rows[fit[k]]["subgroup"] in SIBLINGS]
    chosen = [fit[k] for k in separate(distances(images[fit]), count, kept)]
    concepts = tuple(worded([rows[i] for i in chosen], rows))
    return World(concepts, images[chosen], hold_out(count, len(STYLES), seed))


def fits(row: Mapping[str, object]) -> bool:
    """Whether a concept is a thing or animal with a name of at most three words."""
    name = plain(str(row["name"]))
    words = name.split()
    if row["group"] not in GROUPS or row["subgroup"] == CLOCKS or NOT_SHOWN.search(name) or name in LEFT_OUT:
        return False
    return 1 <= len(words) <= 3 and (name in WEAPONS or not VAGUE.search(name))


def distances(images: Pixels) -> npt.NDArray[np.float64]:
    """How unlike the concepts' drawings are, `[K, K]`: Euclidean, at 16 × 16 pixels, over all styles, by their ink."""
    small = images.reshape(*images.shape[:2], 16, images.shape[2] // 16, 16, images.shape[3] // 16, 3).mean((3, 5))
    ink = (255 - small).reshape(len(images), -1).astype(np.float64)
    squares = (ink**2).sum(1)
    apart = np.sqrt((squares[:, None] + squares - 2 * ink @ ink.T).clip(0))
    found: npt.NDArray[np.float64] = apart / np.sqrt(np.sqrt(squares[:, None] * squares)).clip(1)
    return found


def separate(apart: npt.NDArray[np.float64], count: int, kept: Sequence[int] = ()) -> list[int]:
    """`count` of K concepts: of the two that are most alike, the one with the nearer third goes, again and again."""
    table = apart + np.diag(np.full(len(apart), np.inf))
    alive = np.ones(len(table), bool)
    fixed = np.zeros(len(table), bool)
    fixed[list(kept)] = True
    table = np.where(fixed[:, None] & fixed, np.inf, table)
    while alive.sum() > count:
        a, b = np.unravel_index(table.argmin(), table.shape)
        rest = [np.delete(table[k], [a, b]).min() for k in (a, b)]
        loser = b if fixed[a] else a if fixed[b] else (a, b)[int(rest[1] < rest[0])]
        table[loser], table[:, loser], alive[loser] = np.inf, np.inf, False
    return [int(k) for k in np.flatnonzero(alive)]


def hold_out(K: int, S: int, seed: int) -> Flags:
    """`[K, S]`: at least `HELD_SHARE` of the cells, at most one a concept, every style about as often."""
    rng = np.random.default_rng([seed, 1])
    number = -int(-HELD_SHARE * K * S // 1)
    held = np.zeros((K, S), bool)
    held[rng.permutation(K)[:number], rng.permutation(np.arange(number) % S)] = True
    return held


# ---------------------------------------------------------------- words


def plain(text: str) -> str:
    """Lower-case words of letters and digits, one space between: what a tokenizer makes whole words of."""
    text = unicodedata.normalize("NFC", text.lower()).replace("’", "'").replace("'s", "s")
    return " ".join(re.findall(r"[^\W_]+", text))


def worded(rows: Sequence[Mapping[str, object]], every: Sequence[Mapping[str, object]]) -> list[Concept]:
    """The chosen concepts, with those synonyms and foreign names that mean no other concept.

    Args:
        rows: the chosen ones.
        every: all concepts: a synonym that two of them share says too little.
    """
    shared = Counter(word for row in every for word in {plain(str(t)) for t in (*row["synonyms"], *row["keywords"])})  # type: ignore[misc]
    mains = {plain(str(row["name"])) for row in every}
    foreign = [dict.fromkeys(LANGUAGES, "") | _foreign(row) for row in rows]
    owners = Counter(name for names in foreign for name in set(names.values()))
    taken = {word for name in mains for word in name.split()}
    found = []
    for row, names in zip(rows, foreign, strict=True):
        main = plain(str(row["name"]))
        said = [plain(str(t)) for t in row["synonyms"]]  # type: ignore[attr-defined]
        synonyms = [s for s in dict.fromkeys(said) if shared[s] == 1 and s not in owners and _is_synonym(s, taken)]
        kept = [(code, name) for code, name in names.items() if name and owners[name] == 1 and name not in mains]
        found.append(Concept(main, str(row["group"]), str(row["subgroup"]), tuple(synonyms[:2]), tuple(kept)))
    return found


def _foreign(row: Mapping[str, object]) -> dict[str, str]:
    names: Mapping[str, str] = row["names"]  # type: ignore[assignment]
    found = {code: plain(names.get(code, "")) for code in LANGUAGES}
    return {code: name for code, name in found.items() if 1 <= len(name.split()) <= 3}


def _is_synonym(text: str, taken: set[str]) -> bool:
    """Whether it is one or two plain English words of their own, none of them part of a concept's name."""
    words = text.split()
    plainly = bool(re.fullmatch(r"[a-z]{3,}( [a-z]{3,})?", text))
    return plainly and not NOT_SHOWN.search(text) and taken.isdisjoint(words)


def with_article(name: str) -> str:
    """A name as a noun phrase."""
    last = name.split()[-1]
    if last in MASS or (last.endswith("s") and not last.endswith(("ss", "us", "is"))):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def call(concept: Concept, rng: np.random.Generator) -> str:
    """One wording of a concept: mostly its main name."""
    draw = rng.random()
    if draw < FOREIGN and concept.names:
        return concept.names[int(rng.integers(len(concept.names)))][1]
    if FOREIGN <= draw < FOREIGN + SYNONYM and concept.synonyms:
        return with_article(concept.synonyms[int(rng.integers(len(concept.synonyms)))])
    return with_article(concept.name)


def phrase(things: Sequence[str], style: str | None, background: str | None = None, other: bool = False) -> str:
    """Objects, as noun phrases, in a style, on a background; what is None is not said."""
    text = " and ".join(things)
    text = text if style is None else STYLES[style][int(other)].format(text)
    return text if background is None else f"{text} on a {background} background".replace("a orange", "an orange")


Told = tuple[str, list[int]]
"""A caption, and behind which character each object's name ends."""


def caption(scene: Scene, world: World, rng: np.random.Generator) -> Told:
    """What is said of a scene: true, but not the whole truth; empty for a share of `NULL`."""
    return ("", []) if rng.random() < NULL else tell(scene, world, rng)


def tell(scene: Scene, world: World, rng: np.random.Generator) -> Told:
    """A caption that says something."""
    things = [call(world.concepts[k], rng) for k in scene.objects]
    style = None if rng.random() < NO_STYLE else list(STYLES)[scene.style]
    told = rng.random() < (0.25 if scene.background == 0 else 0.75)
    background = list(BACKGROUNDS)[scene.background] if told else None
    text = phrase(things, style, background, bool(rng.random() < OTHER_PHRASE))
    start = text.index(" and ".join(things))
    return text, [start + len(" and ".join(things[: i + 1])) for i in range(len(things))]


def all_captions(world: World) -> list[str]:
    """Captions that together have every word there is: what a tokenizer is made of."""
    things = [w for concept in world.concepts for w in concept.wordings]
    phrased = [phrase(["a", "an"], style, None, other) for style in STYLES for other in (False, True)]
    return [*things, *phrased, *(phrase(["an"], None, background) for background in BACKGROUNDS)]


# ---------------------------------------------------------------- scenes


def draw_scene(
    world: World, rng: np.random.Generator, *, held: bool = False, doubles: float = DOUBLES, anywhere: bool = False
) -> Scene:
    """A scene by lot: without cells that are held out, unless `held`."""
    style = int(rng.integers(len(STYLES)))
    allowed = np.arange(len(world.concepts)) if held else np.flatnonzero(~world.held[:, style])
    two = rng.random() < doubles
    objects = tuple(int(k) for k in rng.choice(allowed, 2 if two else 1, replace=False))
    background = 0 if rng.random() < WHITE else int(rng.integers(1, len(BACKGROUNDS)))
    return Scene(objects, style, background, place(len(objects), rng, anywhere=anywhere))


def place(
    count: int, rng: np.random.Generator, side: int | None = None, anywhere: bool = False
) -> tuple[tuple[int, int, int], ...]:
    """Boxes of one object, or of two side by side: in the middle, or by lot where there is room."""
    side, width = side or (SINGLE if count == 1 else DOUBLE), SIZE // count
    room = np.array([width - side, SIZE - side])
    corners = [rng.integers(0, room + 1) if anywhere else room // 2 for _ in range(count)]
    return tuple((i * width + int(left), int(top), side) for i, (left, top) in enumerate(corners))


def transparent(drawings: Pixels) -> Pixels:
    """Drawings on white, `[..., H, W, 3]`, as premultiplied RGBA: white that the border reaches is transparent.

    A pixel at an edge is a mixture of white and of the darkest colour beside it; composed on white, the drawing is as
    it was.
    """
    white = (drawings > 245).all(-1)
    outside = np.zeros_like(white)
    outside[..., [0, -1], :], outside[..., :, [0, -1]] = True, True
    outside &= white
    while True:
        grown = _spread(outside) & white
        if (grown == outside).all():
            break
        outside = grown
    edge = _spread(outside) & ~outside
    colour = drawings.astype(np.float32)
    darkest = _neighbours(colour).min(0)
    share = ((255 - colour) / (255 - darkest).clip(1)).max(-1).clip(0, 1)
    alpha = np.where(outside, 0, np.where(edge, share, 1))
    rgb = (colour - 255 * (1 - alpha[..., None])).clip(0)
    return np.concatenate([rgb, 255 * alpha[..., None]], -1).round().astype(np.uint8)


def _spread(mask: Flags) -> Flags:
    """A mask with the four neighbours of each of its pixels."""
    out = mask.copy()
    out[..., 1:, :] |= mask[..., :-1, :]
    out[..., :-1, :] |= mask[..., 1:, :]
    out[..., 1:] |= mask[..., :-1]
    out[..., :-1] |= mask[..., 1:]
    return out


def _neighbours(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Images and their shifts by one pixel to each side, `[5, ..., H, W, C]`."""
    rolled = [np.roll(images, shift, axis) for axis in (-2, -3) for shift in (-1, 1)]
    return np.stack([images, *rolled])


def make_sprites(drawings: Pixels, sides: Sequence[int] = (SINGLE, DOUBLE)) -> dict[int, Pixels]:
    """By side: premultiplied RGBA, `[K, S, side, side, 4]`."""
    found = {side: np.empty((*drawings.shape[:2], side, side, 4), np.uint8) for side in sides}
    for k, some in enumerate(drawings):
        for s, pixels in enumerate(transparent(some)):
            bands = [Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(4)]
            for side in sides:
                small = [np.asarray(band.resize((side, side), Image.Resampling.HAMMING)) for band in bands]
                found[side][k, s] = np.stack(small, -1)
    return found


def render(scene: Scene, sprites: Mapping[int, Pixels]) -> Pixels:
    """The scene's pixels, `[SIZE, SIZE, 3]`."""
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = list(BACKGROUNDS.values())[scene.background]
    for k, (left, top, side) in zip(scene.objects, scene.boxes, strict=True):
        sprite = sprites[side][k, scene.style].astype(np.float32)
        part = canvas[top : top + side, left : left + side]
        part *= 1 - sprite[..., 3:] / 255
        part += sprite[..., :3]
    return canvas.round().clip(0, 255).astype(np.uint8)
