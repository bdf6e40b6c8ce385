"""Settings of attacks on erased text-to-image models; the same for every method that is compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from erase.config.kinds import STRICT, Positive, Prompts

AttackName = Literal[
    "paraphrases",
    "inversion",
    "soft_prompt",
    "prompt_search",
    "p4d",
    "ring_a_bell",
    "half_noised",
    "inpaint",
    "latent_seed",
    "relearn",
    "relearn_lora",
    "benign",
]
Rate = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Paraphrases:
    """Asking for the concept in other words."""

    __pydantic_config__ = STRICT
    prompts: Prompts = field(default_factory=list)
    """Prompts, or names of prompt sets. Rows that are labelled as another concept are left out."""
    images: Positive = 4
    """Number of images for each prompt."""


@dataclass(frozen=True)
class Inversion:
    """Textual inversion: a word for the concept is learned from its images, while the model stays as it is."""

    __pydantic_config__ = STRICT
    prompt: str = "a photo of *"
    """The prompt; `*` is the learned word."""
    steps: Positive = 200
    """Number of steps in which the word is learned."""
    lr: Rate = 5e-3
    """Learning rate of the word."""
    batch_size: Positive = 8
    """Number of images in each step."""
    images: Positive = 32
    """Number of images that are generated with the learned word and judged."""


@dataclass(frozen=True)
class SoftPrompt:
    """A whole text embedding is learned from images of the concept, without bounds; no prompt need have it."""

    __pydantic_config__ = STRICT
    steps: Positive = 200
    """Number of steps in which the embedding is learned."""
    lr: Rate = 1e-2
    """Learning rate of Adam."""
    batch_size: Positive = 8
    """Number of images in each step."""
    images: Positive = 32
    """Number of images that are generated with the learned embedding and judged."""


@dataclass(frozen=True)
class PrefixSearch:
    """A search for tokens before the prompt, one for each image of the concept."""

    __pydantic_config__ = STRICT
    tokens: Positive = 5
    """K, the number of adversarial tokens before the prompt."""
    steps: Positive = 40
    """N, iterations at each timestep; then an image is generated and judged."""
    times: Positive = 50
    """Number of timesteps, spread evenly over the schedule and tried in turn until an image shows the concept."""
    lr: Rate = 1e-2
    """Learning rate of Adam."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Weight decay of Adam."""
    images: Positive = 8
    """Number of images of the concept (at most `attack.count`), each with a search of its own."""
    batch_size: Positive = 8
    """Number of searches at once."""


@dataclass(frozen=True)
class RingABell:
    """Ring-A-Bell: a search for prompts whose embedding is that of the concept, without asking the network."""

    __pydantic_config__ = STRICT
    tokens: Positive = 16
    """K, the number of tokens of a prompt."""
    strength: Rate = 3.0
    """η, the factor on the direction of the concept: forget prompt minus anchor, or minus the empty prompt."""
    population: Annotated[int, Field(ge=4)] = 200
    """Number of prompts in a generation."""
    generations: Positive = 3000
    """Number of generations of the genetic search."""
    crossover: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of children that have two parents."""
    mutation: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of children in which a token is replaced."""
    searches: Positive = 4
    """Number of prompts to find for each forget prompt."""
    images: Positive = 8
    """Number of images for each prompt that is found."""


@dataclass(frozen=True)
class HalfNoised:
    """Half-noised images of the concept are denoised: does the model still complete the concept?"""

    __pydantic_config__ = STRICT
    noise: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The amount of noise, as a share of the schedule."""
    prompt: str | None = ""
    """The prompt with which images are denoised: the empty prompt, a text, or null for each image's own prompt."""
    images: Positive = 16
    """Number of images of the concept (at most `attack.count`)."""


