"""Make an image classifier forget training images: `erase run classify PRESET [key=value …] --out DIR`.

Read top to bottom: read the data and split them, train the model where it is new, retrain it without the forgotten
images, make the mask, unlearn, save, compare the three, report. Trained and retrained models are kept in a cache by a
hash of all that they are made of: no comparison trains one twice. With `--resume` parts that are there are not done
again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from erase import files, processes
from erase.batches import Batches, some
from erase.checkpoint import read_safetensors, write_safetensors
from erase.classification import metrics, models, splits
from erase.classification.backend import RELABEL, Augment, Classifier, logits, without_statistics
from erase.classification.models import Model
from erase.classification.splits import Split
from erase.config import ClassifyConfig, Recipe, TrainClassifier, arguments, dump
from erase.data import LabelledImages, class_number, read_labelled
from erase.evaluation import report
from erase.evaluation.classes import score
from erase.evaluation.stats import mcnemar_exact
from erase.losses import ASCENT, DESCENT
from erase.methods import builder
from erase.methods.retrain import retrain
from erase.precision import Precision
from erase.runs import STATE, bar, check_needs, check_saliency, drop, equip, new_report, open_folder, run_steps, start
from erase.saliency import Mask, load_mask

NEW = "new"
TRAINING = 1
"""Goes up with every change of the code that gives other weights for the same recipe: caches are then not used."""
AXES = {"FA": "forget accuracy, %", "TA": "test accuracy, %"}
"""Of a comparison's plot."""
GOALS = {"avg_d": -1, "rte_s": -1}
"""Of a comparison's Pareto front: whether less (-1) or more (1) is better."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """A run's data, resolved before anything is computed."""

    data: LabelledImages
    """The training images, all of them."""
    test: LabelledImages
    """Without the classes that are forgotten whole."""
    split: Split

    @property
    def labels(self) -> list[str]:
        """Names of the classes that are forgotten whole."""
        return [self.data.names[i] for i in self.split.how.get("labels", [])]

    @property
    def target(self) -> str:
        """What is forgotten, in words."""
        how, n = self.split.how, len(self.split.forget)
        share = [f"{100 * how['fraction']:g} %"] if "fraction" in how else []
        return ", ".join([*(self.labels or share), f"{n} training images"] if n else [])


def main(
    config: ClassifyConfig,
    out: Path,
    *,
    resume: bool = False,
    command: str = "",
    say: Say = print,
    preset: str = "",
    form: str = "full",
) -> Path:
    """Run it all; the path of the report. `preset` is named in the report; `form` can only be `full`.

    Raises:
        ValueError: for settings, splits, models or data that cannot be used.
    """
    if form != "full":
        raise ValueError(f"erase run classify keeps whole models: leave out --save {form}")
    config, accelerator, precision, say = start(config, say)
    if processes.world() > 1:
        raise ValueError(f"erase run classify runs in one process so far; launched with {processes.world()}")
    device = accelerator.device
    metrics.check_sklearn()
    build = builder(str(config.method.get("name", "")))
    settings = arguments(config.method, build)
    method = build(**settings)  # refuses values out of range now, not after the training
    check_needs(build, ("new_net",))
    check_saliency(config.saliency, build)
    plan = make_plan(config, method.fresh)
    model = open_model(config, plan, device)
    check(config, plan, model, method.fresh)
    record = {
        "plan": {"split": plan.split.digest, "target": plan.target},
        "base": {
            "model": config.model,
            "weights": {} if config.model == NEW else models.fingerprint(models.locate(config.model)),
        },
        "data": {"images": len(plan.data), "sha256": plan.split.data, "test_sha256": plan.test.digest},
    }
    open_folder(config, out, record, command, resume)
    splits.write(plan.split, out / "split.json")
    timing_path, mask_path = out / "timing.json", out / "saliency.safetensors"
    if resume and (out / "model").exists() and (out / "report.json").exists():
        timing_path.unlink(missing_ok=True)
        say(f"finished before: {report.write_html(out)}")
        return out / "report.html"

    compared = Comparison(config, plan, model, accelerator, say)
    base = compared.base()
    retrained = compared.retrained()
    if not (out / "model").exists():
        if method.fresh:
            assert retrained is not None
            files.write_json(timing_path, {"erase_s": retrained.seconds})
            copy(retrained.folder, out / "model")
        else:
            say(f"{config.model}: {config.method['name']} forgets {plan.target} of {len(plan.split.train)}")
            unlearn(config, plan, base.folder, accelerator, precision, out, resume)
    drop(out, *STATE)
    timing = files.read_json(timing_path)
    unlearned = Place(out / "model", cache=retrained.cache if method.fresh and retrained is not None else None)
    mask = load_mask(mask_path) if mask_path.exists() else None
    result = make_report(config, plan, base, unlearned, retrained, device, mask, timing, command)
    files.write_json(out / "report.json", result | ({"preset": preset} if preset else {}))
    timing_path.unlink()
    for line in table(result):
        say(line)
    say(f"report: {report.write_html(out)}")
    return out / "report.html"


