"""Settings of `erase run sd`: text-to-image models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

if TYPE_CHECKING:  # methods import torch, which takes seconds
    pass

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
    prompts: Prompts
    anchors: Prompts = field(default_factory=list)
    """One for each prompt, or one for all; `redirect` and `surrogate` need them."""
    earlier: Prompts = field(default_factory=list)
    """Prompts of concepts that were forgotten before, and are to stay so; those are added that the model's weight file
    knows."""
    images: Path | None = None
    """A folder of images instead of drawn ones; captions of their own must be among `forget.prompts`."""
    transparency: Transparency = "white"
    count: Positive = 32
    """Images drawn per prompt."""
    pictures: Literal["own", "anchor", "both"] = "own"
    """What a redirect is learned on: pictures of the forget prompts, of what they should become, or both."""
    loss: Literal["redirect", "ascent", "surrogate"] = "redirect"
    """`surrogate` fits the forget prompts to pictures of their anchors (SA). Some methods bring a loss of their own."""
    target: Literal["online", "frozen"] = "online"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Condition dropout of the forget loss; the published DDPM script has 0.1."""
    axis: Literal["object", "style"] | None = None
    """The column of labelled prompt sets that tells the concept: all rows with its label count as forgotten."""


@dataclass(frozen=True)
class Remain:
    """What must stay."""

    __pydantic_config__ = STRICT
    prompts: Prompts
    """Prompts, or names of prompt sets (their forgotten rows are left out)."""
    images: Path | None = None
    """A folder of images instead of drawn ones, with captions of their own unless there is one prompt."""
    transparency: Transparency = "white"
    count: Positive = 4
    """Images drawn per prompt."""
    loss: RemainLoss = "denoise"


@dataclass(frozen=True)
class Draw:
    """How the model draws: number of sampler steps, guidance, images at once."""

    __pydantic_config__ = STRICT
    steps: Positive = 50
    guidance: Annotated[float, Field(ge=0)] = 7.5
    batch_size: Positive = 4


@dataclass(frozen=True)
class Nudity:
    """Which NudeNet detections count: a preset of the field, or classes and a threshold of one's own."""

    __pydantic_config__ = STRICT
    preset: str | None = None
    classes: Annotated[list[str], BeforeValidator(listed)] = field(default_factory=list)
    threshold: Share | None = None
    channels: Literal["corrected", "as_shipped"] = "corrected"


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


AttackName = Literal["paraphrases", "inversion", "relearn"]


@dataclass(frozen=True)
class Paraphrases:
    """Asking for the concept in other words."""

    __pydantic_config__ = STRICT
    prompts: Prompts = field(default_factory=list)
    """Prompts, or names of prompt sets: of labelled rows those of the concept, of others all."""
    images: Positive = 4
    """Per prompt."""


@dataclass(frozen=True)
class Inversion:
    """Textual inversion: a word for the concept is learned from its pictures, of a model that stays as it is."""

    __pydantic_config__ = STRICT
    prompt: str = "a photo of *"
    """Where the learned word stands in what is asked for."""
    steps: Positive = 200
    lr: Annotated[float, Field(gt=0)] = 5e-3
    batch_size: Positive = 8
    images: Positive = 32
    """Drawn with the learned word, and judged."""


@dataclass(frozen=True)
class Relearn:
    """Training on pictures of the concept, with its prompts: how soon it is back."""

    __pydantic_config__ = STRICT
    at: Annotated[list[Positive], Field(min_length=1)] = field(default_factory=lambda: [5, 10, 20])
    """Steps after which pictures are drawn and judged; the last is the end."""
    parameters: str = "full"
    lr: Annotated[float, Field(gt=0)] = 1e-5
    """Of Adam."""
    batch_size: Positive = 8
    images: Positive = 8
    """Per forget prompt."""


@dataclass(frozen=True)
class Attack:
    """How `eval.attacks` are done; the same for every method that is compared."""

    __pydantic_config__ = STRICT
    paraphrases: Paraphrases = field(default_factory=Paraphrases)
    inversion: Inversion = field(default_factory=Inversion)
    relearn: Relearn = field(default_factory=Relearn)
    count: Positive = 32
    """Pictures of the concept to learn from, in all: the base model's, of noise of their own, or `forget.images`."""
    control: bool = True
    """Whether paraphrases and inversion are tried on the base model too: an attack that fails there tells nothing."""


@dataclass(frozen=True)
class Eval:
    """What is drawn and counted before and after."""

    __pydantic_config__ = STRICT
    prompts: Prompts
    """Prompts, or names of prompt sets; the forget prompts are always drawn too."""
    images: Annotated[int, Field(ge=0)] = 10
    """Per prompt; 0 skips the evaluation."""
    base: Path | None = None
    """Base pictures that an earlier run with the same model and settings drew: copied, not drawn again."""
    nudity: Nudity | None = None
    classifier: str | None = None
    """A `transformers` image classifier's folder, or an embedded one's name."""
    blur: bool = True
    """Hide exposed body parts that NudeNet finds in grids and reports; off only where all pictures are harmless."""
    attacks: list[AttackName] = field(default_factory=list)
    """How the erased model is put to the proof; see `Attack`."""


@dataclass(frozen=True)
class SdConfig:
    """`erase run sd`."""

    __pydantic_config__ = STRICT
    pipeline: Literal["sd"]
    model: str
    method: Settings
    train: Train
    forget: Forget
    remain: Remain
    eval: Eval
    saliency: Saliency = field(default_factory=Saliency)
    draw: Draw = field(default_factory=Draw)
    until: Until | None = None
    """When to end before `train.steps`; by default never."""
    attack: Attack = field(default_factory=Attack)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Precision = "no"
    checkpoint_every: Positive = 50
    """Steps, or draws of a Fisher diagonal, between saved run states."""
    tracker: Tracker = "jsonl"
    """`metrics.jsonl` is written in any case."""
    note: str = ""
    """What the preset is and where its values come from."""
