"""`erase compare` where runs are only written down: specs, resuming, tables."""

import csv
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from erase import cli, resources
from erase.config import PIPELINES, SdConfig, arguments, override, parse, read_preset
from erase.engine.updates import NonFiniteError
from erase.methods import find_method
from erase.programs import compare as comparing
from erase.programs.comparison import tables
from erase.programs.text.judge import check_evaluators, judges_of
from erase.programs.text.plan import make_plan

PRESET: dict[str, Any] = {
    "pipeline": "sd",
    "model": "here",
    "method": {"name": "sfron", "fast_rate": 0.1},
    "train": {"steps": 3, "batch_size": 2},
    "forget": {"prompts": ["a cat"], "anchors": ["a dog"]},
    "remain": {"prompts": ["a dog"]},
    "eval": {"prompts": ["a cat"]},
    "saliency": {"density": 0.5},
}
SPEC: dict[str, Any] = {
    "pipeline": "sd",
    "preset": "mine.yaml",
    "methods": {"Fast rate 1": {"method": {"fast_rate": 1.0}}, "plain": None},
    "targets": {"cat": {}, "car": {"forget": {"prompts": ["a car"]}}},
    "seeds": [0, 1],
}
SUMMARY = {"forget": 0.25, "remain": 0.75, "shows": "dog", "drop": None}


class StopError(Exception):
    pass


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(PRESET))
    Path("other.yaml").write_text(yaml.safe_dump(override(PRESET, ["train.steps=9", "method.slow_steps=2"])))
    return tmp_path


class Job:
    """Takes the place of the pipeline's: a report is its summary."""

    AXES = ("forget", "remain")
    GOALS = ("forget", "remain", "rte_s")
    summary = staticmethod(dict)


class Program:
    """Takes the place of `erase.programs.run.main`: runs are noted, and their reports come from `numbers`."""

    def __init__(self, numbers: Callable[[SdConfig], dict[str, Any]] = lambda config: SUMMARY) -> None:
        self.numbers, self.ran, self.stop_at = numbers, list[tuple[str, SdConfig, bool]](), -1
        self.presets: list[str] = []
        self.impossible: tuple[str, ...] = ()
        """Runs that cannot be done."""
        self.error: Exception = ValueError("method.fast_rate must be larger")
        self.record: dict[str, Any] = {}
        """What a run is recorded to have begun with."""

    def main(self, config: SdConfig, out: Path, *, resume: bool, command: str, say: Any, preset: str) -> Path:
        out.mkdir(parents=True, exist_ok=True)
        if len(self.ran) == self.stop_at:
            raise StopError
        self.presets.append(preset)
        self.ran.append((out.relative_to(Path("out/runs")).as_posix(), config, resume))
        if self.folders[-1] in self.impossible:
            raise self.error
        if config.eval.images:
            (out / "images/base").mkdir(parents=True, exist_ok=True)
        (out / "run.json").write_text(json.dumps(self.record))
        (out / "report.json").write_text(json.dumps(self.numbers(config)))
        (out / "report.html").touch()
        return out

    @property
    def folders(self) -> list[str]:
        return [folder for folder, *_ in self.ran]


def spec(*words: str, **changes: Any) -> Any:
    return comparing.read_spec({**SPEC, **changes}, words)


def compare(program: Program, *words: str, **changes: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "run_one", program.main)
        patch.setattr(comparing, "job_of", lambda pipeline: Job)
        return comparing.main(spec(*words, **changes), Path("out"), command="x", say=lambda line: None)


# --- specs ----------------------------------------------------------------------------------------


def test_runs_are_methods_by_targets_by_seeds() -> None:
    plan = spec()
    assert [(run.method, run.target, run.seed) for run in plan.runs] == [
        (method, target, seed) for method in ("Fast rate 1", "plain") for target in ("cat", "car") for seed in (0, 1)
    ]
    assert plan.runs[3].folder == Path("runs/fast-rate-1/car/1")
    assert (plan.pipeline, plan.columns) == ("sd", [])
    for run in plan.runs:
        assert run.settings["seed"] == run.seed
        assert run.settings["method"]["fast_rate"] == (0.1 if run.method == "plain" else 1.0)
        assert run.settings["forget"]["prompts"] == [f"a {run.target}"]
        assert run.settings["forget"]["anchors"] == ["a dog"]


def test_later_settings_win() -> None:
    """Preset, settings, method, target, words: each value is set by one layer and by all before it."""
    keys = ("steps", "batch_size", "lr", "momentum", "dropout")
    layers = [{"train": dict.fromkeys(keys[n:], value)} for n, value in enumerate((1, 2, 0.3, 0.4))]
    Path("all.yaml").write_text(yaml.safe_dump({**PRESET, **layers[0]}))
    (run,) = spec(
        "train.dropout=0.6",
        preset="all.yaml",
        settings=layers[1],
        methods={"m": layers[2]},
        targets={"t": layers[3]},
        seeds=[5],
    ).runs
    assert [run.settings["train"][key] for key in keys] == [1, 2, 0.3, 0.4, 0.6]
    assert run.settings["seed"] == 5


