"""Stable Diffusion 1.x and 2.x in one file, `.safetensors` or `.ckpt`: find out what it is, and write it again.

Such a file holds tensors alone. What else a pipeline needs comes from the header, if `erase convert` wrote the file,
and otherwise from the released models: their configurations are here, their vocabulary in `vocabulary.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from erase.diffusion.checkpoints import vocabulary
from erase.diffusion.checkpoints.ldm import EMA, PARTS, UNET, Place, places
from erase.diffusion.checkpoints.pickles import MoreThanWeightsError, read_pickle
from erase.store import files
from erase.store.safetensors import Lazy, open_safetensors, write_safetensors
from erase.store.safety import check_components, check_kinds
from erase.store.weights import fitted, without_provenance

Prediction = Literal["epsilon", "v_prediction"]
Shapes = Mapping[str, Mapping[str, torch.Size]]
"""Of the tensors that the networks need, by part and name."""
Configs = Mapping[str, Mapping[str, Any]]

SUFFIXES = (".safetensors", ".ckpt")
TEXTS, NAMES = "diffusers_folder", "diffusers_names"
"""Keys of the header: files of the diffusers folder; tensors that the folder names in another way than we would."""
NEEDED = (
    *("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"),
    *(f"{part}/config.json" for part in PARTS),
)
TEXT_FILE = re.compile(
    r"model_index\.json|(unet|vae|text_encoder|tokenizer|scheduler)/[A-Za-z0-9][\w.-]*\.(json|txt)", re.ASCII
)

WIDTH = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FIRST = f"{UNET}input_blocks.0.0.weight"
"""Tensors whose shapes tell the version: key weights of the first cross-attention, the first convolution."""

LORA = "a LoRA"
FUSE = "fuse it into its model with diffusers (load_lora_weights, fuse_lora, unload_lora_weights, save_pretrained)"

_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_UNET_CONFIG = {  # diffusers' defaults among them: its own reader of single files looks for them here
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "layers_per_block": 2,
}
_VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
_TEXT_CONFIG = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 77,
    "do_lower_case": True,
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
}


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint in one file."""

    name: str
    """As the user gave it."""
    path: Path
    texts: Mapping[str, str]
    """Files of the diffusers folder that it stands for, weights and CLIP's vocabulary left out, by path in it."""
    places: Mapping[str, Place]
    """Where each tensor of the three networks belongs, by its name in the file."""
    spelled: Mapping[str, Place]
    """The same for the folder that it stands for, whose names may be older; buffers among them."""
    left_out: tuple[str, ...] = ()
    """What the file holds besides tensors; a `.ckpt` may."""
    trusted: bool = False
    """Whether a pickle may run code."""
    family: str = "sd"
    """A module of `erase.diffusion.families`."""

    @property
    def place(self) -> Path:
        """Where it is, for messages."""
        return self.path

    def config(self, part: str) -> dict[str, Any]:
        """`config.json` of a part."""
        found: dict[str, Any] = json.loads(self.texts[f"{part}/config.json"])
        return found

    def open(self) -> tuple[Mapping[str, Tensor], dict[str, str]]:
        """All tensors by their names in the file, read when asked for; and the header."""
        tensors, header, _ = read(self.path, trusted=self.trusted)
        return tensors, header

    def part(self, part: str) -> Lazy:
        """Tensors of one network under diffusers' names, as they are stored."""
        return part_of(self.open()[0], self.places, part)


def part_of(tensors: Mapping[str, Tensor], where: Mapping[str, Place], part: str) -> Lazy:
    """Tensors of one network under diffusers' names."""
    at = {n: (ldm, i) for ldm, place in where.items() if place.part == part for i, n in enumerate(place.names)}

    def get(name: str) -> Tensor:
        ldm, i = at[name]
        return where[ldm].to_diffusers(tensors[ldm])[i]

    return Lazy(at, get)


def read(path: Path, *, trusted: bool = False) -> tuple[Mapping[str, Tensor], dict[str, str], tuple[str, ...]]:
    """Tensors by name, the header, and the names of what else is there.

    Raises:
        ValueError: for a file that is broken, or a pickle that holds more than weights and is not trusted.
    """
    if path.suffix == ".safetensors":
        return *open_safetensors(path), ()
    try:
        whole = read_pickle(path, trusted=trusted)
    except MoreThanWeightsError as error:
        raise ValueError(
            f"{error}, and is not read; if you trust where it is from: erase convert --allow-pickle makes it a "
            ".safetensors"
        ) from error
    inner = whole.get("state_dict", whole)
    if not isinstance(inner, dict):
        raise ValueError(f"{path}: its state_dict is a {type(inner).__name__}; expected weights by name")
    tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    others = [str(name) for name, value in inner.items() if not isinstance(value, Tensor)]
    others += [str(name) for name in whole if inner is not whole and name != "state_dict"]
    return tensors, {}, tuple(others)


