"""Models trained by a recipe, kept in a cache by a hash of all that they are made of: none is trained twice."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from erase.classification import folders, models
from erase.classification.backend import Augment, Classifier, together
from erase.classification.models import Model
from erase.config import NEW, ClassifyConfig, Recipe, TrainClassifier, dump
from erase.engine import distributed
from erase.engine.batches import Batches
from erase.methods.retrain import retrain
from erase.programs import saving
from erase.programs.classify.plan import Plan, training_seed
from erase.programs.run import TRAINED
from erase.programs.training import run_steps
from erase.store import files
from erase.store.safetensors import write_safetensors

TRAINING = 1
"""Goes up with every change of the code that gives other weights for the same recipe: caches are then not used."""
LOCK = ".lock"
"""A file of the cache, locked in part while a model is trained."""
Say = Callable[[str], None]


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
        """A model by the recipe on the training images `index`: from the cache, or trained now.

        While another launch trains it, this one waits.
        """
        cache, made_of = self.entry(index)
        source = folders.Source(f"trained-{cache.name}", cache / "model")
        mine, told = False, False
        with ExitStack() as held:
            while (found := distributed.on_main(lambda: kept(cache, made_of))) is None and not mine:
                mine = distributed.on_main(lambda: claim(cache, held))
                if not mine:  # asked again and again: processes of a launch do not wait for each other for hours
                    if not told:
                        self.say(f"{what}: another process is at work on it in {cache}: waiting")
                    told = True
                    time.sleep(1)
            if found is None:
                found = self._train(what, index, cache, made_of)
        return Place(source, found["seconds"], cache)

    def _train(self, what: str, index: torch.Tensor, cache: Path, made_of: dict[str, Any]) -> dict[str, Any]:
        """Train a model and put it into the cache; its record."""
        config, recipe = self.config, self.config.recipe
        assert recipe is not None
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
        return distributed.on_main(lambda: keep(model, cache, record))


def claim(cache: Path, held: ExitStack) -> bool:
    """Whether this process alone may train a model of the cache, as long as the stack is open."""
    with ExitStack() as stack:
        mine = stack.enter_context(files.claim(cache.parent / LOCK, cache.name))
        if mine:
            held.push(stack.pop_all())
    return mine


def kept(cache: Path, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a trained model in the cache; None where none was kept to the end.

    Raises:
        ValueError: for a model of something else, or files that are not those that were kept.
    """
    if not (cache / "trained.json").exists():
        return None
    record = files.read_json(cache / "trained.json")
    if files.read_json(cache / "key.json") != made_of or record.get("files") != hashes(cache / "model"):
        raise ValueError(f"{cache} was changed after training: remove it to train the model again")
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
    write_safetensors(out / TRAINED, {}, {"timing": json.dumps({"erase_s": retrained.seconds})})
    with tempfile.TemporaryDirectory(prefix=f".{saving.MODEL}.", suffix=".tmp", dir=out) as temporary:
        files.copy_folder(retrained.source.folder, Path(temporary) / saving.MODEL)
        (Path(temporary) / saving.MODEL).rename(out / saving.MODEL)
