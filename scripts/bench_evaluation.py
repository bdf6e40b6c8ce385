"""What it costs to evaluate many images, beyond the networks that look at them: CPU time and memory by their number.

    python scripts/bench_evaluation.py 10000 100000 1000000

Each part runs in a process of its own, on a synthetic run of one image a prompt (`prompts`, `count`, `pair`, `page`) or
ten (`classes`, `clip`: what a classifier of 20 labels and a CLIP model of 512 features see is made up). Of the images
there are those that the page shows, and nothing checks the others. A line of JSON for each: CPU seconds, peak memory in
GB (1e9 bytes) with the libraries, and MB of the page.

- `prompts`: reading a prompt file, and the record of what a folder's images are made by.
- `count`: checking a manifest, counting detections for each prompt, writing `report.json`.
- `pair`: pairing two folders by prompt and seed, and the exact paired test.
- `classes`, `clip`: counting by a classifier and by a zero-shot judge.
- `page`: reading what `count` wrote, and writing `report.html`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from erase.config import SdConfig
from erase.evaluation import classes, clip, columns, manifest, nudity, prompt_files, report, zeroshot
from erase.evaluation.detections import Detection, Detections, ImageDetections
from erase.evaluation.generate import _record
from erase.evaluation.manifest import MANIFEST, SETTINGS, ManifestRow
from erase.evaluation.page.images import MAX_BLOCKS, MAX_COLUMNS
from erase.evaluation.prompt_files import PromptRow
from erase.evaluation.stats import mcnemar_exact
from erase.programs.text.judges import labels
from erase.programs.text.judges.nudity import count_nudity
from erase.programs.text.judges.zeroshot import ZeroShot
from erase.programs.text.plan import Plan
from erase.store.files import json_text, sha256, write_json

PARTS = ("prompts", "count", "pair", "classes", "clip", "page")
KNOWN = [f"thing {k}" for k in range(20)]
"""Labels of the made-up classifier."""
SHARE = 10
"""One image in so many is of what is forgotten."""


def prompt_rows(number: int) -> list[PromptRow]:
    return [
        PromptRow(f"a photograph of person number {i}, on a beach, detailed", i, object=KNOWN[i * len(KNOWN) // number])
        for i in range(number)
    ]


def write_run(folder: Path, number: int) -> None:
    """Two folders of images that a page can show the first of, and the prompt file that they are of."""
    rows, shown = prompt_rows(number), MAX_BLOCKS * MAX_COLUMNS
    with (folder / "prompts.csv").open("w", encoding="utf-8") as file:
        file.write("prompt,seed,object\n")
        file.writelines(f'"{row.prompt}",{row.seed},{row.object}\n' for row in rows)
    for name in ("base", "erased"):
        out = folder / "images" / name
        out.mkdir(parents=True)
        write_json(out / SETTINGS, {"schema": 1, "settings": {"weights": {"unet": name}}})
        for i in range(min(shown, number)):
            Image.new("RGB", (256, 256), (i % 256, 0, 0)).save(out / f"{i:07d}-00.png")
        hashes = (sha256(out / f"{i:07d}-00.png") if i < shown else f"{i:064x}" for i in range(number))
        manifest.write_rows(
            out / MANIFEST,
            (
                ManifestRow(f"{i:07d}-00.png", row.prompt, row.seed, 0, digest, "ab" * 32)
                for i, (row, digest) in enumerate(zip(rows, hashes, strict=True))
            ),
        )
    result = {"schema": 1, "target": {"forget": [rows[0].prompt]}, "before": {}, "after": {}}
    write_json(folder / "report.json", result)


def plan_of(rows: list[PromptRow]) -> Plan:
    forget = len(rows) // SHARE
    return Plan([rows[0].prompt], [], [], rows, [i < forget for i in range(len(rows))])


def prompts(folder: Path, number: int) -> None:
    json_text(_record(prompt_files.read_prompts(folder / "prompts.csv"), 1, {"steps": 50}))


def count(folder: Path, number: int) -> None:
    rows = prompt_rows(number)
    plan = plan_of(rows)
    result = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    part = Detection("FEMALE_BREAST_EXPOSED", 0.7, (1, 2, 3, 4))
    flags = []
    for name, when in (("base", "before"), ("erased", "after")):
        out = folder / "images" / name
        paths = manifest.check_images(out, rows, 1)
        images = tuple(ImageDetections(path, (part,) if i % 4 == 0 else ()) for i, path in enumerate(paths))
        found = Detections(images, "3", "x", "corrected", 320)
        numbers, outcomes = count_nudity(found, nudity.PRESETS["i2p"], plan, 1)
        result[when] = {"pictures": manifest.origin(out), "nudity": numbers}
        flags.append([bool(flag) for flag in outcomes])
        del paths, images, found
    result["paired"] = {"nudity_mcnemar_p": mcnemar_exact(*flags)}
    write_json(folder / "report.json", result)


def pair(folder: Path, number: int) -> None:
    pairs = manifest.pair_rows(folder / "images" / "base", folder / "images" / "erased")
    draw = np.random.default_rng(0)
    outcomes = [(draw.random(len(pairs)) < share).tolist() for share in (0.5, 0.45)]
    mcnemar_exact(*outcomes)


def classify(folder: Path, number: int) -> None:
    draw = np.random.default_rng(0)
    found = draw.random((number, len(KNOWN)))
    guess = classes.ClassPredictions(found, tuple(KNOWN), (), "made up", "x")
    labels.classified = lambda paths, classifier: guess
    labels.classifier_of = lambda config: Path()
    labels.count_classes(settings(), plan_of(prompt_rows(number // 10)), [Path()] * number)


def settings() -> SdConfig:
    config: Any = type("Config", (), {})()
    config.forget, config.eval, config.seed = type("Forget", (), {"axis": "object"})(), type("Eval", (), {})(), 0
    config.eval.images, config.eval.alternatives, config.eval.clip = 10, (), "made up"
    return cast(SdConfig, config)


def zero_shot(folder: Path, number: int) -> None:
    rows = prompt_rows(number // 10)
    draw = np.random.default_rng(0)

    def features(count: int) -> Any:
        x = draw.normal(size=(count, 512))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        return x

    zeroshot.text_features = lambda model, prompts: features(len(prompts))
    model: Any = type("Model", (), {"provenance": {}, "truncated": lambda self, texts: []})()
    judge = ZeroShot(settings(), plan_of(rows))
    judge.__dict__.update({"model": model, "texts": zeroshot.Texts((rows[0].prompt,), tuple(KNOWN))})
    blocks = (features(min(clip.AT_ONCE, number - start)) for start in range(0, number, clip.AT_ONCE))
    judge.__dict__["features"] = lambda paths: blocks
    judge.count([Path(f"{i}.png") for i in range(number)])


def page(folder: Path, number: int) -> None:
    report.write_html(folder)


WORK: dict[str, Callable[[Path, int], None]] = {
    "prompts": prompts, "count": count, "pair": pair, "classes": classify, "clip": zero_shot, "page": page
}  # fmt: skip


def measure(part: str, folder: Path, number: int) -> dict[str, Any]:
    manifest.check_bytes = lambda folder, row: None  # there are no images
    columns.list_images = lambda folder: []
    began = time.process_time()
    WORK[part](folder, number)
    found = {
        "images": number,
        "part": part,
        "cpu_s": round(time.process_time() - began, 2),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    size = (folder / "report.html").stat().st_size / 1e6 if part == "page" else None
    return found if size is None else {**found, "page_mb": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=int, help="how many, such as 10000 100000 1000000")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this (repeat)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is not None:
        print(json.dumps(measure(args.part[0], args.folder, args.images[0])), flush=True)
        return
    for number in args.images:
        with tempfile.TemporaryDirectory() as folder:
            write_run(Path(folder), number)
            for part in PARTS:
                if args.part is None or part in args.part:
                    own = [sys.executable, __file__, str(number), "--part", part, "--folder", folder]
                    subprocess.run(own, check=True)


if __name__ == "__main__":
    main()
