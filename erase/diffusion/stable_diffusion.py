"""Stable Diffusion 1.x and 2.x: open a diffusers pipeline, cache its data, denoise, draw, save.

Everything that the training loop does not need (VAE, text encoder) is used once, before it: prompts become
embeddings and images become latents (mean and std), and both networks can then be freed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPTextModel

from erase import files, resources
from erase.checkpoint import read_safetensors, write_safetensors
from erase.diffusion.denoiser import Denoiser

WEIGHTS = "diffusion_pytorch_model"
Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk: a diffusers folder, and where in it the UNet's weights lie."""

    name: str
    """As the user gave it."""
    folder: Path
    unet: str = "unet"
    """Subfolder of the weights to start from: `unet_ema` where the checkpoint has one."""
    variant: str | None = None
    """`fp16` for files named so."""

    @property
    def index(self) -> Path:
        """Where the list of the UNet's shards is, if there are shards."""
        tag = f".{self.variant}" if self.variant else ""
        return self.folder / self.unet / f"{WEIGHTS}.safetensors.index{tag}.json"

    @property
    def weights(self) -> list[Path]:
        """The UNet's weight files: one, or the shards."""
        tag = f".{self.variant}" if self.variant else ""
        folder = self.folder / self.unet
        if self.index.is_file():
            return [folder / name for name in sorted(set(files.read_json(self.index)["weight_map"].values()))]
        for suffix in (".safetensors", ".bin"):
            if (folder / f"{WEIGHTS}{tag}{suffix}").is_file():
                return [folder / f"{WEIGHTS}{tag}{suffix}"]
        return []


def locate(model: str | Path) -> Source:
    """Find a checkpoint: an embedded model's name, a diffusers folder, or a hub id (downloaded once, then cached).

    Raises:
        ValueError: for a path or id that leads nowhere, a folder that is no Stable Diffusion pipeline, or a
            weight file that is cut short.
    """
    name = str(model)
    if name in resources.list_tiny():
        folder = resources.tiny_path(name)
    elif Path(name).is_dir():
        folder = Path(name)
    elif Path(name).exists():
        raise ValueError(f"{name} is a file; a model is a diffusers folder, a hub id, or one of: {_tiny_names()}")
    elif name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not Path(name).parent.is_dir():
        folder = _download(name)
    else:
        raise ValueError(f"no model {name!r}: not a folder, not a hub id (owner/name), not one of: {_tiny_names()}")
    return _check(name, folder)


def _tiny_names() -> str:
    return ", ".join(resources.list_tiny()) or "(no embedded models)"


def _download(name: str) -> Path:
    try:
        return Path(StableDiffusionPipeline.download(name))
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"model {name!r} is no folder here, and the hub did not give it: {reason}") from error


def _check(name: str, folder: Path) -> Source:
    index = files.read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else None
    if not isinstance(index, dict):
        raise ValueError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    kind = index.get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise ValueError(f"{folder} holds a {kind}; erase run sd takes a StableDiffusionPipeline (1.x, 2.x)")
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} is not whole: the subfolder {part} is missing")
    for config in (*folder.glob("*/config.json"), *folder.glob("*/scheduler_config.json")):
        files.read_json(config)
    for weights in folder.glob("*/*.safetensors"):
        try:
            with safe_open(weights, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{weights} is cut short or no safetensors file ({error}): get it again") from error
    for unet in ("unet_ema", "unet"):
        for variant in (None, "fp16"):
            source = Source(name, folder, unet, variant)
            if source.weights:
                missing = [p for p in source.weights if not p.is_file()]
                if missing:
                    raise ValueError(f"{folder} is not whole: {missing[0].relative_to(folder)} is missing")
                return source
    raise ValueError(f"{folder / 'unet'} has no weights ({WEIGHTS}.safetensors)")


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


def save(source: Source, tensors: Mapping[str, Tensor], out: Path, meta: Mapping[str, str]) -> None:
    """Write the checkpoint again with other UNet weights, in the form it came in.

    Files, shards, names and dtypes are the original's; a tensor that did not change is bit-identical; other
    components are copied as they are. Other variants of the UNet, single-file checkpoints and folders that are no
    component are left out: they could still hold the concept. The folder appears whole or not at all.

    Args:
        source: the checkpoint that was opened.
        tensors: new values of the trained parameters, by name.
        out: the folder to write; must not exist.
        meta: added to the safetensors header.

    Raises:
        ValueError: if `out` exists, a name is not among the checkpoint's tensors, or a value is beyond its dtype.
        OSError: if the disk is full or cannot be written.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        target = temporary / out.name
        shutil.copytree(source.folder, target, ignore=_left_out(source))
        (target / "unet").mkdir(exist_ok=True)
        config = source.folder / source.unet / "config.json"
        files.write_bytes(target / "unet" / "config.json", config.read_bytes())
        left = set(tensors)
        for path in source.weights:
            left -= _rewrite(path, tensors, target / "unet", meta)
        if left:
            raise ValueError(f"{source.folder} has no tensor named {sorted(left)[0]!r} in its UNet")
        if source.index.is_file():
            files.write_bytes(target / "unet" / source.index.name, source.index.read_bytes())
        target.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _left_out(source: Source) -> Callable[[str, list[str]], set[str]]:
    heavy = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data")
    top, unet = source.folder, source.folder / "unet"
    components = files.read_json(top / "model_index.json").keys()

    def ignore(folder: str, names: list[str]) -> set[str]:
        here = Path(folder)
        if here not in (top, unet):
            return set()
        kept = components if here == top else ()
        return {
            n
            for n in names
            if n.lower().endswith(heavy) or (here == unet and ".index" in n) or ((here / n).is_dir() and n not in kept)
        }

    return ignore


def _rewrite(path: Path, tensors: Mapping[str, Tensor], folder: Path, meta: Mapping[str, str]) -> set[str]:
    """Write one weight file with new values; the names of those written."""
    old, header = (_read_bin(path), {"format": "pt"}) if path.suffix == ".bin" else read_safetensors(path)
    taken = set(tensors) & set(old)
    for name in taken:
        if old[name].shape != tensors[name].shape:
            raise ValueError(f"{path}: {name} has shape {list(old[name].shape)}, got {list(tensors[name].shape)}")
        old[name] = tensors[name].detach().to("cpu", old[name].dtype)
        if not old[name].isfinite().all():
            raise ValueError(f"{name} holds values that {str(old[name].dtype).removeprefix('torch.')} does not reach")
    write_safetensors(folder / f"{path.stem}.safetensors", old, {"format": "pt", **header, **meta})
    return taken


def _read_bin(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Weights that were pickled; nothing but tensors is unpickled."""
    try:
        found: dict[str, Tensor] = torch.load(path, map_location=device, weights_only=True)  # noqa: TID251
    except Exception as error:  # broken pickles raise a dozen unrelated types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is cut short, or holds more than weights ({reason})") from error
    return found


def fingerprint(source: Source) -> dict[str, str]:
    """SHA-256 of every weight file of the checkpoint, by path inside it."""
    others = [p for part in ("vae", "text_encoder") for p in (source.folder / part).iterdir()]
    paths = sorted({*source.weights, *(p for p in others if p.suffix in (".safetensors", ".bin"))})
    return {p.relative_to(source.folder).as_posix(): files.sha256(p) for p in paths}


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
            for tensor in _read_bin(path, "meta").values():
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
