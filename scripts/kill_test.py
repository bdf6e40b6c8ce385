"""Kill small runs with SIGKILL at random moments, resume each, and compare with a run that was left alone.

    python scripts/kill_test.py --out DIR                        # a micro Stable Diffusion, 20 kills
    python scripts/kill_test.py --out DIR --pipeline ddpm --kills 5

Phases take turns: saliency, fast, slow, saving, generating. The moment within one is random, by a fixed seed: an entry
into it, and a time after that. After each kill every file of the run must be readable; after the resume, weights, mask,
images, losses and report must be those of the undisturbed run, bit for bit. Exit status 1 if one is not. Runs are
forked, so that libraries load once.
"""

from __future__ import annotations

import argparse
import functools
import json
import mmap
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import micro
import micro_ddpm

from erase.config import PIPELINES, parse
from erase.diffusion import class_conditional
from erase.engine import fisher, loop
from erase.engine.phases import Phases
from erase.evaluation.manifest import read_manifest
from erase.programs import images, inputs, saving
from erase.programs.run import main as run_program
from erase.store.files import sha256
from erase.store.safetensors import read_safetensors

TIMES = ("seconds", "timing", "memory")
"""What differs between equal runs."""
PHASES: dict[str, list[tuple[Any, str]]] = {
    "saliency": [(inputs, "fisher_diagonal")],
    "forget": [(Phases, "gradients")],
    "remain": [(Phases, "gradients")],
    "saving": [(fisher, "save_state"), (loop, "save_run"), (saving, "save")],
    "generating": [(images, "generate")],
}
"""Functions that a phase is spent in; `gradients` is told its side."""


class Watch:
    """Where a run is, in memory that its process shares with this one."""

    def __init__(self) -> None:
        self.shared = np.frombuffer(mmap.mmap(-1, 8 * (2 * len(PHASES) + 1)), dtype=np.float64)
        self.entered, self.seconds = self.shared[: len(PHASES)], self.shared[len(PHASES) : -1]

    def clear(self) -> None:
        """Before a run."""
        self.shared[:] = 0

    @property
    def now(self) -> str:
        """The phase that the run is in."""
        return ["another", *PHASES][int(self.shared[-1])]

    def follow(self) -> None:
        """From now on this process tells where it is."""
        for number, (phase, places) in enumerate(PHASES.items()):
            for owner, name in places:
                setattr(owner, name, self._told(getattr(owner, name), number, phase))

    def _told(self, work: Callable[..., Any], number: int, phase: str) -> Callable[..., Any]:
        @functools.wraps(work)
        def told(*args: Any, **given: Any) -> Any:
            if work.__name__ == "gradients" and args[1] != phase:
                return work(*args, **given)
            outer, self.shared[-1] = float(self.shared[-1]), number + 1
            self.entered[number] += 1
            began = time.perf_counter()
            try:
                return work(*args, **given)
            finally:
                self.seconds[number] += time.perf_counter() - began
                self.shared[-1] = outer

        return told


@dataclass(frozen=True)
class Moment:
    """When a run is killed."""

    phase: int
    entry: int
    """Counted from 1."""
    seconds: float
    """After it."""


def small_run(pipeline: str, work: Path) -> dict[str, Any]:
    """Settings of a run of seconds, and the files it needs."""
    common = {
        "pipeline": pipeline,
        "method": {"name": "sfron", "fast_rate": 1e-2, "outer_rate": 0.9},
        "saliency": {"density": 0.3, "count": 8, "draws": 2, "batch_size": 4, "chunk": 1},
        "train": {"steps": 8, "batch_size": 2, "lr": 1e-3, "parameters": "full"},
        "checkpoint_every": 2,
    }
    if pipeline == "ddpm":
        micro_ddpm.write_images(work / "data/train")
        micro_ddpm.write_images(work / "data/test", seed=1)
        micro_ddpm.write_classifier(work / "judge")
        class_conditional.save_new(micro_ddpm.model(), work / "model")
        return {
            **common,
            "model": str(work / "model"),
            "forget": {"labels": ["bee"], "count": 12},
            "draw": {"steps": 2, "batch_size": 4},
            "data": {"source": str(work / "data")},
            "eval": {"images": 8, "classifier": str(work / "judge")},
        }
    micro.pipeline(work / "parts").save_pretrained(work / "model")
    micro.write_classifier(work / "judge")
    words = [f"a photo of a {name},{name},plain,{i}\n" for i, name in enumerate(("cat", "dog", "car", "boat"))]
    (work / "set.csv").write_text("prompt,object,style,seed\n" + "".join(words))
    return {
        **common,
        "model": str(work / "model"),
        "forget": {"prompts": ["a photo of a cat"], "anchors": ["a photo of a dog"], "count": 4, "pictures": "both"},
        "remain": {"prompts": [str(work / "set.csv")], "count": 2},
        "draw": {"steps": 2, "guidance": 3.0, "batch_size": 4},
        "eval": {
            "prompts": [str(work / "set.csv")],
            "images": 2,
            "classifier": str(work / "judge"),
            "nudity": {"classes": ["FACE_FEMALE"], "threshold": 0.35},
        },
    }