def find(
    name: str,
    path: Path,
    shapes: Callable[[Mapping[str, str]], Shapes],
    *,
    prediction: Prediction | None = None,
    trusted: bool = False,
) -> SingleFile:
    """Find out what a single file is, and that it is whole.

    Args:
        name: as the user gave it.
        path: where it is.
        shapes: tells what the networks of a folder's configuration need.
        prediction: what a 2.x model predicts; such a file does not say.
        trusted: whether a pickle may run code.

    Raises:
        ValueError: for a file that is broken, no Stable Diffusion 1.x or 2.x, lacks a tensor, has one of another
            shape or of integers, or is a pickle that holds more than weights and is not trusted.
    """
    tensors, header, left_out = read(path, trusted=trusted)
    texts = _stored(path, header) or released(path, tensors, header, prediction)
    configs = {part: json.loads(texts[f"{part}/config.json"]) for part in PARTS}
    needed = shapes(texts)
    where = _as_named(places(needed, configs), tensors)
    for ldm, place in where.items():
        if ldm not in tensors:
            raise ValueError(f"{path} is no whole Stable Diffusion checkpoint: it lacks {ldm}")
        found, size = tensors[ldm], list(needed[place.part][place.names[0]])
        size = [size[0] * len(place.names), *size[1:], *([1, 1] if place.conv else [])]
        if list(found.shape) != size:
            raise ValueError(f"{path}: {ldm} has shape {list(found.shape)}, expected {size}")
        check_kinds({ldm: found}, path)
    return SingleFile(name, path, texts, where, _spelled(path, header, tensors, where, configs), left_out, trusted)


def _stored(path: Path, header: Mapping[str, str]) -> dict[str, str]:
    """The folder's files that a header holds; empty if it holds none."""
    if TEXTS not in header:
        return {}
    texts = _mapping(path, header, TEXTS)
    for name, text in texts.items():
        if not TEXT_FILE.fullmatch(name) or not isinstance(text, str):
            raise ValueError(f"{path}: its header names {name!r}, which is no configuration of a diffusers folder")
        if name.endswith(".json"):
            try:
                json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: {name} in its header is no JSON ({error.msg})") from error
    missing = [name for name in NEEDED if name not in texts]
    if missing:
        raise ValueError(f"{path}: its header lacks {missing[0]}")
    if any(not isinstance(json.loads(texts[name]), dict) for name in NEEDED):
        raise ValueError(f"{path}: the configurations in its header are no mappings")
    check_components(json.loads(texts["model_index.json"]), path)
    return texts


