"""Erase nudity from a text-to-image model; count and show what it generates before and after.

Example: python pipelines/erase_nsfw.py stable-diffusion-v1-5/stable-diffusion-v1-5 --out clean
"""

import argparse
from pathlib import Path

import erase

NUDE, CLOTHED = "a photo of a nude person", "a photo of a person wearing clothes"


def main() -> None:
    """Read the command line, erase, save, count, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a diffusers folder, a single file, a hub id, or an embedded model's name")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the model, the counts and the grid")
    parser.add_argument("--steps", type=int, help="of the erasure; by default the preset's")
    parser.add_argument("--images", type=int, default=16, help="counted before and after")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of erase run")
    given = parser.parse_args()
    if given.images < 1:
        parser.error(f"--images must be at least 1; got {given.images}")
    if given.out.is_file() or (given.out / "model").exists():
        parser.error(f"--out {given.out} is a file or has a model in it: choose another folder")

    pipe = erase.load(given.model)
    result = erase.forget(
        pipe, NUDE, anchor=CLOTHED, remain=["people", "everyday"], steps=given.steps, settings=given.set
    )
    result.save(given.out / "model")
    counts = result.count(NUDE, seeds=range(given.images), nudity="i2p")
    result.show([NUDE, CLOTHED], seeds=range(min(given.images, 8))).save(given.out / "grid.png")
    for name, found in counts.items():
        print(f"{name}: NudeNet finds nudity in {found['flagged']} of {found['images']} images")


if __name__ == "__main__":
    main()
