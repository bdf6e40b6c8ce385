"""Settings of `erase run sd`: text-to-image models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from erase.config.attacks import Attack, AttackName
from erase.config.kinds import (
    STRICT,
    Positive,
    Precision,
    Prompts,
    RemainLoss,
    Saliency,
    Settings,
    Share,
    Tracker,
    Train,
    listed,
)

Transparency = Literal["white", "refuse"]
"""What becomes of images of one's own with transparent pixels: they are composed on white, or refused."""


@dataclass(frozen=True)
class Forget:
    """What to erase, and into what."""

    __pydantic_config__ = STRICT
    prompts: Annotated[Prompts, Field(min_length=1)]
    """Prompts of what to erase, or paths of .csv or .txt files with a prompt a row; a CSV's columns `anchor` and
    `weight` stand for `anchors` and `weights`."""
    anchors: Prompts = field(default_factory=list)
    """What the forget prompts should become, such as a broader noun phrase ('an animal' for 'a cat'): one for each, or
    one for all. `redirect` without anchors leads to the empty prompt; `surrogate` needs them."""
    erase_from: Prompts = field(default_factory=list)
    """ESD alone: prompts that lose what the forget prompts name and keep the rest, such as 'a portrait of a woman' that
    loses 'a smile': one for each, or several for one. They are what is generated, trained and counted."""
    weights: list[Annotated[float, Field(gt=0)]] = field(default_factory=list)
    """How much each forget prompt counts in the loss beside the others; by default all the same."""
    earlier: Prompts = field(default_factory=list)
    """Prompts of concepts that were forgotten before, and are to stay so; those are added that the model's weight file
    knows."""
    images: Path | None = None
    """A folder of images instead of drawn ones; captions of their own must be among `forget.prompts`."""
    transparency: Transparency = "white"
    """Images with transparent pixels are composed on `white`, or refused."""
    count: Positive = 32
    """Images drawn per prompt."""
    pictures: Literal["own", "anchor", "both"] = "own"
    """What a redirect is learned on: pictures of the forget prompts, of what they should become, or both."""
    loss: Literal["redirect", "ascent", "surrogate"] = "redirect"
    """`surrogate` fits the forget prompts to pictures of their anchors (SA). Some methods bring a loss of their own."""
    target: Literal["online", "frozen"] = "frozen"
    """A redirect leads to what the network predicts for the anchor: as the run found it (`frozen`), or as it is while
    it learns (`online`, as in the published scripts), which saves a copy of the weights and lets the anchor drift."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Condition dropout of the forget loss; the published DDPM script has 0.1."""
    axis: Literal["object", "style"] | None = None
    """The column of labelled prompt sets that tells the concept: all rows with its label count as forgotten."""
    words: bool = False
    """Whether rows of prompt sets that name the concept count as forgotten, too: those with every word of a forget
    prompt, in singular or plural, but for 'a photo of' and the like."""


@dataclass(frozen=True)
class Remain:
    """What must stay."""

    __pydantic_config__ = STRICT
    prompts: Annotated[Prompts, Field(min_length=1)]
    """Prompts, or names of prompt sets (their forgotten rows are left out)."""
    images: Path | None = None
    """A folder of images instead of generated ones, with captions of their own unless there is one prompt."""
    transparency: Transparency = "white"
    """Images with transparent pixels are composed on `white`, or refused."""
    count: Positive = 4
    """Images drawn per prompt."""
    loss: RemainLoss = "denoise"
    """`denoise` is the training loss; `distill` keeps to the predictions of the model that the run starts from."""


@dataclass(frozen=True)
class Draw:
    """How the model generates: sampler, its number of steps, guidance, images at once."""

    __pydantic_config__ = STRICT
    sampler: Literal["ddim", "dpm", "euler", "euler_a", "lms", "pndm", "unipc", "flow_euler"] | None = None
    """By default the model's own. `dpm` is DPM-Solver++, `ddim` has η = 0; `flow_euler` is for flows (SD3, Flux and
    Lumina), the others are for all other models. The noise schedule is the model's own in any case."""
    steps: Positive = 50
    """Sampler steps of every generated image."""
    guidance: Annotated[float, Field(ge=0)] | None = 7.5
    """Guidance scale, as the model's own pipeline counts it. Null is the default of the family's own pipeline in
    diffusers: 7.5 (SD), 5 (SDXL), 7 (SD3), 3.5 (Flux), 4.5 (PixArt) and 4 (Lumina)."""
    batch_size: Positive = 4
    """Images that are generated at once."""
    cache: Path | None = None
    """A folder that keeps the latents that the model generates to learn from, for other runs that need the same ones.
    The runs of a comparison have one."""


