"""Open a checkpoint as a diffusers pipeline, network by network, and find out that no weight is missing or broken.

A network can also be opened *hollow*: all shapes and no weights. So a dry run costs no memory, and the encoders of a
large model are in memory only while they are used.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.folders import HIDES, VARIANTS, WEIGHTS, Source
from erase.diffusion.checkpoints.header import write_texts
from erase.diffusion.checkpoints.networks import Unfilled, first_line, kind_of, network, text_config
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.diffusion.lora.adapter import changed_by
from erase.store import files
from erase.store.safety import check_finite
from erase.store.weights import weight_files

STEMS = (WEIGHTS, "model", "pytorch_model")
"""What the weight files of diffusers' and transformers' networks are called, without variant and suffix."""
HALF = (torch.float16, torch.bfloat16)
LARGE = 5 * 10**8
"""Weights from which on a network that is stored in 16 bits is held in 16 bits, where the precision has 16."""


def open_pipeline(
    source: Source | SingleFile,
    kind: Any,
    trained: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    hollow: Collection[str] = (),
) -> Any:
    """The whole pipeline, frozen, in eval mode, and without a safety checker.

    Args:
        source: the checkpoint.
        kind: the pipeline's class.
        trained: the component that learns.
        device: where its networks go.
        dtype: of the weights; a VAE's are float32 all the same.
        hollow: networks to leave without weights; `load_network` brings them.

    Raises:
        ValueError: for weights that are missing, do not fit their configuration, or are NaN or infinite.
    """
    parts: dict[str, Any] = {}
    for name in network_classes(source):
        make = hollow_network if name in hollow else load_network
        parts[name] = make(source, name, trained, device, dtype)
    try:
        if isinstance(source, Source):
            pipe = _assemble(source.folder, kind, parts)
        else:
            with tempfile.TemporaryDirectory() as folder:
                write_texts(source.texts, Path(folder))
                pipe = _assemble(Path(folder), kind, parts)
    except Exception as error:  # configurations of others break in a dozen unrelated ways
        raise ValueError(f"{source.place} cannot be loaded: {first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    if hollow:
        _fix_place(pipe, torch.device(device))
    return pipe


def network_classes(source: Source | SingleFile) -> dict[str, Any]:
    """The components of a checkpoint that have weights, and the class of each.

    Raises:
        ValueError: for a class that the libraries do not have, or a tokenizer that cannot be read here.
    """
    if isinstance(source, SingleFile):
        beside = {} if source.rest is None else network_classes(source.rest)
        return beside | {name: kind_of(part) for name, part in source.held.items()}
    found = {}
    for name, value in folders.read_index(source.folder).items():
        if not isinstance(value, list) or name in HIDES or value[0] not in ("diffusers", "transformers"):
            continue
        check_sentencepiece(source.folder / name)
        try:
            made = getattr(importlib.import_module(value[0]), value[1])
        except AttributeError as error:
            raise ValueError(f"{source.folder} cannot be loaded: {value[0]} has no {value[1]}") from error
        if isinstance(made, type) and issubclass(made, nn.Module):
            found[name] = made
    return found


def load_network(
    source: Source | SingleFile,
    name: str,
    trained: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """One network of a checkpoint with its weights, frozen and in eval mode; arguments as those of `open_pipeline`.

    Raises:
        ValueError: for weights that are missing, do not fit their configuration, or are NaN or infinite.
    """
    wanted = torch.float32 if name == "vae" else dtype
    source = holder(source, name)
    try:
        if isinstance(source, SingleFile):
            net = _from_file(source, name, wanted)
        else:
            net = _from_folder(source, name, trained, wanted)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ValueError(f"{source.place / name} cannot be loaded: {first_line(error)}") from error
    # Weights that their files lack: diffusers leaves them on "meta".
    missing = [weight for weight, p in net.named_parameters() if p.is_meta]
    if missing:
        raise ValueError(
            f"{source.place / name}: {len(missing)} weights are missing, such as {missing[0]}: get it again"
        )
    _put_loras(net, source, name, trained)
    check_finite(dict(net.named_parameters()), source.place / name)
    return net.requires_grad_(False).eval().to(device)


def _put_loras(net: nn.Module, source: Source | SingleFile, name: str, trained: str) -> None:
    """The LoRAs of a checkpoint into the weights of one of its networks."""
    part = folders.learner(source) if name == trained else name
    changed = changed_by(part, source.loras)
    now = folders.part_tensors(source, part) if changed else {}
    own = {weight.removeprefix("text_model."): p for weight, p in net.named_parameters()}
    for weight in changed:
        p = own[weight.removeprefix("text_model.")]
        p.data = now[weight].to(p.device, p.dtype)


def hollow_network(
    source: Source | SingleFile,
    name: str,
    trained: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The same network on torch's "meta" device: shapes and dtypes, and no memory."""
    source = holder(source, name)
    made = network_classes(source)[name]
    try:
        with init_empty_weights(), Unfilled():
            if isinstance(source, SingleFile):
                net = network(made, source.config(name))
            elif made.__module__.startswith("diffusers."):
                where = source.folder / (source.trained if name == trained else name)
                net = made.from_config(files.read_json(where / "config.json"))
            else:
                net = made(made.config_class.from_pretrained(source.folder, subfolder=name))
        if isinstance(net, PreTrainedModel):
            net.tie_weights()  # emptied one by one, weights that are shared would count twice
    except Exception as error:  # configurations of others break in a dozen unrelated ways
        raise ValueError(f"{source.place / name} cannot be loaded: {first_line(error)}") from error
    return net.requires_grad_(False).eval().to(torch.float32 if name == "vae" else dtype)


