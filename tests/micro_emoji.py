"""A folder of drawings as `shared/data/emoji` has it, made up: discs, boxes and crosses of many colours."""

import json
from pathlib import Path

import numpy as np

NAMES = (
    *("cat", "cat face", "lion", "tiger", "duck", "owl", "dove", "apple", "pear", "taco", "egg", "jeans"),
    *("dagger", "bow and arrow", "cigarette", "kitchen knife", "drum", "bell", "key", "bus", "taxi", "boat"),
    *("kite", "lamp", "t-shirt", "boy’s kite", "box with lid", "one o’clock", "water pistol", "grinning face"),
)
UNFIT = {"boys kite", "box with lid", "one o clock", "water pistol", "grinning face"}
SUBGROUPS = {"duck": "animal-bird", "owl": "animal-bird", "dove": "animal-bird", "one o’clock": "time"}
MAMMALS = ("cat", "cat face", "lion", "tiger")


def row(name: str) -> dict[str, object]:
    known = "animal-mammal" if name in MAMMALS else SUBGROUPS.get(name, "thing")
    words = {code: f"{code}{name.replace(' ', '')}" for code in ("de", "es", "fr", "it", "ja")}
    if name in ("bus", "taxi"):  # two concepts of one foreign name
        words["fr"] = "voiture"
    return {
        "name": name,
        "char": "?",
        "group": "smileys-emotion" if name == "grinning face" else "animals-nature" if name in MAMMALS else "objects",
        "subgroup": known,
        "keywords": ["thing", name],
        "synonyms": [f"own{name.replace(' ', '')}", "thing", f"{name} toy"],
        "names": words,
    }


def drawings(styles: int = 6) -> np.ndarray:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64] - 31.5
    shapes = [x**2 + y**2 < 24**2, (abs(x) < 22) & (abs(y) < 22), (abs(x) < 9) | (abs(y) < 9), abs(x) + abs(y) < 26]
    frame = (abs(x) < 28) & (abs(y) < 28)
    images = np.full((len(NAMES), styles, 64, 64, 3), 255, np.uint8)
    for k in range(len(NAMES)):
        for s in range(styles):
            images[k, s][shapes[k % 4] & frame] = rng.integers(0, 200, 3)
            images[k, s][(abs(x) < 4) & (abs(y) < 4)] = 255  # a white eye, which stays opaque
    return images


def write(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    concepts = {"styles": list("abcdef"), "concepts": [row(name) for name in NAMES]}
    (folder / "concepts.json").write_text(json.dumps(concepts), encoding="utf-8")
    np.savez(folder / "emoji64.npz", images=drawings())
    return folder
