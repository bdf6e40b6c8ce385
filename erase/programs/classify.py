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
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from erase.classification import folders, metrics, models, splits
from erase.classification.backend import RELABEL, Augment, Classifier, logits, together, without_statistics
from erase.classification.models import Model
from erase.classification.splits import Split
from erase.config import NEW, ClassifyConfig, Recipe, TrainClassifier, arguments, dump
from erase.engine import distributed
from erase.engine.batches import Batches, some
from erase.engine.losses import ASCENT, DESCENT, Objective
from erase.engine.method import Method
from erase.engine.precision import Precision
from erase.engine.saliency import load_mask
from erase.evaluation import report
from erase.evaluation.classes import score
from erase.evaluation.stats import mcnemar_exact
from erase.methods import builder
from erase.methods.retrain import retrain
from erase.programs import saving
from erase.programs.runs import (
    STATE,
    bar,
    check_needs,
    check_saliency,
    drop,
    equip,
    new_report,
    open_folder,
    rehearse,
    run_steps,
    start,
)
from erase.store import files
from erase.store.labelled import LabelledImages, class_number, read_labelled
from erase.store.safetensors import digest, read_safetensors, write_safetensors

TRAINING = 1
"""Goes up with every change of the code that gives other weights for the same recipe: caches are then not used."""
AXES = {"FA": ("forget accuracy, %", 100.0), "TA": ("test accuracy, %", 100.0)}
"""Of a comparison's plot: what they are called, and what is most."""
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
    form: saving.Form = "full",
    dry_run: bool = False,
) -> Path:
    """Run it all; the path of the report. `preset` is named in the model's card, `form` is what is kept of it.

    A dry run says what would be done, and writes nothing.

    Raises:
        ValueError: for settings, splits, models or data that cannot be used.
    """
    config, accelerator, precision, say = start(config, say)
    device = accelerator.device
    metrics.check_sklearn()
    build = builder(str(config.method.get("name", "")))
    settings = arguments(config.method, build)
    method = build(**settings)  # refuses values out of range now, not after the training
    check_needs(build, ("new_net",))
    check_saliency(config.saliency, build)
    if method.fresh and form == "delta":
        raise ValueError(f"--save delta keeps what changed, and {method.name} makes new weights: leave it out")
    plan = make_plan(config, method.fresh)
    model = open_model(config, plan, device)
    check(config, plan, model, method.fresh)
    compared = Comparison(config, plan, model, accelerator, say)
    if dry_run:
        say("\n".join(foretell(compared, build, precision, method.fresh, command)))
        return out / "report.html"
    record = {
        "plan": {"split": plan.split.digest, "target": plan.target},
        "base": {
            "model": config.model,
            "weights": {} if config.model == NEW else folders.fingerprint(folders.locate(config.model)),
        },
        "data": {"images": len(plan.data), "sha256": plan.split.data, "test_sha256": plan.test.digest},
    }
    distributed.on_main(lambda: open_folder(config, out, record, command, resume))
    distributed.on_main(lambda: splits.write(plan.split, out / "split.json"))
    timing_path, mask_path = out / "timing.json", out / "saliency.safetensors"
    if resume and distributed.on_main(lambda: saving.finished(out)):
        drop(out, timing_path.name)
        distributed.on_main(lambda: saving.settle(out, form))
        say(f"finished before: {distributed.on_main(lambda: report.write_html(out))}")
        return out / "report.html"

    base = compared.base()
    retrained = compared.retrained()
    if method.fresh:
        assert retrained is not None
        distributed.on_main(partial(copy, retrained, out))
    else:
        unlearned: Model | None = None
        if not distributed.on_main((out / saving.MODEL).exists):
            say(f"{config.model}: {config.method['name']} forgets {plan.target} of {len(plan.split.train)}")
            unlearned = unlearn(config, plan, base.source.folder, accelerator, precision, out, resume)
        distributed.on_main(partial(save, config, plan, base.source, unlearned, out, mask_path, preset, form))
    drop(out, *STATE)
    cache = retrained.cache if method.fresh and retrained is not None else None
    places = {"before": base, "after": Place(folders.locate(out / saving.MODEL), cache=cache)}
    places |= {} if retrained is None else {"retrained": retrained}
    seen = {key: predict(config, plan, place, device) for key, place in places.items()}
    result = distributed.on_main(partial(make_report, config, plan, places, seen, out, mask_path, command))
    distributed.on_main(lambda: files.write_json(out / "report.json", result | ({"preset": preset} if preset else {})))
    distributed.on_main(lambda: saving.settle(out, form))
    drop(out, timing_path.name)
    for line in table(result):
        say(line)
    say(f"report: {distributed.on_main(lambda: report.write_html(out))}")
    return out / "report.html"


