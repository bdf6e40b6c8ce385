"""A run's configuration: frozen dataclasses, filled from a YAML preset and `key=value` words, checked by pydantic."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from erase.store import files

if TYPE_CHECKING:  # methods import torch, which takes seconds
    from erase.methods import Entry

T = TypeVar("T")

NEW = "new"
"""The name of a model that a run makes."""
ONE_OF = (("forget.fraction", "forget.labels", "forget.ids", "forget.split"),)
"""Settings that say the same in different ways: who sets one of them later takes the place of the others."""
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _method(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError(f"name a method by method.name={value}, its settings by method.fast_rate=… and so on")
    return value


Settings = Annotated[dict[str, Any], BeforeValidator(_method)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _off(value: Any) -> Any:
    """YAML 1.1 reads a bare `no` as false."""
    return "no" if value is False else value


Precision = Annotated[Literal["no", "fp16", "bf16", "auto"], BeforeValidator(_off)]
"""`auto`: bf16 where the device does it in hardware, else no."""
Tracker = Literal["jsonl", "tensorboard", "wandb"]
RemainLoss = Literal["denoise", "distill"]
"""`denoise`: the training loss; `distill`: to the predictions of the model that the run starts from."""
Prompts = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed)]


@dataclass(frozen=True)
class Train:
    """The loop: T steps, the slow optimizer, and which parameters learn."""

    __pydantic_config__ = _STRICT
    steps: Positive
    batch_size: Positive = 8
    """Over all processes."""
    micro_batch: Positive | None = None
    """Most samples that a process takes through the network at once; by default all of its share."""
    checkpointing: bool = False
    """Gradient checkpointing: activations are computed again in the backward pass instead of kept."""
    lr: Annotated[float, Field(gt=0)] = 1e-5
    optimizer: Literal["adam", "adamw", "sgd", "adam8bit"] = "adam"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of `sgd`; the Adams have betas 0.9 and 0.999. `adam8bit` needs bitsandbytes, and its 0.50 on a CPU."""
    parameters: str = "xattn"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Condition dropout of the remain loss."""


@dataclass(frozen=True)
class Saliency:
    """S: how the mask is made. `kind: none` switches it off."""

    __pydantic_config__ = _STRICT
    kind: Literal["fisher", "magnitude", "none"] = "fisher"
    """`fisher`: forget over remain; `magnitude`: the largest gradients of the forget loss (SalUn)."""
    per: Literal["sample", "batch"] = "sample"
    threshold: Annotated[float, Field(ge=0)] | None = None
    density: Share | None = None
    count: Positive = 64
    """Samples of each side."""
    draws: Positive = 2
    """Timestep and noise draws per sample."""
    batch_size: Positive = 16
    chunk: Positive | None = None
    """Samples whose gradients are held at once; by default what fits in 256 MB."""


@dataclass(frozen=True)
class Forget:
    """What to erase, and into what."""

    __pydantic_config__ = _STRICT
    prompts: Prompts
    anchors: Prompts = field(default_factory=list)
    """One for each prompt, or one for all; `redirect` and `surrogate` need them."""
    earlier: Prompts = field(default_factory=list)
    """Prompts of concepts that were forgotten before, and are to stay so; those are added that the model's weight file
    knows."""
    images: Path | None = None
    """A folder of images instead of drawn ones."""
    count: Positive = 32
    """Images drawn per prompt."""
    pictures: Literal["own", "anchor", "both"] = "own"
    """What a redirect is learned on: pictures of the forget prompts, of what they should become, or both."""
    loss: Literal["redirect", "ascent", "surrogate"] = "redirect"
    """`surrogate` fits the forget prompts to pictures of their anchors (SA). Some methods bring a loss of their own."""
    target: Literal["online", "frozen"] = "online"
    axis: Literal["object", "style"] | None = None
    """The column of labelled prompt sets that tells the concept: all rows with its label count as forgotten."""


@dataclass(frozen=True)
class Remain:
    """What must stay."""

    __pydantic_config__ = _STRICT
    prompts: Prompts
    """Prompts, or names of prompt sets (their forgotten rows are left out)."""
    images: Path | None = None
    count: Positive = 4
    """Images drawn per prompt."""
    loss: RemainLoss = "denoise"


@dataclass(frozen=True)
class Draw:
    """How the model draws: number of sampler steps, guidance, images at once."""

    __pydantic_config__ = _STRICT
    steps: Positive = 50
    guidance: Annotated[float, Field(ge=0)] = 7.5
    batch_size: Positive = 4


@dataclass(frozen=True)
class Nudity:
    """Which NudeNet detections count: a preset of the field, or classes and a threshold of one's own."""

    __pydantic_config__ = _STRICT
    preset: str | None = None
    classes: Annotated[list[str], BeforeValidator(_listed)] = field(default_factory=list)
    threshold: Share | None = None
    channels: Literal["corrected", "as_shipped"] = "corrected"


