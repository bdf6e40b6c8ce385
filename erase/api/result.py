"""What a call did to a model in memory: to be looked at, counted, saved, and undone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from PIL import Image
from torch import nn

from erase.api.history import Past, past, remember
from erase.api.images import boxes_of, count
from erase.api.learning import Learned
from erase.api.settings import Call, Chosen
from erase.api.writing import base_of, erased_of, save_lora, write_model
from erase.diffusion.checkpoints.folders import FORGOTTEN, LABELS
from erase.engine.borrow import Values, modes_kept
from erase.engine.saliency import Mask
from erase.evaluation.generate import Sampler, generate
from erase.evaluation.grid import grid_from_folders
from erase.evaluation.prompt_files import PromptRow
from erase.programs import saving
from erase.programs.lora import ranks_of
from erase.store.delta import write_delta
from erase.store.safetensors import digest

Prompts = str | int | Sequence[str | int]
"""Prompts, or classes by name or number."""


@dataclass(frozen=True)
class Sampling:
    """How a model generates."""

    sample: Sampler
    prompts: list[str]
    """What is shown if nothing is asked for: what is forgotten first, then some of what stays."""
    forgotten: int
    """How many of them are of what is forgotten."""
    nets: list[nn.Module]
    batch_size: int


@dataclass(frozen=True)
class About:
    """What was done, for a model's card."""

    chosen: Chosen
    name: str
    """Of the base."""
    target: Mapping[str, str]
    """What is forgotten, by a hash."""
    forgotten: tuple[str, ...] = ()
    """Marks of all that the weights have forgotten."""
    part: str | None = None
    """The component of a pipeline that learned."""
    processor: Any = None
    labels: tuple[str, ...] = ()
    """Names of the classes of a model that names none itself."""