def save(
    config: ClassifyConfig,
    plan: Plan,
    source: folders.Source,
    model: Model | None,
    out: Path,
    mask_path: Path,
    preset: str,
    form: saving.Form,
) -> None:
    """The unlearned model, in the form its base came in; without one it is in the run's folder already."""
    mask = load_mask(mask_path) if mask_path.exists() else None
    meta = saving.provenance(config, preset, source, {"erase_split_sha256": plan.split.digest}, mask)
    saving.save(source, {} if model is None else models.stored(model.net), out, meta, form)


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
        return models.open_model(folders.locate(config.model).folder, device)
    if config.architecture is None:
        raise ValueError("model=new needs an architecture: give architecture.model_type=resnet and so on")
    depth, height, width = plan.data.pixels.shape[1:]
    return models.new(config.architecture, plan.data.names, (depth, height, width), training_seed(config), device)


def check(config: ClassifyConfig, plan: Plan, model: Model, fresh: bool) -> None:
    """Find out now, not after the training, what cannot work.

    Raises:
        ValueError: for a model of other classes or images than the data, a missing recipe or train, a recipe's batch
            that does not divide over the processes, or a retrained model that does not fit.
    """
    fits(config.model, model, plan.data)
    own = [key for key in config.method if key != "name"]
    if fresh and own:
        raise ValueError(f"training goes by the recipe: leave out method.{own[0]}, and set recipe.* instead")
    if config.train is None and not fresh:
        raise ValueError("the setting train.steps is missing: give train.steps=…")
    wanted = config.eval.retrained
    trains = config.model == NEW or fresh or wanted is True
    if config.recipe is None and trains:
        raise ValueError(
            "training and retraining need a recipe: give recipe.epochs=… and so on, or eval.retrained=false with a "
            "trained model"
        )
    size = 0 if config.recipe is None else config.recipe.batch_size
    if trains and size % distributed.world():
        raise ValueError(f"recipe.batch_size {size} does not divide over {distributed.world()} processes")
    if isinstance(wanted, str):
        fits(wanted, models.open_model(folders.locate(wanted).folder), plan.data)


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


def foretell(
    compared: Comparison, build: Callable[..., Method], precision: Precision, fresh: bool, command: str
) -> list[str]:
    """What the run would learn, hold and do."""
    config, plan, model = compared.config, compared.plan, compared.model
    remain = len(plan.split.remain)
    sides = (0, remain) if fresh else (len(plan.split.forget), num_remain(config, plan))
    if fresh:
        assert config.recipe is not None
        config = replace(config, train=loop_of(config.recipe, num_steps(config.recipe, remain)))
    more = []
    for what, index in compared.training().values():
        assert config.recipe is not None
        cache, made_of = compared.entry(index)
        there = f"done, in {cache}" if kept(cache, made_of) else "to be done"
        more.append(f"{what}: {len(index)} images, {config.recipe.epochs} epochs; {there}")
    net = model.net.train()
    backend = Classifier(net, len(model.labels), model.prepare, Augment(config.data.shift, config.data.flip))
    sample = {"x": plan.data.pixels[:1].to(precision.device), "y": plan.data.labels[:1].to(precision.device)}
    return rehearse(
        config, backend, build, lambda net: (objective(config, build), DESCENT), sample, sides, precision, more, command
    )