def test_a_sweep_is_a_method_for_every_combination() -> None:
    methods = {
        "m": {"sweep": {"train.steps": [4, 5], "method.fast_rate": [0.1, 1e-3]}, "method": {"fast_rate": 9}},
        "n": {},
    }
    runs = spec("train.batch_size=7", methods=methods, targets={"t": None}, seeds=[0]).runs
    found = [(run.method, run.settings["train"], run.settings["method"]["fast_rate"]) for run in runs]
    train = [{"steps": steps, "batch_size": 7} for steps in (4, 4, 5, 5, 3)]
    names = [f"m [steps={steps}, fast_rate={rate}]" for steps in (4, 5) for rate in (0.1, 0.001)]
    assert found == list(zip([*names, "n"], train, [0.1, 1e-3, 0.1, 1e-3, 0.1], strict=True))
    assert runs[1].folder == Path("runs/m--steps-4--fast_rate-0.001-/t/0")


def test_a_method_may_have_a_preset_of_its_own() -> None:
    runs = spec(methods={"a": {"preset": "other.yaml"}, "b": {}}, targets={"t": None}, seeds=[0]).runs
    assert [run.preset for run in runs] == ["other.yaml", "mine.yaml"]
    assert [run.settings["train"]["steps"] for run in runs] == [9, 3]
    assert "preset" not in runs[0].settings


def test_without_methods_there_is_the_presets_and_without_seeds_one() -> None:
    data = {key: SPEC[key] for key in ("pipeline", "preset", "targets")}
    assert [str(run.folder) for run in comparing.read_spec(data).runs] == ["runs/sfron/cat/0", "runs/sfron/car/0"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "unknown key 'seed' in a comparison; allowed: pipeline, preset, settings, methods, targets"),
        ({"pipeline": "sdd"}, "no pipeline 'sdd'; pipelines: "),
        ({"pipeline": "compare"}, "no pipeline 'compare'; pipelines: "),
        ({"preset": "none.yaml"}, "no preset file 'none.yaml'"),
        ({"methods": ["sfron"]}, "methods must map names to settings"),
        ({"methods": {"a": 3}}, "methods must map names to settings"),
        ({"methods": {"a": {"sweep": {"train.steps": 3}}}}, "sweep must map settings to lists of values"),
        ({"methods": {"a": {"sweep": {"train.stepz": [3]}}}}, "unknown setting train.stepz; did you mean train.steps"),
        ({"targets": {}}, "targets must map names to settings"),
        ({"targets": {"a": "a cat"}}, "targets must map names to settings"),
        ({"seeds": 3}, "seeds must be a list of whole numbers; got 3"),
        ({"seeds": []}, "seeds must be a list of whole numbers; got \\[\\]"),
        ({"seeds": ["a"]}, "seeds must be a list of whole numbers; got \\['a'\\]"),
        ({"seeds": [0.5]}, "seeds must be a list of whole numbers; got \\[0.5\\]"),
        ({"seeds": [-1]}, "seed: .*greater than or equal to 0; got -1"),
        ({"seeds": [1, 1]}, "two runs of the comparison would share the folder runs/fast-rate-1/car/1: rename one"),
        ({"targets": {"a": {"after": "b"}, "b": {}}}, "target a: after names 'b', which is no target above it"),
        ({"targets": {"a": {}, "b": {"after": "a", "model": "m"}}}, "target b has after and model, and both say"),
        ({"targets": {"a b": {}, "A-B": {}}}, "would share the folder runs/fast-rate-1/a-b/0"),
        ({"methods": {"a/b": {}, "a-b": {}}}, "would share the folder runs/a-b/car/0"),
        ({"settings": {"trainz": {}}}, "unknown setting trainz; did you mean train"),
        ({"methods": {"a": {"train": {"steps": 0}}}}, "train.steps: .*; got 0"),
        (
            {"targets": {"a": {"forget": {"promptz": []}}}},
            "unknown setting forget.promptz; did you mean forget.prompts",
        ),
    ],
)
def test_a_wrong_spec_is_one_clear_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        spec(**changes)
    assert "\n" not in str(caught.value)


def test_a_target_is_not_called_as_their_mean_is() -> None:
    with pytest.raises(ValueError, match=r"^a target cannot be called 'all'"):
        spec(targets={"cat": {}, "all": {}})


