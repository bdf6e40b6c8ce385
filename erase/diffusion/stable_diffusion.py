"""Stable Diffusion 1.x and 2.x: open a diffusers pipeline, cache its data, denoise, draw, save.

Everything that the training loop does not need (VAE, text encoder) is used once, before it: prompts become
embeddings and images become latents (mean and std), and both networks can then be freed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPTextModel

from erase import files
from erase.diffusion.denoiser import Denoiser
from erase.diffusion.folders import Source, check, find, read_bin, read_index

Autocast = Callable[[], AbstractContextManager[Any]]


def locate(model: str | Path) -> Source:
    """Find a checkpoint: an embedded model's name, a diffusers folder, or a hub id (downloaded once, then cached).

    Raises:
        ValueError: for a path or id that leads nowhere, a folder that is no Stable Diffusion pipeline, or a
            weight file that is cut short.
    """
    folder = find(model, StableDiffusionPipeline)
    kind = read_index(folder)["_class_name"]
    if kind != "StableDiffusionPipeline":
        raise ValueError(f"{folder} holds a {kind}; erase run sd takes a StableDiffusionPipeline (1.x, 2.x)")
    return check(str(model), folder, ("unet", "vae", "text_encoder", "tokenizer", "scheduler"))


def open_pipeline(source: Source, device: torch.device | str = "cpu") -> StableDiffusionPipeline:
    """The whole pipeline in float32, without a safety checker: it would hide what an evaluation must count.

    Raises:
        ValueError: for weights that do not fit their configuration.
    """
    try:
        unet = UNet2DConditionModel.from_pretrained(
            source.folder, subfolder=source.unet, variant=source.variant, dtype=torch.float32
        )
        encoder: Any = CLIPTextModel  # its annotations leave out output_loading_info
        text_encoder, info = encoder.from_pretrained(
            source.folder,
            subfolder="text_encoder",
            variant=source.variant,
            dtype=torch.float32,
            output_loading_info=True,
        )
        pipe = StableDiffusionPipeline.from_pretrained(
            source.folder,
            unet=unet,
            text_encoder=text_encoder,
            variant=source.variant,
            dtype=torch.float32,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{source.folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    # Weights that their files lack: transformers makes them up, diffusers leaves them on "meta".
    absent = {"text_encoder": sorted(info["missing_keys"])}
    for part in ("unet", "vae"):
        absent[part] = [name for name, p in getattr(pipe, part).named_parameters() if p.is_meta]
    for part, names in absent.items():
        if names:
            raise ValueError(
                f"{source.folder / part}: {len(names)} weights are missing, such as {names[0]}: get it again"
            )
    channels = pipe.unet.config.in_channels
    if channels != pipe.vae.config.latent_channels:
        raise ValueError(
            f"{source.folder} has a UNet of {channels} input channels for {pipe.vae.config.latent_channels} latent "
            "channels: inpainting and depth models are not supported"
        )
    pipe.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    return pipe.to(device)


def resolution(pipe: StableDiffusionPipeline) -> int:
    """The image size the UNet was trained at, pixels."""
    return int(pipe.unet.config.sample_size * pipe.vae_scale_factor)


def token_count(pipe: StableDiffusionPipeline, prompt: str) -> int:
    """Tokens of a prompt, begin and end included."""
    return len(pipe.tokenizer(prompt, truncation=False).input_ids)


def check_prompts(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> None:
    """Refuse prompts that would be cut.

    Raises:
        ValueError: for a prompt longer than the tokenizer allows.
    """
    allowed = pipe.tokenizer.model_max_length
    for prompt in prompts:
        count = token_count(pipe, prompt)
        if count > allowed:
            raise ValueError(
                f"the prompt {prompt[:60]!r}{'…' if len(prompt) > 60 else ''} has {count} tokens, this model takes "
                f"{allowed}: shorten it"
            )


@torch.no_grad()
def embed(pipe: StableDiffusionPipeline, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Text embeddings `[P, T, D]`, float32, on the CPU.

    Raises:
        ValueError: for a prompt longer than the tokenizer allows.
    """
    check_prompts(pipe, prompts)
    parts = []
    for start in range(0, len(prompts), batch_size):
        cond, _ = pipe.encode_prompt(list(prompts[start : start + batch_size]), pipe.device, 1, False)
        parts.append(cond.float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def encode(pipe: StableDiffusionPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Latent mean and std of images in `[-1, 1]`, `[B, 3, R, R]`, scaled as the UNet sees them, on the CPU."""
    posterior = pipe.vae.encode(pixels.to(pipe.device)).latent_dist
    scale = pipe.vae.config.scaling_factor
    return (posterior.mean * scale).float().cpu(), (posterior.std * scale).float().cpu()


@torch.no_grad()
def draw_latents(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    *,
    steps: int,
    guidance: float,
    batch_size: int = 16,
    autocast: Autocast = nullcontext,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """What the model itself draws for prompts, as latents `[N, C, H, W]` on the CPU: nothing is decoded and encoded."""
    parts = []
    for start in range(0, len(prompts), batch_size):
        with autocast():
            drawn = pipe(
                list(prompts[start : start + batch_size]),
                generator=list(generators[start : start + batch_size]),
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="latent",
            ).images
        parts.append(drawn.float().cpu())
        if progress is not None:
            progress(min(start + batch_size, len(prompts)))
    return torch.cat(parts)


def sampler(
    pipe: StableDiffusionPipeline, *, steps: int, guidance: float, autocast: Autocast = nullcontext
) -> Callable[..., list[Image.Image]]:
    """A function that draws pictures, as `erase.evaluation.generate` takes it."""

    def sample(
        prompts: list[str],
        generators: list[torch.Generator],
        *,
        guidance: float | None = None,
        width: int | None = None,
        height: int | None = None,
        _default: float = guidance,
    ) -> list[Image.Image]:
        with torch.no_grad(), autocast():
            images: list[Image.Image] = pipe(
                prompts,
                generator=generators,
                num_inference_steps=steps,
                guidance_scale=_default if guidance is None else guidance,
                width=width,
                height=height,
            ).images
        return images

    return sample


def _predict(net: nn.Module, noisy: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    out: Tensor = net(noisy, t, encoder_hidden_states=cond, return_dict=False)[0]
    return out


def denoiser(pipe: StableDiffusionPipeline, null: Tensor | None = None) -> Denoiser:
    """The UNet as a backend, with the schedule it was trained on; `null` embeds the empty prompt, `[1, T, D]`."""
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    return Denoiser(
        net=pipe.unet,
        predict_fn=_predict,
        alphas_cumprod=schedule.alphas_cumprod.float(),
        prediction=schedule.config.prediction_type,
        null=null,
    )


def describe(source: Source) -> dict[str, Any]:
    """What the checkpoint is, from its configuration files alone."""
    unet: dict[str, Any] = files.read_json(source.folder / source.unet / "config.json")
    scheduler: dict[str, Any] = files.read_json(source.folder / "scheduler" / "scheduler_config.json")
    numel, kinds = 0, set()
    for path in source.weights:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118
                    part = f.get_slice(name)
                    numel += torch.Size(part.get_shape()).numel()
                    kinds.add(str(part.get_dtype()))
        else:
            for tensor in read_bin(path, "meta").values():
                numel += tensor.numel()
                kinds.add(str(tensor.dtype).removeprefix("torch.").replace("float", "F").upper())
    return {
        "kind": "Stable Diffusion pipeline",
        "unet_weights": numel,
        "dtype": "/".join(sorted(kinds)),
        "resolution": unet.get("sample_size"),
        "cross_attention_dim": unet.get("cross_attention_dim"),
        "prediction_type": scheduler.get("prediction_type", "epsilon"),
        "ema": source.unet == "unet_ema",
        "index": json.loads((source.folder / "model_index.json").read_text()),
    }
