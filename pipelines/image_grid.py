"""Put folders of images side by side, a row for each.

Example: python pipelines/image_grid.py base=runs/demo/images/base erased=runs/demo/images/erased --out grid.png
"""

import argparse
from pathlib import Path

import erase


def main() -> None:
    """Read the command line, write the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="a .png or .jpg file")
    parser.add_argument("--columns", type=int, default=12, help="most images in a row")
    parser.add_argument("--no-blur", action="store_true", help="do not hide exposed body parts that NudeNet finds")
    given = parser.parse_args()

    rows = dict(row.split("=", 1) if "=" in row else (Path(row).name, row) for row in given.rows)
    if len(rows) < len(given.rows):
        parser.error("two rows have one name: give NAME=FOLDER")
    erase.grid(rows, max_columns=given.columns, blur=not given.no_blur).save(given.out)


if __name__ == "__main__":
    main()