# ---------------------------------------------------------------- training and retraining


@dataclass(frozen=True)
class Place:
    """A trained model on disk."""

    source: folders.Source
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

    def training(self) -> dict[str, tuple[str, torch.Tensor]]:
        """What is trained by the recipe, `base` and `retrained`: in words, and the numbers of the training images."""
        config, split = self.config, self.plan.split
        found = {} if config.model != NEW else {"base": ("training", split.train)}
        wanted = config.eval.retrained
        if wanted is True or (config.method["name"] == "retrain" and not isinstance(wanted, str)):
            found["retrained"] = (f"training without {self.plan.target or 'nothing'}", split.remain)
        return found

    def base(self) -> Place:
        """The model before unlearning."""
        if "base" in self.training():
            return self._trained(*self.training()["base"])
        return Place(folders.locate(self.config.model))

    def retrained(self) -> Place | None:
        """The model that never saw the forgotten images, if there is to be one."""
        if "retrained" in self.training():
            return self._trained(*self.training()["retrained"])
        wanted = self.config.eval.retrained
        return Place(folders.locate(wanted)) if isinstance(wanted, str) else None

    def entry(self, index: torch.Tensor) -> tuple[Path, dict[str, Any]]:
        """Where the cache keeps a model trained on the images `index`, and all that the model is made of."""
        config, recipe = self.config, self.config.recipe
        assert recipe is not None
        made_of = {
            "code": {"erase": version("erase"), "training": TRAINING},
            "data": self.plan.split.data,
            "images": hashlib.sha256(index.numpy().tobytes()).hexdigest(),
            "model": self.model.config,
            "recipe": {
                **dump(recipe),
                "seed": training_seed(config),
                "shift": config.data.shift,
                "flip": config.data.flip,
            },
            "precision": config.precision,
        }
        text = json.dumps(made_of, sort_keys=True)
        return config.cache / hashlib.sha256(text.encode()).hexdigest()[:16], json.loads(text)

    def _trained(self, what: str, index: torch.Tensor) -> Place:
        """A model by the recipe on the training images `index`: from the cache, or trained now."""
        config, recipe = self.config, self.config.recipe
        assert recipe is not None
        cache, made_of = self.entry(index)
        source = folders.Source(f"trained-{cache.name}", cache / "model")
        found = distributed.on_main(lambda: kept(cache, made_of))
        if found is None:
            self.say(f"{what}: {len(index)} images, {recipe.epochs} epochs ({cache})")
            distributed.on_main(lambda: files.write_json(cache / "key.json", made_of))
            seed = training_seed(config)
            model = replace(self.model, net=models.renew(self.model, seed))
            backend = classifier(config, model)
            model.net.train()
            done = run_steps(
                replace(config, train=loop_of(recipe, num_steps(recipe, len(index))), seed=seed),
                backend,
                retrain(average=0.0, slow_schedule=recipe.schedule),
                None,
                Batches(self.plan.data.take(index), recipe.batch_size, seed),
                self.accelerator,
                cache,
                resume=True,
                desc=what,
            )
            record = {"seconds": done.timing["erase_s"], "steps": done.steps}
            found = distributed.on_main(lambda: keep(model, cache, record))
        return Place(source, found["seconds"], cache)


