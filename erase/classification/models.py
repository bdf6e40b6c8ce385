"""Image classifiers of `transformers`, in folders: open one, make one, save it.

A ResNet for small images has another stem than the library's, which halves twice before the first block; its
configuration says so under `stem`. Such a folder opens here; `AutoModelForImageClassification` refuses its weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForImageClassification,
)

from erase.classification.backend import Prepare
from erase.engine.backend import drawn_from
from erase.store import files
from erase.store.safetensors import read_safetensors

Auto: Any = AutoModelForImageClassification  # untyped upstream
PREPROCESSOR = "preprocessor_config.json"
RESAMPLE: dict[Any, int] = {"bilinear": 2, "bicubic": 3}
"""Pillow's numbers."""
STEM = {"kernel": 3, "stride": 1, "pool": False}


@dataclass(frozen=True)
class Model:
    """A classifier and all that its folder says."""

    net: nn.Module
    labels: tuple[str, ...]
    """Names of the classes by number, K; `LABEL_0` and so on where the folder names none."""
    prepare: Prepare
    channels: int
    """Of the images it takes."""

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, without what does not matter to the network."""
        kept: Any = self.net.config
        idle = ("_name_or_path", "transformers_version", "dtype", "architectures")
        return {k: v for k, v in kept.to_dict().items() if k not in idle}


def open_model(folder: Path, device: torch.device | str = "cpu") -> Model:
    """A classifier in float32, in eval mode, all weights learning.

    Dropout and stochastic depth are off: all randomness of a run comes from its seed.

    Raises:
        ValueError: for a folder that is no whole classifier in safetensors, or weights that are NaN or infinite.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if getattr(config, "stem", None) is not None:
            net = _with_stem(Auto.from_config(config), config.stem)
            net.load_state_dict(read_safetensors(folder / "model.safetensors")[0])
        else:
            net, info = Auto.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            if info["missing_keys"]:  # transformers would go on with random weights
                raise ValueError(f"weights are missing, such as {min(info['missing_keys'])}")
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{folder} is not a complete image classifier of transformers in safetensors ({reason})"
        ) from error
    broken = [name for name, t in net.state_dict().items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if broken:
        raise ValueError(f"{folder}: {broken[0]} holds values that are NaN or infinite: get the model again")
    labels = tuple(str(net.config.id2label[k]) for k in range(net.config.num_labels))
    return _ready(net, labels, _read_prepare(folder), device)


def new(
    architecture: Mapping[str, Any],
    labels: Sequence[str],
    shape: tuple[int, int, int],
    seed: int,
    device: torch.device | str = "cpu",
) -> Model:
    """A classifier with new weights for images of `shape` (C, H, W).

    Args:
        architecture: `model_type` and other keys of its configuration; `image_size` and `num_channels` are those of
            the images unless given (images are then resized). For a `resnet` also `stem`: `kernel`, `stride`, `pool`.
        labels: names of the classes.
        shape: of the images.
        seed: of the weights.
        device: where it goes.

    Raises:
        ValueError: for an unknown type or key, or values that do not fit each other.
    """
    given = dict(architecture)
    kind = given.pop("model_type", None)
    if kind not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        raise ValueError(
            f"architecture.model_type must be a transformers image classifier such as resnet, vit, swin or convnext; "
            f"got {kind!r}"
        )
    known = {**AutoConfig.for_model(kind).to_dict(), **({"stem": None} if kind == "resnet" else {})}
    for key in given:
        if key not in known:
            raise ValueError(f"unknown setting architecture.{key}; {kind} has: {', '.join(sorted(known))}")
    channels, height, width = shape
    side: Any = height if height == width else [height, width]
    for key, value in (("num_channels", channels), ("image_size", side)):
        if key in known:
            given.setdefault(key, value)
    if given.get("stem") is not None:
        given["stem"] = _check_stem(given["stem"])
    names = dict(enumerate(labels))
    try:
        config = AutoConfig.for_model(kind, **given, id2label=names, label2id={v: k for k, v in names.items()})
        with drawn_from(seed):
            net = Auto.from_config(config)
            if given.get("stem") is not None:
                net = _with_stem(net, given["stem"])
    except (ValueError, TypeError, RuntimeError, StrictDataclassError, ZeroDivisionError) as error:
        raise ValueError(f"architecture: {kind} cannot be built ({' '.join(str(error).split())})") from error
    size = given.get("image_size")
    wanted = None if size is None else ((size, size) if isinstance(size, int) else tuple(size))
    half = (0.5,) * int(given.get("num_channels", channels))
    return _ready(net, tuple(labels), Prepare(half, half, None if wanted == (height, width) else wanted), device)


def renew(model: Model, seed: int) -> nn.Module:
    """The same network with new weights."""
    kept: Any = model.net.config
    with drawn_from(seed):
        net = Auto.from_config(kept)
        if getattr(kept, "stem", None) is not None:
            net = _with_stem(net, kept.stem)
    device = next(model.net.parameters()).device
    return _ready(net, model.labels, model.prepare, device).net


def stored(net: nn.Module) -> dict[str, Tensor]:
    """All weights and statistics under the names that `transformers` keeps them by in files.

    It has other names for a ViT and a Swin in memory; only its own writing says which they were.
    """
    pretrained: Any = net
    with tempfile.TemporaryDirectory() as folder:
        pretrained.save_pretrained(folder)
        return {
            n: t.clone() for path in Path(folder).glob("*.safetensors") for n, t in read_safetensors(path)[0].items()
        }


def save(model: Model, out: Path) -> None:
    """Write a new classifier's folder, in float32; it appears whole or not at all.

    Raises:
        ValueError: if `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    net: Any = model.net
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as temporary:
        target = Path(temporary) / out.name
        net.save_pretrained(target, state_dict={k: v.contiguous() for k, v in net.state_dict().items()})
        files.write_json(target / PREPROCESSOR, _prepare_config(model.prepare))
        target.rename(out)


def _ready(net: Any, labels: tuple[str, ...], prepare: Prepare, device: torch.device | str) -> Model:
    for module in net.modules():
        noisy = isinstance(module, nn.modules.dropout._DropoutNd)
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (noisy and name == "p")):
                setattr(module, name, 0.0)
    net.requires_grad_(True).eval().to(device)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    # A quarter faster; but torch 2.13 on a CPU writes beyond its memory in the backward pass of a 1×1 convolution of 4
    # channels and stride 2 that lies so (8 and more were found sound).
    if all(m.in_channels >= 8 or m.kernel_size != (1, 1) for m in convolutions):
        net.to(memory_format=torch.channels_last)
    channels = int(getattr(net.config, "num_channels", len(prepare.mean)))
    if len(prepare.mean) == 1:
        prepare = replace(prepare, mean=prepare.mean * channels, std=prepare.std * channels)
    return Model(net, labels, prepare, channels)


def _check_stem(stem: Any) -> dict[str, Any]:
    if not isinstance(stem, Mapping) or not stem.keys() <= STEM.keys():
        raise ValueError(f"architecture.stem may have the keys {', '.join(STEM)}; got {stem!r}")
    whole = {**STEM, **stem}
    sound = all(type(whole[k]) is int and whole[k] >= 1 for k in ("kernel", "stride")) and whole["kernel"] % 2
    if not sound or type(whole["pool"]) is not bool:
        raise ValueError(f"architecture.stem: kernel must be odd, stride at least 1, pool true or false; got {stem!r}")
    return whole


def _with_stem(net: Any, stem: Mapping[str, Any]) -> Any:
    """The same ResNet with another first convolution, and without the pooling after it."""
    block = net.resnet.embedder
    old = block.embedder.convolution
    block.embedder.convolution = nn.Conv2d(
        old.in_channels,
        old.out_channels,
        stem["kernel"],
        stride=stem["stride"],
        padding=stem["kernel"] // 2,
        bias=False,
    )
    nn.init.kaiming_normal_(block.embedder.convolution.weight, mode="fan_out", nonlinearity="relu")
    if not stem["pool"]:
        block.pooler = nn.Identity()
    return net


def _read_prepare(folder: Path) -> Prepare:
    path = folder / PREPROCESSOR
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {PREPROCESSOR}, which says how pixels are given to the network: get it again"
        )
    found = files.read_json(path)
    try:
        return _prepare_of(found)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not say how pixels are given to the network ({reason})") from error


def _prepare_of(found: dict[str, Any]) -> Prepare:
    """What a processor of `transformers` does, by its file; what the file leaves out is as the library has it."""
    size: Any = found.get("size") if found.get("do_resize", True) else None
    crop: Any = found["crop_size"] if found.get("do_center_crop", False) else None
    kind = str(found.get("image_processor_type", found.get("feature_extractor_type", "")))
    cuts = kind.startswith("ConvNext")
    odd = [key for key in ("do_flip_channel_order", "include_top", "rescale_offset") if found.get(key)]
    odd += ["crop_pct"] if found.get("crop_pct") and not cuts else []
    if odd or kind.startswith(("Levit", "PoolFormer", "EfficientNet", "MobileViT")):
        raise ValueError(f"{', '.join(odd) or kind} changes pixels in a way that is not known here")
    if isinstance(size, dict):
        size = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
    elif size is not None and not cuts:
        size = (size, size)
    if crop is not None:
        crop = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
    if cuts and size is not None:  # its rule: large images are squeezed, of others the middle is kept
        small = size < 384
        crop = (size, size) if small else crop
        size = int(size / found.get("crop_pct", 224 / 256)) if small else (size, size)
    number = found.get("resample", 3 if cuts else 2)
    if size is not None and number not in RESAMPLE.values():
        raise ValueError(f"resample must be 2 (bilinear) or 3 (bicubic); got {number}")
    mean, std = found.get("image_mean") or [0.0], found.get("image_std") or [1.0]
    if not found.get("do_normalize", True):
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    scale = 255 * (found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 1)
    return Prepare(
        tuple(m / scale for m in mean),
        tuple(s / scale for s in std),
        size,
        crop,
        next(mode for mode, n in RESAMPLE.items() if n == number) if size is not None else "bilinear",
    )


def _prepare_config(prepare: Prepare) -> dict[str, Any]:
    size, crop = prepare.size, prepare.crop
    known: dict[str, Any] = {}
    if size is not None:
        known["size"] = {"shortest_edge": size} if isinstance(size, int) else {"height": size[0], "width": size[1]}
        known["resample"] = RESAMPLE[prepare.mode]
    if crop is not None:
        known["crop_size"] = {"height": crop[0], "width": crop[1]}
    plain = crop is None and not isinstance(size, int)
    return {
        "image_processor_type": "ViTImageProcessor" if plain else "CLIPImageProcessor",
        "do_resize": size is not None,
        **known,
        **({} if plain else {"do_center_crop": crop is not None, "do_convert_rgb": False}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(prepare.mean),
        "image_std": list(prepare.std),
    }
