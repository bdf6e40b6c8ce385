"""A diffusion model in use: a pipeline, and the family that knows how to use it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from erase.diffusion import condition, loading, samplers
from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.folders import Source
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.diffusion.checkpoints.texts import config_hashes
from erase.diffusion.condition import Condition
from erase.diffusion.denoiser import Denoiser
from erase.diffusion.families import Family, LabelFamily, class_name, family
from erase.diffusion.lora import train
from erase.diffusion.parameters import Learning, select

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass
class Model:
    """A pipeline and its family.

    A large model is `lean`: its encoders are loaded to embed prompts and then given up, before the network that learns
    is loaded, so that they are never in memory together. What they said of a prompt is remembered.
    """

    family: Family
    pipe: Any
    source: Source | SingleFile | None = None
    """Where it came from; `None` for a pipeline in memory."""
    dtype: torch.dtype = torch.float32
    """Of frozen weights; those that learn are float32."""
    lean: bool = False
    remembered: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Conditions of prompts, leaves `[…]`, on the CPU: of a lean model."""
    learning: Learning | None = None
    """What learns, as `choose` was told."""
    given: dict[str, Condition] = field(default_factory=dict)
    """Conditions that `generate` takes for some prompts instead of the encoders', leaves `[1, …]`: of attacks."""

    @property
    def net(self) -> nn.Module:
        """The component that learns."""
        found: nn.Module = getattr(self.pipe, self.family.TRAINED)
        return found

    @cached_property
    def weights(self) -> dict[str, str]:
        """Hashes of the files that it was loaded from: see `erase.diffusion.checkpoints.folders.fingerprint`."""
        assert self.source is not None, "a pipeline in memory has no files"
        return folders.fingerprint(self.source)

    @cached_property
    def config_hashes(self) -> dict[str, str]:
        """Hashes of its configurations: see `erase.diffusion.checkpoints.texts.config_hashes`."""
        assert self.source is not None, "a pipeline in memory has no files"
        return config_hashes(self.source)

    @property
    def device(self) -> torch.device:
        """Where its networks are."""
        found: torch.device = self.pipe.device
        return found

    def ready(self, *names: str, device: torch.device | str | None = None) -> None:
        """Load networks that are hollow, by default onto the device where the others are."""
        for name in names:
            net = getattr(self.pipe, name, None)
            if isinstance(net, nn.Module) and loading.is_hollow(net):
                assert self.source is not None
                loaded = loading.load_network(
                    self.source, name, self.family.TRAINED, self.device if device is None else device, self.dtype
                )
                setattr(self.pipe, name, loaded)
                if name == self.family.TRAINED and self.learning is not None:
                    self.choose(self.learning)

    def release(self, *names: str) -> None:
        """Make networks hollow again."""
        for name in names:
            if getattr(self.pipe, name, None) is not None:
                assert self.source is not None
                empty = loading.hollow_network(self.source, name, self.family.TRAINED, self.device, self.dtype)
                setattr(self.pipe, name, empty)
        gc.collect()

    def choose(self, learning: Learning) -> list[str]:
        """Let the parameters of a set learn, and no others; their names. They become float32, by the file's values.

        Raises:
            ValueError: for an invalid expression, a set without parameters, or a family without LoRAs.
        """
        self.learning = learning
        chosen = self.select(learning)
        if learning.rank is not None:
            return train.inject(self.net, chosen, learning.rank, learning.seed)
        if loading.is_hollow(self.net):
            for name in chosen:  # as they will be, for a dry run
                p = self.net.get_parameter(name)
                p.data = torch.empty_like(p, dtype=torch.float32)
        elif self.dtype != torch.float32:
            stored = {} if self.source is None else folders.tensors(self.source)
            for name in chosen:
                p = self.net.get_parameter(name)
                p.data = stored.get(name, p.data).to(p.device, torch.float32)
        return chosen

    def select(self, learning: Learning) -> list[str]:
        """The weights that `choose` is about, which alone then have `requires_grad`; nothing else changes.

        Raises:
            ValueError: as `choose`.
        """
        sets, layout = self.family.PARAMETERS, self.family.LORA
        if not learning.lora_safe and learning.rank is None:
            return select(self.net, learning.which, sets)
        if layout is None:
            raise ValueError(f"train.lora_safe and train.form=lora: no program loads LoRAs onto {self.family.NAME}")
        return select(self.net, learning.which, sets, layout.carried)

    @property
    def resolution(self) -> int:
        """The side of an image that it was trained at, in pixels."""
        return self.family.resolution(self.pipe)

    @property
    def _label_family(self) -> LabelFamily:
        assert self.family.CONDITION == "label", f"{self.family.NAME} reads text"
        return cast(LabelFamily, self.family)

    @property
    def labels(self) -> list[str]:
        """Names of its classes, by number; of label families alone."""
        return self._label_family.labels(self.pipe)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image, in pixels; of label families alone."""
        return self._label_family.shape(self.pipe)

    @property
    def guidance(self) -> float:
        """The guidance scale that it is used with by default; of label families alone."""
        return self._label_family.guidance(self.pipe)

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """Configurations of its components, by name, and the pipeline's class as in `model_index.json`."""
        found: dict[str, Mapping[str, Any]] = {"model_index": {"_class_name": class_name(self.pipe)}}
        for name, part in self.pipe.components.items():
            config = getattr(part, "config", None)
            if config is not None:
                found[name] = config if isinstance(config, Mapping) else config.to_dict()
        return found

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt, begin and end included; of text families alone."""
        tokenizer, _ = self.family.tokenizer(self.pipe)
        return len(tokenizer(prompt, truncation=False).input_ids)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that would be cut.

        Raises:
            ValueError: for a prompt with more tokens than the model reads.
        """
        _, allowed = self.family.tokenizer(self.pipe)
        for prompt in prompts:
            count = self.count_tokens(prompt)
            if count > allowed:
                raise ValueError(
                    f"the prompt {prompt[:60]!r}{'…' if len(prompt) > 60 else ''} has {count} tokens, this model takes "
                    f"{allowed}: shorten it"
                )

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], batch_size: int = 32) -> dict[str, Tensor]:
        """Conditions of prompts, leaves `[P, …]`, float32, on the CPU.

        Raises:
            ValueError: for a prompt longer than the tokenizer allows.
        """
        if self.family.CONDITION == "text":
            self.check_prompts(prompts)
        if self.lean:
            return self._recall(prompts)
        parts = []
        for start in range(0, len(prompts), batch_size):
            found = self.family.embed(self.pipe, prompts[start : start + batch_size])
            parts.append({name: x.float() if x.is_floating_point() else x for name, x in found.items()})
        return condition.to(condition.cat(parts), "cpu")

    @torch.no_grad()
    def remember(self, prompts: Sequence[str]) -> None:
        """Embed all prompts of a lean model that it has not embedded yet, with the encoders in memory meanwhile."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.remembered]
        if not (self.lean and new):
            return
        self.ready(*self.family.ENCODERS)
        for prompt in new:
            found = condition.to(self.family.embed(self.pipe, [prompt]), "cpu")
            self.remembered[prompt] = {n: (x.float() if x.is_floating_point() else x)[0] for n, x in found.items()}
        self.release(*self.family.ENCODERS)

    def null(self) -> dict[str, Tensor] | None:
        """The empty condition, leaves `[1, …]`, on the model's device; `None` where there is none."""
        return condition.to(self.embed([""]), self.device) if self.has_null else None

    @property
    def has_null(self) -> bool:
        """Whether there is an empty condition."""
        return self.family.has_null(self.pipe)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latent mean and standard deviation of images `[B, 3, H, W]` in [-1, 1], float32, on the CPU."""
        mean, std = self.family.encode(self.pipe, pixels.to(self.device))
        return mean.float().cpu(), None if std is None else std.float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Images of latents `[B, C, H, W]`; of text families alone."""
        found = loading.pixels(self.pipe.vae, latents.to(self.device))
        arrays = ((found + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(array) for array in arrays]

    def denoiser(self, null: Condition | None = None) -> Denoiser:
        """The network as a backend; `null` is the empty condition, leaves `[1, …]`."""
        return Denoiser(
            net=self.net,
            call=self.family.call,
            process=self.family.process(self.pipe),
            null=None if null is None else dict(null),
        )

    def scheduler(self, sampler: str | None = None) -> Any:
        """What it generates with: by default its own scheduler.

        Raises:
            ValueError: for a sampler that this model cannot be sampled with.
        """
        own = self.pipe.scheduler
        if sampler is None:
            return own
        if self.family.CONDITION == "label":
            return samplers.label_sampler(own.config, sampler, latent="vae" in self.family.PARTS)
        return samplers.text_sampler(own.config, self.family.process(self.pipe), sampler)

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        net: Any = self.net
        net.enable_gradient_checkpointing()

    def free(self, *names: str) -> None:
        """Give up components that are needed no more."""
        for name in names:
            if getattr(self.pipe, name, None) is not None:
                setattr(self.pipe, name, None)
        gc.collect()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance: float | None,
        sampler: str | None = None,
        size: tuple[int, int] | None = None,
        latents: bool = False,
        autocast: Autocast = nullcontext,
    ) -> Any:
        """One sample for each prompt: PIL images, or latents `[B, C, H, W]`.

        Arguments as those of `Family.generate` and `scheduler`.
        """
        # Not under autocast: prompts mean the same as in training, and T5 overflows in float16.
        asked = self._asked(prompts)
        null = self._embedded([""] * len(prompts)) if self.has_null else None
        self.ready(self.family.TRAINED)
        borrowed = self.source is None and not latents
        decoding = loading.exact_images(getattr(self.pipe, "vae", None)) if borrowed else nullcontext()
        with decoding, autocast(), samplers.sampling(self.pipe, self.scheduler(sampler)):
            return self.family.generate(
                self.pipe, asked, null, generators, steps=steps, guidance=guidance, size=size, latents=latents
            )

    def _recall(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Remembered conditions, leaves `[P, …]`, float32, on the CPU."""
        self.remember(prompts)
        rows = [self.remembered[prompt] for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _asked(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditions of prompts, those of `given` as they are there."""
        found = self._embedded(["" if prompt in self.given else prompt for prompt in prompts])
        for i, prompt in enumerate(prompts):
            if prompt in self.given:
                own = self.given[prompt]
                found = {name: torch.cat([x[:i], own[name].to(x), x[i + 1 :]]) for name, x in found.items()}
        return found

    def _embedded(self, prompts: list[str]) -> dict[str, Tensor]:
        """Conditions on the model's device; of a lean model remembered ones, in its dtype."""
        if not self.lean:
            return self.family.embed(self.pipe, prompts)
        found = condition.to(self._recall(prompts), self.device)
        return {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in found.items()}

    def generate_latents(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance: float | None,
        sampler: str | None = None,
        batch_size: int = 16,
        autocast: Autocast = nullcontext,
    ) -> Tensor:
        """What the model itself generates, as latents `[N, C, H, W]` on the CPU: nothing is decoded and encoded."""
        parts = []
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            drawn = self.generate(
                prompts[part],
                generators[part],
                steps=steps,
                guidance=guidance,
                sampler=sampler,
                latents=True,
                autocast=autocast,
            )
            parts.append(drawn.float().cpu())
        return torch.cat(parts)

    def sampler(
        self,
        *,
        steps: int,
        guidance: float | None,
        sampler: str | None = None,
        autocast: Autocast = nullcontext,
    ) -> Callable[..., list[Image.Image]]:
        """A function that generates images, as `erase.evaluation.generate` takes it."""
        side = self.resolution

        def sample(
            prompts: list[str],
            generators: list[torch.Generator],
            *,
            guidance: float | None = None,
            width: int | None = None,
            height: int | None = None,
            _default: float | None = guidance,
        ) -> list[Image.Image]:
            images: list[Image.Image] = self.generate(
                prompts,
                generators,
                steps=steps,
                guidance=_default if guidance is None else guidance,
                sampler=sampler,
                # a pipeline would drop one that is given alone
                size=(height or side, width or side) if width or height else None,
                autocast=autocast,
            )
            return images

        return sample


def open_model(
    source: Source | SingleFile, device: torch.device | str = "cpu", precision: str = "no", *, hollow: bool = False
) -> Model:
    """Load a checkpoint.

    Args:
        source: the checkpoint.
        device: where its networks go.
        precision: of the passes to come: a large model that is stored in 16 bits is then held in 16 bits.
        hollow: whether to leave all weights out, for a dry run.

    Raises:
        ValueError: for weights that are missing, do not fit their configuration, or are not finite.
    """
    known = family(source.family)
    dtype = loading.held_dtype(source, precision)
    lean = dtype != torch.float32
    encoders = (known.TRAINED, *known.ENCODERS)
    empty = (*known.PARTS, *encoders) if hollow else encoders if lean else ()
    return Model(known, known.open(source, device, dtype, empty), source, dtype, lean)
