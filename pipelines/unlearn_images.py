"""Make an image classifier of transformers unlearn images; say how many it names right before and after.

Example: python pipelines/unlearn_images.py my-vit forget remain --out my-vit-without-them
Both folders hold a subfolder for each class.
"""

import argparse
from pathlib import Path

import erase
from erase.evaluation.image_files import list_images
from erase.store.class_names import class_number


def named_right(model: str, folder: Path) -> str:
    """How many images of a folder with a subfolder for each class the classifier names right."""
    right = total = 0
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        found = erase.count(list_images(path), classifier=model)
        names = list(found["counts"])
        right += found["counts"][names[class_number(path.name, names)]]
        total += found["images"]
    return f"{right} of {total}"


def main() -> None:
    """Read the command line, unlearn, save, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder of the classifier")
    parser.add_argument("forget", type=Path, help="images to unlearn, in a subfolder for each class")
    parser.add_argument("remain", type=Path, help="images to keep, likewise")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the model")
    parser.add_argument("--steps", type=int, help="of unlearning; by default the preset's")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of erase run")
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"--out {given.out} exists: choose another folder")

    net = erase.load(given.model)
    result = erase.forget(net, given.forget, remain=given.remain, steps=given.steps, settings=given.set)
    result.save(given.out)
    for name, folder in (("forget", given.forget), ("remain", given.remain)):
        before, after = named_right(given.model, folder), named_right(str(given.out), folder)
        print(f"{name}: {before} named right before, {after} after")


if __name__ == "__main__":
    main()
