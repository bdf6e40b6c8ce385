"""What the scenarios of `erase run` know of each kind of model: how to make a tiny one, and how it is run.

A row of `FAMILIES` is a family of diffusion models or the classifiers. Sizes are the least with which every part of a
run has something to do: three steps, saved after the second one, and images in two batches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import micro
import micro_classify
import micro_ddpm
import micro_dit
import micro_flux
import micro_lumina2
import micro_pixart
import micro_sd3
import micro_sdxl
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from erase.classification import models
from erase.config import PIPELINES, override, parse
from erase.diffusion.model import Model
from erase.programs import inputs, run
from erase.programs.tracking import JsonlTracker

Words = tuple[str, ...]
NO_IMAGES: Words = ("eval.images=0",)
ADAM: Words = ("train.optimizer=adam", "train.lr=1e-3")
SAME_FOR_ALL = {  # plain gradient steps: what differs by rounding stays so
    "method": {"name": "sfron", "fast_rate": 1e-2, "fast_rule": "sgd"},
    "saliency": {"density": 0.3, "count": 2, "draws": 1, "batch_size": 2},
    "train": {"steps": 3, "batch_size": 2, "lr": 1e-2, "optimizer": "sgd"},
    "checkpoint_every": 2,
}
NAMES = ("car", "cat", "dog")  # as a folder of images orders them
PROMPTS = ("a photo of a car", "a photo of a cat", "a photo of a dog")


@dataclass(frozen=True)
class Family:
    """A row."""

    kind: Literal["text", "labels", "classify"]
    pipeline: Callable[[Path], Any]
    """Writes what it needs into a folder; a pipeline of random weights."""
    learns: str
    """Names of the weights that `settings` let learn: an expression, written out once more."""
    methods: Mapping[str, Words]
    """What is run beside `sfron`, and by which settings."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Beside those of its kind; `{work}` in them is the case's folder."""
    trained: str = "transformer"
    """The folder of what learns."""
    text_weights: str | None = None
    """Names of the weights that closed forms edit."""
    dtype: torch.dtype = torch.float32


TEXT: dict[str, Words] = {
    "finetune": ("method={name: finetune}",),
    "gradient_ascent": ("method={name: gradient_ascent, fast_rate: 1e-3}", "forget.loss=ascent"),
    "random_label": ("method={name: random_label}",),
    "salun": ("method={name: salun}", "saliency.kind=magnitude"),
    "selective_amnesia": (
        "method={name: selective_amnesia, strength: 10}",
        *("forget.loss=surrogate", "forget.pictures=anchor"),
    ),
    "scrub": ("method={name: scrub}", "forget.loss=ascent"),
    "esd": ("method={name: esd, fast_rate: 1e-3}", "train.parameters=noxattn"),
    "uce": ("method={name: uce}", "saliency.kind=none", "train.parameters=full"),
    "speed": ("method={name: speed, tokens: all}", "saliency.kind=none", "train.parameters=full"),
}
CLOSED = ("uce", "speed")
"""Closed forms: one step, on the weights that read text."""
LABELS: dict[str, Words] = {
    "finetune": ("method={name: finetune}",),
    "gradient_ascent": ("method={name: gradient_ascent, fast_rate: 1e-3}",),
    "random_label": ("method={name: random_label}", "forget.loss=redirect"),
    "salun": ("method={name: salun}", "forget.loss=redirect", "saliency.kind=magnitude"),
    "selective_amnesia": ("method={name: selective_amnesia, strength: 10}", "forget.loss=surrogate"),
    "bad_teacher": ("method={name: bad_teacher}",),
    "scrub": ("method={name: scrub}",),
    "esd": ("method={name: esd, fast_rate: 1e-3}",),
    "retrain": ("method={name: retrain}", "train.parameters=full"),
}
CLASSIFY: dict[str, Words] = {
    "finetune": ("method={name: finetune}",),
    "gradient_ascent": ("method={name: gradient_ascent, fast_rate: 1e-3}",),
    "random_label": ("method={name: random_label}",),
    "salun": ("method={name: salun}", "saliency.kind=magnitude"),
    "selective_amnesia": ("method={name: selective_amnesia, strength: 10}",),
    "bad_teacher": ("method={name: bad_teacher}",),
    "scrub": ("method={name: scrub}",),
}
ONE_SIDED = {
    "finetune": "remain",
    "retrain": "remain",
    "gradient_ascent": "forget",
    "esd": "forget",
    "uce": "",
    "speed": "",
}
"""Methods that do not learn from both sides, and from which they do."""
MASKED = ("sfron", "salun")