def _mapping(path: Path, header: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        found = json.loads(header[key])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {key} in its header is no JSON ({error.msg})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {key} in its header is a {type(found).__name__}; expected a mapping")
    return found


def _spelled(
    path: Path, header: Mapping[str, str], tensors: Mapping[str, Tensor], where: Mapping[str, Place], configs: Configs
) -> dict[str, Place]:
    """Places in a folder, whose names may differ from those that the libraries have today."""
    stored = _mapping(path, header, NAMES) if NAMES in header else {}
    usual = {part: [n for place in where.values() if place.part == part for n in place.names] for part in PARTS}
    usual["text_encoder"] = [f"text_model.{n.removeprefix('text_model.')}" for n in usual["text_encoder"]]
    names = {**usual, **stored}
    if names.keys() != set(PARTS) or not all(isinstance(n, str) for part in names.values() for n in part):
        raise ValueError(f"{path}: {NAMES} in its header must hold names of tensors of {', '.join(PARTS)}")
    found = _as_named(places(names, configs), tensors)
    odd = [*sorted(where.keys() - found.keys()), *sorted(found.keys() - tensors.keys())]
    if odd:
        raise ValueError(f"{path}: {NAMES} in its header do not fit its tensors, such as {odd[0]}")
    return found


def _as_named(where: Mapping[str, Place], tensors: Mapping[str, Tensor]) -> dict[str, Place]:
    """Places by the names that a file has: some of 1.x leave out the `text_model` of their text encoder's."""

    def name(ldm: str) -> str:
        short = ldm.replace(".transformer.text_model.", ".transformer.", 1)
        return short if ldm not in tensors and short in tensors else ldm

    return {name(ldm): place for ldm, place in where.items()}


def odd_names(names: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """The parts of a folder whose tensors have other names than we would give them."""
    old = re.compile(r"(?!text_model\.).*|.*position_ids"), re.compile(r".*\.(query|key|value|proj_attn)\.\w+")
    return {
        part: names[part]
        for part, pattern in (("text_encoder", old[0]), ("vae", old[1]))
        if any(pattern.fullmatch(name) for name in names[part])
    }


def released(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], prediction: Prediction | None
) -> dict[str, str]:
    """The configuration of the released model that has such tensors.

    Raises:
        ValueError: for tensors of no Stable Diffusion 1.x or 2.x, or a 2.x model of which it is not known what it
            predicts.
    """
    if not {WIDTH, FIRST} <= tensors.keys():
        kind = kind_of(tensors)
        advice = f", which changes a model: {FUSE}, and name the folder it writes" if kind == LORA else ""
        raise ValueError(f"{path} is no Stable Diffusion 1.x or 2.x checkpoint: it is {kind}{advice}")
    width, channels = tensors[WIDTH].shape[-1], tensors[FIRST].shape[1]
    if width not in (768, 1024):
        raise ValueError(f"{path}: its cross-attention is {width} wide; 1.x has 768 and 2.x has 1024")
    if channels != 4:
        raise ValueError(
            f"{path} has a UNet of {channels} input channels: inpainting and depth models are not supported"
        )
    told = {"epsilon": "epsilon", "v": "v_prediction"}.get(header.get("modelspec.prediction_type", ""))
    predicts = prediction or told or ("epsilon" if width == 768 else None)
    if predicts is None:
        raise ValueError(
            f"{path} is of Stable Diffusion 2.x and does not say what it predicts: make it a folder with erase convert "
            "--prediction epsilon (512 pixels, -base) or --prediction v_prediction (768 pixels)"
        )
    unet: dict[str, Any] = {**_UNET_CONFIG, "cross_attention_dim": width}
    unet |= {"sample_size": 96 if predicts == "v_prediction" else 64, "attention_head_dim": 8}
    text: dict[str, Any] = {**_TEXT_CONFIG, "hidden_size": width, "intermediate_size": 4 * width}
    scheduler: dict[str, Any] = {**_SCHEDULE, "prediction_type": predicts}
    if width == 768:
        text |= {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu", "projection_dim": 768}
        kind, pad = "PNDMScheduler", "<|endoftext|>"
        scheduler |= {"skip_prk_steps": True}
    else:
        unet |= {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True, "upcast_attention": True}
        text |= {"num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 512}
        kind, pad = "DDIMScheduler", "!"
        scheduler |= {"clip_sample": False}
    configs = {
        "model_index.json": {**_INDEX, "scheduler": ["diffusers", kind]},
        "unet/config.json": unet,
        "vae/config.json": {**_VAE_CONFIG, "sample_size": 8 * unet["sample_size"]},
        "text_encoder/config.json": text,
        "scheduler/scheduler_config.json": {"_class_name": kind, **scheduler},
        "tokenizer/tokenizer_config.json": {**_TOKENIZER, "pad_token": pad},
    }
    return {name: json.dumps(config, indent=2) + "\n" for name, config in configs.items()}


def kind_of(names: Iterable[str]) -> str:
    """What a file with such tensors is, as far as their names tell."""
    signs = (
        (r"conditioner\.embedders\.", "Stable Diffusion XL"),
        (r"(lora_unet_|lora_te|.*\.lora_(up|down|A|B)\.)", LORA),
        (r"control_model\.|controlnet_", "a ControlNet"),
        (re.escape(UNET), "a UNet in LDM's layout"),
        (r"(double_blocks|joint_blocks|transformer_blocks)\.", "a diffusion transformer"),
        (r"down_blocks\.\d+\.(attentions|resnets)\.", "a diffusers UNet's weights"),
        (r"(first_stage_model\.)?(encoder|decoder)\.(mid|mid_block)\b", "an autoencoder's weights"),
        (r"(text_model\.)?encoder\.layers\.", "a text encoder's weights"),
        (r"emb_params|string_to_param|<.+>", "a textual inversion"),
    )
    found = list(names)
    return next((kind for sign, kind in signs if any(re.match(sign, name) for name in found)), "something else")


def write_texts(texts: Mapping[str, str], folder: Path) -> None:
    """A folder's configuration and tokenizer, with CLIP's vocabulary where it has no other."""
    whole = texts if any(name in texts for name in vocabulary.VOCABULARY) else {**texts, **vocabulary.files()}
    for name, text in whole.items():
        files.write_text(folder / name, text)


def rewrite(
    source: SingleFile,
    tensors: Mapping[str, Tensor],
    path: Path,
    meta: Mapping[str, str],
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write the checkpoint again with other UNet weights; every other tensor, and every dtype, stays as it is.

    A running average of the weights (`model_ema`) is left out: it would still hold what is erased.

    Args:
        source: the checkpoint.
        tensors: new values of UNet weights, by diffusers' names.
        path: the file to write.
        meta: provenance for the header, in the place of the old one.
        progress: called with 1 for each tensor that is written.

    Raises:
        ValueError: for a name that is not among the UNet's tensors, or a value beyond its dtype.
    """
    old, header = source.open()
    where = {place.names[0]: ldm for ldm, place in source.places.items() if place.part == "unet"}
    unknown = sorted(tensors.keys() - where.keys())
    if unknown:
        raise ValueError(f"{source.path} has no tensor named {unknown[0]!r} in its UNet")
    new = {where[name]: name for name in tensors}

    def get(ldm: str) -> Tensor:
        return fitted(new[ldm], old[ldm], tensors[new[ldm]], source.path) if ldm in new else old[ldm]

    kept = Lazy((ldm for ldm in old if not ldm.startswith(EMA)), get)
    write_safetensors(path, kept, {"format": "pt", **without_provenance(header), **meta}, progress)
