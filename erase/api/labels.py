"""Class-conditional pipelines and networks forget classes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from erase.api.history import past
from erase.api.learning import learn, no_launch_left
from erase.api.result import About, Result, Sampling, base_name, finish
from erase.api.settings import Call, choose
from erase.diffusion.class_conditional import ClassConditionalPipeline
from erase.diffusion.live import checkpointing, exact_vae, family_name, model_of, unet_names
from erase.diffusion.loading import networks
from erase.diffusion.model import Model
from erase.engine.borrow import borrow
from erase.programs import saving
from erase.programs.images import sampler_of
from erase.programs.inputs import check_guidance, learning_of, sides_read, with_dropout
from erase.programs.labels.data import gather
from erase.programs.labels.lesson import make_lesson
from erase.programs.labels.plan import check, make_plan, read_data
from erase.programs.progress import listening
from erase.store.class_names import class_names

Label = str | int


def forget_labels(
    given: Any,
    what: Label | Sequence[Label] | None,
    call: Call,
    *,
    label: Label | Sequence[Label] | None = None,
    names: int | Sequence[str] = (),
    anchor: Label | Sequence[Label] | None = None,
    data: str | Path | None = None,
    scheduler: Any = None,
) -> Result:
    """Arguments as those of `erase.forget`."""
    began = time.perf_counter()
    if (what is None) == (label is None) and (call.preset is None or what is not None):
        raise ValueError("give what to forget once, by what or by label, such as erase.forget(pipe, label=3)")
    called = class_names(names) if names else ()
    model = _open(given, called, scheduler)
    unnamed = model.family.TRAINED == "unet" and not isinstance(given, ClassConditionalPipeline)
    net, parts = model.net, list(networks(model.pipe).values())
    kind = family_name(model.pipe) or ""
    asked = _asked(label if what is None else what, call, anchor, data)
    chosen = choose(call, kind, asked, ("new_net", "denoiser"), model.device, model.dtype)
    chosen = replace(chosen, config=with_dropout(chosen.config, model.has_null))
    config, before = chosen.config, past(net)
    found = None if config.data is None else read_data(config, None, lambda line: None)
    plan = make_plan(config, model, found, False, before.forgotten)
    check(config, plan, model, chosen.method)
    check_guidance(config.saliency, chosen.entry, model.has_null)
    with (
        listening(call.progress),
        no_launch_left(),
        borrow(net, parts) as loan,
        checkpointing(net, config.train.checkpointing),
    ):
        for part in parts:
            part.eval()
        model.choose(learning_of(config))
        loan.keep()
        with exact_vae(model.pipe):
            used = sides_read(config, chosen.entry)
            sides = gather(config, plan, model, chosen.precision, False, wanted=used)
        learned = learn(chosen, make_lesson(config, model, *sides), call.progress)
    sample = sampler_of(model, config.draw, chosen.precision)
    about = About(
        chosen,
        base_name(given, before),
        saving.hidden({"forget": plan.forget, "anchors": plan.anchors}),
        tuple(plan.gone),
        None if given is net else model.family.TRAINED,
        labels=tuple(model.labels) if unnamed else called,
    )
    shown = [plan.labels[i] for i in (*plan.forget, *plan.remain[:3])]
    sampling = Sampling(sample, shown, len(plan.forget), parts, config.draw.batch_size)
    return finish(Result(given, learned, time.perf_counter() - began, net, about, before, loan.base, sampling), call)


def _open(given: Any, names: Sequence[str], scheduler: Any) -> Model:
    """A pipeline, or a lone network with its noise schedule, as a model."""
    if not isinstance(given, UNet2DModel):
        if scheduler is not None:
            raise TypeError("scheduler is for a lone UNet2DModel; a pipeline has its own")
        return model_of(given, names)
    called = unet_names(given, "the UNet2DModel", names)
    return model_of(ClassConditionalPipeline(given, scheduler or DDPMScheduler(), called))


def _asked(
    label: Label | Sequence[Label] | None,
    call: Call,
    anchor: Label | Sequence[Label] | None,
    data: str | Path | None,
) -> dict[str, Any]:
    """Nested settings."""
    forget: dict[str, Any] = {}
    if label is not None:
        forget["labels"] = _listed(label)
        forget["anchors"] = []
    if anchor is not None:  # a redirect to it, of images of both
        forget |= {"anchors": _listed(anchor), "loss": "redirect", "among": "all"}
    asked: dict[str, Any] = {"pipeline": "ddpm", "model": "a model in memory", "forget": forget, "eval": {"images": 0}}
    asked["labels"], asked["architecture"] = [], None
    if data is not None or call.preset is None:
        asked["data"] = None if data is None else {"source": str(data)}
    return asked


def _listed(labels: Label | Sequence[Label]) -> list[Label]:
    return [labels] if isinstance(labels, str | int) else list(labels)