@dataclass(frozen=True)
class Until:
    """When an erasure may end before its last step: the concept is gone, and the rest is still there."""

    __pydantic_config__ = _STRICT
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

    __pydantic_config__ = _STRICT
    prompts: Prompts = field(default_factory=list)
    """Prompts, or names of prompt sets: of labelled rows those of the concept, of others all."""
    images: Positive = 4
    """Per prompt."""


@dataclass(frozen=True)
class Inversion:
    """Textual inversion: a word for the concept is learned from its pictures, of a model that stays as it is."""

    __pydantic_config__ = _STRICT
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

    __pydantic_config__ = _STRICT
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

    __pydantic_config__ = _STRICT
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

    __pydantic_config__ = _STRICT
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

    __pydantic_config__ = _STRICT
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


Labels = Annotated[list[str | int], BeforeValidator(lambda v: [v] if isinstance(v, str | int) else v)]


@dataclass(frozen=True)
class Architecture:
    """A new class-conditional `UNet2DModel`, for `model: new`."""

    __pydantic_config__ = _STRICT
    channels: Annotated[list[Positive], Field(min_length=1)]
    """Of each resolution, the finest first."""
    layers: Positive = 2
    """Residual blocks per resolution."""
    attention: list[bool] = field(default_factory=list)
    """For each resolution; none by default."""
    patch: Positive = 1
    """Space-to-depth factor of the input: half the resolution and four times the channels at 2."""
    groups: Positive = 32
    """Of the group normalisation; divides every number of channels."""
    head: Positive = 8
    """Channels of an attention head."""
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """The standard guidance scale that the model is saved with; 1 is none."""


@dataclass(frozen=True)
class Data:
    """Labelled images: see `erase.store.labelled.read_labelled`."""

    __pydantic_config__ = _STRICT
    source: str
    names: list[str] = field(default_factory=list)
    """Class names by number; by default what the source says, else the model."""


@dataclass(frozen=True)
class ForgetLabels:
    """Which classes to forget."""

    __pydantic_config__ = _STRICT
    labels: Labels
    """Names or numbers."""
    anchors: Labels = field(default_factory=list)
    """One for each label, or one for all; for `redirect`. None: another class by lot for each image (RL, SalUn)."""
    among: Literal["all", "far"] | Labels = "all"
    """Without anchors, the classes of the lot: all that stay, the half of them whose predictions differ most from the
    forgotten class's, or some by name. What lies between near classes can look like it."""
    earlier: Labels = field(default_factory=list)
    """Classes that were forgotten before, and are to stay so; those that the model's weight file names are added."""
    count: Positive = 500
    """Images per label, from the data or drawn."""
    pictures: Literal["own", "anchor", "both"] = "own"
    """What a redirect is learned on: pictures of the forgotten classes, of their anchors (without anchors: of all
    classes that stay, each with its own label as the anchor), or both."""
    loss: Literal["ascent", "redirect", "surrogate"] = "ascent"
    """`surrogate` fits uniform noise in the place of the forgotten images (SA)."""
    target: Literal["online", "frozen"] = "online"