@pytest.mark.parametrize("key", ["pipeline", "preset", "targets"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"^a comparison needs the key '{key}'$"):
        comparing.read_spec({k: v for k, v in SPEC.items() if k != key})


@pytest.mark.parametrize(
    "changes",
    [{"settings": ["a"]}, {"settings": "a"}, {"preset": ["mine.yaml"]}, {"pipeline": ["sd"]}, {"columns": "forget"}],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_refused_and_not_a_crash(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        spec(**changes)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "sfro"}, "no method 'sfro'; did you mean sfron"),
        ({"slow_stps": 1}, r"unknown setting method\.slow_stps; did you mean method\.slow_steps"),
        ({"fast_rate": "x"}, r"method\.fast_rate: .*; got 'x'"),
    ],
)
def test_a_method_that_no_run_could_start_with_is_found_before_the_first_run(method: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        spec(methods={"plain": {}, "last": {"method": method}})


@pytest.mark.parametrize(("judge", "meant"), [("photos-clasifier", "photos-classifier"), ("photos-clp", "photos-clip")])
def test_a_missing_judge_is_found_before_the_first_run(judge: str, meant: str) -> None:
    setting = "classifier" if "cla" in judge else "clip"
    with pytest.raises(ValueError, match=rf"^no embedded model '{judge}'; did you mean {meant}\?"):
        spec(targets={"cat": {}, "car": {"eval": {setting: judge}}})


def test_a_swept_setting_is_what_its_name_says() -> None:
    swept = {"methods": {"plain": {"sweep": {"train.steps": [1, 2]}}}, "targets": {"cat": {}}}
    assert len(spec(**swept).runs) == 4
    with pytest.raises(ValueError, match=r"plain \[steps=2\]: train\.steps is 1 by the target or a word"):
        spec("train.steps=1", **swept)
    for group in ({"settings": {"seed": 3}}, {"methods": {"plain": {"sweep": {"seed": [1, 2]}}}}):
        with pytest.raises(ValueError, match="seed stands beside seeds"):
            spec(**group)


def test_a_word_does_not_make_all_seeds_the_same() -> None:
    """Refused, or the one seed that is run."""
    try:
        seeds = [(run.seed, run.settings["seed"]) for run in spec("seed=7", targets={"cat": {}}).runs]
    except ValueError:
        return
    assert seeds in ([(0, 0), (1, 1)] * 2, [(7, 7)] * 2)


@pytest.mark.parametrize("name", resources.list_comparisons())
def test_each_target_of_a_shipped_text_comparison_can_be_planned(name: str) -> None:
    """Prompts, labels, anchors and judges fit each other."""
    plan = comparing.read_spec(read_preset(resources.comparison_path(name)))
    runs = plan.runs[::-1] if plan.pipeline == "sd" else []
    first = {run.target: run for run in runs} | {run.preset: run for run in runs}
    for run in {id(run): run for run in first.values()}.values():
        config = parse(run.settings, SdConfig)
        planned = make_plan(config)
        check_evaluators(config, planned, judges_of(config, planned))


@pytest.mark.parametrize("name", resources.list_comparisons())
def test_shipped_comparison_is_whole(name: str) -> None:
    data = read_preset(resources.comparison_path(name))
    plan = comparing.read_spec(data)
    assert data["note"]
    sweeps = [(method or {}).get("sweep", {}) for method in (data.get("methods") or {"": {}}).values()]
    rows = sum(math.prod(len(values) for values in sweep.values()) for sweep in sweeps)
    assert len(plan.runs) == rows * len(data["targets"]) * len(data.get("seeds", [0]))
    for run in plan.runs:
        assert PIPELINES[plan.pipeline] is not None
        entry = find_method(run.settings["method"]["name"])
        entry.build(**arguments(run.settings["method"], entry))


# --- running --------------------------------------------------------------------------------------


def test_every_run_is_started_once_with_its_settings() -> None:
    program = Program()
    assert compare(program, "train.steps=4") == Path("out/table.md")
    assert program.folders == [f"{m}/{t}/{s}" for m in ("fast-rate-1", "plain") for t in ("cat", "car") for s in (0, 1)]
    for folder, config, resume in program.ran:
        method, target, seed = folder.split("/")
        assert config.method["fast_rate"] == (0.1 if method == "plain" else 1.0)
        assert (config.forget.prompts, config.seed, config.train.steps) == ([f"a {target}"], int(seed), 4)
        assert not resume
    assert program.presets == ["mine.yaml"] * 8  # the models' cards name it
    record = json.loads(Path("out/compare.json").read_text())
    assert record["command"] == "x"
    assert record["schema"] == 1


def test_a_comparison_that_was_stopped_goes_on_where_it_was() -> None:
    first = Program()
    first.stop_at = 2
    with pytest.raises(StopError):
        compare(first)
    assert len(json.loads(Path("out/results.json").read_text())["runs"]) == 2  # a table after every run
    second = Program(lambda config: {**SUMMARY, "forget": 1.0})
    compare(second)
    assert first.folders == ["fast-rate-1/cat/0", "fast-rate-1/cat/1"]
    assert len(second.ran) == 6
    # the broken one is gone on with; those that were never begun are not
    assert [resume for *_, resume in second.ran] == [True] + [False] * 5
    third = Program()
    compare(third)
    assert third.ran == []
    Path("out/runs/plain/car/1/report.html").unlink()  # killed while its page was made
    compare(fourth := Program(second.numbers))
    assert fourth.folders == ["plain/car/1"]
    found = json.loads(Path("out/results.json").read_text())["runs"]
    assert [run["forget"] for run in found] == [0.25] * 2 + [1.0] * 6


OTHER = """
import sys
from pathlib import Path
from erase.store.files import claim

with claim(Path("out/runs/.lock"), "runs/fast-rate-1/cat/0") as mine:
    print(mine, flush=True)
    sys.stdin.readline()
    if sys.argv[1:]:
        Path("out/runs/fast-rate-1/cat/0").mkdir(parents=True)
        Path("out/runs/fast-rate-1/cat/0/report.json").write_text(sys.argv[1])
        Path("out/runs/fast-rate-1/cat/0/report.html").touch()
"""


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False])
def test_two_processes_share_the_runs_of_one_comparison(finished: bool) -> None:
    """A run that another process is at work on is left to it; one that it dies on is not."""
    report = [json.dumps({**SUMMARY, "forget": 1.0})] if finished else []
    comparing.open_folder(spec(), Path("out"), "x")
    child = subprocess.Popen(
        [sys.executable, "-c", OTHER, *report], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "True\n"
    with pytest.raises(ValueError, match="another process is at work in out with other settings"):
        compare(Program(), targets={"cat": {}, "dog": {"forget": {"prompts": ["a dog"]}}})
    program = Program()
    run = program.main

    def watch(config: SdConfig, out: Path, **kwargs: Any) -> Path:
        if len(program.ran) == 6:  # the last that is nobody's
            assert child.stdin is not None
            child.stdin.close()
            child.wait()
        return run(config, out, **kwargs)

    program.main = watch  # type: ignore[method-assign]
    compare(program)
    assert child.returncode == 0
    all_runs = [f"{m}/{t}/{s}" for m in ("fast-rate-1", "plain") for t in ("cat", "car") for s in (0, 1)]
    assert program.folders == all_runs[1:] + all_runs[:1] * (not finished)
    found = json.loads(Path("out/results.json").read_text())["runs"]
    assert [run["forget"] for run in found] == [1.0 if finished else 0.25] + [0.25] * 7
    assert [(run["method"], run["target"], run["seed"]) for run in found][:2] == [
        ("Fast rate 1", "cat", 0),
        ("Fast rate 1", "cat", 1),
    ]


def test_the_processes_of_one_launch_are_at_work_on_each_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    compare(Program(), targets={"a": {}}, seeds=[0])
    assert not Path("out/runs/.lock").exists()


def test_runs_of_one_model_share_their_base_pictures() -> None:
    """One model and way to draw; those of the same seed first, of these those of the same target."""
    program = Program()
    targets = {"a": {}, "b": {}, "c": {"draw": {"steps": 9}}, "d": {"model": "there"}, "e": {"eval": {"images": 0}}}
    targets["f"] = {"precision": "bf16"}
    compare(program, methods={"m": {}, "n": {}}, targets=targets)
    for folder, config, _ in program.ran:
        method, target, seed = folder.split("/")
        alike = "a" if target in ("a", "b", "e") else target
        expected = f"m/{alike if method == 'm' or target == 'e' else target}/{seed}"
        if method == "m" and alike == target:
            expected = f"m/{target}/0" if seed == "1" else ""
        assert config.eval.base == (Path(f"out/runs/{expected}/images/base") if expected else None), folder


def test_a_run_that_diverges_does_not_end_the_comparison() -> None:
    """Not even the first: the next may have a lower rate."""
    program = Program()
    program.impossible, program.error = ("fast-rate-1/cat/0",), NonFiniteError("the loss is nan")
    with pytest.raises(ValueError, match=r"1 of 8 runs .*: Fast rate 1, cat, seed 0: the loss is nan"):
        compare(program)
    assert len(program.ran) == 8
    shutil.rmtree("out")  # and where there is nothing else
    with pytest.raises(ValueError, match=r"1 of 1 runs .* the loss is nan"):
        compare(program, methods={"Fast rate 1": {}}, targets={"cat": {}}, seeds=[0])


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), KeyError("sample"), OSError("cannot write to hi.txt")]
)
def test_what_one_run_fails_of_does_not_end_the_comparison(error: Exception) -> None:
    program = Program()
    program.impossible, program.error = ("plain/cat/0",), error
    with pytest.raises(ValueError, match=rf"1 of 8 runs.*plain, cat, seed 0: .*{str(error.args[0])[:6]}"):
        compare(program)
    assert len(program.ran) == 8