# ---------------------------------------------------------------- before anything is computed


def make_plan(config: ClassifyConfig, fresh: bool) -> Plan:
    """Read the data and split them.

    Raises:
        ValueError: for data that cannot be read, and unless exactly one way to choose the forgotten images is given
            (for training none may be).
    """
    data = read_labelled(config.data.source, "train", names=config.data.names or None)
    shape = (int(data.pixels.shape[1]), int(data.pixels.shape[2]), int(data.pixels.shape[3]))
    test = read_labelled(config.data.source, "test", names=data.names, shape=shape)
    wanted = config.forget
    ways = {"fraction": wanted.fraction, "labels": wanted.labels, "ids": wanted.ids, "split": wanted.split}
    given = [name for name, value in ways.items() if value not in (None, [])]
    if len(given) > 1:
        raise ValueError(f"forget.{given[0]} and forget.{given[1]} both choose what to forget: give one of them")
    if not given and not fresh:
        raise ValueError(
            "the forget set is empty: name what to forget, such as forget.fraction=0.1 or forget.labels=[trouser]"
        )
    if wanted.split is not None:
        split = splits.read(wanted.split, data)
    else:
        labels = [class_number(label, data.names) for label in wanted.labels]
        seed = config.seed if wanted.seed is None else wanted.seed
        split = splits.make(
            data,
            validation=config.data.validation,
            seed=seed,
            fraction=wanted.fraction,
            labels=labels,
            ids=wanted.ids,
        )
    return Plan(data, test.without(split.how.get("labels", [])), split)


def open_model(config: ClassifyConfig, plan: Plan, device: torch.device) -> Model:
    """The model to start from, or a new one as the recipe starts from it.

    Raises:
        ValueError: for an architecture where there is none to choose, or a missing one.
    """
    if config.model != NEW:
        if config.architecture is not None:
            raise ValueError(f"architecture is for model=new; {config.model} has its own: take one of the two back")
        return models.open_model(models.locate(config.model), device)
    if config.architecture is None:
        raise ValueError("model=new needs an architecture: give architecture.model_type=resnet and so on")
    depth, height, width = plan.data.pixels.shape[1:]
    return models.new(config.architecture, plan.data.names, (depth, height, width), training_seed(config), device)


def check(config: ClassifyConfig, plan: Plan, model: Model, fresh: bool) -> None:
    """Find out now, not after the training, what cannot work.

    Raises:
        ValueError: for a model of other classes or images than the data, a missing recipe or train, or a retrained
            model that does not fit.
    """
    fits(config.model, model, plan.data)
    own = [key for key in config.method if key != "name"]
    if fresh and own:
        raise ValueError(f"training goes by the recipe: leave out method.{own[0]}, and set recipe.* instead")
    if config.train is None and not fresh:
        raise ValueError("the setting train.steps is missing: give train.steps=…")
    wanted = config.eval.retrained
    if config.recipe is None and (config.model == NEW or fresh or wanted is True):
        raise ValueError(
            "training and retraining need a recipe: give recipe.epochs=… and so on, or eval.retrained=false with a "
            "trained model"
        )
    if isinstance(wanted, str):
        fits(wanted, models.open_model(models.locate(wanted)), plan.data)