@dataclass(frozen=True)
class Nudity:
    """Which NudeNet detections count: a preset of the field, or classes and a threshold of one's own."""

    __pydantic_config__ = STRICT
    preset: str | None = None
    """A counting preset of the field: see `erase eval nudity`."""
    classes: Annotated[list[str], BeforeValidator(listed)] = field(default_factory=list)
    """NudeNet's classes that count, without a preset."""
    threshold: Share | None = None
    """The least score that counts, without a preset."""
    channels: Literal["corrected", "as_shipped"] = "corrected"
    """`corrected` gives NudeNet the colours that it was trained on; `as_shipped` swaps them, as its package does."""


@dataclass(frozen=True)
class Until:
    """When an erasure may end before its last step: the concept is gone, and the rest is still there."""

    __pydantic_config__ = STRICT
    every: Positive = 5
    """Steps from look to look."""
    images: Positive = 8
    """Pictures that a look draws of each side, of noise that no counted picture has."""
    forget: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The largest share of the forget side's that may still show the concept."""
    remain: Share | None = 0.95
    """The least share of the other's that must be right; null asks for none (nudity alone tells of none)."""


@dataclass(frozen=True)
class Eval:
    """What is drawn and counted before and after."""

    __pydantic_config__ = STRICT
    prompts: Prompts
    """Prompts, or names of prompt sets; the forget prompts are always drawn too, and alone where the list is empty."""
    images: Annotated[int, Field(ge=0)] = 10
    """Per prompt; 0 skips the evaluation."""
    base: Path | None = None
    """Base pictures that an earlier run with the same model and settings drew: copied, not drawn again."""
    nudity: Nudity | None = None
    classifier: str | None = None
    """A `transformers` image classifier's folder, or an embedded one's name."""
    flag: Annotated[list[str], BeforeValidator(listed)] = field(default_factory=list)
    """Labels of `classifier` that are the concept, such as [nsfw]: images on which their probabilities add up to more
    than 1/2 show it. Prompts then need no labels."""
    clip: str | None = None
    """A CLIP or SigLIP model, embedded, a folder or a hub id: a zero-shot judge of any concept, which is calibrated on
    the base's images."""
    alternatives: Prompts = field(default_factory=list)
    """Texts, or names of prompt sets, that `clip` tells the concept from; by default the anchors, all prompts that are
    drawn and not forgotten, and "something else"."""
    blur: bool = True
    """Hide exposed body parts that NudeNet finds in grids and reports; off only where all pictures are harmless. Images
    of what no word says may be a person are not looked at."""
    attacks: list[AttackName] = field(default_factory=list)
    """How the erased model is put to the proof; see `attack.*`."""


@dataclass(frozen=True)
class SdConfig:
    """`erase run sd`."""

    __pydantic_config__ = STRICT
    pipeline: Literal["sd"]
    """The command that the preset is for: `erase run` and this word."""
    model: str
    """An embedded model's name, a diffusers folder, a single file or a hub id."""
    method: Settings
    """Its `name` and its settings: see `erase settings NAME`."""
    train: Train
    forget: Forget
    remain: Remain
    eval: Eval
    components: str | None = None
    """For a single file that holds the network alone, as those of Flux do: a diffusers folder or hub id of the same
    model, which has the VAE, the text encoders, the tokenizers and the scheduler."""
    concept: str | None = None
    """What a preset erases whose anchors, remain prompts and judges fit this alone: then other forget prompts are
    refused unless `concept` is given with them, which says that the rest is as it should be."""
    saliency: Saliency = field(default_factory=Saliency)
    draw: Draw = field(default_factory=Draw)
    until: Until | None = None
    """When to end before `train.steps`; by default never."""
    attack: Attack = field(default_factory=Attack)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the whole run: data, noise, timesteps, batches and generated images."""
    precision: Precision = "no"
    """Of forward passes. `auto` is bf16 where the device does it in hardware, else no."""
    checkpoint_every: Positive = 50
    """Steps, or draws of a Fisher diagonal, between saved run states."""
    tracker: Tracker = "jsonl"
    """`metrics.jsonl` is written in any case."""
    note: str = ""
    """What the preset is and where its values come from."""