def kept(cache: Path, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a trained model in the cache; None where none was kept to the end.

    Raises:
        ValueError: for a model of something else, or files that are not those that were kept.
    """
    if not (cache / "trained.json").exists():
        return None
    record = files.read_json(cache / "trained.json")
    if files.read_json(cache / "key.json") != made_of or record.get("files") != hashes(cache / "model"):
        raise ValueError(f"{cache} does not hold what was trained there: remove it, and the model is trained again")
    found: dict[str, Any] = record
    return found


def keep(model: Model, cache: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Put a trained model into the cache; its record, written last."""
    shutil.rmtree(cache / "model", ignore_errors=True)  # of a training that was killed before its record was there
    models.save(model, cache / "model")
    whole = {**record, "files": hashes(cache / "model")}
    files.write_json(cache / "trained.json", whole)
    (cache / "state.safetensors").unlink(missing_ok=True)
    return whole


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by name; empty without the folder."""
    return {path.name: files.sha256(path) for path in sorted(folder.glob("*"))}


def num_steps(recipe: Recipe, count: int) -> int:
    """Of a training on so many images."""
    return recipe.epochs * -(-count // recipe.batch_size)


def loop_of(recipe: Recipe, steps: int) -> TrainClassifier:
    """The recipe as the loop takes it."""
    return TrainClassifier(steps, recipe.batch_size, recipe.lr, recipe.optimizer, recipe.weight_decay, recipe.momentum)


def classifier(config: ClassifyConfig, model: Model) -> Classifier:
    """The backend, with the augmentation of training."""
    augment = Augment(config.data.shift, config.data.flip)
    return Classifier(together(model.net), len(model.labels), model.prepare, augment)


def copy(retrained: Place, out: Path) -> None:
    """Copy the retrained model into the run's folder, if it is not there; it appears whole or not at all."""
    if (out / saving.MODEL).exists():
        return
    files.write_json(out / "timing.json", {"erase_s": retrained.seconds})
    with tempfile.TemporaryDirectory(prefix=f".{saving.MODEL}.", suffix=".tmp", dir=out) as temporary:
        shutil.copytree(retrained.source.folder, Path(temporary) / saving.MODEL)
        (Path(temporary) / saving.MODEL).rename(out / saving.MODEL)


# ---------------------------------------------------------------- unlearning


def unlearn(
    config: ClassifyConfig,
    plan: Plan,
    base: Path,
    accelerator: Accelerator,
    precision: Precision,
    out: Path,
    resume: bool,
) -> Model:
    """Make the mask, and unlearn; the model. The times are in `timing.json`."""
    assert config.train is not None
    build = builder(str(config.method["name"]))
    settings = arguments(config.method, build)
    model = models.open_model(base, accelerator.device)
    backend = classifier(config, model)
    forget = plan.data.take(plan.split.forget)
    remain = plan.data.take(plan.split.remain)
    if config.remain.count != "all":
        remain = remain.subset(num_remain(config, plan), config.seed)
    wanted = config.saliency
    began = time.perf_counter()
    batches = tuple(some(side, wanted.count, wanted.batch_size, config.seed) for side in (forget, remain))
    given = equip(
        build,
        config,
        replace(backend, augment=Augment()),  # saliency is of the images as they are
        objective(config, build),
        DESCENT,
        batches,
        precision,
        out / "saliency.safetensors",
        resume,
        renew=lambda: models.renew(model, config.seed + 1),  # not as the model began
    )
    timing_path = out / "timing.json"
    saliency_s = time.perf_counter() - began
    if not distributed.on_main(timing_path.exists):  # a run that goes on has found its mask
        distributed.on_main(lambda: files.write_json(timing_path, {"saliency_s": saliency_s}))
    method = build(**settings, **given)
    model.net.train()
    how = config.forget.statistics
    done = run_steps(
        config,
        backend,
        method if how == "update" else without_statistics(method, running=how == "running"),
        Batches(forget, config.train.batch_size, config.seed),
        Batches(remain, config.train.batch_size, config.seed + 1),
        accelerator,
        out,
        resume,
    )
    distributed.on_main(lambda: files.write_json(timing_path, files.read_json(timing_path) | done.timing))
    return model


def num_remain(config: ClassifyConfig, plan: Plan) -> int:
    """How many of the images that stay are trained on."""
    there, wanted = len(plan.split.remain), config.remain.count
    return there if wanted == "all" else min(len(plan.split.forget) if wanted is None else wanted, there)


def objective(config: ClassifyConfig, build: Callable[..., Method]) -> Objective:
    """What is done on forget data. Fitting another target needs one: without a teacher that is another label."""
    own = build(**arguments(config.method, build)).forget
    return RELABEL if own is not None and own.sense > 0 else ASCENT


# ---------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Seen:
    """What a model says, float32, in eval mode, of images as they are."""

    train: metrics.Floats
    """Logits `[N, K]` of all training images."""
    test: metrics.Floats
    """Of the test images."""


def predict(config: ClassifyConfig, plan: Plan, place: Place, device: torch.device) -> Seen:
    """A model's logits, kept beside a model of the cache; the processes share the work."""
    meta = {
        "data": plan.split.data,
        "test": plan.test.digest,
        "weights": json.dumps(folders.fingerprint(place.source)),
    }
    path = None if place.cache is None else place.cache / f"predictions-{plan.test.digest[:12]}.safetensors"
    made = distributed.on_main(lambda: None if path is None else kept_logits(path, meta))
    if made is None:
        model = models.open_model(place.source.folder, device)
        made = {}
        with bar(len(plan.data) + len(plan.test), f"predictions: {place.source.folder}") as shown:

            def ask(pixels: torch.Tensor) -> torch.Tensor:
                with torch.no_grad():
                    found = logits(model.net, model.prepare(pixels.to(device))).float().cpu()
                shown.update(len(pixels) * distributed.world())
                return found

            for name, data in (("train", plan.data), ("test", plan.test)):
                made[name] = torch.cat(distributed.spread(ask, torch.split(data.pixels, config.eval.batch_size)))
        if path is not None:
            distributed.on_main(partial(write_safetensors, path, made, {**meta, "sha256": digest(made)}))
    return Seen(made["train"].numpy(), made["test"].numpy())


def kept_logits(path: Path, meta: dict[str, str]) -> dict[str, torch.Tensor] | None:
    """Logits that were kept; None for those of another model or data, and a file that is not as it was written."""
    if not path.exists():
        return None
    try:
        found, header = read_safetensors(path)
    except ValueError:
        return None
    return found if header == {**meta, "sha256": digest(found)} else None


def make_report(
    config: ClassifyConfig,
    plan: Plan,
    places: dict[str, Place],
    seen: dict[str, Seen],
    out: Path,
    mask_path: Path,
    command: str,
) -> dict[str, Any]:
    """The keys of a report: see the README. Models are `before`, `after` and, where there is one, `retrained`."""
    timing = files.read_json(out / "timing.json")
    mask = load_mask(mask_path) if mask_path.exists() else None
    result = new_report(config, command, {"forget": plan.target, "labels": plan.labels}, mask, timing)
    result["versions"]["scikit-learn"] = version("scikit-learn")
    for key, found in seen.items():
        result[key] = {"metrics": measure(plan, found), "classes": scores(plan, found)}
    if "retrained" in seen:
        ideal = result["retrained"]["metrics"]
        for key, found in seen.items():
            result[key]["metrics"] |= compare(plan, found, seen["retrained"], result[key]["metrics"], ideal)
        result["gap"] = metrics.gaps(result["after"]["metrics"], ideal)
        ideal["rte_s"] = places["retrained"].seconds
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
    """A report as the numbers that comparisons are made of: those of the table and two more.

    `avg_d_v` is of the validation images, `rte_share` the run time over that of retraining.
    """
    found = result["after"]["metrics"]
    whole = result.get("retrained", {}).get("metrics", {}).get("rte_s")
    return {
        **{name: found.get(name) for name in COLUMNS},
        "avg_d_v": found.get("avg_d_v"),
        "rte_share": found["rte_s"] / whole if whole else None,
    }
