"""A small model of each kind, a preset for it, and a finished run: not to be changed by a test."""

from pathlib import Path

import micro_classify
import micro_ddpm
import pytest
import yaml
from jobs import COUNTED, NAMES, Runner

from erase.classification import models
from erase.diffusion import class_conditional


def runner(folder: Path, settings: dict[str, object]) -> Runner:
    (folder / "micro.yaml").write_text(yaml.safe_dump(settings))
    return Runner(folder / "micro.yaml", folder)


@pytest.fixture(scope="session")
def text_runs(micro_sd: Path, micro_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Of a text-to-image model, with a set of labelled prompts."""
    folder = tmp_path_factory.mktemp("text")
    lines = [f"a photo of a {name},{name},plain,{i}\n" for i, name in enumerate(NAMES)]
    (folder / "set.csv").write_text("prompt,object,style,seed\n" + "".join(lines))
    sets = {"prompts": [str(folder / "set.csv")]}
    settings = {
        "pipeline": "sd",
        "model": str(micro_sd),
        "method": {"name": "sfron", "fast_rate": 1e-2, "fast_rule": "adam"},
        "saliency": {"density": 0.3, "count": 4, "draws": 1, "batch_size": 4},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3},
        "forget": {"prompts": ["a photo of a cat"], "anchors": ["a photo of a dog"], "count": 2, "axis": "object"},
        "remain": {**sets, "count": 1},
        "draw": {"steps": 2, "guidance": 3.0, "batch_size": 4},
        "eval": {**sets, "images": 2, "classifier": str(micro_classifier), "blur": False},
    }
    return runner(folder, settings)


@pytest.fixture(scope="session")
def text_run(text_runs: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_runs(tmp_path_factory.mktemp("text") / "finished", *COUNTED, preset="micro.yaml")


@pytest.fixture(scope="session")
def label_runs(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Of a class-conditional model, with images and a judge."""
    folder = tmp_path_factory.mktemp("labels")
    micro_ddpm.write_images(folder / "data/train")
    micro_ddpm.write_images(folder / "data/test", seed=1)
    micro_ddpm.write_classifier(folder / "judge")
    class_conditional.save_new(micro_ddpm.model(), folder / "base")
    class_conditional.save_new(micro_ddpm.model(seed=5), folder / "retrained")
    micro_ddpm.model().unet.save_pretrained(folder / "lone")
    settings = {
        "pipeline": "ddpm",
        "model": str(folder / "base"),
        "method": {"name": "sfron", "fast_rate": 1e-2},
        "saliency": {"density": 0.3, "count": 4, "draws": 1, "batch_size": 4},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3, "parameters": "full"},
        "forget": {"labels": ["bee"], "count": 4},
        "draw": {"steps": 2, "batch_size": 8},
        "data": {"source": str(folder / "data")},
        "eval": {"images": 6, "classifier": str(folder / "judge"), "blur": False},
    }
    return runner(folder, settings)


@pytest.fixture(scope="session")
def label_run(label_runs: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a retrained model to compare with."""
    return label_runs(tmp_path_factory.mktemp("labels") / "finished", "eval.retrained={work}/retrained")


@pytest.fixture(scope="session")
def classify_runs(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Of a classifier that is trained first; the cache of trained models is in the folder too."""
    folder = tmp_path_factory.mktemp("classify")
    micro_ddpm.write_images(folder / "data/train", count=10)
    micro_ddpm.write_images(folder / "data/test", count=6, seed=1)
    models.save(micro_classify.model(seed=3), folder / "base")
    settings = {
        "pipeline": "classify",
        "model": "new",
        "architecture": micro_classify.RESNET,
        "data": {"source": str(folder / "data"), "validation": 0.2},
        "recipe": {"epochs": 2, "batch_size": 8, "lr": 0.05},
        "forget": {"fraction": 0.25},
        "method": {"name": "sfron", "fast_rate": 1e-2, "slow_steps": 2},
        "saliency": {"density": 0.3, "count": 4, "draws": 1, "batch_size": 4},
        "train": {"steps": 2, "batch_size": 4, "lr": 1e-2, "weight_decay": 1e-3},
        "cache": str(folder / "cache"),
    }
    return runner(folder, settings)


@pytest.fixture(scope="session")
def classify_run(classify_runs: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classify_runs(tmp_path_factory.mktemp("classify") / "finished", preset="micro.yaml")
