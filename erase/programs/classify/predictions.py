"""What a classifier says of every image, and which part of the data an image belongs to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from erase.classification import folders, metrics, models
from erase.classification.backend import logits
from erase.config import ClassifyConfig
from erase.engine import distributed
from erase.programs.classify.plan import Plan
from erase.programs.classify.trained import Place
from erase.programs.progress import bar
from erase.store.safetensors import digest, read_safetensors, write_safetensors


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


def parts(plan: Plan, seen: Seen) -> dict[str, tuple[metrics.Floats, metrics.Ints]]:
    """Logits and labels of each part of the data."""
    labels = plan.data.labels.numpy()
    index = {"forget": plan.split.forget, "remain": plan.split.remain, "validation": plan.split.validation}
    found = {name: (seen.train[i.numpy()], labels[i.numpy()]) for name, i in index.items()}
    return {**found, "test": (seen.test, plan.test.labels.numpy())}
