"""Write the emoji world's models as folders, and have the judges say what they generate (see `make_emoji.py`)."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import emoji_models as nets
import emoji_world as data
import numpy as np
import torch
from emoji_generators import read_latents, transformer_modules, unet_modules
from emoji_judges import clip_modules, settle, texts_of
from emoji_training import CPU, Kit, restored
from torch import Tensor

from erase.config.read import read_preset
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.model import Model, open_model
from erase.engine.precision import Precision, resolve
from erase.evaluation import classes
from erase.resources import preset_path

PRESETS = {"emoji-sd": "sd_emoji_sfron", "emoji-sd3": "sd3_emoji_sfron"}
"""The check generates as they do."""
Drawn = Callable[[list[str], int], Tensor]
"""Images of prompts by a seed, uint8 `[N, 3, SIZE, SIZE]`."""


def export(kit: Kit, steps: int) -> None:
    """Every model whose stages are there, in fp16; a folder appears whole or not at all."""
    makers: dict[str, tuple[str, Callable[[Kit, Path], None]]] = {
        "emoji-judge": ("judge", write_judge),
        "emoji-clip": ("clip", write_clip),
        "emoji-sd": ("unet", write_sd),
        "emoji-sd3": ("transformer", write_sd3),
    }
    kit.out.mkdir(parents=True, exist_ok=True)
    for name, (stage, write) in makers.items():
        if not (kit.work / f"{stage}.pt").exists():
            print(f"{name}: not yet, {stage} is not trained")
            continue
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=kit.out) as temporary:
            made = Path(temporary) / name
            write(kit, made)
            shutil.rmtree(kit.out / name, ignore_errors=True)
            made.rename(kit.out / name)
        size = sum(f.stat().st_size for f in (kit.out / name).rglob("*") if f.is_file())
        print(f"{name}: {size / 1e6:.2f} MB", flush=True)


def write_judge(kit: Kit, folder: Path) -> None:
    net = restored(kit, "judge", {"judge": nets.new_judge(kit.world)})["judge"]
    settle(kit, net, restored(kit, "vae", {"vae": nets.new_vae()})["vae"])
    net.half().save_pretrained(folder)
    text = json.dumps(nets.processor("ViT", nets.SHOWN), indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text)


def write_clip(kit: Kit, folder: Path) -> None:
    tokenizer = nets.tokenizer_of(kit.work, kit.world)
    restored(kit, "clip", clip_modules(kit, tokenizer))["clip"].half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(nets.processor("CLIP", data.SIZE), indent=2) + "\n")


def scaled_vae(kit: Kit, **config: float) -> Any:
    """The VAE, told how latents are scaled."""
    vae: Any = restored(kit, "vae", {"vae": nets.new_vae()})["vae"]
    vae.register_to_config(scaling_factor=read_latents(kit).scale, **config)
    return vae


def write_sd(kit: Kit, folder: Path) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    tokenizer, first, _ = texts_of(kit)
    found = restored(kit, "unet", unet_modules(kit, first))
    parts = {
        "vae": scaled_vae(kit),
        "text_encoder": found["text"],
        "tokenizer": tokenizer,
        "unet": found["unet"],
        "scheduler": DDIMScheduler(**nets.scheduler_config()),
    }
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    save(StableDiffusionPipeline, parts, none, folder)


def write_sd3(kit: Kit, folder: Path) -> None:
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    tokenizer, first, second = texts_of(kit)
    found = restored(kit, "transformer", transformer_modules(kit, first, second))
    parts = {
        "transformer": found["transformer"],
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0),
        "vae": scaled_vae(kit, shift_factor=0.0),
        "text_encoder": found["first"],
        "tokenizer": tokenizer,
        "text_encoder_2": found["second"],
        "tokenizer_2": tokenizer,
    }
    save(StableDiffusion3Pipeline, parts, {"text_encoder_3": None, "tokenizer_3": None}, folder)


def save(pipeline: Any, parts: dict[str, Any], none: dict[str, Any], folder: Path) -> None:
    """In fp16; transformers would then load text encoders in half precision and diffusers the rest in float32."""
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.half()
    pipeline(**parts, **none).save_pretrained(folder, safe_serialization=True)
    for config in folder.glob("text_encoder*/config.json"):
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


# ---------------------------------------------------------------- what they generate


def check(kit: Kit, steps: int) -> None:
    """Generate `steps` images of each cell, and of as many pairs; what the judge says of them goes to `check.json`."""
    found = {}
    for name, preset in PRESETS.items():
        if not (kit.out / name).exists():
            print(f"{name} is not there: export it first")
            continue
        began = time.time()
        model = open_model(locate(kit.out / name))
        model.pipe.set_progress_bar_config(disable=True)
        draw = partial(generate, kit, model, drawn_by(preset))
        cells = [(k, s) for k, s in np.ndindex(*kit.world.held.shape) for _ in range(steps)]
        found[name] = singles(kit, draw, cells) | pairs(kit, draw, min(len(cells), 240 * steps))
        found[name] |= {"seconds": round(time.time() - began), "text distances": text_distances(kit, model.pipe)}
        print(f"{name}: " + json.dumps({k: v for k, v in found[name].items() if k != "objects"}), flush=True)
    (kit.work / "check.json").write_text(json.dumps(found, indent=1))


def drawn_by(preset: str) -> dict[str, Any]:
    """A preset's `draw`: batch size, steps, guidance, sampler."""
    found: dict[str, Any] = read_preset(preset_path(preset))["draw"]
    return found


