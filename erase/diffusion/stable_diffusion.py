"""Stable Diffusion 1.x and 2.x: open a diffusers folder or a single file, cache its data, denoise, draw.

Everything that the training loop does not need (VAE, text encoder) is used once, before it: prompts become
embeddings and images become latents (mean and std), and both networks can then be freed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel

from erase import resources
from erase.diffusion.checkpoints import folders, single_file
from erase.diffusion.checkpoints.folders import Source, check, find, read_index
from erase.diffusion.checkpoints.single_file import SUFFIXES, Prediction, SingleFile
from erase.diffusion.data import Concepts
from erase.diffusion.denoiser import Denoiser
from erase.store import files
from erase.store.safetensors import KINDS
from erase.store.safety import check_finite

Autocast = Callable[[], AbstractContextManager[Any]]


def locate(model: str | Path, *, prediction: Prediction | None = None, trusted: bool = False) -> Source | SingleFile:
    """Find a checkpoint: an embedded model's name, a diffusers folder, a single file, or a hub id (downloaded once).

    Args:
        model: as the user gave it; a folder may hold one single file instead of a pipeline.
        prediction: what a single file of 2.x predicts, if it does not say.
        trusted: whether a pickle may run code.

    Raises:
        ValueError: for a path or id that leads nowhere, a file or folder that is no Stable Diffusion, or a weight file
            that is broken.
    """
    path = Path(model)
    if str(model) not in resources.list_tiny() and not (path / "model_index.json").exists():
        alone = [p for suffix in SUFFIXES for p in path.glob(f"*{suffix}")]
        path = alone[0] if len(alone) == 1 else path
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} is no model: a single file is {' or '.join(SUFFIXES)}")
        return single_file.find(str(model), path, shapes, prediction=prediction, trusted=trusted)
    folder = find(model, StableDiffusionPipeline)
    kind = read_index(folder)["_class_name"]
    if kind != "StableDiffusionPipeline":
        raise ValueError(f"{folder} holds a {kind}; erase run sd takes a StableDiffusionPipeline (1.x, 2.x)")
    return check(str(model), folder, ("unet", "vae", "text_encoder", "tokenizer", "scheduler"))


def shapes(texts: Mapping[str, str]) -> single_file.Shapes:
    """Of the tensors that the networks of a folder's configuration have, by part and name.

    Raises:
        ValueError: for a configuration that makes no network.
    """
    try:
        with torch.device("meta"):
            nets = {part: network(part, json.loads(texts[f"{part}/config.json"])) for part in ("unet", "vae")}
            nets["text_encoder"] = CLIPTextModel(_text_config(texts))
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"the configuration makes no network: {str(error).strip().splitlines()[0]}") from error
    return {part: {name: t.shape for name, t in net.state_dict().items()} for part, net in nets.items()}


def network(part: str, config: dict[str, Any]) -> nn.Module:
    """The UNet or the VAE of a configuration, with new weights."""
    kind: Any = UNet2DConditionModel if part == "unet" else AutoencoderKL
    net: nn.Module = kind.from_config(config)
    return net


def _text_config(texts: Mapping[str, str]) -> CLIPTextConfig:
    found: CLIPTextConfig = CLIPTextConfig.from_dict(json.loads(texts["text_encoder/config.json"]))
    return found


def open_pipeline(source: Source | SingleFile, device: torch.device | str = "cpu") -> StableDiffusionPipeline:
    """The whole pipeline in float32, without a safety checker: it would hide what an evaluation must count.

    Raises:
        ValueError: for weights that do not fit their configuration, or are NaN or infinite.
    """
    path = source.path if isinstance(source, SingleFile) else source.folder
    try:
        if isinstance(source, SingleFile):
            pipe = _open_file(source)
        else:
            pipe = _open_folder(source)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    # Weights that their files lack: diffusers leaves them on "meta".
    for part in ("unet", "vae", "text_encoder"):
        net = getattr(pipe, part)
        names = [name for name, p in net.named_parameters() if p.is_meta]
        if names:
            raise ValueError(f"{path / part}: {len(names)} weights are missing, such as {names[0]}: get it again")
        check_finite(dict(net.named_parameters()), path / part)
    channels = pipe.unet.config.in_channels
    if channels != pipe.vae.config.latent_channels:
        raise ValueError(
            f"{path} has a UNet of {channels} input channels for {pipe.vae.config.latent_channels} latent "
            "channels: inpainting and depth models are not supported"
        )
    pipe.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    return pipe.to(device)


def _open_folder(source: Source) -> StableDiffusionPipeline:
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
    absent = sorted(info["missing_keys"])  # transformers makes them up
    if absent:
        where = source.folder / "text_encoder"
        raise ValueError(f"{where}: {len(absent)} weights are missing, such as {absent[0]}: get it again")
    return _assemble(source.folder, unet=unet, text_encoder=text_encoder, variant=source.variant)


def _open_file(source: SingleFile) -> StableDiffusionPipeline:
    def values(part: str) -> dict[str, Tensor]:
        return {name: tensor.to(torch.float32, copy=True) for name, tensor in source.part(part).items()}

    nets: dict[str, Any] = {}
    for part in ("unet", "vae"):
        with torch.device("meta"):
            nets[part] = network(part, source.config(part))
        nets[part].load_state_dict(values(part), assign=True)
    encoder: Any = CLIPTextModel
    nets["text_encoder"] = encoder.from_pretrained(
        None, config=_text_config(source.texts), state_dict=values("text_encoder"), dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        single_file.write_texts(source.texts, Path(folder))
        return _assemble(Path(folder), **nets)


def _assemble(folder: Path, **parts: Any) -> StableDiffusionPipeline:
    """The pipeline of a folder, some parts of which are loaded."""
    pipe: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(
        folder,
        dtype=torch.float32,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
        **parts,
    )
    return pipe


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


def cut_prompts(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """The prompts that this model reads the beginning of only: ``row`` (from 0), ``tokens`` and ``prompt`` of each."""
    counts = [token_count(pipe, prompt) for prompt in prompts]
    return [
        {"row": row, "tokens": count, "prompt": prompts[row]}
        for row, count in enumerate(counts)
        if count > pipe.tokenizer.model_max_length
    ]


def say_cut(pipe: StableDiffusionPipeline, cut: Sequence[dict[str, Any]], total: int) -> str:
    """A line on what `cut_prompts` found, for a terminal; files are named by the rows."""
    rows = ", ".join(str(row["row"]) for row in cut[:10]) + (", …" if len(cut) > 10 else "")
    return (
        f"{len(cut)} of {total} prompts are longer than {pipe.tokenizer.model_max_length} tokens and will be cut, "
        f"first {cut[0]['prompt'][:60]!r} (rows {rows}; all are named in settings.json)"
    )


def check_size(width: int | None, height: int | None, where: str) -> None:
    """Refuse a size that no latent image has.

    Raises:
        ValueError: for a side that is no multiple of 8 pixels.
    """
    for name, side in (("width", width), ("height", height)):
        if side is not None and side % 8:
            raise ValueError(f"{where}: {name} is {side}, expected a multiple of 8")


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


def concepts(
    pipe: StableDiffusionPipeline, forget: Sequence[str], anchors: Sequence[str], kept: Sequence[str]
) -> Concepts:
    """Text embeddings, token by token: of forget prompts from where they leave their anchors, and of whole others.

    The beginning that a forget prompt shares with one that stays means the same in both, and stays.

    Args:
        pipe: the pipeline, with its text encoder.
        forget: prompts whose words are to mean something else.
        anchors: what they are to mean, one for each.
        kept: prompts that stay.

    Raises:
        ValueError: for a prompt that is its own anchor, or too long.
    """
    length = pipe.tokenizer.model_max_length
    table = dict(zip([*forget, *anchors, *kept], embed(pipe, [*forget, *anchors, *kept]), strict=True))
    ids = {text: list(pipe.tokenizer(text, truncation=False).input_ids) for text in table}
    shared = {tuple(ids[text][:end]) for text in kept for end in range(1, len(ids[text]))}
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for prompt, anchor in zip(forget, anchors, strict=True):
        for at, other in paired_tokens(ids[prompt], ids[anchor], length):
            if tuple(ids[prompt][: at + 1]) not in shared:
                sides[0].append(table[prompt][at])
                sides[1].append(table[anchor][other])
    return Concepts(torch.stack(sides[0]), torch.stack(sides[1]), torch.cat([table[text] for text in kept]))


def paired_tokens(prompt: Sequence[int], anchor: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Places of a prompt's tokens and of those that they should become, from the first that differs to the end.

    Last words are paired, and so is the padding after them; words that the prompt has more go to the first that
    differs in the anchor.

    Args:
        prompt: its token ids, begin and end included, without padding.
        anchor: likewise.
        length: with padding.

    Raises:
        ValueError: for the same tokens.
    """
    if list(prompt) == list(anchor):
        raise ValueError("a forget prompt is its own anchor: choose another anchor")
    first = next((i for i, (a, b) in enumerate(zip(prompt, anchor, strict=False)) if a != b), 0)
    shift = len(anchor) - len(prompt)
    return [(i, max(first, i + shift)) for i in range(first, length) if i + shift < length]


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
    side = resolution(pipe)

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
                # the pipeline would drop one that is given alone
                width=width or side,
                height=height or side,
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


def describe(source: Source | SingleFile) -> dict[str, Any]:
    """What the checkpoint is, from its configuration and header alone."""
    if isinstance(source, SingleFile):
        unet, scheduler = source.config("unet"), json.loads(source.texts["scheduler/scheduler_config.json"])
        index = json.loads(source.texts["model_index.json"])
    else:
        unet = files.read_json(source.folder / source.unet / "config.json")
        scheduler = files.read_json(source.folder / "scheduler" / "scheduler_config.json")
        index = files.read_json(source.folder / "model_index.json")
    tensors = folders.tensors(source)
    return {
        "kind": "Stable Diffusion " + ("single file" if isinstance(source, SingleFile) else "pipeline"),
        "unet_weights": sum(tensor.numel() for tensor in tensors.values()),
        "dtype": "/".join(sorted({KINDS[tensor.dtype] for tensor in tensors.values()})),
        "resolution": unet.get("sample_size"),
        "cross_attention_dim": unet.get("cross_attention_dim"),
        "prediction_type": scheduler.get("prediction_type", "epsilon"),
        "ema": not isinstance(source, SingleFile) and source.unet == "unet_ema",
        "index": index,
    }
