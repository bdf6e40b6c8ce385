"""Early stopping: images generated between steps, judged, and what became of it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from erase.config import SdConfig
from erase.diffusion.model import Model
from erase.engine import distributed
from erase.engine.loop import Probe
from erase.engine.precision import Precision
from erase.evaluation.manifest import images_of
from erase.evaluation.prompt_files import PromptRow
from erase.programs.text.images import generate_rows
from erase.programs.text.judges.seam import Judge
from erase.programs.text.plan import Plan


def look_between_steps(
    config: SdConfig, plan: Plan, judge: Judge, diffuser: Model, precision: Precision, out: Path
) -> Callable[[int], Probe | None]:
    """The probe of each step: at some steps a few images are generated, judged and dropped."""
    wanted = config.until
    assert wanted is not None
    rows: list[PromptRow] = []
    for side in (True, False):
        both = zip(plan.rows, plan.forgotten, strict=True)
        those = [row for row, gone in both if gone is side and row.prompt not in plan.earlier]
        spread = [those[k * len(those) // wanted.images] for k in range(wanted.images)] if those else []
        # Seeds apart from the evaluation's: the images that end a run are not those that it is counted by.
        rows += [replace(row, seed=(row.seed + 1 + k) % 2**32) for k, row in enumerate(spread)]

    def look(done: int) -> Probe | None:
        if done % wanted.every or done == config.train.steps:  # after the last step there is the evaluation
            return None
        work = Path(distributed.on_main(lambda: tempfile.mkdtemp(prefix=".until.", suffix=".tmp", dir=out)))
        folder = work / f"after step {done}"
        generate_rows(config, rows, 1, diffuser, precision, folder, False, {})
        found = judge.judge(images_of(folder), rows)
        distributed.on_main(lambda: shutil.rmtree(work))
        forget = sum(found.shows[: wanted.images]) / wanted.images
        right = (found.right or [])[wanted.images :]
        remain = sum(right) / len(right) if right else None
        kept = wanted.remain is None or (remain is not None and remain >= wanted.remain)
        return Probe({"until_forget": forget, "until_remain": remain}, forget <= wanted.forget and kept)

    return look


def looked(config: SdConfig, out: Path) -> dict[str, Any]:
    """Whether a run ended before its last step, why, and all that its looks saw; from `metrics.jsonl`."""
    wanted = config.until
    assert wanted is not None
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    looks = [row for row in rows if "until_forget" in row]
    done, steps = rows[-1]["step"] + 1, config.train.steps
    why = f"no probe of {len(looks)} met the conditions: all {steps} steps were done"
    if done < steps:
        last = looks[-1]
        right = "" if last["until_remain"] is None else f", {last['until_remain']:.3g} of the others' were right"
        why = f"after step {done} of {steps} {last['until_forget']:.3g} of its images showed the concept{right}"
    return {
        **asdict(wanted),
        "ended": done if done < steps else None,
        "why": why,
        "looks": {
            str(row["step"] + 1): {"forget": row["until_forget"], "remain": row["until_remain"]} for row in looks
        },
        "seconds": sum(row["look_seconds"] for row in looks),
    }