@dataclass(frozen=True)
class RemainLabels:
    """How much is kept at hand of what must stay."""

    __pydantic_config__ = _STRICT
    count: Positive | None = None
    """Images per label; by default as many in all as forget images (all there are, for training)."""
    share: Literal["even", "near"] = "even"
    """`near`: of a class the more, the nearer its predictions are to a forgotten one's, as many in all. It is the near
    ones that forgetting harms."""
    loss: RemainLoss = "denoise"


@dataclass(frozen=True)
class DrawLabels:
    """How the model draws."""

    __pydantic_config__ = _STRICT
    sampler: Literal["ddim", "ddpm", "dpm"] | None = None
    """By default the model's own."""
    steps: Positive = 25
    guidance: Annotated[float, Field(ge=0)] | None = None
    """Standard scale, 1 is none; by default the model's own."""
    batch_size: Positive = 100


@dataclass(frozen=True)
class EvalLabels:
    """What is drawn and counted before and after."""

    __pydantic_config__ = _STRICT
    images: Annotated[int, Field(ge=0)] = 100
    """Per label; 0 skips the evaluation."""
    labels: Labels = field(default_factory=list)
    """Classes whose images are generated and judged beside the forgotten ones; by default all."""
    classifier: str | None = None
    """A `transformers` image classifier's folder, or an embedded one's name; its labels are the model's."""
    base: Path | None = None
    """Base pictures that an earlier run with the same model and settings drew: copied, not drawn again."""
    retrained: str | None = None
    """A model that was trained without the forgotten classes: drawn and judged as the third."""
    retrained_base: Path | None = None
    """Its pictures from an earlier run, as `base`."""
    blur: bool = True
    """Hide exposed body parts that NudeNet finds in grids and reports; off only where all pictures are harmless."""


@dataclass(frozen=True)
class DdpmConfig:
    """`erase run ddpm`."""

    __pydantic_config__ = _STRICT
    pipeline: Literal["ddpm"]
    model: str
    """An embedded model's name, a folder, or `new`."""
    method: Settings
    train: Train
    forget: ForgetLabels
    labels: list[str] = field(default_factory=list)
    """Class names by number, for a model folder that has none."""
    architecture: Architecture | None = None
    data: Data | None = None
    """Without it the model draws its own data."""
    remain: RemainLabels = field(default_factory=RemainLabels)
    eval: EvalLabels = field(default_factory=EvalLabels)
    saliency: Saliency = field(default_factory=Saliency)
    draw: DrawLabels = field(default_factory=DrawLabels)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Precision = "no"
    checkpoint_every: Positive = 50
    """Steps, or draws of a Fisher diagonal, between saved run states."""
    tracker: Tracker = "jsonl"
    """`metrics.jsonl` is written in any case."""
    note: str = ""
    """What the preset is and where its values come from."""


@dataclass(frozen=True)
class TrainClassifier:
    """The loop of a classifier's unlearning: T steps and the slow optimizer. All weights learn."""

    __pydantic_config__ = _STRICT
    steps: Positive
    batch_size: Positive = 128
    lr: Annotated[float, Field(gt=0)] = 0.01
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of `sgd`; the Adams have betas 0.9 and 0.999."""
    micro_batch: None = None
    """Batch normalisation sees whole batches."""


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained, and retrained without what is forgotten."""

    __pydantic_config__ = _STRICT
    epochs: Positive
    batch_size: Positive = 128
    lr: Annotated[float, Field(gt=0)] = 0.1
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Of the learning rate."""
    seed: Seed | None = None
    """Of the first weights, order and augmentation; by default the run's."""


@dataclass(frozen=True)
class ClassifyData:
    """Labelled images (`erase.store.labelled.read_labelled`), some of them held out, and how they are varied."""

    __pydantic_config__ = _STRICT
    source: str
    names: list[str] = field(default_factory=list)
    """Class names by number; by default what the source says."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the training images that is never trained on: settings are chosen on it."""
    shift: Annotated[int, Field(ge=0)] = 0
    """Pixels by which training images are shifted at random."""
    flip: bool = False
    """Whether every second training image is mirrored."""


