"""The one program behind `erase run`, for every kind of model.

Read `main` top to bottom: plan, record, images of the base, data, mask, loop, save, images of the erased model, judge,
report. What a kind of model adds is a `Job`: text-to-image (`erase.programs.text`), class labels
(`erase.programs.labels`), classifiers (`erase.programs.classify`). Every part leaves a file in the run's folder; with
`resume` parts that are there are not done again.
"""

from __future__ import annotations

import gc
import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from erase.config import arguments
from erase.engine import distributed
from erase.engine.backend import Backend
from erase.engine.batches import Batches, Samples, Together, some
from erase.engine.loop import Probe
from erase.engine.losses import Objective
from erase.engine.method import Method
from erase.engine.precision import Precision
from erase.engine.saliency import Mask, load_mask
from erase.engine.sharding import gathered, is_sharded
from erase.engine.updates import Descent, Epoch, InTurn
from erase.methods import Entry
from erase.programs import saving
from erase.programs.folder import STATE, TIMING, drop, open_folder, working_in
from erase.programs.inputs import check_needs, resolve_inputs
from erase.programs.launching import check_sharding, start
from erase.programs.settings import notices, read_method
from erase.programs.training import run_steps
from erase.store import files
from erase.store.safetensors import open_safetensors, read_safetensors, write_safetensors, written_order

JOBS = {
    "sd": "erase.programs.text.job",
    "ddpm": "erase.programs.labels.job",
    "classify": "erase.programs.classify.job",
}
"""Where the job of each pipeline is: a class `Job`."""
TRAINED = "trained.safetensors"
"""The weights that learned, until the model is saved and measured; its header tells how long everything took."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What a run is given."""

    config: Any
    out: Path
    """The run's folder."""
    accelerator: Accelerator
    precision: Precision
    say: Say
    """Where lines for a terminal go; of the first process alone."""
    entry: Entry
    """What is known of the method before it is built."""
    method: Method
    """Built from settings alone."""
    command: str = ""
    """As it was typed."""
    preset: str = ""
    """Its name or file, for the model's card."""
    form: saving.Form = "full"
    """What is kept of the erased model."""
    resume: bool = False
    dry_run: bool = False
    """Whether nothing is computed: models are then opened without weights."""

    @property
    def device(self) -> torch.device:
        """Where networks go."""
        found: torch.device = self.accelerator.device
        return found

    def images(self, name: str) -> Path:
        """The folder of one model's images."""
        return self.out / "images" / name


@dataclass(frozen=True)
class Lesson:
    """What a model learns from, and how."""

    backend: Backend[Any]
    forget: Samples | None
    """`None` where the method does not look at forget data."""
    remain: Samples | None
    forget_objective: Objective
    remain_objective: Objective
    true_forget: Samples | None = None
    """Images of what is forgotten where `forget` has surrogates of them, for `saliency.per=image`."""
    measured: Backend[Any] | None = None
    """The backend that saliency is measured on, if it is another one."""
    resources: Mapping[str, Any] = field(default_factory=dict)
    """What some methods need beside data: `renew`, `concepts`."""
    before_steps: Callable[[Method], Method] = lambda method: method
    """Called after the mask is made and before the first step, with the method that is then used."""
    until: Callable[[int], Probe | None] | None = None
    desc: str = "unlearning"
    values: Callable[[], Mapping[str, Tensor]] | None = None
    """What the loop leaves; by default the trainable weights."""


@dataclass(frozen=True)
class Learned:
    """What the loop leaves, here or in an earlier process of the same run."""

    values: Mapping[str, Tensor]
    mask: Mask | None
    timing: dict[str, Any]