@dataclass(eq=False)
class Result:
    """What `erase.forget` did; it holds the model, and of its first weights those that learned."""

    model: Any = field(repr=False)
    """As it was given, erased."""
    learned: Learned = field(repr=False)
    seconds: float
    """Of the whole call."""
    net: nn.Module = field(repr=False)
    """The network that learned."""
    about: About = field(repr=False)
    before: Past = field(repr=False)
    base: Values | None = field(repr=False)
    """None with `keep_base=False`."""
    sampling: Sampling | None = field(repr=False, default=None)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A row for each step: losses, gradient norms, seconds, as in a run's `metrics.jsonl`."""
        return self.learned.metrics

    @property
    def mask(self) -> Mask | None:
        """The weights that forget steps might change, if there is a mask; `mask.density` is their share."""
        return self.learned.mask

    def save(
        self,
        out: str | Path,
        form: saving.Form = "full",
        *,
        rank: int | None = None,
        energy: float | None = None,
    ) -> Path:
        """Write the erased model, or what changed of it; the path of what was written, whole or not at all.

        Args:
            out: a new folder. A delta or LoRA is `delta.safetensors` or `lora.safetensors` in it, or `out` itself if
                that is named `.safetensors`.
            form: `full` is the library's own format, which `from_pretrained` and `erase.load` open, with a model card;
                of a network of neither library, `model.safetensors`. `delta` is for `erase apply` on a base that is
                stored in the dtype that the model had here (of a model that `erase.load` opened: as it is stored).
                `lora`, of text-to-image pipelines, is loaded onto the base by diffusers, ComfyUI and the WebUIs.
            rank: of every layer of a LoRA; by default each layer's own.
            energy: without `rank`, the share of each layer's change that a LoRA keeps at least; by default .99 of what
                was trained, and all of what has low rank already: of `train.form=lora` and of closed forms.

        Raises:
            ValueError: for an unknown form, a model or a change that no LoRA carries, a path in use, if another call
                changed the model since, and for a delta or LoRA of a model that was converted to another dtype.
        """
        self._check_last()
        target = Path(out)
        if form == "full":
            write_model(self.model, target, self.meta, self.about.part, self.about.processor)
            return target
        if form == "lora":
            before, pairs = base_of(self.net, self._base(), self.before.source), self.learned.pairs
            if pairs and energy is None:
                energy = 1.0  # what was trained at a rank is kept whole
            ranks = ranks_of(self.about.chosen.entry.name, rank, energy)
            return save_lora(self.model, self.net, before, target, self.meta, ranks, pairs)
        if form != "delta":
            raise ValueError(f"unknown form {form!r}; allowed: full, delta, lora")
        if target.suffix != ".safetensors":
            target = target / saving.DELTA
        if target.exists():
            raise ValueError(f"{target} exists: choose another path, or remove it")
        base = base_of(self.net, self._base(), self.before.source)
        write_delta(base, erased_of(self.net, base), target, self.meta, self.before.meta)
        return target

    def show(
        self, prompts: Prompts | None = None, seeds: Sequence[int] = range(4), *, blur: bool = True
    ) -> Image.Image:
        """Images before and after, from the same seeds: a block for each prompt, a column for each seed.

        Args:
            prompts: or classes; by default what was forgotten, and some of what stays.
            seeds: one image of each for every prompt.
            blur: whether to hide exposed body parts that NudeNet finds.

        Raises:
            ValueError: for a model that does not generate, without the base's weights, or if another call or a
                conversion to another dtype changed the model since.
        """
        with self._images(prompts, seeds) as folders:
            hidden = boxes_of([path for folder in folders for path in sorted(folder.glob("*.png"))]) if blur else None
            return grid_from_folders(folders, names=["base", "erased"], blur=hidden)

    def count(
        self, prompts: Prompts | None = None, seeds: Sequence[int] = range(8), **how: Any
    ) -> dict[str, dict[str, Any]]:
        """What `erase.count` finds in images before and after, `base` and `erased`; arguments as those of `show`.

        Args:
            prompts: by default what was forgotten alone.
            seeds: one image of each for every prompt.
            how: as for `erase.count`.
        """
        sampling = self._sampling()
        asked: Prompts = sampling.prompts[: sampling.forgotten] if prompts is None else prompts
        with self._images(asked, seeds) as folders:
            return {name: count(folder, **how) for name, folder in zip(("base", "erased"), folders, strict=True)}

    def undo(self) -> None:
        """Put the first weights back, bit for bit; the result is of no more use then.

        Raises:
            ValueError: without the base's weights, or if another call or a conversion to another dtype changed the
                model since.
        """
        self._check_last()
        self._base().swap()
        remember(self.net, self.before)

    @property
    def meta(self) -> dict[str, str]:
        """What the header of the saved weights and the model's card say."""
        if self.base is None or self.base.misfit():
            return self.describe("not kept")
        return self.describe(digest(base_of(self.net, self.base, self.before.source)))

    def describe(self, sha256: str) -> dict[str, str]:
        """As `meta`, of a base whose weights have this hash."""
        about, chosen = self.about, self.about.chosen
        steps = len(self.metrics)
        made = saving.describe(chosen.config, chosen.preset, about.name, sha256, about.target, self.mask, steps)
        lists = {FORGOTTEN: about.forgotten, LABELS: about.labels}
        return made | {key: json.dumps(names) for key, names in lists.items() if names}

    def _base(self) -> Values:
        if self.base is None:
            raise ValueError("the first weights were not kept (keep_base=False): call erase.forget with keep_base=True")
        return self.base

    def _sampling(self) -> Sampling:
        if self.sampling is None:
            raise ValueError(f"{type(self.model).__name__} does not generate images")
        return self.sampling

    def _check_last(self) -> None:
        last = past(self.net).result
        if last is None or last() is not self:
            raise ValueError("the model was changed after this result: by another erase.forget, or by undo()")

    @contextmanager
    def _images(self, prompts: Prompts | None, seeds: Sequence[int]) -> Iterator[list[Path]]:
        """Folders of images of the base and of the erased model, for a while."""
        self._check_last()
        sampling, base = self._sampling(), self._base()
        asked = sampling.prompts if prompts is None else [prompts] if isinstance(prompts, str | int) else prompts
        rows = [PromptRow(str(prompt), seed) for prompt in asked for seed in seeds]

        def draw(folder: Path) -> Path:
            generate(sampling.sample, rows, folder, batch_size=min(sampling.batch_size, len(rows)))
            return folder

        with tempfile.TemporaryDirectory() as work, modes_kept(sampling.nets), torch.no_grad():
            for net in sampling.nets:
                net.eval()
            with base.back():
                first = draw(Path(work) / "base")
            yield [first, draw(Path(work) / "erased")]


def finish(result: Result, call: Call) -> Result:
    """Remember the result as the last of its network."""
    if not call.keep_base:
        result = replace(result, base=None)
    about = result.about
    remember(result.net, Past(about.forgotten, result.describe("not kept"), None, about.name, ref(result)))
    return result


def base_name(model: Any, before: Past) -> str:
    """What a model in memory is called: the hub's id or the folder that it was loaded from, without the path."""
    if before.name is not None:
        return before.name
    config = getattr(model, "config", None)
    kept = config.get("_name_or_path") if isinstance(config, Mapping) else getattr(config, "_name_or_path", None)
    if not kept:
        return type(model).__name__
    return Path(kept).resolve().name if Path(kept).exists() else str(kept)