def holder(source: Source | SingleFile, name: str) -> Source | SingleFile:
    """Where a network's weights are: in a single file, or in the folder with the rest."""
    beside = isinstance(source, SingleFile) and source.rest is not None and name not in source.held
    return source.rest if beside else source  # type: ignore[union-attr, return-value]


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that have weights, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def is_hollow(net: nn.Module) -> bool:
    """Whether a network's weights are left out."""
    return any(p.is_meta for p in net.parameters())


def held_dtype(source: Source | SingleFile, precision: str) -> torch.dtype:
    """In which dtype frozen weights are held: float32, or for a large model in 16 bits those of the precision.

    Only what trains has float32 masters then; what is written to disk is the file's own in any case.
    """
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    tensors = folders.tensors(source)
    if wanted is None or not tensors:
        return torch.float32
    count, half = 0, True
    for _, tensor in tensors.sketches():
        count += tensor.numel()
        half = half and tensor.dtype in HALF
    return wanted if half and count >= LARGE else torch.float32


def check_betas(pipe: Any, where: object) -> None:
    """Refuse a scheduler without a schedule of betas, which `erase.diffusion.process.Discrete` needs.

    Raises:
        ValueError: for the scheduler of an EDM or a flow.
    """
    if "beta_schedule" not in pipe.scheduler.config:
        raise ValueError(
            f"{where} has the noise schedule {type(pipe.scheduler).__name__}, which has no betas: not supported for "
            f"{type(pipe).__name__}"
        )


def check_cfg(unet: Any, where: object) -> None:
    """Refuse a UNet that is told the guidance scale.

    Raises:
        ValueError: for one.
    """
    if unet.config.time_cond_proj_dim is not None:
        raise ValueError(
            f"{where} has a UNet that is conditioned on the guidance scale (time_cond_proj_dim): latent "
            "consistency models are not supported"
        )


def keep_vae_exact(vae: Any) -> None:
    """Have a VAE with `force_upcast` work in its own dtype under autocast too: its activations overflow in float16."""
    if getattr(vae.config, "force_upcast", False):
        vae.encode, vae.decode = partial(_exact, vae, vae.encode), partial(_exact, vae, vae.decode)


def take_any_dtype(vae: Any) -> None:
    """Have a VAE take tensors of any dtype: stock pipelines give it latents in the dtype of the other networks."""
    vae.encode, vae.decode = partial(_cast, vae, vae.encode), partial(_cast, vae, vae.decode)


def _exact(vae: Any, function: Callable[..., Any], *args: Any, **given: Any) -> Any:
    device = next(x.device for x in (*args, *given.values()) if isinstance(x, Tensor))
    with torch.autocast(device.type, enabled=False):
        return _cast(vae, function, *args, **given)