class Job(Protocol):
    """What a kind of model adds to the skeleton; it is made before anything is computed."""

    AXES: ClassVar[tuple[str, str]]
    """Numbers of a summary that a comparison plots, across and up."""
    GOALS: ClassVar[tuple[str, ...]]
    """Numbers of a summary that a comparison's Pareto front is of."""

    def __init__(self, setting: Setting) -> None:
        """Open the model and make the plan.

        Raises:
            ValueError: for settings, prompts, labels, models or data that cannot be used.
        """

    def rehearse(self) -> list[str]:
        """What the run would learn, hold and do, in lines."""

    def record(self) -> dict[str, Any]:
        """What makes the run what it is besides its settings: `plan`, `base`, `data`."""

    def announcement(self) -> str:
        """A line on what is about to happen."""

    def measure_base(self) -> None:
        """Whatever is measured before a weight changes."""

    def lesson(self) -> Lesson:
        """The data, and what is to be done with them."""

    def save(self, learned: Learned) -> None:
        """Write the erased model into the run's folder, and give up what is in memory."""

    def measure_erased(self) -> None:
        """What `measure_base` measured, of the saved model."""

    def report(self, learned: Learned) -> dict[str, Any]:
        """The numbers of the report: see docs/reference/run-folder.md."""

    def verdict(self, result: Mapping[str, Any]) -> list[str]:
        """The numbers in lines."""

    def page(self) -> Path:
        """Write what a person opens; its path."""

    @staticmethod
    def summary(report: dict[str, Any]) -> dict[str, float | str | None]:
        """A report as the numbers that comparisons are made of; `erase.evaluation.page.names` has words for each."""


def job_of(pipeline: str) -> type[Job]:
    """The job of a pipeline, imported only when it is needed: its libraries take seconds."""
    found: type[Job] = importlib.import_module(JOBS[pipeline]).Job
    return found


def main(
    config: Any,
    out: Path,
    *,
    resume: bool = False,
    command: str = "",
    say: Say = print,
    preset: str = "",
    form: saving.Form = "full",
    dry_run: bool = False,
) -> Path:
    """Run it all; the path of the report. `preset` is named in the model's card, `form` is what is kept of it.

    A dry run says what would be done, and writes nothing.

    Raises:
        ValueError: for settings, prompts, labels, models or data that cannot be used.
    """
    if form == "lora" and config.pipeline != "sd":
        raise ValueError("--save lora is for text-to-image models (erase run sd): use full or delta")
    config, accelerator, precision, say = start(config, say)
    entry, method = read_method(config)
    check_sharding(config, entry, accelerator)
    for line in notices(config):
        say(line)
    setting = Setting(config, out, accelerator, precision, say, entry, method, command, preset, form, resume, dry_run)
    job = job_of(config.pipeline)(setting)
    if dry_run:
        say("\n".join(job.rehearse()))
        return out / "report.html"
    record = job.record()
    with working_in(out):
        distributed.on_main(lambda: open_folder(config, out, record, command, resume))
        _work(setting, job)
    return out / "report.html"


def _work(setting: Setting, job: Job) -> None:
    """All of a run that computes and writes."""
    out, say, form = setting.out, setting.say, setting.form
    if setting.resume and distributed.on_main(lambda: saving.finished(out)):
        distributed.on_main(lambda: saving.check_kept(out, form))
        drop(out, *STATE, TRAINED)
        distributed.on_main(lambda: saving.settle(out, form))
        say(f"finished before: {job.page()}")
        return
    say(job.announcement())
    job.measure_base()
    learned = learn(setting, job)
    job.save(learned)
    drop(out, *STATE)
    gc.collect()
    job.measure_erased()
    result = job.report(learned)
    distributed.on_main(lambda: saving.settle(out, form))
    distributed.on_main(lambda: files.write_json(out / "report.json", result))
    drop(out, TRAINED)
    for line in job.verdict(result):
        say(line)
    say(f"report: {job.page()}")


def learn(setting: Setting, job: Job) -> Learned:
    """Data, mask and loop; or what an earlier process of the run left of them."""
    trained, mask_path = setting.out / TRAINED, setting.out / "saliency.safetensors"
    if distributed.on_main(trained.exists):
        values, stored = read_safetensors(trained)
        mask = load_mask(mask_path) if mask_path.exists() else None
        return Learned(values, mask, json.loads(stored["timing"]))
    began = time.perf_counter()
    lesson = job.lesson()
    timing: dict[str, Any] = {"data_s": time.perf_counter() - began}
    config = setting.config
    sides = make_batches(config, setting.method, lesson)
    began = time.perf_counter()
    given = resolve(config, setting.entry, setting.precision, lesson, epoch_of(sides), mask_path, setting.resume)
    if not setting.entry.fresh:
        timing["saliency_s"] = time.perf_counter() - began
    mask = given.get("mask")
    timing = distributed.on_main(partial(first_timing, setting.out / TIMING, timing))
    method = lesson.before_steps(setting.entry.build(**arguments(config.method, setting.entry), **given))
    done = run_steps(
        config,
        lesson.backend,
        method,
        *sides,
        setting.accelerator,
        setting.out,
        setting.resume,
        lesson.desc,
        lesson.until,
    )
    timing |= done.timing
    weights = dict(lesson.backend.net.named_parameters())
    own = {name: p.detach() for name, p in weights.items() if p.requires_grad}
    found = own if lesson.values is None else lesson.values()
    stored = {"timing": json.dumps(timing)}
    if is_sharded(lesson.backend.net):
        return Learned(write_gathered(trained, found, stored), mask, timing)
    distributed.on_main(partial(write_safetensors, trained, found, stored))
    return Learned(found, mask, timing)


