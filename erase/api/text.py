"""Text-to-image pipelines forget prompts."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from erase import resources
from erase.api.history import past
from erase.api.images import write_images
from erase.api.learning import learn, no_launch_left
from erase.api.result import About, Result, Sampling, base_name, finish
from erase.api.settings import PRESETS, Call, choose
from erase.config import listed, read_preset
from erase.diffusion.live import checkpointing, exact_vae, family_name, model_of
from erase.diffusion.loading import networks
from erase.diffusion.lora.train import merge, taken_out
from erase.diffusion.text import check_edited
from erase.engine.borrow import borrow
from erase.engine.updates import ClosedForm
from erase.programs import saving
from erase.programs.images import sampler_of
from erase.programs.inputs import check_dense, check_guidance, learning_of, with_dropout
from erase.programs.progress import listening
from erase.programs.text.lesson import make_lesson, read_sides, readable
from erase.programs.text.plan import make_plan, marks


def forget_prompts(
    pipe: Any,
    prompts: str | Sequence[str] | None,
    call: Call,
    *,
    anchor: str | Sequence[str] | None = None,
    remain: str | Sequence[str] | None = None,
    images: str | Path | Sequence[Image.Image] | None = None,
) -> Result:
    """Arguments as those of `erase.forget`."""
    began = time.perf_counter()
    model = model_of(pipe)
    net, parts = model.net, list(networks(model.pipe).values())
    with ExitStack() as stack:
        folder = None if images is None else _folder(images, stack)
        asked = _asked(prompts, call, anchor, remain, folder)
        chosen = choose(call, family_name(pipe) or "", asked, ("concepts", "denoiser"), model.device, model.dtype)
        chosen = replace(chosen, config=with_dropout(chosen.config, model.has_null))
        config = chosen.config
        check_guidance(config.saliency, chosen.entry, model.has_null)
        before = past(net)
        plan = readable(config, make_plan(config, before.forgotten), model, lambda line: None)
        model.check_prompts(plan.words)
        for context in (listening(call.progress), no_launch_left()):
            stack.enter_context(context)
        with borrow(net, parts) as loan, taken_out(net), checkpointing(net, config.train.checkpointing):
            for part in parts:
                part.eval()
            with exact_vae(model.pipe):
                sides = read_sides(config, plan, model, chosen.entry, chosen.method, chosen.precision)
            names = model.select(learning_of(config))
            if isinstance(chosen.method.update, ClosedForm) or config.forget.start == "uce":
                check_dense(config)
                check_edited(model, names)
            loan.keep()
            model.choose(learning_of(config))
            learned = learn(chosen, make_lesson(config, model, sides), call.progress)
            learned.pairs = merge(net)
    sample = sampler_of(model, config.draw, chosen.precision)
    shown = dict.fromkeys([*plan.forget, *filter(None, plan.anchors), *plan.remain[:2]])
    about = About(
        chosen,
        base_name(pipe, before),
        saving.hidden(plan.target),
        tuple(dict.fromkeys([*before.forgotten, *marks(config, plan)])),
        model.family.TRAINED,
    )
    sampling = Sampling(sample, list(shown), len({*plan.forget}), parts, config.draw.batch_size)
    return finish(Result(pipe, learned, time.perf_counter() - began, net, about, before, loan.base, sampling), call)


def _asked(
    prompts: str | Sequence[str] | None,
    call: Call,
    anchor: str | Sequence[str] | None,
    remain: str | Sequence[str] | None,
    images: Path | None,
) -> dict[str, Any]:
    """Nested settings."""
    own = call.preset is not None
    below = read_preset(resources.preset_path(str(call.preset))) if own else {}
    if prompts is None and not own:
        raise ValueError(
            "say what to forget, such as erase.forget(pipe, 'a photo of a cat'), or give a preset that does"
        )
    forget: dict[str, Any] = {"images": images}
    kept: dict[str, Any] = {"images": None}
    if prompts is not None:
        forget |= {"prompts": listed(prompts), "anchors": []}
    if anchor is not None:
        forget["anchors"] = listed(anchor)
    if remain is not None:
        kept["prompts"] = listed(remain)
    elif prompts is not None and below.get("concept"):  # the preset's own prompts go with its own concept
        kept["prompts"] = read_preset(resources.preset_path(PRESETS["sd"]))["remain"]["prompts"]
    return {
        **({"concept": None} if prompts is not None else {}),  # nothing is left of what a preset has for its own
        "pipeline": "sd",
        "model": "a pipeline in memory",
        "forget": forget,
        "remain": kept,
        "eval": {"prompts": [], "images": 0},
    }


def _folder(images: str | Path | Sequence[Image.Image], stack: ExitStack) -> Path:
    """Where the images are, or are for the time of the call."""
    if isinstance(images, str | Path):
        return Path(images)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if not all(isinstance(image, Image.Image) for image in images):
        raise TypeError("images must be a folder, or PIL images")
    write_images(images, folder)
    return folder