def _cast(vae: Any, function: Callable[..., Any], *args: Any, **given: Any) -> Any:
    def own(x: Any) -> Any:
        return x.to(vae.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return function(*map(own, args), **{name: own(x) for name, x in given.items()})


@contextmanager
def vae_in_float32(vae: Any) -> Iterator[None]:
    """Have a VAE in float32 meanwhile, an image at a time; afterwards it has the very tensors that it had."""
    own = [(p, p.data) for p in (*vae.parameters(), *vae.buffers())]
    slicing = getattr(vae, "use_slicing", None)
    try:
        if slicing is not None:
            vae.use_slicing = True
        for p, data in own:
            if data.is_floating_point():
                p.data = data.float()
        yield
    finally:
        for p, data in own:
            p.data = data
        if slicing is not None:
            vae.use_slicing = slicing


@contextmanager
def exact_images(vae: Any) -> Iterator[None]:
    """What `open` sees to for a checkpoint's VAE, for one that is somebody else's: exact and in float32 meanwhile.

    Args:
        vae: the VAE of a pipeline in memory; without `force_upcast`, nothing is done.
    """
    vae = getattr(vae, "_orig_mod", vae)  # of torch.compile
    if not getattr(getattr(vae, "config", None), "force_upcast", False):
        yield
        return
    own = {name: vae.__dict__[name] for name in ("encode", "decode") if name in vae.__dict__}
    with vae_in_float32(vae) if vae.dtype in HALF else nullcontext():
        keep_vae_exact(vae)
        try:
            yield
        finally:
            for name in ("encode", "decode"):
                delattr(vae, name)
            vae.__dict__.update(own)


def latents(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[B, C, h, w]` of a VAE's posterior, shifted if the VAE is, and scaled."""
    found, config = posterior(vae, pixels), vae.config
    mean = found.mean - (getattr(config, "shift_factor", None) or 0.0)
    return mean * config.scaling_factor, found.std * config.scaling_factor


def posterior(vae: Any, pixels: Tensor) -> Any:
    """A VAE's posterior of images `[B, 3, H, W]`.

    Raises:
        ValueError: for a VAE without one, such as a tiny one for previews.
    """
    found = vae.encode(pixels)
    if not hasattr(found, "latent_dist"):
        raise ValueError(f"{type(vae).__name__} encodes images without a posterior: give the model's own VAE")
    return found.latent_dist


def pixels(vae: Any, latents: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` in [-1, 1] of latents as a network sees them: encoding undone."""
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    shift: Any = getattr(config, "shift_factor", None) or 0.0
    scale: Any = 1 / config.scaling_factor
    if mean is not None and std is not None:
        shift, spread = (torch.tensor(values, device=latents.device).view(1, -1, 1, 1) for values in (mean, std))
        scale = spread * scale
    decoded: Tensor = vae.decode((latents * scale + shift).to(vae.dtype), return_dict=False)[0]
    return decoded.float().clamp(-1, 1)


def check_sentencepiece(folder: Path) -> None:
    """Refuse a T5 tokenizer that cannot be read: transformers would ask for another package.

    Raises:
        ValueError: for a `spiece.model` without a `tokenizer.json`, where a package that reads it is missing.
    """
    old = (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file()
    missing = [name for name in ("sentencepiece", "google.protobuf") if old and not _installed(name)]
    if missing:
        raise ValueError(
            f"{folder} is a SentencePiece model, and {' and '.join(missing)} is not installed: pip install 'erase[t5]'"
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _variant(folder: Path, first: str | None) -> str | None:
    """Which weights of a component there are: those of a variant, else the plain ones, else of any variant."""
    for variant in (first, None, *VARIANTS):
        if any(weight_files(folder, stem, variant) for stem in STEMS):
            return variant
    return first


def _from_folder(source: Source, name: str, trained: str, dtype: torch.dtype) -> nn.Module:
    loader: Any = network_classes(source)[name]
    where = source.trained if name == trained else name
    variant = source.variant if name == trained else _variant(source.folder / name, source.variant)
    given: dict[str, Any] = {"subfolder": where, "variant": variant, "dtype": dtype}
    net: nn.Module
    if loader.__module__.startswith("diffusers."):
        net = loader.from_pretrained(source.folder, **given)
        return net
    net, info = loader.from_pretrained(source.folder, **given, output_loading_info=True)
    absent = sorted(info["missing_keys"])  # transformers makes them up
    if absent:
        raise ValueError(
            f"{source.folder / name}: {len(absent)} weights are missing, such as {absent[0]}: get it again"
        )
    return net


def _from_file(source: SingleFile, name: str, dtype: torch.dtype) -> nn.Module:
    kind = kind_of(source.held[name])
    values = {key: tensor.to(dtype, copy=True) for key, tensor in source.part(name).items()}
    if issubclass(kind, PreTrainedModel):
        config = text_config(kind, source.config(name))
        found: nn.Module = kind.from_pretrained(None, config=config, state_dict=values, dtype=dtype)
        return found
    with torch.device("meta"), Unfilled():
        net = network(kind, source.config(name))
    net.load_state_dict(values, assign=True)
    return net


def _assemble(folder: Path, kind: Any, parts: Mapping[str, Any]) -> Any:
    """The pipeline of a folder, whose networks are loaded."""
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    absent = [name for name, value in index.items() if name in HIDES or value == [None, None]]
    hidden: dict[str, Any] = dict.fromkeys(absent, None)
    if "safety_checker" in index:
        hidden["requires_safety_checker"] = False
    return kind.from_pretrained(folder, dtype=torch.float32, **hidden, **parts)


def _fix_place(pipe: Any, device: torch.device) -> None:
    """Have a pipeline say where it is: it would ask the first of its networks, which may be hollow."""
    kind, here = type(pipe), property(lambda _: device)
    pipe.__class__ = type(kind.__name__, (kind,), {"device": here, "_execution_device": here})