def write_gathered(path: Path, values: Mapping[str, Tensor], meta: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Write tensors that are spread over processes, each whole in turn; they are then read when they are asked for."""
    whole = gathered(values)
    if distributed.rank() == 0:
        write_safetensors(path, whole, meta)
    else:  # a process alone cannot gather
        for name in written_order(whole):
            whole[name]
    distributed.on_main(path.exists)  # wait for it
    return open_safetensors(path)[0]


def make_batches(config: Any, method: Method, lesson: Lesson) -> tuple[Batches | None, Batches | None]:
    """Batches of forget and of remain data; whole epochs for a method that takes both sides in turn, or mixed.

    Raises:
        ValueError: for the last batch of a whole epoch that does not divide over the processes.
    """
    train, seed, update = config.train, config.seed, method.update
    mixed = isinstance(update, Descent) and update.mixed
    whole = mixed or isinstance(update, InTurn)
    sides: tuple[Samples | None, Samples | None] = (lesson.forget, lesson.remain)
    if mixed:
        assert lesson.forget is not None
        assert lesson.remain is not None
        sides = None, Together(lesson.forget, lesson.remain)
    found: list[Batches | None] = []
    for number, data in enumerate(sides):
        found.append(None if data is None else Batches(data, train.batch_size, seed + number, whole))
        last = 0 if data is None or not whole else len(data) % train.batch_size
        if last % distributed.world():
            raise ValueError(
                f"method.order={config.method['order']} ends an epoch with a batch of {last}, which does not "
                f"divide over {distributed.world()} processes: choose another train.batch_size, or order=joint"
            )
    return found[0], found[1]


def epoch_of(sides: tuple[Batches | None, Batches | None]) -> Epoch | None:
    """How many batches of each side an epoch has; `None` where there is one side alone."""
    forget, remain = sides
    return None if forget is None or remain is None else Epoch(forget.per_epoch, remain.per_epoch)


def first_timing(path: Path, timing: dict[str, Any]) -> dict[str, Any]:
    """Of a run that is resumed, the times that its data and its mask took the first time."""
    if path.exists():
        return dict(files.read_json(path))
    files.write_json(path, timing)
    return timing


def resolve(
    config: Any,
    entry: Entry,
    precision: Precision,
    lesson: Lesson,
    epoch: Epoch | None,
    mask_path: Path | None,
    resume: bool = False,
) -> dict[str, Any]:
    """What the method's builder takes besides settings; see `resolve_inputs`."""
    if entry.fresh:
        return {"remain": lesson.remain_objective}
    wanted = config.saliency
    batches: Sequence[Any] = [
        [] if side is None else some(side, wanted.count, wanted.batch_size, config.seed, shuffled=wanted.per == "batch")
        for side in (lesson.true_forget if wanted.per == "image" else lesson.forget, lesson.remain)
    ]
    return resolve_inputs(
        entry,
        config,
        lesson.backend if lesson.measured is None else lesson.measured,
        lesson.forget_objective,
        lesson.remain_objective,
        batches,
        precision,
        mask_path,
        resume,
        epoch=epoch,
        **lesson.resources,
    )


def check_method(setting: Setting, has: Sequence[str]) -> None:
    """Find out that a kind of model, which has some rare things, cannot give the method what it needs.

    Raises:
        ValueError: if it cannot.
    """
    check_needs(setting.entry, has)