@dataclass(frozen=True)
class ForgetImages:
    """Which training images to forget: one of `fraction`, `labels`, `ids` and `split`."""

    __pydantic_config__ = _STRICT
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """This share of them, by lot."""
    labels: Labels = field(default_factory=list)
    """Whole classes, by name or number."""
    ids: list[Annotated[int, Field(ge=0)]] = field(default_factory=list)
    """Images by number."""
    split: Path | None = None
    """A file that an earlier run wrote; its validation images are taken too."""
    seed: Seed | None = None
    """Of the split; by default the run's."""
    statistics: Literal["batch", "running", "update"] = "batch"
    """What batch normalisation goes by in passes over forget data: the batch's own mean and variance, or the running
    ones, as in use. Images of one class have others than those of all. None but `update` (the batch's own) moves the
    running ones."""


@dataclass(frozen=True)
class RemainImages:
    """How much is kept at hand of what must stay."""

    __pydantic_config__ = _STRICT
    count: Positive | Literal["all"] | None = None
    """Images; by default as many as are forgotten."""


@dataclass(frozen=True)
class EvalClassifier:
    """What the unlearned model is compared with."""

    __pydantic_config__ = _STRICT
    retrained: bool | str = True
    """`true`: a model that the recipe trains without the forgotten images; a folder of one; `false`: nothing."""
    batch_size: Positive = 500


@dataclass(frozen=True)
class ClassifyConfig:
    """`erase run classify`."""

    __pydantic_config__ = _STRICT
    pipeline: Literal["classify"]
    model: str
    """An embedded model's name, a folder, or `new`: trained by the recipe."""
    data: ClassifyData
    method: Settings
    train: TrainClassifier | None = None
    """Of unlearning; training and retraining go by the recipe."""
    recipe: Recipe | None = None
    forget: ForgetImages = field(default_factory=ForgetImages)
    architecture: dict[str, Any] | None = None
    """For `model: new`: `model_type` and other keys of a `transformers` configuration; for `resnet` also `stem`."""
    remain: RemainImages = field(default_factory=RemainImages)
    eval: EvalClassifier = field(default_factory=EvalClassifier)
    saliency: Saliency = field(default_factory=Saliency)
    cache: Path = Path("runs/trained")
    """Where trained and retrained models are kept, by a hash of all that they are made of."""
    seed: Seed = 0
    """Of unlearning; of training and split too, where they have none of their own."""
    precision: Precision = "no"
    checkpoint_every: Positive = 500
    """Steps between saved run states."""
    tracker: Tracker = "jsonl"
    """`metrics.jsonl` is written in any case."""
    note: str = ""
    """What the preset is and where its values come from."""


def read_preset(path: Path) -> dict[str, Any]:
    """A preset file as a mapping.

    Raises:
        ValueError: for a file that is missing or no YAML mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no such preset file: {path}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; a preset is a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a YAML mapping; got {type(data).__name__}")
    return data


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings put over each other, later ones win; a list or value is replaced as a whole."""
    out: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = out.get(key)
            if isinstance(value, Mapping):
                out[key] = merge(below if isinstance(below, dict) else {}, value)
            else:
                out[key] = value
    return out


