"""Methods × targets × seeds, for any pipeline: `erase compare SPEC --out DIR`.

Every run is a folder of its own, `DIR/runs/METHOD/TARGET/SEED`; finished ones are not done again, a broken one goes on
where it was, and the same command given twice at a time shares the runs: each process takes those that no other has.

After each run are written: `index.html`, the page to open; `table.md`, `table.csv`, `results.json`, and
`forgetting.svg`, forgetting against retention; at the end `differences.md`, each method against the first. In table and
plot are means over seeds: in the table with their sample deviation, and the two numbers that are plotted with 95 %
intervals (Student's; seeds that agree have none). Methods on the Pareto front of a target (forgetting, retention, time)
are marked in the table and ringed in the plot.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from erase import config
from erase.engine.updates import NonFiniteError
from erase.programs import saving
from erase.programs.comparison import tables
from erase.programs.comparison.images import Finished
from erase.programs.comparison.page import write_page
from erase.programs.comparison.spec import Run, Spec, base_of, data_of, named_files, read_spec, reusable
from erase.programs.folder import without_note
from erase.programs.run import job_of
from erase.programs.run import main as run_one
from erase.store import files

FAILURES = (ValueError, KeyError, ImportError, RuntimeError, OSError)
"""What one run fails of, and others need not."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""What every run fails of."""
LOCK = Path("runs") / ".lock"
"""Of a comparison's folder: what its processes share."""
__all__ = ["Run", "Spec", "main", "read_spec", "reusable"]


def main(
    spec: Spec,
    out: Path,
    *,
    command: str = "",
    say: Callable[[str], None] = print,
) -> Path:
    """Run what is not there yet; the table's path. A run that cannot be done does not keep others from being done.

    Raises:
        ValueError: for a folder that holds something else; at once if the first run cannot be begun, and at the end if
            another could not.
    """
    open_folder(spec, out, command)
    work = Comparison(spec, out, command, say)
    work.gather()
    while work.left:
        for number, run in list(work.left.items()):
            with claim(out, run) as mine:
                work.gather()
                if mine and number in work.left and work.may_begin(run):
                    work.begin(number, run)
        work.gather()
        if work.left:
            time.sleep(1)
    if work.results and (lines := tables.differences_table(work.results, spec)):
        files.write_text(out / "differences.md", "\n".join(lines) + "\n")
    if work.failed:
        raise ValueError(
            f"{len(work.failed)} of {len(spec.runs)} runs could not be done and are not in {out / 'table.md'}; "
            f"the first: {next(iter(work.failed.values()))}"
        )
    return out / "table.md"


