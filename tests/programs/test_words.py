"""Every key of a report and of a comparison has words on the pages: see `erase.evaluation.page.names`."""

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jobs import read

from erase.engine import loop, phases, updates
from erase.evaluation.page.names import NAMES, find_name, is_data, name_of
from erase.evaluation.page.scores import read_score
from erase.evaluation.page.verdict import is_classifier
from erase.evaluation.report import write_html
from erase.methods import find_method, list_methods
from erase.programs.attacks.kinds import KINDS
from erase.programs.classify import report as classify
from erase.programs.folder import run_time
from erase.programs.labels import report as labels
from erase.programs.run import job_of
from erase.programs.text import report as text

RUNS = ("text_run", "label_run", "classify_run")
RAW = re.compile(r"\b[a-z]+_[a-z_]+\b")
COUNTED = ("flagged", "correct", "named", "shown", "images", "n", "rate", "accuracy", "ci95", "errors")
ELSEWHERE = ("pictures", "versions", "paired", "target", "method", "mask", "robustness", "run")
"""Sections whose keys are not shown by their names."""
COSTS = ("timing", "memory")
"""Sections that are shown as one."""


def keys(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Of a report: paths of what the page shows, numbers of scores aside."""
    for key, value in tree.items():
        if key in ELSEWHERE:
            continue
        here = (*path, key)
        if isinstance(value, dict):
            counted = COUNTED if read_score(value) else ()
            yield from [] if key in COSTS else [here]
            yield from keys({k: v for k, v in value.items() if k not in counted}, here)
        else:
            yield here


def wanted(path: tuple[str, ...], report: dict[str, Any]) -> tuple[str, ...]:
    """What the page asks for: of a side's sections without the side, below `classify` for a classifier."""
    above = ("classify",) if is_classifier(report) else ()
    return (*above, *path[1:]) if path[0] in ("before", "after", "retrained") and len(path) > 1 else path


@pytest.mark.parametrize("run", RUNS)
def test_every_key_of_a_report_has_words(request: pytest.FixtureRequest, run: str) -> None:
    report = read(request.getfixturevalue(run) / "report.json")
    shown = {key: value for key, value in report.items() if key not in ("schema", "command", "seed")}
    wordless = [path for path in keys(shown) if not is_data(*path) and find_name(*wanted(path, report)) is None]
    assert wordless == []


@pytest.mark.parametrize("run", RUNS)
def test_every_metric_of_the_training_has_words(request: pytest.FixtureRequest, run: str) -> None:
    lines = (request.getfixturevalue(run) / "metrics.jsonl").read_text().splitlines()
    assert {key for line in lines for key in json.loads(line) if find_name(key) is None} == set()


@pytest.mark.parametrize("module", [loop, phases, updates])
def test_every_metric_that_the_engine_can_write_has_words(module: Any) -> None:
    """Also those that the three runs have not."""
    names = set(re.findall(r'"((?:skipped|weight|edit|fast|look)_\w+)"', inspect.getsource(module)))
    assert names
    assert {name for name in names if find_name(name) is None} == set()


def written(function: Callable[..., Any]) -> set[str]:
    """The keys that a function writes: constants as subscripts that are set, as keys of mappings, and in loops."""
    found = set[str]()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            found |= constants(node.slice)
        if isinstance(node, ast.Dict):
            found |= {name for key in node.keys if key is not None for name in constants(key)}
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            found |= constants(node.iter)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setdefault":
            found |= constants(node.args[0])
    return found


def constants(tree: ast.AST) -> set[str]:
    """Words in it; the parts of an f-string are no words of their own: what is inserted is a number."""
    if isinstance(tree, ast.JoinedStr):
        return {"".join(str(part.value) if isinstance(part, ast.Constant) else "0" for part in tree.values)}
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


NOT_KEYS = {"before", "after", "gap_0", "asr_"}
"""Read in a loop, and an f-string that the keys of `gap` fill."""


@pytest.mark.parametrize(("job", "least"), [(text, 15), (labels, 7), (classify, 2)])
def test_every_number_of_a_comparison_has_words(job: Any, least: int) -> None:
    """Whatever `summarise` can write; of the gaps those that `gap` makes."""
    names = (written(job.summarise) | (written(text.summed) if job is text else set())) - NOT_KEYS
    assert len(names) >= least
    names |= written(run_time) | {*job.AXES, *job.GOALS}
    if job is classify:
        names |= set(classify.COLUMNS)
    if job is text:
        names |= {*text.PARTS, *text.PARTS.values()}
        columns = {name: text.COLUMNS.get(name, f"asr_{name}") for name, kind in KINDS.items() if not kind.trains}
        names |= {*columns.values()}
    if job is labels:
        names |= {f"gap_{name}" for name in written(labels.gap)}
    assert {name for name in names if find_name("summary", name) is None} == set()


@pytest.mark.parametrize(("run", "kind"), list(zip(RUNS, ("sd", "ddpm", "classify"), strict=True)))
def test_the_numbers_of_a_finished_run_have_words(request: pytest.FixtureRequest, run: str, kind: str) -> None:
    job = job_of(kind)
    numbers = job.summary(read(request.getfixturevalue(run) / "report.json"))
    assert [name for name in numbers if find_name("summary", name) is None] == []
    assert all(name_of("summary", goal).better for goal in job.GOALS)  # a front needs to know which way


def test_every_method_and_setting_has_words() -> None:
    assert [name for name in list_methods() if find_name("method", name) is None] == []
    settings = {key for name in list_methods() for key in find_method(name).settings}
    assert {key for key in settings if find_name(key) is None} == set()


def test_words_are_no_keys() -> None:
    assert [key for key, name in NAMES.items() if not name.words or RAW.search(name.words)] == []


@pytest.mark.parametrize("run", RUNS)
def test_no_key_is_left_on_the_page(request: pytest.FixtureRequest, run: str) -> None:
    """Outside what is typed, names of layers and files, and the run's record."""
    page = write_html(request.getfixturevalue(run)).read_text()
    page = re.sub(r"<(style|script|pre)\b.*?</\1>", " ", page, flags=re.DOTALL)
    page = re.sub(r'<table class="layers">.*?</table>|<div class="hashes">.*?</div>', " ", page, flags=re.DOTALL)
    shown = re.sub(r"<[^>]*>", " ", page)
    record = json.dumps(read(request.getfixturevalue(run) / "run.json"))
    assert {word for word in RAW.findall(shown) if f'"{word}"' not in re.sub(r'"\w+":', "", record)} == set()


def test_a_key_without_a_row_is_shown_without_underscores() -> None:
    assert name_of("classes", "my_new_number").words == "my new number"
    assert name_of("counts", "FACE_FEMALE").words == "face female"
    assert name_of("per_label", "t_shirt and more").words == "t_shirt and more"


def test_the_longest_path_decides_and_digits_are_numbers() -> None:
    assert name_of("fidelity", "remain") != name_of("classes", "remain") != name_of("summary", "remain")
    assert "20" in name_of("summary", "relearned_20").words
    assert name_of("classes", "forget_shows", "cat").show(0.25) == "25.0 %"
    assert name_of("until", "looks", "5", "forget").words == NAMES["looks.forget"].words
