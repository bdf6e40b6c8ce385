"""A call and a run with the same settings leave the same weights, bit for bit."""

from pathlib import Path

import jobs
import micro_ddpm
import pytest
import torch

import erase
from erase.api import settings
from erase.diffusion.checkpoints.locate import locate
from erase.programs import saving

NO_IMAGES = ("eval.images=0", "precision=no")


def same(out: Path, net: torch.nn.Module) -> bool:
    stored, mine = saving.tensors(locate(out / "model")), net.state_dict()
    return all(torch.equal(x, mine[name].to(x.dtype)) for name, x in stored.items())


@pytest.mark.slow
def test_text(micro_sd: Path, tmp_path: Path) -> None:
    runner = jobs.Runner(Path(settings.PRESETS["sd"]), tmp_path)
    words = (f"model={micro_sd}", "forget.prompts=[a cat]", "forget.anchors=[a dog]", "seed=3", "eval.prompts=[a cat]")
    out = runner(tmp_path / "run", *words, *NO_IMAGES)
    pipe = erase.load(micro_sd)
    base = {name: x.clone() for name, x in pipe.unet.state_dict().items()}
    result = erase.forget(pipe, "a cat", anchor="a dog", seed=3, settings={"precision": "no"})
    assert same(out, pipe.unet)
    assert any(not torch.equal(x, base[name]) for name, x in pipe.unet.state_dict().items())
    assert [row["forget_loss"] for row in result.metrics] == [row["forget_loss"] for row in jobs.rows(out)]


@pytest.mark.slow
def test_labels(tmp_path: Path) -> None:
    micro_ddpm.pipeline(tmp_path).save_pretrained(tmp_path / "ddpm")
    runner = jobs.Runner(Path(settings.PRESETS["ddpm"]), tmp_path)
    words = ("forget.labels=[dog]", "eval.classifier=null")
    out = runner(tmp_path / "run", f"model={tmp_path / 'ddpm'}", *words, *NO_IMAGES)
    pipe = erase.load(tmp_path / "ddpm")
    erase.forget(pipe, label="dog", settings={"precision": "no"})
    assert same(out, pipe.unet)