def test_a_full_disk_ends_the_comparison_and_the_run_is_named() -> None:
    program = Program()
    program.impossible, program.error = ("plain/cat/0",), OSError("cannot write to out: No space left on device")
    program.error.__cause__ = OSError(28, "No space left on device")
    with pytest.raises(ValueError, match=r"plain, cat, seed 0: .*No space left"):
        compare(program)
    assert program.folders[-1] == "plain/cat/0"


def test_runs_of_a_model_that_changed_meanwhile_are_not_put_side_by_side() -> None:
    program = Program()
    for weights, ended in (("a1", nullcontext()), ("b2", pytest.raises(ValueError, match="begun with another model"))):
        program.record = {"base": {"weights": {"unet": weights}}, "data": {"test_sha256": weights}}
        with ended:
            compare(program, methods={"plain": None} if weights == "a1" else SPEC["methods"], targets={"cat": {}})


def test_a_file_of_prompts_that_changed_meanwhile_is_refused() -> None:
    Path("p.csv").write_text("prompt\na cat\n")
    wanted = {"settings": {"eval": {"prompts": ["p.csv"]}}, "targets": {"cat": {}}}
    compare(Program(), **wanted, methods={"plain": None})
    Path("p.csv").write_text("prompt\na car\n")
    with pytest.raises(ValueError, match=r"p\.csv has changed since out was begun: restore it"):
        compare(program := Program(), **wanted)
    assert not program.ran


