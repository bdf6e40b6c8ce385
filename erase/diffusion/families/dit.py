"""DiT: a transformer on VAE latents that reads the number of a class through adaptive layer norms (arXiv 2212.09748).

The null class follows the last one. Transformers that learn variances give them as further channels; these stay in
`call` and enter neither a loss nor a sampler, as in the stock pipeline.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from torch import Tensor, nn

from erase.diffusion import condition as conditions
from erase.diffusion import loading
from erase.diffusion.checkpoints.folders import Source, read_index
from erase.diffusion.class_conditional import label_condition
from erase.diffusion.condition import Condition
from erase.diffusion.lora.keys import LoraLayout
from erase.diffusion.process import Discrete, discrete
from erase.store.class_names import distinct

NAME = "DiT"
CONDITION: Literal["text", "label"] = "label"
TRAINED = "transformer"
PARTS: tuple[str, ...] = ("transformer", "vae", "scheduler")
ENCODERS: tuple[str, ...] = ()
PARAMETERS: Mapping[str, str] = {
    "full": r".*",
    # All that a class acts through: in every block the embeddings of class and timestep and the layer that makes
    # shifts, scales and gates of their sum, and the same layer before the output.
    "adaln": r"\.norm1\.|^proj_out_1\.",
}
TEXT_KV: str | None = None
LORA: LoraLayout | None = None
CFG = True
STRIDE = 16
"""A VAE's 8 times a patch's 2."""
GUIDANCE = 4.0
"""The stock pipeline's."""


def open(
    source: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    hollow: Collection[str] = (),
) -> Any:
    """The whole pipeline; classes without names are called by their numbers.

    Raises:
        ValueError: for weights that are missing, do not fit their configuration, or are not finite, a transformer of
            another kind, a noise schedule without betas, and a number of names that is not the number of classes.
    """
    pipe = loading.open_pipeline(source, DiTPipeline, TRAINED, device, dtype, hollow)
    check(pipe, source.folder)
    loading.keep_vae_exact(pipe.vae)
    named = {int(i): str(name) for i, name in (read_index(source.folder).get("id2label") or {}).items()}
    if named and source.labels and [named[i] for i in sorted(named)] != list(source.labels):
        raise ValueError(f"{source.folder} names its classes itself: leave out labels")
    names = named or dict(enumerate(source.labels))
    count = pipe.transformer.config.num_embeds_ada_norm
    if names and sorted(names) != list(range(count)):
        raise ValueError(f"{source.folder} has {count} classes; got {len(names)} names, expected one for each")
    pipe.register_to_config(id2label={str(i): names[i] for i in sorted(names)})
    shape(pipe)
    return pipe


def check(pipe: Any, where: object) -> None:
    """Refuse networks that take something else than this family's, and say `where` they are.

    Raises:
        ValueError: for these.
    """
    net = pipe.transformer
    if not isinstance(net, DiTTransformer2DModel):
        raise ValueError(f"{where} has a {type(net).__name__}; expected a DiTTransformer2DModel")
    channels, latent = net.config.in_channels, pipe.vae.config.latent_channels
    if channels != latent or net.out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"{where} has a transformer of {channels} input and {net.out_channels} output channels for "
            f"{latent} latent channels; expected {latent} and {latent} or {2 * latent}"
        )
    loading.check_betas(pipe, where)


def labels(pipe: Any) -> list[str]:
    """As `model_index.json` names them, with synonyms: `tench, Tinca tinca`."""
    names = dict(pipe.config).get("id2label") or {}
    return distinct([names.get(str(i), str(i)) for i in range(pipe.transformer.config.num_embeds_ada_norm)])


def shape(pipe: Any) -> tuple[int, int, int]:
    """Channels, height and width of an image, in pixels; the pipeline remembers them when its VAE is freed."""
    if pipe.vae is not None:
        vae = pipe.vae.config
        side = int(pipe.transformer.config.sample_size * 2 ** (len(vae.block_out_channels) - 1))
        pipe.image_shape = (int(vae.out_channels), side, side)
    found: tuple[int, int, int] = pipe.image_shape
    return found


def guidance(pipe: Any) -> float:
    """The stock pipeline's."""
    return GUIDANCE


def process(pipe: Any) -> Discrete:
    """The schedule that the transformer was trained on."""
    return discrete(pipe.scheduler.config)


def embed(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """`label` `[P]`, long: numbers of class names; of the empty prompt the null class."""
    return label_condition(prompts, labels(pipe), pipe.transformer.config.num_embeds_ada_norm, pipe.device)


def has_null(pipe: Any) -> bool:
    """Always: the transformer's classes have one embedding more than there are names."""
    return True


def encode(pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation of the VAE's posterior, scaled."""
    return loading.latents(pipe.vae, pixels)


def call(net: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The transformer's prediction, `[B, C, H, W]`, without variances."""
    out: Tensor = net(x, timestep=t, class_labels=condition["label"], return_dict=False)[0]
    return out[:, : x.shape[1]]


@torch.no_grad()
def generate(
    pipe: Any,
    condition: Condition,
    null: Condition | None,
    generators: Sequence[torch.Generator],
    *,
    steps: int,
    guidance: float | None,
    size: tuple[int, int] | None = None,
    latents: bool = False,
) -> Any:
    """As the stock pipeline, which has ImageNet's null class alone and no generators for its scheduler's noise.

    Guidance acts on all latent channels; a scale of 1 or less is none.

    Raises:
        ValueError: for a size that is not the model's own.
    """
    _, high, wide = shape(pipe)
    if size not in (None, (high, wide)):
        raise ValueError(f"this model only generates images of {wide}×{high}; got {size[1]}×{size[0]}")
    net, scheduler, device = pipe.transformer, pipe.scheduler, pipe.device
    scale = GUIDANCE if guidance is None else guidance
    guided = null is not None and scale > 1
    told = conditions.cat([null, condition]) if null is not None and guided else condition
    side = net.config.sample_size
    x = torch.cat([torch.randn(1, net.config.in_channels, side, side, generator=g) for g in generators]).to(device)
    takes = "generator" in inspect.signature(scheduler.step).parameters
    noise = {"generator": list(generators)} if takes else {}
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
        out = call(net, given, t.to(device).expand(len(given)), told).float()
        if guided:
            without, within = out.chunk(2)
            out = without + scale * (within - without)
        x = scheduler.step(out, t, x, **noise, return_dict=False)[0]
    if latents:
        return x
    pixels = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    return pipe.numpy_to_pil((pixels / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy())


def resolution(pipe: Any) -> int:
    """The side of its images, pixels."""
    return shape(pipe)[-1]


def example(configs: Mapping[str, Mapping[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Zeros."""
    net = configs["transformer"]
    side = net["sample_size"]
    return torch.zeros(1, net["in_channels"], side, side), {"label": torch.zeros(1, dtype=torch.long)}


def tokenizer(pipe: Any) -> tuple[Any, int]:
    """None: its prompts are names of classes."""
    raise ValueError(f"{NAME} reads no text")