def some(methods: Mapping[str, Words], *names: str) -> dict[str, Words]:
    """A part of them."""
    return {name: methods[name] for name in names}


ATTENTION = {"learns": r"\.attn2\.", "trained": "unet", "text_weights": r"\.attn2\.to_[kv]\.weight$"}
JOINT = {"learns": r"\.attn\.add_[qkv]_proj\.", "text_weights": r"^context_embedder\.weight$"}
FAMILIES = {
    "sd": Family("text", micro.pipeline, methods=TEXT, dtype=torch.float16, **ATTENTION),
    "sdxl": Family("text", micro_sdxl.pipeline, methods=some(TEXT, "esd", "salun", *CLOSED, "finetune"), **ATTENTION),
    "sd3": Family("text", micro_sd3.pipeline, methods=some(TEXT, "esd", "salun", *CLOSED, "gradient_ascent"), **JOINT),
    "flux": Family("text", micro_flux.pipeline, methods=some(TEXT, "esd", "salun", *CLOSED, "random_label"), **JOINT),
    "pixart": Family(
        "text",
        micro_pixart.pipeline,
        r"\.attn2\.",
        some(TEXT, "esd", "salun", *CLOSED, "selective_amnesia"),
        text_weights=r"^caption_projection\.linear_1\.weight$",
    ),
    "lumina2": Family(
        "text",
        micro_lumina2.pipeline,
        r"^(time_caption_embed\.caption_embedder|context_refiner)\.",
        some(TEXT, "esd", "salun", "scrub"),
    ),
    "ddpm": Family(
        "labels",
        lambda work: micro_ddpm.model(NAMES, (3, micro_ddpm.SIZE, micro_ddpm.SIZE)),
        r"",
        LABELS,
        {"data": {"source": "{work}/data"}},
        "unet",
    ),
    "dit": Family(
        "labels",
        lambda work: micro_dit.pipeline(work, NAMES),
        r"\.norm1\.|^proj_out_1\.",
        some(LABELS, "esd", "salun", "random_label", "selective_amnesia"),
        {"train": {"parameters": "adaln"}},
    ),
    "classify": Family("classify", lambda work: micro_classify.model(labels=NAMES), r"", CLASSIFY, trained=""),
}


@dataclass(frozen=True)
class Case:
    """A family's tiny model on disk, and the settings of its runs."""

    name: str
    family: Family
    work: Path
    settings: dict[str, Any]

    @property
    def base(self) -> Path:
        """The model that concepts are erased from; not to be changed by a test."""
        return self.work / "base"

    @property
    def folder(self) -> set[str]:
        """What a run leaves."""
        always = {"run.json", "metrics.jsonl", "saliency.safetensors", "model", "report.json", "report.html"}
        return always | ({"split.json"} if self.family.kind == "classify" else {"images", "grid.png"})

    @property
    def weights(self) -> list[Path]:
        """Its files of weights, what learns first; relative to the model's folder."""
        found = sorted(path.relative_to(self.base) for path in self.base.rglob("*.safetensors"))
        return sorted(found, key=lambda path: str(path.parent) not in (self.family.trained, "."))

    @property
    def without_images(self) -> Words:
        """Words for a run that measures nothing it can do without."""
        return () if self.family.kind == "classify" else NO_IMAGES

    def start(self, out: Path, *words: str, **options: Any) -> list[str]:
        """Run with `key=value` words; what is said."""
        said: list[str] = []
        data = override(self.settings, words)
        run.main(parse(data, PIPELINES[data["pipeline"]]), out, command="erase run", say=said.append, **options)
        return said


