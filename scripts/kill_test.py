"""Kill small runs with SIGKILL at random moments, resume each, and compare with a run that was left alone.

    python scripts/kill_test.py --out DIR                        # a micro Stable Diffusion, 20 kills
    python scripts/kill_test.py --out DIR --pipeline ddpm --kills 5

The moments are spread over the whole run (one in each equal part of its time, by a fixed seed). After each kill every
file of the run must be readable; after the resume, weights, mask, pictures, losses and report must be those of the
undisturbed run, bit for bit. Exit status 1 if one is not. Runs are forked, so that libraries load once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import micro
import micro_ddpm

from erase import cli
from erase.checkpoint import read_safetensors
from erase.config import PIPELINES, parse
from erase.evaluation import generate
from erase.files import sha256

TIMES = ("seconds", "timing", "memory")
"""What differs between equal runs."""


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
        micro_ddpm.ddpm.save_new(micro_ddpm.model(), work / "model")
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


def run(program: ModuleType, config: Any, out: Path, *, resume: bool, kill_after: float | None) -> bool:
    """One run in a process of its own; whether it came to its end."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)
        try:
            program.main(config, out, resume=resume, command="kill_test", say=lambda line: None)
        except BaseException as error:  # said in the parent's terminal: stderr is off
            print(f"failed: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"{out}: a run ended with status {status}")
    return status == 0


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
        for row in generate.read_manifest(manifest.parent) if manifest.stat().st_size else []:
            assert sha256(manifest.parent / row.file) == row.sha256, f"{manifest}: {row.file}"


def phase(out: Path) -> str:
    """How far a killed run had come, by what it left."""

    def there(name: str) -> bool:
        return (out / name).exists()

    if not there("run.json"):
        return "before run.json"
    for name, what in (
        ("report.json", "writing the report page"),
        ("images/erased/manifest.jsonl", "drawing or counting the erased model's pictures"),
        ("model", "opening the erased model"),
        ("trained.safetensors", "saving the model"),
        ("metrics.jsonl", "steps"),
        ("saliency.safetensors", "starting steps"),
        ("fisher-remain.safetensors", "saliency: remain"),
        ("fisher-forget.safetensors", "saliency: forget or remain"),
    ):
        if there(name):
            return what
    return "base pictures, data, first sums"


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
    program = cli.program(args.pipeline)
    run(program, config, out / "warm", resume=False, kill_after=None)
    began = time.perf_counter()
    run(program, config, out / "whole", resume=False, kill_after=None)
    seconds = time.perf_counter() - began
    print(f"left alone: {seconds:.1f} s", flush=True)
    expected = outcome(out / "whole")
    assert outcome(out / "warm") == expected, "two undisturbed runs differ"
    shutil.rmtree(out / "warm")
    rng = np.random.default_rng(args.seed)
    phases: Counter[str] = Counter()
    good = 0
    for number in range(args.kills):
        moment = seconds * (number + rng.random()) / args.kills
        folder = out / f"{number:02d}"
        while run(program, config, folder, resume=False, kill_after=moment):  # it came to its end: earlier, then
            shutil.rmtree(folder)
            moment *= 0.9
        where = phase(folder)
        check_readable(folder)
        run(program, config, folder, resume=True, kill_after=None)
        check_readable(folder)
        found = outcome(folder)
        differ = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        phases[where] += 1
        good += not differ
        print(f"{number:2d}  killed at {moment:5.2f} s  {where:48s}  {differ or 'equal'}", flush=True)
        shutil.rmtree(folder)
    print(f"{good} of {args.kills} ended as the undisturbed run", dict(phases))
    raise SystemExit(good < args.kills)


if __name__ == "__main__":
    main()
