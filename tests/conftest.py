"""Set up before any test module is imported: one thread, no network, no state carried from test to test."""

import os

# before torch and huggingface_hub read them; subprocesses inherit them
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import typer

from erase import resources

torch.set_num_threads(1)  # tiny models: threads cost more than they bring
gc.set_threshold(20_000)  # the libraries' objects are many, and hardly any is garbage
typer.main.get_command = cache(typer.main.get_command)  # 40 ms, which a user's process takes once


@pytest.fixture(autouse=True, scope="module")
def libraries_are_no_garbage() -> None:
    """What was imported until now stays; a run that collects garbage need not look at it again, for 0.3 s."""
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in class attributes; forget them after each test that used it."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="session")
def tiny_sd() -> Path:
    """The embedded Stable Diffusion checkpoint."""
    return resources.tiny_path("photos-sd")


@pytest.fixture(scope="session")
def micro_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion checkpoint of random weights in fp16; not to be changed by a test."""
    import micro

    work = tmp_path_factory.mktemp("micro")
    micro.pipeline(work).to(torch.float16).save_pretrained(work / "micro-sd")
    return work / "micro-sd"


@pytest.fixture(scope="session")
def micro_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of random weights that knows `micro.LABELS`."""
    import micro

    folder = tmp_path_factory.mktemp("micro") / "classifier"
    micro.write_classifier(folder)
    return folder


@pytest.fixture(scope="session")
def micro_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of random weights; not to be changed by a test."""
    import micro

    return micro.write_clip(tmp_path_factory.mktemp("micro") / "clip")


@pytest.fixture(scope="session")
def micro_siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP model of random weights; not to be changed by a test."""
    import micro

    return micro.write_clip(tmp_path_factory.mktemp("micro") / "siglip", siglip=True)
