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
"""What happens to images with transparent pixels: they are composed on white, or refused."""


@dataclass(frozen=True)
class Forget:
    """What to erase, and into what."""

    __pydantic_config__ = STRICT
    prompts: Annotated[Prompts, Field(min_length=1)]
    """Prompts of what to erase, or paths of .csv or .txt files with one prompt in each row. `emoji-birds.csv` is the
    prompt set `emoji-birds`. A CSV's columns `anchor` and `weight` replace `anchors` and `weights`."""
    only: Annotated[list[str], BeforeValidator(listed)] = field(default_factory=list)
    """Use only those rows of the files in `prompts` whose column `object` or `style` has one of these labels. Other
    `prompts` than a preset's put its `only` aside."""
    anchors: Prompts = field(default_factory=list)
    """What the forget prompts should become, such as a broader noun phrase ('an animal' for 'a cat'): one for each, or
    one for all. Without anchors they become the empty prompt; `forget.loss=surrogate` needs anchors."""
    erase_from: Prompts = field(default_factory=list)
    """For ESD: prompts from which to erase only what the forget prompts name. With `forget.prompts='a smile'` and
    `forget.erase_from='a portrait of a woman'`, portraits stay and smiles go. One for each forget prompt, or several
    for one. Images of these prompts are generated, trained on and counted."""
    weights: list[Annotated[float, Field(gt=0)]] = field(default_factory=list)
    """The weight of each forget prompt in the loss; by default all are equal."""
    earlier: Prompts = field(default_factory=list)
    """Prompts of concepts that were forgotten in an earlier run and must stay forgotten. Those that erase
    recorded in the model's weight file are added."""
    start: Literal["model", "uce"] = "model"
    """Where the steps start: from the model as it is (`model`), or after UCE on the forget prompts with its default
    settings (`uce`). `uce` needs the weights that read text in `train.parameters`; anchors are predicted by the model
    before UCE."""
    images: Path | None = None
    """A folder of images to use instead of generated ones. If they have captions, these must be among
    `forget.prompts`."""
    transparency: Transparency = "white"
    """Images with transparent pixels: `white` puts them on white, `refuse` stops with an error."""
    count: Positive = 32
    """Number of images for each prompt."""
    pictures: Literal["own", "anchor", "both"] = "own"
    """The images to train `forget.loss=redirect` on: of the forget prompts (`own`), of their anchors (`anchor`), or
    both."""
    loss: Literal["redirect", "ascent", "surrogate"] = "redirect"
    """The loss on forget data. `redirect`: predict for the forget prompt what is predicted for its anchor. `ascent`:
    increase the training loss. `surrogate`: learn images of the anchor as images of the forget prompt (SA). Some
    methods have a loss of their own and do not use this one."""
    target: Literal["online", "frozen"] = "frozen"
    """Which network predicts for the anchor in `forget.loss=redirect`: the one before the run (`frozen`), or the one
    that learns (`online`, as in published scripts), which needs no copy of the weights but lets the anchor drift."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """How often the empty prompt takes the place of the forget prompt in the forget loss."""
    axis: Literal["object", "style"] | None = None
    """The column of prompt sets that labels the concept: all rows with a forget prompt's label count as forgotten."""
    words: bool = False
    """Whether rows of prompt sets with every word of a forget prompt, in singular or plural, count as forgotten as
    well. Words such as 'a photo of' are ignored."""


@dataclass(frozen=True)
class Remain:
    """What must stay."""

    __pydantic_config__ = STRICT
    prompts: Annotated[Prompts, Field(min_length=1)]
    """Prompts, or names of prompt sets. Rows that are forgotten are left out."""
    images: Path | None = None
    """A folder of images to use instead of generated ones, with captions unless there is a single prompt."""
    transparency: Transparency = "white"
    """Images with transparent pixels: `white` puts them on white, `refuse` stops with an error."""
    count: Positive = 4
    """Number of images for each prompt, where `total` is not set; with `near`, for each near prompt."""
    total: Positive | None = None
    """Number of generated images in all, spread over the prompts at random. If there are more prompts than images,
    some prompts have none."""
    near: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of `total` for the prompts that are nearest to a forget prompt, `count` images for each; the other
    prompts share the rest. Erasing harms near concepts most. Nearness is the cosine of text embeddings, averaged over
    tokens, after the mean of all remain prompts is subtracted."""
    loss: RemainLoss = "denoise"
    """`denoise` is the training loss; `distill` trains the model to predict as the base model does."""


@dataclass(frozen=True)
class Draw:
    """How the model generates: sampler, its number of steps, guidance, images at once."""

    __pydantic_config__ = STRICT
    sampler: Literal["ddim", "dpm", "euler", "euler_a", "lms", "pndm", "unipc", "flow_euler"] | None = None
    """The sampler; by default the model's own. `dpm` is DPM-Solver++, `ddim` has η = 0; `flow_euler` is for flow models
    (SD3, Flux and Lumina), the others are for all other models. The noise schedule is always the model's own."""
    steps: Positive = 50
    """Number of sampler steps for each generated image."""
    guidance: Annotated[float, Field(ge=0)] | None = 7.5
    """Guidance scale, as the model's diffusers pipeline defines it. Null is that pipeline's default: 7.5 (SD), 5
    (SDXL), 7 (SD3), 3.5 (Flux), 4.5 (PixArt) and 4 (Lumina)."""
    batch_size: Positive = 4
    """Images that are generated at once."""
    cache: Path | None = None
    """A folder for the latents that the model generates to learn from, where other runs that need the same ones find
    them. The runs of a comparison share one."""


