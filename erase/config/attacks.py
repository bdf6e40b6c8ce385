"""Settings of attacks on erased text-to-image models; the same for every method that is compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from erase.config.kinds import STRICT, Positive, Prompts

AttackName = Literal["paraphrases", "inversion", "soft_prompt", "prompt_search", "p4d", "relearn"]
Rate = Annotated[float, Field(gt=0)]


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
    """Steps of learning the word."""
    lr: Rate = 5e-3
    """Learning rate of the word."""
    batch_size: Positive = 8
    """Images in a step."""
    images: Positive = 32
    """Drawn with the learned word, and judged."""


@dataclass(frozen=True)
class SoftPrompt:
    """A whole text embedding is learned from images of the concept, without bounds; no prompt has it."""

    __pydantic_config__ = STRICT
    steps: Positive = 200
    """Steps of learning the embedding."""
    lr: Rate = 1e-2
    """Of Adam."""
    batch_size: Positive = 8
    """Images in a step."""
    images: Positive = 32
    """Generated with the learned embedding, and judged."""


@dataclass(frozen=True)
class PrefixSearch:
    """Tokens before the prompt are searched for, one search for each image of the concept."""

    __pydantic_config__ = STRICT
    tokens: Positive = 5
    """K, adversarial tokens before the prompt."""
    steps: Positive = 40
    """N, iterations at each timestep; then an image is generated and judged."""
    times: Positive = 50
    """Timesteps, spread evenly over the schedule, one after the other until an image shows the concept."""
    lr: Rate = 1e-2
    """Of Adam."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Of Adam."""
    images: Positive = 8
    """Images of the concept (at most `attack.count`), each with a search of its own."""
    batch_size: Positive = 8
    """Searches at once."""


@dataclass(frozen=True)
class Relearn:
    """Training on pictures of the concept, with its prompts: how soon it is back."""

    __pydantic_config__ = STRICT
    at: Annotated[list[Positive], Field(min_length=1)] = field(default_factory=lambda: [5, 10, 20])
    """Steps after which pictures are drawn and judged; the last is the end."""
    parameters: str = "full"
    """The weights that the attacker trains: see `train.parameters`."""
    lr: Rate = 1e-5
    """Of Adam."""
    batch_size: Positive = 8
    """Images in a step."""
    images: Positive = 8
    """Per forget prompt."""


@dataclass(frozen=True)
class Attack:
    """How `eval.attacks` are done; the same for every method that is compared."""

    __pydantic_config__ = STRICT
    paraphrases: Paraphrases = field(default_factory=Paraphrases)
    inversion: Inversion = field(default_factory=Inversion)
    soft_prompt: SoftPrompt = field(default_factory=SoftPrompt)
    prompt_search: PrefixSearch = field(default_factory=PrefixSearch)
    p4d: PrefixSearch = field(default_factory=PrefixSearch)
    relearn: Relearn = field(default_factory=Relearn)
    count: Positive = 32
    """Pictures of the concept to learn from, in all: the base model's, of noise of their own, or `forget.images`."""
    control: bool = True
    """Whether attacks are tried on the base model too, but for those that train it: one that fails there tells
    nothing."""
