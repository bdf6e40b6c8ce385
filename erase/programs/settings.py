"""What can be said of a run's settings before a model is opened: nothing here needs more than torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from erase import resources
from erase.config import AttackName, Remain, Saliency, arguments
from erase.engine.method import Method
from erase.engine.updates import ClosedForm, FastSlow
from erase.evaluation.clip import locate_clip
from erase.methods import Entry, find_method


def read_method(config: Any) -> tuple[Entry, Method]:
    """The method of a configuration, built from settings alone.

    Raises:
        ValueError: for an unknown method or setting, a value out of range, a mask that cannot be made, a side that has
            nothing, and a classifier that is not there.
    """
    entry = find_method(str(config.method.get("name", "")))
    method = entry.build(**arguments(config.method, entry))
    check_saliency(config.saliency, entry)
    if config.pipeline == "sd" and isinstance(method.update, ClosedForm) and config.train.steps != 1:
        raise ValueError(
            f"train.steps={config.train.steps}: method {entry.name} is a closed form, which takes one step: set "
            "train.steps=1"
        )
    if config.pipeline != "classify":
        check_classifiers_only(config.method)
        if config.train.checkpointing and config.train.network_dropout:
            raise ValueError(
                "train.checkpointing=true computes each pass again, without train.network_dropout=true: set one "
                "of them to false"
            )
    if config.method.get("robust") is not None:
        check_robust(config)
    if config.saliency.per == "image" and config.pipeline == "classify":
        raise ValueError(
            "saliency.per=image sums over timesteps, which classifiers do not have: set saliency.per=sample"
        )
    if config.saliency.augment and config.pipeline != "classify":
        raise ValueError("saliency.augment is for classifiers, whose images are augmented: unset it")
    if config.pipeline == "sd" and config.remain.near:
        check_near(config.remain)
    if entry.fresh and config.pipeline == "sd":
        raise ValueError(
            f"method.name={entry.name} trains new weights, which erase run sd does not do: choose another method"
        )
    if not entry.fresh and config.pipeline == "ddpm" and not config.forget.labels:
        raise ValueError("forget.labels is empty: name what to forget, such as forget.labels=[trouser]")
    for key, find in (("classifier", resources.tiny_path), ("clip", locate_clip)) if judges(config) else ():
        if (judge := getattr(config.eval, key, None)) is not None:
            find(judge)
    if (
        config.pipeline == "sd"
        and not config.eval.prompts
        and config.eval.images
        and config.eval.classifier is not None
    ):
        raise ValueError(
            "eval.prompts is empty, so eval.classifier would judge nothing that must stay: name prompts or a prompt "
            "set, or set eval.classifier=null"
        )
    return entry, method


def check_near(remain: Remain) -> None:
    """Check that there are images of which a share can go to near prompts.

    Raises:
        ValueError: without a total or with images of the user's, and for a share that is less than an image.
    """
    if remain.images is not None:
        raise ValueError(
            f"remain.near={remain.near} is for images that the model generates: unset remain.images, or set "
            "remain.near=0"
        )
    if remain.total is None:
        raise ValueError(f"remain.near={remain.near} is a share of remain.total: set that, or set remain.near=0")
    if not near_images(remain):
        raise ValueError(
            f"remain.near={remain.near} of remain.total={remain.total} is less than an image: raise one of them, or "
            "set remain.near=0"
        )


def near_images(remain: Remain) -> int:
    """How many remain images are of near prompts: `remain.near` of `remain.total`."""
    return round(remain.near * (remain.total or 0))


def judges(config: Any) -> bool:
    """Whether a run on a diffusion model generates images that are judged."""
    if config.pipeline == "classify":
        return False
    return bool(config.eval.images or (config.pipeline == "sd" and (config.until or config.eval.attacks)))


def notices(config: Any) -> list[str]:
    """What a user may not expect of settings that are allowed, a line each."""
    if config.pipeline == "sd" and config.eval.images and not config.eval.prompts:
        return ["eval.prompts is empty: images are generated of the forget prompts alone"]
    return []


def check_saliency(wanted: Saliency, entry: Entry) -> None:
    """Check before the Fisher diagonals are computed that a mask can be made of them.

    Raises:
        ValueError: unless exactly one of threshold and density is given, and for a clip without squares, for a method
            that takes a mask; for diagonals of images where there is no pull; and for the loss of a method without one.
    """
    if wanted.per == "image" and ("fisher" not in entry.needs or wanted.clip is not None):
        raise ValueError(
            "saliency.per=image is for the pull of selective_amnesia, without saliency.clip: set saliency.per=sample"
        )
    if "mask" not in entry.needs:
        return
    if wanted.kind != "none" and wanted.loss == "objective" and "forget" not in entry.needs:
        raise ValueError(
            "saliency.loss=objective is the method's own forget loss, and a closed form has none: set "
            "saliency.kind=none or saliency.loss=plain"
        )
    if wanted.kind == "magnitude" and wanted.clip is not None:
        raise ValueError(f"saliency.clip is for saliency.kind=fisher: set it to null; got {wanted.clip}")
    if wanted.loss == "objective" and wanted.guidance is not None:
        raise ValueError(
            f"saliency.guidance={wanted.guidance} is for the training loss: set saliency.loss=plain, or "
            "saliency.guidance=null"
        )
    if wanted.kind == "magnitude" and (wanted.density is None or wanted.threshold is not None):
        raise ValueError(
            "saliency.kind=magnitude needs saliency.density, without saliency.threshold: set "
            "saliency.threshold=null; got "
            f"{wanted.density} and {wanted.threshold}"
        )
    if wanted.kind == "fisher" and (wanted.threshold is None) == (wanted.density is None):
        raise ValueError(
            f"the mask needs one of saliency.threshold and saliency.density: set the other to null; "
            f"got {wanted.threshold} and {wanted.density}"
        )


def check_classifiers_only(method: Mapping[str, Any]) -> None:
    """Check that the settings of a diffusion model's method have no value that only classifiers know.

    Raises:
        ValueError: for labels by lot within a batch of both sides, and the mean of a divergence over classes.
    """
    for name, value, instead in (("order", "mixed", "joint or turn"), ("reduction", "mean", "sum")):
        if method.get(name) == value:
            raise ValueError(f"method.{name}={value} is for classifiers, not for diffusion models: use {instead}")


def check_robust(config: Any) -> None:
    """Check that what is to be made robust is a redirect of a text-to-image model.

    Raises:
        ValueError: for another kind of model, loss or target.
    """
    if config.pipeline != "sd":
        raise ValueError(
            f"method.robust is for text-to-image models (erase run sd); got {config.pipeline}: leave it out"
        )
    for key, value in (("loss", "redirect"), ("target", "frozen"), ("dropout", 0)):
        if (got := getattr(config.forget, key)) != value:
            raise ValueError(f"method.robust needs forget.{key}={value}; got {got}: set it, or method.robust=null")


@dataclass(frozen=True)
class Use:
    """Settings that some runs read and others do not."""

    keys: tuple[str, ...]
    """Paths, or the groups that they begin with (`saliency.`)."""
    read: bool
    why: str
    """Why this run does not read them."""

    def holds(self, key: str) -> bool:
        """Whether a path is one of these settings."""
        return any(key == own or (own.endswith(".") and key.startswith(own)) for own in self.keys)


def unused(config: Any, entry: Entry, method: Method, typed: Mapping[str, Any]) -> list[str]:
    """Settings that the user typed and the run does not read, a line each. A preset's own are not told of.

    Args:
        config: the settings, all of them.
        entry: the method.
        method: as it was built.
        typed: what the user typed, by path; nulls and empty lists take something back, so that they always have a use.
    """
    idle = [use for use in uses(config, entry, method) if not use.read]
    given = [key for key, value in typed.items() if value is not None and value != []]
    return [f"{key} has no effect here: {use.why}" for key in given for use in idle if use.holds(key)]


def uses(config: Any, entry: Entry, method: Method) -> list[Use]:
    """What the run reads of the settings that not every run reads."""
    name, needs, kind = entry.name, entry.needs, config.saliency.kind
    masks = "mask" in needs
    masked = masks and kind != "none"
    unmasked = "saliency.kind=none switches the mask off" if masks else f"method {name} takes no mask"
    found = [
        Use(("saliency.kind",), masks or kind == "none", unmasked),
        Use(("saliency.threshold", "saliency.density", "saliency.chunk"), masked, unmasked),
        Use(
            tuple(f"saliency.{key}" for key in ("loss", "guidance", "per", "clip", "count", "draws", "batch_size")),
            masked or "fisher" in needs,
            unmasked,
        ),
        Use(
            ("method.clip_forget", "method.fast_rule"),
            config.method.get("ron") is not False,
            "method.ron=false takes one step on both losses, which train.optimizer and method.clip_remain rule",
        ),
    ]
    if config.pipeline == "classify":
        return [*found, Use(("train.",), not entry.fresh, f"{name} goes by the recipe")]
    loss, sd = config.forget.loss, config.pipeline == "sd"
    leads = "forget" in needs and (loss == "redirect" or (sd and loss == "surrogate")) and not entry.fresh
    own = f"method {name} has no such loss on forget data"
    steps = tuple(
        f"train.{key}" for key in ("batch_size", "micro_batch", "lr", "optimizer", "weight_decay", "momentum")
    )
    goes_by_fast_rate = isinstance(method.update, FastSlow) and method.remain is None
    slow = ("train.lr", "train.optimizer", "train.weight_decay", "train.momentum", "train.dropout")
    found += [
        Use(slow, not goes_by_fast_rate, f"method {name} has no remain loss, and steps by method.fast_rate alone"),
        Use(steps, not isinstance(method.update, ClosedForm), f"method {name} is a closed form"),
        Use(("forget.start",), not isinstance(method.update, ClosedForm), f"method {name} is a closed form"),
        Use(("forget.loss", "forget.target", "forget.dropout"), "forget" in needs, own),
        Use(
            ("forget.anchors",),
            leads or "concepts" in needs,
            f"forget.loss={loss} has none" if "forget" in needs else own,
        ),
        Use(("forget.count", "forget.images"), entry.reads("forget", masked), f"method {name} reads no forget data"),
        Use(
            ("remain.count", "remain.total", "remain.near", "remain.images", "remain.share"),
            entry.reads("remain", masked),
            f"method {name} reads no remain data",
        ),
        Use(("remain.loss",), "remain" in needs, f"method {name} has no such loss on remain data"),
    ]
    if sd:
        asked = config.eval.attacks
        known = get_args(AttackName) if asked else ()
        found += [
            Use(("attack.",), bool(config.eval.attacks), "eval.attacks is empty"),
            *(Use((f"attack.{name}.",), name in asked, f"eval.attacks does not name {name}") for name in known),
            Use(
                ("eval.nudity", "eval.nudity.", "eval.classifier", "eval.clip", "eval.flag", "eval.alternatives"),
                judges(config),
                "eval.images=0 judges nothing",
            ),
            Use(
                ("remain.count",),
                config.remain.total is None or bool(config.remain.near),
                "remain.total says how many images there are",
            ),
        ]
    return found