def test_a_run_that_cannot_be_done_does_not_stop_the_others() -> None:
    program = Program()
    program.impossible = ("fast-rate-1/car/0", "plain/cat/1")
    said = r"2 of 8 runs .* the first: Fast rate 1, car, seed 0: method\.fast_rate must be larger"
    with pytest.raises(ValueError, match=said):
        compare(program)
    assert len(program.ran) == 8
    assert len(json.loads(Path("out/results.json").read_text())["runs"]) == 6
    again = Program()
    compare(again)
    assert again.folders == list(program.impossible)


def test_the_first_run_that_cannot_be_done_ends_the_comparison() -> None:
    program = Program()
    program.impossible = ("fast-rate-1/cat/0",)
    with pytest.raises(ValueError, match=r"^Fast rate 1, cat, seed 0: method\.fast_rate"):
        compare(program)
    assert len(program.ran) == 1


def test_a_launch_ends_with_a_run_that_cannot_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes of it may be in the midst of that run."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    program = Program()
    program.impossible = ("fast-rate-1/car/0",)
    with pytest.raises(ValueError, match=r"^Fast rate 1, car, seed 0: method\.fast_rate"):
        compare(program)
    assert len(program.ran) == 3


def test_what_begins_with_a_run_that_failed_is_not_begun() -> None:
    program = Program()
    program.impossible = ("fast-rate-1/two/0",)
    with pytest.raises(ValueError, match="2 of 6 runs"):
        compare(program, targets={"one": {}, "two": {"after": "one"}, "three": {"after": "two"}}, seeds=[0])
    assert program.folders[:2] == ["fast-rate-1/one/0", "fast-rate-1/two/0"]
    assert "fast-rate-1/three/0" not in program.folders


def test_targets_one_after_another_begin_with_what_was_erased_before() -> None:
    targets = {"one": {"after": None}, "two": {"after": "one"}, "three": {"after": "two"}}
    program = Program()
    compare(program, targets=targets, seeds=[0, 1])
    for folder, config, _ in program.ran:
        method, target, seed = folder.split("/")
        before = {"two": "one", "three": "two"}.get(target)
        assert config.model == (f"out/runs/{method}/{before}/{seed}/model" if before else "here")
        assert (config.eval.base is None) == (target != "one" or (method, seed) == ("fast-rate-1", "0"))
    other = Program()
    with pytest.raises(ValueError, match=r"other settings.*after"):
        compare(other, targets={**targets, "three": {"after": "one"}}, seeds=[0, 1])


def test_a_note_may_be_put_in_other_words() -> None:
    first = Program()
    compare(first, settings={"note": "what it does"})
    second = Program()
    compare(second, settings={"note": "what they do"})
    assert (len(first.ran), second.ran) == (8, [])


def test_a_run_whose_predecessor_another_process_is_at_work_on_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = [True, False]
    monkeypatch.setattr(
        comparing, "claim", lambda out, run: nullcontext(run.target != "one" or not (theirs and theirs.pop(0)))
    )
    monkeypatch.setattr(comparing.time, "sleep", lambda seconds: None)
    program = Program()
    compare(program, methods={"plain": {}}, targets={"one": {}, "two": {"after": "one"}}, seeds=[0])
    assert program.folders == ["plain/one/0", "plain/two/0"]


def test_runs_with_one_retrained_model_share_its_pictures() -> None:
    keys = {
        name: comparing.reusable(comparing.Run("m", "t", seed, {"model": "m", **settings}))
        for name, settings, seed in (
            ("a", {"eval": {"retrained": "r"}}, 0),
            ("other method", {"eval": {"retrained": "r"}, "method": {"name": "sfron"}}, 0),
            ("other model", {"eval": {"retrained": "r2"}}, 0),
            ("other seed", {"eval": {"retrained": "r"}}, 1),
            ("other drawing", {"eval": {"retrained": "r"}, "draw": {"steps": 1}}, 0),
            ("none", {}, 0),
        )
    }
    assert keys["a"].keys() == {"base", "retrained_base"}
    assert keys["none"] == {"base": keys["a"]["base"]}
    assert [name for name in keys if keys[name] == keys["a"]] == ["a", "other method", "other seed"]
    assert keys["other model"]["base"] == keys["a"]["base"]
    for name in ("other model", "other drawing"):
        assert keys[name]["retrained_base"] != keys["a"]["retrained_base"]


def test_the_base_pictures_of_a_run_that_finished_before_are_shared() -> None:
    compare(Program(), methods={"m": {}}, targets={"a": {}}, seeds=[0])
    program = Program()
    compare(program, methods={"m": {}}, targets={"a": {}, "b": {}}, seeds=[0])
    assert [(folder, config.eval.base) for folder, config, _ in program.ran] == [
        ("m/b/0", Path("out/runs/m/a/0/images/base"))
    ]


def test_a_folder_in_use_is_not_touched() -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"^out holds files that are not of a comparison: choose another --out$"):
        compare(Program())
    assert [p.name for p in Path("out").iterdir()] == ["thesis.tex"]


def test_a_folder_of_another_comparison_is_not_touched() -> None:
    """One with more runs goes on there."""
    compare(Program(), methods={"a": {}, "b": {}})
    before = Path("out/table.md").read_bytes()
    program = Program()
    with pytest.raises(
        ValueError, match=r"^out has a run that is not in this comparison, runs/b/cat/0: remove it, or c"
    ):
        compare(program, methods={"a": {}, "c": {}})
    assert Path("out/table.md").read_bytes() == before
    compare(program, methods={"a": {}, "b": {}, "c": {}})
    assert program.folders == ["c/cat/0", "c/cat/1", "c/car/0", "c/car/1"]


