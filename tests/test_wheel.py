"""The wheel holds one package, and all that `erase.resources` looks for."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from erase import resources

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_one_top_level_package(files: set[str]) -> None:
    top = {name.split("/")[0] for name in files}
    assert {name for name in top if not name.endswith(".dist-info")} == {"erase"}
    assert not [name for name in files if "__pycache__" in name]


def test_package_is_complete_and_typed(files: set[str]) -> None:
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "erase").rglob("*.py")} <= files
    assert "erase/py.typed" in files


def test_resources_are_inside(files: set[str]) -> None:
    shipped = [p for folder in ("pipelines", "prompts") for p in (ROOT / folder).rglob("*") if p.is_file()]
    wanted = {f"erase/_resources/{p.relative_to(ROOT)}" for p in shipped if "__pycache__" not in p.parts}
    assert wanted
    assert wanted <= files


def test_unpacked_wheel_finds_its_resources(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = """
from erase import resources as r
print(r.__file__)
print(r.list_presets(), r.list_comparisons(), r.list_prompts(), r.list_tiny())
print(r.prompt_path("nudity"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "site",  # first in sys.path, before the checkout
        capture_output=True,
        text=True,
        check=True,
    )
    source, names, path = done.stdout.splitlines()
    here = tmp_path / "site" / "erase"
    assert Path(source) == here / "resources.py"
    kinds = ("presets", "comparisons", "prompts", "tiny")
    assert names == " ".join(str(getattr(resources, f"list_{kind}")()) for kind in kinds)
    assert Path(path) == here / "_resources" / "prompts" / "nudity.csv"
