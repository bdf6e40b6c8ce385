"""Make a class-conditional model (a DDPM or DiT) forget a class, and show it before and after.

Example: python pipelines/forget_class.py fashion-ddpm trouser --data fashion-mnist --out without-trousers
"""

import argparse
from pathlib import Path

import erase


def main() -> None:
    """Read the command line, forget, show, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a diffusers folder, a hub id, or an embedded model's name")
    parser.add_argument("label", nargs="+", help="classes, by name or number")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the model and the grid")
    parser.add_argument("--data", help="labelled training images; by default the model generates its own")
    parser.add_argument("--steps", type=int, help="of forgetting; by default the preset's")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of erase run")
    given = parser.parse_args()
    if given.out.is_file() or (given.out / "model").exists():
        parser.error(f"--out {given.out} is a file or has a model in it: choose another folder")

    pipe = erase.load(given.model)
    result = erase.forget(pipe, label=given.label, data=given.data, steps=given.steps, settings=given.set)
    result.save(given.out / "model")
    result.show(seeds=range(8)).save(given.out / "grid.png")
    print(f"{result.seconds:.0f} s; {given.out}")


if __name__ == "__main__":
    main()