def run(config: Any, out: Path, watch: Watch, *, resume: bool = False, kill: Moment | None = None) -> bool:
    """One run in a process of its own; whether it came to its end."""
    watch.clear()
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)
        try:
            watch.follow()
            run_program(config, out, resume=resume, command="kill_test", say=lambda line: None)
        except BaseException as error:  # said in the parent's terminal: stderr is off
            print(f"failed: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    ended = 0
    if kill is not None:
        while not ended and watch.entered[kill.phase] < kill.entry:
            time.sleep(1e-4)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            time.sleep(kill.seconds)
            os.kill(child, signal.SIGKILL)
    if not ended:
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"{out}: a run ended with status {code}")
    return code == 0


def check_readable(out: Path) -> None:
    """Read every file that is there under its own name."""
    for path in out.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(out).parts)
        if hidden or not path.is_file():
            continue
        if path.suffix == ".safetensors":
            read_safetensors(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                json.loads(line)
        elif path.suffix == ".png":
            Image.open(path).verify()
    for manifest in out.rglob("manifest.jsonl"):
        for row in read_manifest(manifest.parent) if manifest.stat().st_size else []:
            assert sha256(manifest.parent / row.file) == row.sha256, f"{manifest}: {row.file}"


def same(value: Any) -> Any:
    """Without times."""
    if isinstance(value, dict):
        return {k: same(v) for k, v in value.items() if k not in TIMES}
    return [same(v) for v in value] if isinstance(value, list) else value


def outcome(out: Path) -> dict[str, Any]:
    """All that must be equal: file by file."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out).as_posix()
        if name == "metrics.jsonl":
            found[name] = [same(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name in ("report.json", "run.json"):
            found[name] = same(json.loads(path.read_text()))
        elif name != "report.html":  # it shows times
            found[name] = sha256(path)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--pipeline", choices=["sd", "ddpm"], default="sd")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="sfron")
    args = parser.parse_args()
    work, out = args.out / "work", args.out / "runs"
    work.mkdir(parents=True)
    settings = small_run(args.pipeline, work)
    if args.method != "sfron":
        settings["method"] = {"name": args.method}
        settings["forget"]["loss"] = "surrogate" if args.method == "selective_amnesia" else "redirect"
    config = parse(settings, PIPELINES[args.pipeline])
    watch = Watch()
    run(config, out / "warm", watch)
    began = time.perf_counter()
    run(config, out / "whole", watch)
    entered, seconds = watch.entered.copy(), watch.seconds.copy()
    print(f"left alone: {time.perf_counter() - began:.1f} s", flush=True)
    print("entered:", dict(zip(PHASES, entered.astype(int).tolist(), strict=True)), flush=True)
    expected = outcome(out / "whole")
    assert outcome(out / "warm") == expected, "two undisturbed runs differ"
    shutil.rmtree(out / "warm")
    rng = np.random.default_rng(args.seed)
    phases: Counter[str] = Counter()
    good = 0
    for number in range(args.kills):
        folder = out / f"{number:02d}"
        phase = number % len(PHASES)

        def moment(phase: int = phase) -> Moment:
            mean = seconds[phase] / entered[phase]
            return Moment(phase, int(rng.integers(1, entered[phase] + 1)), float(rng.random() * mean))

        kill = moment()
        while run(config, folder, watch, kill=kill):  # it came to its end first
            shutil.rmtree(folder)
            kill = moment()
        where = watch.now
        check_readable(folder)
        run(config, folder, watch, resume=True)
        check_readable(folder)
        found = outcome(folder)
        differ = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        phases[where] += 1
        good += not differ
        wanted = f"{list(PHASES)[phase]} {kill.entry} + {1e3 * kill.seconds:.1f} ms"
        print(f"{number:2d}  killed at {wanted:26s} in {where:10s}  {differ or 'equal'}", flush=True)
        shutil.rmtree(folder)
    print(f"{good} of {args.kills} ended as the undisturbed run", dict(phases))
    raise SystemExit(good < args.kills)


if __name__ == "__main__":
    main()