def write(name: str, work: Path) -> Case:
    """Make a family's model and data in a folder."""
    family = FAMILIES[name]
    made = family.pipeline(work)
    if family.kind == "text":
        made.to(family.dtype).save_pretrained(work / "base")
        rows = [f"{prompt},{what},{i}\n" for i, (prompt, what) in enumerate(zip(PROMPTS, NAMES, strict=True))]
        (work / "set.csv").write_text("prompt,object,seed\n" + "".join(rows))
        own: dict[str, Any] = {
            "pipeline": "sd",
            "forget": {"prompts": [PROMPTS[1]], "anchors": [PROMPTS[2]], "count": 2, "axis": "object"},
            "remain": {"prompts": [str(work / "set.csv")], "count": 1},
            "draw": {"steps": 2, "guidance": 3.0, "batch_size": 2},
            "eval": {"prompts": [str(work / "set.csv")], "images": 1, "blur": False},
        }
    elif family.kind == "labels":
        made.save_pretrained(work / "base")
        micro_ddpm.write_images(work / "data/train", 4, NAMES, mode="RGB")
        rows = [f"{what},{i}\n" for i, what in enumerate(NAMES, 1)]
        (work / "set.csv").write_text("prompt,seed\n" + "".join(rows))
        own = {
            "pipeline": "ddpm",
            "train": {"parameters": "full"},
            "forget": {"labels": ["cat"], "count": 2},
            "draw": {"steps": 2, "batch_size": 2, "guidance": 3.0},
            "eval": {"images": 1, "blur": False},
        }
    else:
        models.save(made, work / "base")
        micro_ddpm.write_images(work / "data/train", 8, NAMES)
        micro_ddpm.write_images(work / "data/test", 2, NAMES, seed=1)
        own = {
            "pipeline": "classify",
            "data": {"source": str(work / "data"), "validation": 0.2},
            "forget": {"fraction": 0.25},
            "eval": {"retrained": False},
            "cache": str(work / "cache"),
        }
    settings = merged(SAME_FOR_ALL, own, json.loads(json.dumps(dict(family.settings)).replace("{work}", str(work))))
    return Case(name, family, work, {**settings, "model": str(work / "base")})


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over settings."""
    out: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            out[key] = merged(out.get(key, {}), value) if isinstance(value, Mapping) else value
    return out


# --- what there is --------------------------------------------------------------------------------


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())


def rows(out: Path) -> list[dict[str, Any]]:
    """Of `metrics.jsonl`, without how long a step took."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "ram_bytes", "gpu_bytes")} for row in found]


def tensors(model: Path) -> dict[str, Tensor]:
    """All weights of a model, by file and name."""
    files = sorted(path.relative_to(model) for path in model.rglob("*.safetensors"))
    return {f"{file} {name}": tensor for file in files for name, tensor in load_file(model / file).items()}


def same(a: Path, b: Path) -> bool:
    """Whether two models have the same weights, bit for bit."""
    mine, theirs = tensors(a), tensors(b)
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine
    )


def same_file(a: Path, b: Path, name: str) -> bool:
    """Whether two folders have the same file."""
    return (a / name).read_bytes() == (b / name).read_bytes()


def tree(folder: Path) -> dict[str, str]:
    """A hash of each file, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def images(out: Path) -> dict[str, str]:
    """A hash of each image, by its path."""
    return {name: value for name, value in tree(out / "images").items() if name.endswith(".png")}


# --- damage ---------------------------------------------------------------------------------------


def with_nan(file: Path) -> None:
    """One weight of a file is no number."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    values = load_file(file)
    next(x for x in values.values() if x.is_floating_point()).view(-1)[-1] = torch.nan
    save_file(values, file, metadata)


def cut_short(file: Path) -> None:
    """A file, as a download that was interrupted leaves it."""
    file.write_bytes(file.read_bytes()[:-10])


DAMAGE: dict[str, Callable[[Path], None]] = {"nan": with_nan, "cut short": cut_short, "missing": Path.unlink}


# --- stopping -------------------------------------------------------------------------------------


class StopError(Exception):
    """The process is killed here."""


def stop(*_: Any, **__: Any) -> Any:
    """Anything, killed as it begins."""
    raise StopError


def stopped_at(count: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is killed when it is called for the `count`th time."""
    calls: list[int] = []

    def counted(*args: Any, **given: Any) -> Any:
        calls.append(1)
        return stop() if len(calls) == count else real(*args, **given)

    return counted


def stopped_sampler(self: Model, real: Callable[..., Any] = Model.sampler, **given: Any) -> Callable[..., Any]:
    """`Model.sampler`, whose second batch is killed."""
    return stopped_at(2, real(self, **given))


Stage = tuple[str, Any, str, Any]
"""What is stopped, and an attribute of something that is put in the place of another meanwhile."""


def stages(case: Case) -> Sequence[Stage]:
    """Where a run can be killed, in its order."""
    job = run.job_of(case.settings["pipeline"])
    found: list[Stage] = [
        ("generating base", Model, "sampler", stopped_sampler),
        ("before data", job, "lesson", stop),
        ("in saliency", inputs, "diagonal", stopped_at(2, inputs.diagonal)),
        ("between steps", JsonlTracker, "__call__", stopped_at(3, JsonlTracker.__call__)),
        ("after the last step", run, "write_safetensors", stop),
        ("before saving", job, "save", stop),
        ("generating erased", Model, "sampler", stopped_sampler),
        ("before the page", job, "page", stop),
    ]
    return [stage for stage in found if case.family.kind != "classify" or stage[2] != "sampler"]