def over(below: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """`merge`, but what the layer chooses takes the place of what is below: see `superseded`."""
    return merge(_without(below, superseded(below, files.paths(layer))), layer)


def superseded(below: Mapping[str, Any], named: Mapping[str, Any]) -> list[str]:
    """Paths of what gives way to the settings that are named, by path.

    The others of `ONE_OF`, another method's settings, and a new model's architecture where the model is there.
    """
    gone = [
        other
        for group in ONE_OF
        if any(named.get(path) not in (None, []) for path in group)
        for other in group
        if other not in named
    ]
    if named.get("model", NEW) != NEW:
        gone.append("architecture")
    name = named.get("method.name")
    if name is not None and name != files.paths(below).get("method.name"):
        gone.append("method")
    return gone


def _without(data: Mapping[str, Any], gone: Sequence[str], before: str = "") -> dict[str, Any]:
    """A copy of nested settings but for some paths."""
    return {
        k: _without(v, gone, f"{before}{k}.") if isinstance(v, Mapping) else v
        for k, v in data.items()
        if f"{before}{k}" not in gone
    }


def override(data: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with `a.b=value` words applied; what they choose takes the place of others, see `superseded`.

    Values are numbers (`1e-3` too), true, false, null, `[lists]` and `{mappings}` of YAML, or text, which is
    kept to the letter (a prompt may hold `:` and `#`).

    Raises:
        ValueError: for a word without `=`, a path through something that is no mapping, or a broken list.
    """
    given = []
    for word in words:
        key, equals, text = (part.strip() for part in word.partition("="))
        if not equals or not key:
            raise ValueError(f"cannot read {word!r}: settings are given as key=value, such as train.steps=30")
        try:
            given.append((key, _value(text)))
        except yaml.YAMLError as error:
            raise ValueError(f"cannot read the value of {key}: {text!r} is no YAML value") from error
    out = _without(data, superseded(data, files.paths(dict(given))))
    for key, value in given:
        node = out
        *parents, last = key.split(".")
        for parent in parents:
            child = node.get(parent)
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ValueError(f"cannot set {key}: {parent} is a value, not a group")
            node = child
        node[last] = value
    return out


def _value(text: str) -> Any:
    if text.startswith(("[", "{", '"', "'")):
        return yaml.safe_load(text)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    plain = (value is None and text in ("null", "~")) or (isinstance(value, bool | int | float) and "#" not in text)
    return value if plain else _number(text)


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as a string; people mean a number."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def parse(data: Mapping[str, Any], kind: type[T]) -> T:
    """A configuration of `kind` from a mapping.

    Raises:
        ValueError: naming the first wrong key, what was got and what is allowed.
    """
    try:
        return TypeAdapter(kind).validate_python(_numbers(data))
    except ValidationError as error:
        raise ValueError(_first(error, kind)) from None


def _numbers(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {k: _numbers(v) for k, v in data.items()}
    return _number(data)


def _first(error: ValidationError, kind: type) -> str:
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "unexpected_keyword_argument"), errors[0])
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        return _unknown(path, _keys(kind, first["loc"][:-1]))
    if first["type"] in ("missing", "missing_argument"):
        return f"the setting {path} is missing: give {path}=…"
    message = first["msg"]
    return f"{path}: {message[0].lower()}{message[1:]}; got {first['input']!r}"


def _keys(kind: Any, path: Sequence[int | str]) -> list[str]:
    for part in path:
        types = inspect.get_annotations(kind, eval_str=True)
        found = types.get(str(part))
        options = [found, *getattr(found, "__args__", ())]
        kind = next((o for o in options if dataclasses.is_dataclass(o)), None)
    return [f.name for f in dataclasses.fields(kind)] if kind is not None else []


def _unknown(path: str, allowed: Sequence[str]) -> str:
    *parents, last = path.split(".")
    close = get_close_matches(last, allowed, n=1)
    hint = f"; did you mean {'.'.join([*parents, close[0]])}?" if close else ""
    return f"unknown setting {path}{hint or '.'} Allowed here: {', '.join(allowed)}"


def dump(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return plain


def arguments(settings: Mapping[str, Any], entry: Entry, prefix: str = "method") -> dict[str, Any]:
    """Settings checked against those of a method, without `name`.

    Raises:
        ValueError: for an unknown key, a missing one, or a value of the wrong type.
    """
    allowed = entry.settings
    out = {}
    for key, value in settings.items():
        if key == "name":
            continue
        if key not in allowed:
            raise ValueError(_unknown(f"{prefix}.{key}", [*allowed]))
        adapter: TypeAdapter[Any] = TypeAdapter(allowed[key].annotation, config=ConfigDict(allow_inf_nan=False))
        try:
            out[key] = adapter.validate_python(_number(value))
        except ValidationError as error:
            raise ValueError(f"{prefix}.{key}: {error.errors()[0]['msg'].lower()}; got {value!r}") from None
    for name, parameter in allowed.items():
        if parameter.default is inspect.Parameter.empty and name not in out:
            raise ValueError(f"the setting {prefix}.{name} is missing: give {prefix}.{name}=…")
    return out


PIPELINES: dict[str, type] = {"sd": SdConfig, "ddpm": DdpmConfig, "classify": ClassifyConfig}