@dataclass(frozen=True)
class Inpaint:
    """The middle of images of the concept is hidden and generated again, with their prompts."""

    __pydantic_config__ = STRICT
    hidden: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Share of the area that is hidden."""
    prompt: str | None = None
    """The prompt with which images are completed, as for `half_noised`."""
    images: Positive = 16
    """Number of images of the concept (at most `attack.count`)."""


@dataclass(frozen=True)
class LatentSeed:
    """Generation starts from noise to which the model itself inverts images of the concept (DDIM inversion)."""

    __pydantic_config__ = STRICT
    prompt: str | None = None
    """The prompt, as for `half_noised`; inversion to noise uses the empty prompt."""
    images: Positive = 16
    """Number of images of the concept (at most `attack.count`)."""


@dataclass(frozen=True)
class Relearn:
    """Training on images of the concept with its prompts: how soon it comes back."""

    __pydantic_config__ = STRICT
    at: Annotated[list[Positive], Field(min_length=1)] = field(default_factory=lambda: [5, 10, 20])
    """Steps after which images are generated and judged; training ends after the last one."""
    parameters: str = "full"
    """The weights that the attacker trains: see `train.parameters`."""
    lr: Rate = 1e-5
    """Learning rate of Adam."""
    batch_size: Positive = 8
    """Number of images in each step."""
    images: Positive = 8
    """Number of images for each forget prompt."""


@dataclass(frozen=True)
class RelearnLora:
    """Training a LoRA on images of the concept with its prompts, beside weights that stay: what most users can do."""

    __pydantic_config__ = STRICT
    at: Annotated[list[Positive], Field(min_length=1)] = field(default_factory=lambda: [5, 10, 20])
    """Steps after which images are generated and judged; training ends after the last one."""
    parameters: str = "xattn"
    """The weights that the LoRA changes: see `train.parameters`. Those that a LoRA cannot change are left out."""
    rank: Positive = 4
    """Rank of the LoRA."""
    lr: Rate = 1e-4
    """Learning rate of Adam. About ten times that of `relearn` learns as fast."""
    batch_size: Positive = 8
    """Number of images in each step."""
    images: Positive = 8
    """Number of images for each forget prompt."""


@dataclass(frozen=True)
class Benign:
    """Training on images of what stays, which the base model generates: does the concept come back by itself?"""

    __pydantic_config__ = STRICT
    at: Annotated[list[Positive], Field(min_length=1)] = field(default_factory=lambda: [20, 50])
    """Steps after which images are generated and judged; training ends after the last one."""
    parameters: str = "full"
    """The weights that learn from remain images: see `train.parameters`."""
    lr: Rate = 1e-5
    """Learning rate of Adam."""
    batch_size: Positive = 8
    """Number of images in each step."""
    images: Positive = 8
    """Number of images for each forget prompt."""


@dataclass(frozen=True)
class Attack:
    """How `eval.attacks` are carried out; the same for every method that is compared."""

    __pydantic_config__ = STRICT
    paraphrases: Paraphrases = field(default_factory=Paraphrases)
    inversion: Inversion = field(default_factory=Inversion)
    soft_prompt: SoftPrompt = field(default_factory=SoftPrompt)
    prompt_search: PrefixSearch = field(default_factory=PrefixSearch)
    p4d: PrefixSearch = field(default_factory=PrefixSearch)
    ring_a_bell: RingABell = field(default_factory=RingABell)
    half_noised: HalfNoised = field(default_factory=HalfNoised)
    inpaint: Inpaint = field(default_factory=Inpaint)
    latent_seed: LatentSeed = field(default_factory=LatentSeed)
    relearn: Relearn = field(default_factory=Relearn)
    relearn_lora: RelearnLora = field(default_factory=RelearnLora)
    benign: Benign = field(default_factory=Benign)
    count: Positive = 32
    """Total number of images of the concept to learn from: those of `forget.images`, at most as many as there are, or
    generated by the base model from noise used nowhere else."""
    control: bool = True
    """Whether attacks, except those that train the model, are tried on the base model as well: an attack that fails
    there says nothing."""
