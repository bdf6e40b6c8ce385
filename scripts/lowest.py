"""Try the lower bounds of pyproject.toml: resolve every dependency at its minimum, then run the fast tests there.

Example: python scripts/lowest.py --venv build/lowest            # a new environment, the minimums, the tests
         python scripts/lowest.py --venv build/lowest --resolve  # the environment and imports alone

A bound that cannot be installed, imported or tested is to be raised in pyproject.toml. On a machine without a GPU give
--index https://download.pytorch.org/whl/cpu.
"""

import argparse
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOUND = re.compile(r"^(?P<name>[A-Za-z0-9_.-]+)(?P<extra>\[[^\]]*\])?>=(?P<version>[^,;\s]+)")
EXTRAS = ("classify", "t5")
"""Extras that the fast tests use."""
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "scipy")
"""What the tests need besides; their newest versions."""


def minimums(config: dict) -> list[str]:
    """Every lower bound as an exact pin."""
    project = config["project"]
    wanted = [*project["dependencies"], *(d for name in EXTRAS for d in project["optional-dependencies"][name])]
    found = [BOUND.match(each) for each in wanted]
    return [f"{m['name']}{m['extra'] or ''}=={m['version']}" for m in found if m]


def main() -> None:
    """Make the environment, install, import, test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True, help="folder of the environment to make")
    parser.add_argument("--index", help="an index of packages beside the usual one")
    parser.add_argument("--resolve", action="store_true", help="install and import, without the tests")
    given = parser.parse_args()

    pins = minimums(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    print("\n".join(pins), flush=True)
    venv.create(given.venv, with_pip=True)
    place = given.venv / ("Scripts" if sys.platform == "win32" else "bin")
    python = str((place / "python").absolute())
    index = ["--extra-index-url", given.index] if given.index else []
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *index]
    subprocess.run([*install, *pins, *TOOLS], check=True)
    subprocess.run([*install, "--no-deps", "-e", str(ROOT)], check=True)
    imports = "import erase; erase.load, erase.forget; import erase.cli; print(erase.__version__)"
    subprocess.run([python, "-c", imports], check=True)
    if not given.resolve:
        subprocess.run(
            [python, "-m", "pytest", "-q", "-m", "not slow", "tests/engine", "tests/methods"], cwd=ROOT, check=True
        )


if __name__ == "__main__":
    main()
