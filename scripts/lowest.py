"""Try the lower bounds of pyproject.toml: install each dependency at its minimum, then run the tests there.

Example: python scripts/lowest.py --venv build/lowest            # an environment of the minimums, and the tests
         python scripts/lowest.py --venv build/lowest --resolve  # the environment and imports alone

A bound that cannot be installed, imported or tested is to be raised in pyproject.toml. What no bound names is
installed in the newest version that fits. Into an environment that is there already goes only what changed. The lowest
torch brings 5 GB of CUDA libraries; --index https://download.pytorch.org/whl/cpu spares a machine without a GPU those.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOUND = re.compile(r"^(?P<name>[A-Za-z0-9_.-]+)(?P<extra>\[[^\]]*\])?>=(?P<version>[^,;\s]+)")
EXTRAS = ("classify", "lora", "t5")
"""Extras that the tests use; the bounds of the others are not tried."""
TOOLS = ("hypothesis", "playwright", "pytest", "pytest-timeout", "pytest-xdist", "scikit-image", "scipy")
"""What the tests need of the extra `dev`."""
TESTS = (
    "tests/api",
    "tests/attacks",
    "tests/classification",
    "tests/cli",
    "tests/diffusion",
    "tests/engine",
    "tests/evaluation",
    "tests/methods",
    "tests/programs",
    "tests/store",
)
"""The tests of `erase` itself; those that are marked slow are left out."""
LEFT_OUT = "tests/engine/test_sharding.py"
"""Over CPU processes the lowest torch does not average gradients; `erase.engine.sharding` refuses it."""


def minimums(config: dict) -> list[str]:
    """Every lower bound that is tried, as an exact pin."""
    project = config["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(each for name in EXTRAS for each in extras[name])]
    wanted += [each for each in extras["dev"] if each.partition(">=")[0] in TOOLS]
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
    subprocess.run([*install, *pins], check=True)
    subprocess.run([*install, "--no-deps", "-e", str(ROOT)], check=True)
    imports = "import erase; erase.load, erase.forget; import erase.cli; print(erase.__version__)"
    subprocess.run([python, "-c", imports], check=True)
    if not given.resolve:
        tests = [python, "-m", "pytest", "-q", "-m", "not slow", "--numprocesses", "auto", "--dist", "loadfile"]
        subprocess.run(
            [*tests, *TESTS, "--ignore", LEFT_OUT], check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


if __name__ == "__main__":
    main()