def open_folder(spec: Spec, out: Path, command: str) -> None:
    """Write `compare.json`, or check that the folder holds this very comparison.

    Raises:
        ValueError: for a folder that holds something else, or runs with other settings, or in which another process
            is at work with other settings.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder as --out")
    if files.in_use(out) and not (out / "compare.json").exists():
        raise ValueError(f"{out} holds files that are not of a comparison: choose another --out")
    stored: Any = {}
    begun: dict[str, Any] = {}
    if (out / "compare.json").exists():
        stored = files.read_json(out / "compare.json")
        if not isinstance(stored, dict) or not isinstance(stored.get("runs"), dict):
            raise ValueError(f"{out / 'compare.json'} is not of a comparison: choose another --out")
        begun = stored["runs"]
    now = {
        str(run.folder): json.loads(json.dumps(run.settings | ({"after": run.after} if run.after else {}), default=str))
        for run in spec.runs
    }
    same = {name for name in begun if name in now and without_note(begun[name]) == without_note(now[name])}
    if len(same) < len(begun) and not launched() and at_work(out, begun):
        raise ValueError(f"another process is at work in {out} with other settings: wait for it, or use another --out")
    for name, settings in begun.items():
        if (out / name).exists():
            if name not in now:
                raise ValueError(
                    f"{out} has a run that is not in this comparison, {name}: remove it, or choose another --out"
                )
            if changed := files.differences(without_note(settings), without_note(now[name])):
                raise ValueError(
                    f"{out / name} was started with other settings ({changed[0]}): remove it, or choose another --out"
                )
    hashes = {path: files.sha256(Path(path)) for path in named_files(now)}
    if any((out / name).exists() for name in begun):
        for path, was in stored.get("files", {}).items():
            if hashes.get(path, was) != was:
                raise ValueError(f"{path} has changed since {out} was begun: restore it, or choose another --out")
    files.write_json(out / "compare.json", {"schema": 1, "command": command, "runs": now, "files": hashes})


def at_work(out: Path, runs: Iterable[str]) -> bool:
    """Whether another process is at work on one of the runs."""
    if not (out / LOCK).exists():
        return False
    for name in runs:
        with files.claim(out / LOCK, name) as mine:
            if not mine:
                return True
    return False


@dataclass
class Comparison:
    """What is finished of a comparison, by whichever process, and what is left."""

    spec: Spec
    out: Path
    command: str
    say: Callable[[str], None]
    found: dict[int, Finished] = field(default_factory=dict)
    """Finished runs, by number."""
    left: dict[int, Run] = field(init=False)
    failed: dict[int, str] = field(default_factory=dict)
    """Why runs could not be done, by number."""
    shared: dict[str, list[tuple[Run, Path]]] = field(default_factory=dict)
    """Runs whose images others can take over, with their folders, by what these depend on."""
    begun: dict[str, tuple[Path, Any]] = field(default_factory=dict)
    """Weights and data that runs began with, and the first run that did, by their settings."""
    boxes: dict[Path, Any] = field(default_factory=dict)
    """What is hidden in each image of the page that was looked at."""

    def __post_init__(self) -> None:
        self.left = dict(enumerate(self.spec.runs, 1))

    @property
    def results(self) -> list[dict[str, Any]]:
        """The numbers of the finished runs, in order."""
        return [self.found[number].result for number in sorted(self.found)]

    def may_begin(self, run: Run) -> bool:
        """Whether the run that it begins after, if any, is finished."""
        return run.before is None or (self.out / run.before / "report.json").exists()

    def begin(self, number: int, run: Run) -> None:
        """Do a run, or resume it; or say why it cannot be done.

        Raises:
            ValueError: if it cannot be begun, and no run is finished (the next would hardly fare better), or other
                processes of the launch may be in the midst of it.
        """
        folder = self.out / run.folder
        spare = {}
        for setting, (_, key) in reusable(run).items():
            if found := self.shared.get(key):  # rows without seeds of their own have the run's
                alike = max(found, key=lambda one: (one[0].seed == run.seed, one[0].target == run.target))
                spare[setting] = str(alike[1])
        kind = config.PIPELINES[self.spec.pipeline]
        changes: dict[str, Any] = {"eval": spare}
        if run.before is not None:
            changes["model"] = str(self.out / run.before / saving.MODEL)
        settings: Any = config.parse(config.merge(run.settings, changes), kind)
        drawing: Any = getattr(settings, "draw", None)
        if hasattr(drawing, "cache"):  # runs of one concept need the same latents
            kept = self.out.absolute() / "drawn"
            settings = replace(settings, draw=replace(drawing, cache=drawing.cache or kept))
        self.say(f"run {number} of {len(self.spec.runs)}: {run.name}")
        try:
            run_one(settings, folder, resume=folder.exists(), command=self.command, say=self.say, preset=run.preset)
        except FAILURES as error:
            why = f"{run.name}: {one_line(error)}"
            hopeless = any(getattr(each, "errno", None) in FULL for each in (error, error.__cause__))
            if launched() or hopeless or (not self.found and not isinstance(error, NonFiniteError)):
                raise ValueError(why) from error
            self.give_up(number, why)

    def give_up(self, number: int, why: str) -> None:
        """Count a run as failed, and those that begin with its model."""
        run = self.left.pop(number)
        self.failed[number] = why
        self.say(f"not done: {why}")
        for later, each in list(self.left.items()):
            if each.before == run.folder:
                self.give_up(later, f"{each.name}: it begins with a run that failed")

    def gather(self) -> None:
        """Write the tables and the page anew if more is finished than before."""
        before, job = len(self.left), job_of(self.spec.pipeline)
        for number, run in list(self.left.items()):
            folder = self.out / run.folder
            if (folder / "report.json").exists() and (folder / "report.html").exists():
                for what, key in reusable(run).values():
                    if (folder / "images" / what).is_dir():
                        self.shared.setdefault(key, []).append((run, folder / "images" / what))
                self.check_alike(run, folder)
                report = files.read_json(folder / "report.json")
                numbers = {"method": run.method, "target": run.target, "seed": run.seed, **job.summary(report)}
                self.found[number] = Finished(run, report, numbers)
                del self.left[number]
        if len(self.left) < before:
            tables.write(self.results, self.out, self.spec, job.AXES, job.GOALS)
            done = [self.found[number] for number in sorted(self.found)]
            write_page(self.spec, done, self.out, job.AXES, job.GOALS, self.command, self.boxes)

    def check_alike(self, run: Run, folder: Path) -> None:
        """Refuse a finished run that began with another model, or other data, than one with the same settings.

        Raises:
            ValueError: for one.
        """
        made = files.read_json(folder / "run.json") if (folder / "run.json").exists() else {}
        base = f"{run.before} {base_of(run)}"
        for what, settings in (("base", base), ("data", f"{base} {data_of(run)}")):
            now = made.get(what, {})
            # The test images of a classifier that are known are those of the other classes, which differ by target.
            now = now.get("weights") if what == "base" else {k: v for k, v in now.items() if k != "test_sha256"}
            first, was = self.begun.setdefault(f"{what} {settings}", (folder, now))
            if was != now:
                other = "another model" if what == "base" else "other data"
                raise ValueError(
                    f"{folder} was begun with {other} than {first}, of the same name: restore it and remove one of the "
                    "two, or choose another --out"
                )


def one_line(error: BaseException) -> str:
    """An error in a line; a missing key says only its name."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"KeyError: {text}" if isinstance(error, KeyError) else text


def launched() -> bool:
    """Whether several processes of one launch are at work on every run together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def claim(out: Path, run: Run) -> AbstractContextManager[bool]:
    """Whether no other process is at work on the run; the processes of one launch are at work on it together."""
    if launched():
        return nullcontext(True)
    return files.claim(out / LOCK, str(run.folder))