@torch.no_grad()
def generate(kit: Kit, model: Model, by: dict[str, Any], prompts: list[str], seed: int) -> Tensor:
    """`Drawn`, by a preset's `draw`."""
    precision, images = Precision(resolve(kit.precision, CPU), CPU), []
    how = {name: value for name, value in by.items() if name != "batch_size"}
    for start in range(0, len(prompts), by["batch_size"]):
        some = prompts[start : start + by["batch_size"]]
        seeds = [torch.Generator().manual_seed(seed + start + i) for i in range(len(some))]
        images += model.generate(some, seeds, autocast=precision.autocast, **how)
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def singles(kit: Kit, draw: Drawn, cells: list[tuple[int, int]]) -> dict[str, Any]:
    """Shares of images with the right object and style, and by concept."""
    names, styles = kit.world.names, list(data.STYLES)
    prompts = [data.phrase([data.with_article(names[k])], styles[s]) for k, s in cells]
    said = classes.classify(draw(prompts, 1), kit.out / "emoji-judge")
    thing = np.array(classes.correct(classes.axis(said, "object"), [names[k] for k, _ in cells]))
    style = np.array(classes.correct(classes.axis(said, "style"), [styles[s] for _, s in cells]))
    held = np.array([bool(kit.world.held[cell]) for cell in cells])
    by_concept = {name: float(thing[[names[k] == name for k, _ in cells]].mean()) for name in names}
    return {
        "object": float(thing[~held].mean()),
        "concepts of which 80 % are right": float(np.mean([share >= 0.8 for share in by_concept.values()])),
        "style": float(style[~held].mean()),
        "held-out cells, object and style": float((thing & style)[held].mean()) if held.any() else None,
        "objects": by_concept,
    }


def pairs(kit: Kit, draw: Drawn, count: int) -> dict[str, Any]:
    """Of scenes of two objects by lot, the shares in which both are there, and in which one is."""
    scenes = kit.scenes(np.random.default_rng(9), count, held=False, doubles=1.0)
    names, styles = kit.world.names, list(data.STYLES)
    prompts = [data.phrase([data.with_article(names[k]) for k in s.objects], styles[s.style]) for s in scenes]
    images = draw(prompts, 10**6)
    said = classes.axis(classes.classify(images, kit.out / "emoji-judge"), "object")
    both = classes.correct(said, ["+".join(names[k] for k in s.objects) for s in scenes])
    one = [any(names[k] in shown for k in s.objects) for shown, s in zip(said.shown, scenes, strict=True)]
    return {"both of two": float(np.mean(both)), "one of two": float(np.mean(one))}


@torch.no_grad()
def text_distances(kit: Kit, pipe: Any) -> dict[str, float]:
    """How far apart two concepts are on average in rows of the text: at the word, at its end, and in the padding."""
    names = [name for name in kit.world.names if " " not in name][:40]
    ids = nets.tokens(pipe.tokenizer, [data.phrase([f"a {name}"], "flat") for name in names]).input_ids
    rows = pipe.text_encoder(ids).last_hidden_state if hasattr(pipe, "unet") else nets.two_rows(
        pipe.text_encoder, pipe.text_encoder_2, ids
    )[0]  # fmt: skip
    word = int((ids[0] == ids[0, -1]).nonzero()[0]) - 1
    places = {"word": word, "end": word + 1, "first padding": word + 2, "last padding": nets.MAX_TOKENS - 1}
    far = ~torch.eye(len(names), dtype=torch.bool)
    return {what: round(torch.cdist(rows[:, at], rows[:, at])[far].mean().item(), 3) for what, at in places.items()}