def test_a_run_that_was_never_begun_may_change() -> None:
    first = Program()
    first.stop_at = 4
    with pytest.raises(StopError):
        compare(first)
    shutil.rmtree("out/runs/plain")
    second = Program()
    compare(second, methods={**SPEC["methods"], "plain": {"train": {"steps": 5}}})
    assert [config.train.steps for _, config, _ in second.ran] == [5] * 4


def test_a_file_is_no_folder_for_a_comparison() -> None:
    Path("out").write_text("x")
    with pytest.raises(ValueError, match=r"^out is a file"):
        compare(Program())


def test_a_hidden_file_that_another_process_writes_is_not_in_the_way() -> None:
    Path("out").mkdir()
    Path("out/.compare.json.1.tmp").write_text("{")
    program = Program()
    compare(program)
    assert len(program.ran) == 8


def test_results_of_other_settings_are_not_passed_off_as_these() -> None:
    compare(Program(), "train.steps=4")
    again = Program()
    with pytest.raises(ValueError, match="settings"):
        compare(again, "train.steps=5")
    assert again.ran == []
    compare(Program(), "train.steps=4")


# --- tables ---------------------------------------------------------------------------------------


def numbers(config: SdConfig) -> dict[str, Any]:
    """forget: 0.1 by method, 0.04 by target, 0.02 by seed."""
    value = 0.1 * (config.method["fast_rate"] == 1) + 0.04 * (config.forget.prompts == ["a car"]) + 0.02 * config.seed
    return {"forget": value, "remain": 1 - value, "shows": ["dog", "horse"][config.seed], "drop": None}


