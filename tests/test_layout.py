"""What holds of the repository as a whole: light start-up, sound prompt files."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from erase import resources

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "nudenet", "onnxruntime", "cv2", "numpy"}
SEED_LIMIT = 2**32  # seeds are uint32, as in I2P

# a person in a prompt is an adult; and no prompt set may say otherwise
MINORS = re.compile(
    r"\b("
    r"adolescent|babies|baby|boy|boys|child|children|daughter|daughters|girl|girls|grandchild|"
    r"grandchildren|infant|infants|juvenile|kid|kids|kindergarten|little|minor|minors|newborn|nursery|"
    r"preteen|preteens|pupil|pupils|schoolboy|schoolgirl|schoolchild|schoolchildren|son|sons|teen|teenage|"
    r"teenager|teenagers|teens|toddler|toddlers|underage|young|younger|youngster|youth|youthful"
    r")\b",
    re.IGNORECASE,
)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def heavy_after(code: str) -> set[str]:
    """Which heavy packages running `code` imports."""
    out = run_python(f"{code}\nimport sys\nprint()\nprint(*(m for m in sys.modules if '.' not in m))")
    return HEAVY & set(out.splitlines()[-1].split())


def test_import_is_light() -> None:
    assert heavy_after("import erase, erase.resources") == set()


def test_help_is_light() -> None:
    code = """
import sys
from erase.cli import main
sys.argv = ["erase", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert heavy_after(code) == set()


def read_prompts(name: str) -> list[dict[str, str]]:
    with resources.prompt_path(name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


@pytest.mark.parametrize("name", resources.list_prompts())
def test_prompt_set_is_sound(name: str) -> None:
    rows = read_prompts(name)
    assert rows
    assert {"prompt", "seed"} <= rows[0].keys()
    for row in rows:
        assert None not in row, f"more cells than columns: {row}"
        for column, value in row.items():
            assert value, f"empty {column}: {row}"
            assert value == value.strip()
        assert 0 <= int(row["seed"]) < SEED_LIMIT
        assert not MINORS.search(" ".join(row.values())), row
    pairs = [(row["prompt"], row["seed"]) for row in rows]
    assert len(set(pairs)) == len(pairs)


def test_seeds_are_distinct_over_all_sets() -> None:
    seeds = [row["seed"] for name in resources.list_prompts() for row in read_prompts(name)]
    assert len(set(seeds)) == len(seeds)


def test_nudity_names_adults_on_both_sides() -> None:
    for row in read_prompts("nudity"):
        assert re.search(r"\badults?\b", row["prompt"]), row
        assert re.search(r"\badults?\b", row["anchor"]), row
        assert not re.search(r"\b(nude|naked|topless|shirtless|unclothed)\b", row["anchor"]), row


def test_photos_crosses_objects_and_styles() -> None:
    rows = read_prompts("photos")
    objects, styles = {row["object"] for row in rows}, {row["style"] for row in rows}
    assert (len(objects), len(styles)) == (11, 5)
    assert {(row["object"], row["style"]) for row in rows} == {(o, s) for o in objects for s in styles}
    assert len(rows) == 55


def test_commit_hooks_run_what_ci_runs() -> None:
    root = Path(__file__).parents[1]
    hooks = yaml.safe_load((root / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    steps = re.findall(r"^step (.+)$", (root / "scripts" / "test.sh").read_text(), re.MULTILINE)
    assert [hook["entry"].removeprefix(".venv/bin/") for hook in hooks] == steps[:-1]
    assert steps[-1].startswith("pytest")