@dataclass(frozen=True)
class Nudity:
    """Which NudeNet detections count: a published counting rule, or your own classes and threshold."""

    __pydantic_config__ = STRICT
    preset: str | None = None
    """NudeNet judges images by this published rule: see `erase eval nudity -h`."""
    classes: Annotated[list[str], BeforeValidator(listed)] = field(default_factory=list)
    """The NudeNet classes that count, where there is no `preset`."""
    threshold: Share | None = None
    """The lowest score that counts, where there is no `preset`."""
    channels: Literal["corrected", "as_shipped"] = "corrected"
    """`corrected` gives NudeNet the colours that it was trained on; `as_shipped` swaps red and blue, as its package
    does."""


@dataclass(frozen=True)
class Until:
    """Early stopping: the run ends before its last step when the concept is gone and the rest is still right."""

    __pydantic_config__ = STRICT
    every: Positive = 5
    """Number of steps between two probes. Early stopping is off unless a setting `until.*` is given."""
    images: Positive = 8
    """Images that a probe generates for each side, with other seeds than the evaluation."""
    forget: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The largest share of the forget side's images that may still show the concept."""
    remain: Share | None = 0.95
    """The smallest share of the remain side's images that must be judged right. Null sets no limit: give null where
    `eval.nudity` is the only judge."""


@dataclass(frozen=True)
class LoraForm:
    """The rank of `--save lora` and of `train.form=lora`."""

    __pydantic_config__ = STRICT
    rank: Positive | None = None
    """The rank of every layer. With null, `--save lora` chooses each layer's rank by `lora.energy`, and
    `train.form=lora` uses 16."""
    energy: Share | None = None
    """The smallest share of each layer's change to keep, as a sum of squared singular values. Null keeps 0.99 of what
    was trained, and all of a closed form (`uce`, `speed`), whose change has low rank."""


@dataclass(frozen=True)
class Eval:
    """What is generated and counted before and after."""

    __pydantic_config__ = STRICT
    prompts: Prompts
    """Prompts, or names of prompt sets. Images of the forget prompts are always generated as well; if the list is
    empty, only these."""
    about: Prompts = field(default_factory=list)
    """Names of labelled prompt sets. Only their rows about the concept are added: those with its label, alone or as in
    `cat+pizza`, or of its `group`, and those of what was forgotten earlier."""
    images: Annotated[int, Field(ge=0)] = 10
    """Number of images for each prompt; 0 skips the evaluation."""
    base: Path | None = None
    """A folder of the base model's images from an earlier run with the same model and settings: copied instead of
    generated again."""
    nudity: Nudity | None = None
    classifier: str | None = None
    """A judge: the folder of a `transformers` image classifier, or a name from `erase ls models`."""
    flag: Annotated[list[str], BeforeValidator(listed)] = field(default_factory=list)
    """Labels of `classifier` that are the concept, such as [nsfw]. An image shows the concept where their probabilities
    add up to more than 1/2. Prompts then need no labels."""
    clip: str | None = None
    """A zero-shot judge of any concept: a CLIP or SigLIP model, by a name from `erase ls models`, a folder or a hub id.
    It is calibrated on the base model's images."""
    alternatives: Prompts = field(default_factory=list)
    """Texts, or names of prompt sets, from which `clip` distinguishes the concept; by default the anchors, all other
    evaluated prompts, and "something else"."""
    blur: bool = True
    """Whether exposed body parts that NudeNet finds are hidden in grids and reports. Switch it off only where all
    images are harmless. Images whose prompts or labels do not suggest a person are not examined."""
    attacks: list[AttackName] = field(default_factory=list)
    """Attacks on the erased model; `prompt_search` is UnlearnDiffAtk, `benign` trains on what stays. See `attack.*`."""


@dataclass(frozen=True)
class SdConfig:
    """`erase run sd`."""

    __pydantic_config__ = STRICT
    pipeline: Literal["sd"]
    """The command that the preset is for, such as `erase run sd`."""
    model: str
    """A name from `erase ls models`, a diffusers folder, a single file or a hub id."""
    method: Settings
    """The method's `name` and its settings: see `erase settings NAME`."""
    train: Train
    forget: Forget
    remain: Remain
    eval: Eval
    components: str | None = None
    """For a single file with the network only, such as one of Flux: a diffusers folder or hub id of the same model,
    from which VAE, text encoders, tokenizers and scheduler are taken."""
    loras: Annotated[list[str], BeforeValidator(listed)] = field(default_factory=list)
    """LoRA files that are merged into the model before anything else, each `FILE.safetensors` or with a scale, such as
    [style.safetensors:0.8]. The erased model has them in its weights."""
    concept: str | None = None
    """The only concept that the preset's anchors, remain prompts and judges are for. Other forget prompts are refused,
    unless you give `concept` as well to say that they name the same concept."""
    saliency: Saliency = field(default_factory=Saliency)
    draw: Draw = field(default_factory=Draw)
    until: Until | None = None
    """Early stopping; off by default."""
    attack: Attack = field(default_factory=Attack)
    lora: LoraForm = field(default_factory=LoraForm)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The seed of the whole run: data, noise, timesteps, batches and generated images."""
    precision: Precision = "no"
    """Precision of the forward passes. `auto` is bf16 where the device computes it in hardware, else `no`."""
    checkpoint_every: Positive = 50
    """Number of steps, or of batches of a Fisher diagonal, between two saved run states."""
    tracker: Tracker = "jsonl"
    """Where metrics go besides `metrics.jsonl`, which is always written."""
    note: str = ""
    """What the preset is for, and where its values come from."""