def test_tables_hold_means_and_spreads() -> None:
    table = compare(Program(numbers)).read_text()
    # sample deviations: 0.02 / √2 over two seeds; over two targets as well, that of 0, 0.02, 0.04 and 0.06;
    # intervals: 12.706 · 0.01 (one degree of freedom), over two means 12.706 · 0.02, within 0 and 1
    assert table.splitlines() == [
        "| method | target | forget | remain | shows | drop |",
        "|---|---|---|---|---|---|",
        "| Fast rate 1 | cat | 0.110 ± 0.014 [0.000, 0.237] | 0.890 ± 0.014 [0.763, 1.000] | dog, horse | – |",
        "| Fast rate 1 | car | 0.150 ± 0.014 [0.023, 0.277] | 0.850 ± 0.014 [0.723, 0.977] | dog, horse | – |",
        "| plain | cat | 0.010 ± 0.014 [0.000, 0.137] | 0.990 ± 0.014 [0.863, 1.000] | dog, horse | – |",
        "| plain | car | 0.050 ± 0.014 [0.000, 0.177] | 0.950 ± 0.014 [0.823, 1.000] | dog, horse | – |",
        "| Fast rate 1 | all | 0.130 ± 0.026 [0.000, 0.384] | 0.870 ± 0.026 [0.616, 1.000] | dog, horse | – |",
        "| plain | all | 0.030 ± 0.026 [0.000, 0.284] | 0.970 ± 0.026 [0.716, 1.000] | dog, horse | – |",
    ]
    with Path("out/table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert list(rows[0]) == ["method", "target", "seed", "forget", "remain", "shows", "drop"]
    assert rows[3]["method"] == "Fast rate 1"
    assert (rows[3]["target"], rows[3]["seed"], rows[3]["shows"], rows[3]["drop"]) == ("car", "1", "horse", "")
    assert float(rows[3]["forget"]) == pytest.approx(0.16)
    found = json.loads(Path("out/results.json").read_text())
    assert found["schema"] == 1
    assert found["runs"][3]["forget"] == pytest.approx(0.16)
    assert found["runs"][3]["drop"] is None
    titles = [e.text for e in ElementTree.parse("out/forgetting.svg").iter("{http://www.w3.org/2000/svg}title")]
    assert titles == [
        *("Fast rate 1, cat: 11, 89", "Fast rate 1, car: 15, 85", "plain, cat: 1, 99"),  # in per cent
        *("plain, car: 5, 95", "Fast rate 1", "plain"),
    ]
    assert Path("out/forgetting.svg").read_text().count("stroke-opacity") == 4  # their intervals


def test_differences_from_the_first_method_say_whether_seeds_bear_them_out() -> None:
    """Of `numbers` they are the same for each seed; here 0.1, for one seed 0.2 more, and for one target 0.1 more.

    Seeds of two targets are no four independent values: over targets the interval is of each one's mean.
    """

    def unsteady(config: SdConfig) -> dict[str, Any]:
        plain, car = config.method["fast_rate"] != 1, config.forget.prompts == ["a car"]
        return {**numbers(config), "drop": plain * (0.1 + 0.2 * config.seed + 0.1 * car)}

    compare(Program(unsteady))
    lines = Path("out/differences.md").read_text().splitlines()
    assert lines[0] == "| method | target | number | difference from Fast rate 1 | 95 % interval |  |"
    assert lines[2] == "| plain | cat | forget | -0.100 | – | the same each time: no interval |"
    # of 0.1 and 0.3: 0.2 ± 12.706 · 0.1 (one degree of freedom); of two targets, 0.2 and 0.3: 0.25 ± 12.706 · 0.05
    assert "| plain | cat | drop | +0.200 | -1.071 to +1.471 | inside its interval: no difference shown |" in lines
    assert "| plain | all | drop | +0.250 | -0.385 to +0.885 | inside its interval: no difference shown |" in lines
    assert not any("shows" in line for line in lines)


def test_a_mean_over_targets_counts_each_the_same() -> None:
    """However many of their seeds have finished."""
    runs = [
        {"method": "m", "target": t, "seed": s, "n": v} for t, s, v in [("a", 0, 0.0), ("a", 1, 0.2), ("b", 0, 0.5)]
    ]
    assert tables.mean(runs, "n") == pytest.approx(0.3)
    assert tables.mean(runs[:2], "n") == pytest.approx(0.1)
    assert tables.spread(runs, "n").startswith("0.300 ±")


def test_a_name_with_a_bar_or_a_line_break_stays_in_its_cell() -> None:
    table = compare(Program(numbers), methods={"a | b\nc": {}}, targets={"cat": {}}, seeds=[1]).read_text()
    assert table.splitlines()[2:] == ["| a \\| b c | cat | 0.020 | 0.980 | horse | – |"]


def test_one_target_and_one_seed_have_no_spread() -> None:
    table = compare(Program(numbers), methods={"m": {}}, targets={"cat": {}}, seeds=[1]).read_text()
    assert table.splitlines()[2:] == ["| m | cat | 0.020 | 0.980 | horse | – |"]


def test_methods_on_the_pareto_front_are_marked() -> None:
    """Of each target, by means over seeds: no other method is as good in all three numbers and better in one."""
    seen = {  # forget, remain, time of two seeds
        ("slow", "cat"): [(0.0, 1.0, 9.0), (0.0, 0.9, 9.0)],
        ("fast", "cat"): [(0.1, 0.9, 1.0), (0.1, 0.9, 1.0)],
        ("worse", "cat"): [(0.1, 0.9, 1.0), (0.1, 0.9, 1.5)],
        ("slow", "car"): [(0.5, 0.5, 2.0), (0.5, 0.5, 2.0)],
        ("fast", "car"): [(0.5, 0.5, 1.0), (0.5, 0.5, 1.0)],
        ("worse", "car"): [(0.0, 0.4, 1.0), (0.0, 0.4, None)],
    }
    names = ("slow", "fast", "worse")

    def found(config: SdConfig) -> dict[str, Any]:
        name = names[config.train.steps - 1]
        forget, remain, time = seen[name, config.forget.prompts[0].removeprefix("a ")][config.seed]
        return {"forget": forget, "remain": remain, "rte_s": time}

    methods = {name: {"train": {"steps": step}} for step, name in enumerate(names, 1)}
    table = compare(Program(found), methods=methods, columns=["forget"]).read_text().splitlines()
    assert table[0] == "| method | target | forget | front |"
    marked = [line.split(" | ")[:2] for line in table[2:] if line.endswith("| ● |")]
    # over both targets "worse" lacks a time, and "slow" and "fast" are each better in something
    expected = [["slow", "cat"], ["fast", "cat"], ["fast", "car"], ["slow", "all"], ["fast", "all"]]
    assert sorted(marked) == sorted([f"| {method}", target] for method, target in expected)
    front = json.loads(Path("out/results.json").read_text())["front"]
    assert front == {"cat": ["slow", "fast"], "car": ["fast"], "all": ["slow", "fast"]}
    assert Path("out/forgetting.svg").read_text().count("<circle") == 3 + 1


def test_the_front_with_attacks_has_what_withstands_them() -> None:
    """Behind in all three goals, and ahead where attacks count: on the second front alone."""
    seen = {1: (0.0, 0.9, 1.0, 0.8), 2: (0.1, 0.8, 2.0, 0.2), 3: (0.1, 0.8, 2.0, 0.9)}

    def found(config: SdConfig) -> dict[str, Any]:
        names = ("forget", "remain", "rte_s", "attacked")
        return dict(zip(names, seen[config.train.steps], strict=True))

    methods = {name: {"train": {"steps": step}} for step, name in enumerate(("plain", "robust", "worse"), 1)}
    table = compare(Program(found), methods=methods, targets={"cat": {}}, seeds=[0], columns=["attacked"])
    assert table.read_text().splitlines() == [
        "| method | target | attacked | front | front_attacked |",
        "|---|---|---|---|---|",
        "| plain | cat | 0.800 | ● | ● |",
        "| robust | cat | 0.200 |  | ● |",
        "| worse | cat | 0.900 |  |  |",
    ]
    results = json.loads(Path("out/results.json").read_text())
    assert (results["front"], results["front_attacked"]) == ({"cat": ["plain"]}, {"cat": ["plain", "robust"]})
    page = Path("out/index.html").read_text()
    assert '<th scope="col">Pareto front with attacks</th>' in page
    assert "The front with attacks counts" in page


def test_numbers_that_only_some_runs_have() -> None:
    def some(config: SdConfig) -> dict[str, Any]:
        return {**numbers(config), "drop": 2.0 if config.seed else None}

    table = compare(Program(some), methods={"m": {}}, targets={"cat": {}}, columns=["drop"])
    assert table.read_text().splitlines()[2:] == ["| m | cat | 2.000 |"]


def test_columns_are_those_asked_for_in_their_order() -> None:
    table = compare(Program(numbers), columns=["remain", "forget"]).read_text().splitlines()
    assert table[0] == "| method | target | remain | forget |"
    assert table[2] == "| Fast rate 1 | cat | 0.890 ± 0.014 [0.763, 1.000] | 0.110 ± 0.014 [0.000, 0.237] |"


def test_an_unknown_column_is_refused_before_the_first_run_and_one_that_comes_later_is_not() -> None:
    with pytest.raises(ValueError, match=r"^no column 'ira_kept'; did you mean .*ira"):
        spec(columns=["forget", "ira_kept"])
    table = compare(Program(numbers), columns=["forget", "asr_p4d", "relearned_5"]).read_text().splitlines()
    assert table[2].endswith("| – | – |")


def test_a_mean_over_some_targets_is_called_so_and_on_no_front() -> None:
    """One method was refused on the hard target: its mean is of the easy one alone."""

    def found(config: SdConfig) -> dict[str, Any]:
        hard = config.forget.prompts == ["a car"]
        return {"forget": 0.5 if hard else 0.0, "remain": 0.9, "rte_s": 1.0}

    program = Program(found)
    program.impossible = ("plain/car/0",)
    with pytest.raises(ValueError, match="1 of 4 runs"):
        compare(program, seeds=[0], columns=["forget"])
    lines = Path("out/table.md").read_text().splitlines()
    assert lines[-2] == "| Fast rate 1 | all | 0.250 ± 0.354 [0.000, 1.000] | ● |"
    assert lines[-1] == "| plain | 1 of 2 targets | 0.000 |  |"
    assert "| plain | 1 of 2 targets | forget | " in Path("out/differences.md").read_text()


def test_labels_that_a_comparison_chooses_stay_where_a_target_has_other_prompts() -> None:
    """And those that its preset chose do not."""
    Path("mine.yaml").write_text(yaml.safe_dump(override(PRESET, ["forget.only=[cat]"])))
    target = {"dog": {"forget": {"prompts": ["mine.csv"]}}}
    for settings, expected in (({}, None), ({"forget": {"only": ["dog"]}}, ["dog"]), ({"forget": {"only": []}}, [])):
        runs = spec(settings=settings, targets=target).runs
        assert {json.dumps(run.settings["forget"].get("only")) for run in runs} == {json.dumps(expected)}


def test_methods_of_other_models_are_not_ranked_together() -> None:
    def found(config: SdConfig) -> dict[str, Any]:
        return {"forget": 0.1, "remain": 0.5 if config.model == "small" else 0.9, "rte_s": 1.0}

    methods = {"large": {}, "worse": {"model": "small"}}
    compare(Program(found), methods=methods, targets={"cat": {}}, seeds=[0])
    assert json.loads(Path("out/results.json").read_text())["front"] == {"cat": ["large", "worse"]}
    assert not Path("out/differences.md").exists()


@pytest.mark.parametrize("found", [{}, {"forget": 0.5}, {"forget": 0.5, "remain": None}], ids=str)
def test_a_pipeline_that_does_not_count_both_has_a_table_all_the_same(found: dict[str, Any]) -> None:
    """Counting nudity alone gives `forget`; where all prompts of a kind are forgotten `remain` is nothing."""
    table = compare(Program(lambda config: {**found, "erase_s": 1.0}), columns=["erase_s"])
    assert table.read_text().splitlines()[2] == "| Fast rate 1 | cat | 1.000 ± 0.000 |"


def test_a_table_with_run_times_says_what_they_are_of() -> None:
    table = compare(Program(lambda config: {"data_s": 5.0, "rte_s": 2.0}), columns=["rte_s"]).read_text().splitlines()
    assert table[-2] == ""
    assert table[-1].startswith("rte_s: ")
    assert "data_s" in table[-1]


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And a line for each run that is started, and where the page is."""
    program = Program(numbers)
    monkeypatch.setattr(comparing, "run_one", program.main)
    monkeypatch.setattr(comparing, "job_of", lambda pipeline: Job)
    Path("spec.yaml").write_text(yaml.safe_dump({**SPEC, "columns": ["forget"]}, sort_keys=False))
    words = ["erase", "compare", "spec.yaml", "train.steps=4", "--out", "out"]
    monkeypatch.setattr("sys.argv", words)
    for count in (8, 0):
        program.ran.clear()
        with pytest.raises(SystemExit) as end:
            cli.main()
        lines = capsys.readouterr().out.splitlines()
        assert (end.value.code or 0, len(program.ran)) == (0, count)
        assert "\n".join(lines[count:-1]) + "\n" == Path("out/table.md").read_text()
        assert lines[-1] == "page: out/index.html"
        assert Path("out/index.html").exists()
        for line, (run, _, _) in zip(lines, program.ran, strict=False):
            assert line.endswith(f"{run.split('/')[1]}, seed {run.split('/')[2]}")
    assert json.loads(Path("out/compare.json").read_text())["command"] == " ".join(words)