def fits(name: str, model: Model, data: LabelledImages) -> None:
    """Find out whether a model knows the data's classes and takes its images.

    Raises:
        ValueError: otherwise.
    """
    if len(model.labels) != len(data.names):
        raise ValueError(f"{name} has {len(model.labels)} classes, the data have {len(data.names)}: they must agree")
    unnamed = tuple(f"LABEL_{k}" for k in range(len(model.labels)))
    if model.labels not in (unnamed, data.names):
        raise ValueError(
            f"the data's classes are {', '.join(data.names)}, those of {name} are {', '.join(model.labels)}: give "
            "data.names in the model's order"
        )
    depth = data.pixels.shape[1]
    if depth not in (1, model.channels):
        raise ValueError(f"the data's images have {depth} channels, {name} takes {model.channels}")


def training_seed(config: ClassifyConfig) -> int:
    """Of first weights, order and augmentation."""
    own = None if config.recipe is None else config.recipe.seed
    return config.seed if own is None else own


# ---------------------------------------------------------------- training and retraining


@dataclass(frozen=True)
class Place:
    """A trained model on disk."""

    folder: Path
    seconds: float | None = None
    """That its training took."""
    cache: Path | None = None
    """Where its predictions may be kept."""


@dataclass(frozen=True)
class Comparison:
    """Makes the models that the unlearned one comes from and is compared with."""

    config: ClassifyConfig
    plan: Plan
    model: Model
    """To start from."""
    accelerator: Accelerator
    say: Say

    def base(self) -> Place:
        """The model before unlearning."""
        if self.config.model != NEW:
            return Place(models.locate(self.config.model))
        return self._trained(self.plan.split.train, "training")

    def retrained(self) -> Place | None:
        """The model that never saw the forgotten images, if there is to be one."""
        wanted = self.config.eval.retrained
        if isinstance(wanted, str):
            return Place(models.locate(wanted))
        fresh = self.config.method["name"] == "retrain"
        if not wanted and not fresh:
            return None
        return self._trained(self.plan.split.remain, f"training without {self.plan.target or 'nothing'}")

    def _trained(self, index: torch.Tensor, what: str) -> Place:
        """A model by the recipe on the training images `index`: from the cache, or trained now."""
        config, recipe = self.config, self.config.recipe
        assert recipe is not None
        seed = training_seed(config)
        key = {
            "code": {"erase": version("erase"), "training": TRAINING},
            "data": self.plan.split.data,
            "images": hashlib.sha256(index.numpy().tobytes()).hexdigest(),
            "model": self.model.config,
            "recipe": {**dump(recipe), "seed": seed, "shift": config.data.shift, "flip": config.data.flip},
            "precision": config.precision,
        }
        text = json.dumps(key, sort_keys=True)
        cache = config.cache / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not (cache / "model").exists():
            self.say(f"{what}: {len(index)} images, {recipe.epochs} epochs ({cache})")
            files.write_json(cache / "key.json", json.loads(text))
            model = replace(self.model, net=models.renew(self.model, seed))
            steps = recipe.epochs * -(-len(index) // recipe.batch_size)
            done = run_steps(
                replace(config, train=loop_of(recipe, steps), seed=seed),
                classifier(config, replace(model, net=model.net.train())),
                retrain(average=0.0, slow_schedule=recipe.schedule),
                None,
                Batches(self.plan.data.take(index), recipe.batch_size, seed),
                self.accelerator,
                cache,
                resume=True,
                desc=what,
            )
            files.write_json(cache / "trained.json", {"seconds": done.timing["erase_s"], "steps": done.steps})
            models.save(model, cache / "model")
            (cache / "state.safetensors").unlink(missing_ok=True)
        return Place(cache / "model", files.read_json(cache / "trained.json")["seconds"], cache)


def loop_of(recipe: Recipe, steps: int) -> TrainClassifier:
    """The recipe as the loop takes it."""
    return TrainClassifier(steps, recipe.batch_size, recipe.lr, recipe.optimizer, recipe.weight_decay, recipe.momentum)


def classifier(config: ClassifyConfig, model: Model) -> Classifier:
    """The backend, with the augmentation of training."""
    return Classifier(model.net, len(model.labels), model.prepare, Augment(config.data.shift, config.data.flip))


def copy(source: Path, out: Path) -> None:
    """Copy a folder; it appears whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as temporary:
        shutil.copytree(source, Path(temporary) / out.name)
        (Path(temporary) / out.name).rename(out)


# ---------------------------------------------------------------- unlearning


def unlearn(
    config: ClassifyConfig,
    plan: Plan,
    base: Path,
    accelerator: Accelerator,
    precision: Precision,
    out: Path,
    resume: bool,
) -> None:
    """Make the mask, unlearn, and save the model and the times."""
    assert config.train is not None
    build = builder(str(config.method["name"]))
    settings = arguments(config.method, build)
    model = models.open_model(base, accelerator.device)
    backend = classifier(config, model)
    forget = plan.data.take(plan.split.forget)
    remain = plan.data.take(plan.split.remain)
    count = len(forget) if config.remain.count is None else config.remain.count
    if count != "all":
        remain = remain.subset(min(count, len(remain)), config.seed)
    wanted = config.saliency
    # Fitting another target needs one: without a teacher that is another label.
    fits_other = build(**settings).forget
    objective = RELABEL if fits_other is not None and fits_other.sense > 0 else ASCENT
    began = time.perf_counter()
    batches = tuple(some(side, wanted.count, wanted.batch_size, config.seed) for side in (forget, remain))
    given = equip(
        build,
        config,
        replace(backend, augment=Augment()),  # saliency is of the images as they are
        objective,
        DESCENT,
        batches,
        precision,
        out / "saliency.safetensors",
        resume,
        renew=lambda: models.renew(model, config.seed + 1),  # not as the model began
    )
    timing_path = out / "timing.json"
    if not timing_path.exists():  # a run that goes on has found its mask
        files.write_json(timing_path, {"saliency_s": time.perf_counter() - began})
    method = build(**settings, **given)
    model.net.train()
    done = run_steps(
        config,
        backend,
        method if config.forget.statistics else without_statistics(method),
        Batches(forget, config.train.batch_size, config.seed),
        Batches(remain, config.train.batch_size, config.seed + 1),
        accelerator,
        out,
        resume,
    )
    files.write_json(timing_path, files.read_json(timing_path) | done.timing)
    models.save(model, out / "model")


# ---------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Seen:
    """What a model says, float32, in eval mode, of images as they are."""

    train: metrics.Floats
    """Logits `[N, K]` of all training images."""
    test: metrics.Floats
    """Of the test images."""


def predict(config: ClassifyConfig, plan: Plan, place: Place, device: torch.device) -> Seen:
    """A model's logits, kept beside a model of the cache."""
    meta = {
        "data": plan.split.data,
        "test": plan.test.digest,
        "weights": json.dumps(models.fingerprint(place.folder)),
    }
    path = None if place.cache is None else place.cache / f"predictions-{plan.test.digest[:12]}.safetensors"
    if path is not None and path.exists():
        kept, found = read_safetensors(path)
        if found == meta:
            return Seen(kept["train"].numpy(), kept["test"].numpy())
    model = models.open_model(place.folder, device)
    made = {}
    with bar(len(plan.data) + len(plan.test), f"predictions: {place.folder}") as shown:
        for name, data in (("train", plan.data), ("test", plan.test)):
            parts = []
            for pixels in data.pixels.split(config.eval.batch_size):
                with torch.no_grad():
                    parts.append(logits(model.net, model.prepare(pixels.to(device))).float().cpu())
                shown.update(len(pixels))
            made[name] = torch.cat(parts)
    if path is not None:
        write_safetensors(path, made, meta)
    return Seen(made["train"].numpy(), made["test"].numpy())


def make_report(
    config: ClassifyConfig,
    plan: Plan,
    base: Place,
    unlearned: Place,
    retrained: Place | None,
    device: torch.device,
    mask: Mask | None,
    timing: dict[str, Any],
    command: str,
) -> dict[str, Any]:
    """The keys of a report: see the README."""
    result = new_report(config, command, {"forget": plan.target, "labels": plan.labels}, mask, timing)
    result["versions"]["scikit-learn"] = version("scikit-learn")
    places = {"before": base, "after": unlearned, **({} if retrained is None else {"retrained": retrained})}
    seen = {key: predict(config, plan, place, device) for key, place in places.items()}
    for key, found in seen.items():
        result[key] = {"metrics": measure(plan, found), "classes": scores(plan, found)}
    if retrained is not None:
        ideal = result["retrained"]["metrics"]
        for key, found in seen.items():
            result[key]["metrics"] |= compare(plan, found, seen["retrained"], result[key]["metrics"], ideal)
        result["gap"] = metrics.gaps(result["after"]["metrics"], ideal)
        ideal["rte_s"] = retrained.seconds
    result["after"]["metrics"]["rte_s"] = timing.get("saliency_s", 0.0) + timing["erase_s"]
    before, after = (parts(plan, seen[key]) for key in ("before", "after"))
    for part, of in before.items():
        if len(of[1]):
            p = mcnemar_exact(metrics.correct(*of).tolist(), metrics.correct(*after[part]).tolist())
            result["paired"][f"{part}_mcnemar_p"] = p
    return result


def parts(plan: Plan, seen: Seen) -> dict[str, tuple[metrics.Floats, metrics.Ints]]:
    """Logits and labels of each part of the data."""
    labels = plan.data.labels.numpy()
    index = {"forget": plan.split.forget, "remain": plan.split.remain, "validation": plan.split.validation}
    if plan.labels:  # as in the test images
        kept = ~torch.isin(plan.data.labels[index["validation"]], torch.tensor(plan.split.how["labels"]))
        index["validation"] = index["validation"][kept]
    found = {name: (seen.train[i.numpy()], labels[i.numpy()]) for name, i in index.items()}
    return {**found, "test": (seen.test, plan.test.labels.numpy())}


def measure(plan: Plan, seen: Seen) -> dict[str, float | None]:
    """FA, RA, TA and MIA, percent; VA and MIA_V have validation images in the place of test images."""
    of = parts(plan, seen)
    found: dict[str, float | None] = {
        name: metrics.accuracy(*of[part])
        for name, part in (("FA", "forget"), ("RA", "remain"), ("TA", "test"), ("VA", "validation"))
    }
    for name, part in (("MIA", "test"), ("MIA_V", "validation")):
        whole = len(of["forget"][0]) and len(of[part][0])
        found[name] = metrics.membership(of["forget"][0], of["remain"][0], of[part][0]) if whole else None
    return found


def compare(
    plan: Plan, ours: Seen, theirs: Seen, here: dict[str, float | None], ideal: dict[str, float | None]
) -> dict[str, float | None]:
    """Mean gap to the retrained model, the same on validation images (to choose settings by), and D_KL."""
    as_validation = [{**m, "TA": m["VA"], "MIA": m["MIA_V"]} for m in (here, ideal)]
    p, q = (parts(plan, seen)["forget"][0] for seen in (theirs, ours))
    return {
        "avg_d": metrics.average_gap(here, ideal),
        "avg_d_v": None if here["VA"] is None else metrics.average_gap(*as_validation),
        "kl": metrics.divergence(p, q) if len(p) else None,
    }


def scores(plan: Plan, seen: Seen) -> dict[str, Any]:
    """Right answers of each part, with intervals."""
    return {name: score(metrics.correct(*of).tolist()) for name, of in parts(plan, seen).items() if len(of[1])}


COLUMNS = {"FA": 2, "RA": 2, "TA": 2, "MIA": 2, "avg_d": 2, "kl": 4, "rte_s": 1}
"""Of the table, with digits after the point."""


def table(result: dict[str, Any]) -> list[str]:
    """The field's table of a run: before, after, retrained."""
    lines = [" " * 9 + "".join(f"{name:>9}" for name in COLUMNS)]
    for key in ("before", "after", "retrained"):
        if key in result:
            found = result[key]["metrics"]
            cells = [found.get(name) for name in COLUMNS]
            texts = ["–" if v is None else f"{v:.{d}f}" for v, d in zip(cells, COLUMNS.values(), strict=True)]
            lines.append(f"{key:9}" + "".join(f"{text:>9}" for text in texts))
    return lines


def summary(result: dict[str, Any]) -> dict[str, float | str | None]:
    """A report as the numbers that comparisons are made of: the table's, `avg_d_v` of the validation images, and
    `rte_share`, run time over that of retraining.
    """
    found = result["after"]["metrics"]
    whole = result.get("retrained", {}).get("metrics", {}).get("rte_s")
    return {
        **{name: found.get(name) for name in COLUMNS},
        "avg_d_v": found.get("avg_d_v"),
        "rte_share": found["rte_s"] / whole if whole else None,
    }
