"""Read LoRA files of any form that diffusers reads, and find out that they fit a model.

The names are diffusers' affair: its own converters turn those of kohya's sd-scripts, of PEFT and of others into one
form. Values are ours: scales are folded into `up`, and nothing is left out without a word.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.utils import state_dict_utils as _names
from torch import Tensor

from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.folders import Source
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.diffusion.families import FAMILIES, family
from erase.diffusion.lora.adapter import Lora, Pairs
from erase.store import files
from erase.store.safetensors import open_safetensors
from erase.store.safety import check_finite, check_kinds

UPS = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight")
DOWN_OF = {"lora_up": "lora_down", "lora_B": "lora_A", "lora.up": "lora.down", "layer.up": "layer.down"}
converters: Any = _names  # its functions are unannotated
OTHERS = (
    (r"hada_w", "a LoHa"),
    (r"lokr_w", "a LoKr"),
    (r"dora_scale|lora_magnitude_vector", "a DoRA"),
    (r"\.(diff|diff_b|set_weight|w_norm|b_norm)$", "a file of whole differences"),
    (r"lora_mid\.|lora_[AB]\.bias|lora_bias", "a LoRA with parts beside up and down"),
    (r"\.oft_", "an OFT"),
)
"""Adapters of other kinds, by the names of their tensors."""
PEFT, SETTINGS = "base_model.model.", "adapter_config.json"
"""How PEFT's own names begin, and the file beside them that has their scale."""


def with_loras(source: Source | SingleFile, specs: Sequence[str], key: str = "loras") -> Source | SingleFile:
    """A model with more LoRAs in it, each given as `FILE` or `FILE:SCALE`; they are merged where its weights are read.

    Args:
        source: the model.
        specs: as the user gave them; applied in order, after those that it has.
        key: what the user gave them as, for messages.

    Raises:
        ValueError: for a file that is missing, broken, no LoRA, or of another model; and for an infinite scale.
    """
    if not specs:
        return source
    if family(source.family).LORA is None:
        raise ValueError(f"{key} is for text-to-image models; {source.name} is a {family(source.family).NAME}")
    return replace(source, loras=(*source.loras, *(read_lora(*parse(spec, key), source) for spec in specs)))


def parse(spec: str, key: str = "loras") -> tuple[Path, float]:
    """File and scale, 1 by default.

    Raises:
        ValueError: for a scale that is no finite number.
    """
    path, colon, number = spec.rpartition(":")
    if not colon or number.endswith(".safetensors") or "/" in number:
        return Path(spec), 1.0
    try:
        scale = float(number)
    except ValueError:
        scale = float("nan")
    if not abs(scale) < float("inf"):
        raise ValueError(f"{key} has {spec!r}: the scale {number!r} is not a number; give FILE.safetensors:0.8")
    return Path(path), scale


def read_lora(path: Path, scale: float, source: Source | SingleFile) -> Lora:
    """Read one, and find out that it fits a model.

    Raises:
        ValueError: for a file that is missing, broken, no LoRA, or of another model.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a .safetensors file: LoRAs in pickles are not read; get it as .safetensors")
    lazy, header = open_safetensors(path)
    tensors = {name: lazy[name] for name in lazy}
    for sign, kind in OTHERS:
        if any(re.search(sign, name) for name in tensors):
            raise ValueError(f"{path} is {kind}, which erase does not merge: fuse it into the model with its own tool")
    if not any("lora" in name for name in tensors):
        raise ValueError(f"{path} is not a LoRA: its first tensor is {next(iter(tensors), 'none')}; leave it out")
    check_kinds({name: t for name, t in tensors.items() if not name.endswith("alpha")}, path)
    check_finite(tensors, path)
    trained = family(source.family).TRAINED
    told, beside = _peft_settings(tensors, header, path, trained)
    named = {re.sub(rf"^{re.escape(PEFT)}", f"{trained}.", name): t for name, t in tensors.items()}
    pairs = _pairs(_converted(_scaled(named, told, path), source, path), path)
    parts = {part: _fitted(found, part, source, path, header) for part, found in pairs.items()}
    if isinstance(source, SingleFile) and (more := parts.keys() - {source.trained}):
        raise ValueError(
            f"{path} changes {min(more)} too, and {source.name} is a single file: make it a folder first "
            f"(erase convert {source.name} FOLDER)"
        )
    return Lora(path, scale, _digest(path, beside), parts)


def _digest(path: Path, beside: Path | None) -> str:
    own = files.sha256(path)
    return own if beside is None else hashlib.sha256(f"{own} {files.sha256(beside)}".encode()).hexdigest()


def _scaled(tensors: Mapping[str, Tensor], told: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Without alphas, which are multiplied into `up`; `told` are PEFT's settings by component."""
    plain = {re.sub(r"\.lora_([AB])\.default\.weight$", r".lora_\1.weight", name): t for name, t in tensors.items()}
    found = {name: t for name, t in plain.items() if not name.endswith("alpha")}
    given = _peft_alphas(told)
    for name, up in list(found.items()):
        end = next((end for end in UPS if name.endswith(end)), None)
        if end is None:
            continue
        layer = name.removesuffix(end)
        down = found.get(_down(name))
        alpha = plain.get(f"{layer}.alpha")
        if down is None:
            raise ValueError(f"{path} is incomplete: it has {name} without {_down(name)}: get it again")
        if up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"{path} is broken: {layer} has shapes {list(up.shape)} and {list(down.shape)}, whose ranks differ: "
                "get it again"
            )
        rank = len(down)
        if alpha is not None and alpha.numel() != 1:
            raise ValueError(f"{path} is broken: {layer}.alpha must be one number; got the shape {list(alpha.shape)}")
        value = float(alpha) if alpha is not None else given(layer, rank)
        found[name] = up.float() * (value / rank)
    downs = {_down(name) for name in found if name.endswith(UPS)}
    alone = [n for n in found if re.search(r"lora_down\.|lora_A\.|lora\.down\.|layer\.down\.", n) and n not in downs]
    if alone:
        raise ValueError(f"{path} is incomplete: it has {alone[0]} without its other half: get it again")
    lost = [n for n in plain if n.endswith(".alpha") and not any(n[:-6] + end in found for end in UPS)]
    if lost:
        raise ValueError(f"{path} is incomplete: it has {lost[0]} without a LoRA of that name: get it again")
    return found


def _down(name: str) -> str:
    """The name of `down` of an `up`."""
    for up, down in DOWN_OF.items():
        head, found, tail = name.rpartition(up)
        if found:
            return head + down + tail
    raise AssertionError(name)


def _peft_settings(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], path: Path, trained: str
) -> tuple[dict[str, Any], Path | None]:
    """PEFT's settings by component (`unet.lora_alpha`, …), and the file beside the LoRA that they are of.

    diffusers writes them into the LoRA's header; PEFT itself writes a file. Without either there are none.

    Raises:
        ValueError: for settings that cannot be read, and PEFT's own names without settings, which have their scale.
    """
    try:
        told = json.loads(header.get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: lora_adapter_metadata in its header is not JSON ({error.msg}): get it again"
        ) from error
    _check_settings(told, f"{path}: lora_adapter_metadata in its header")
    scaled = f"{trained}.lora_alpha" in told or any(name.endswith(".alpha") for name in tensors)
    if scaled or not any(name.startswith(PEFT) for name in tensors):
        return told, None
    beside = path.parent / SETTINGS
    if not beside.is_file():
        raise ValueError(
            f"{path} is an adapter of PEFT without {SETTINGS}, which has its scale: put it into {path.parent}"
        )
    own = files.read_json(beside)
    _check_settings(own, str(beside))
    if "lora_alpha" not in own:
        raise ValueError(f"{beside} has no lora_alpha, the scale of {path.name}: get it again")
    return {f"{trained}.{key}": value for key, value in own.items()}, beside


def _check_settings(told: Any, where: str) -> None:
    """Refuse settings of PEFT without numbers where alphas are."""
    if not isinstance(told, dict):
        raise ValueError(f"{where} must be a JSON object; got {str(told)[:60]}: get it again")
    for key, value in told.items():
        name, alphas = key.rpartition(".")[2], {key: value}
        if name == "alpha_pattern":
            if not isinstance(value, dict | None):
                raise ValueError(f"{where}: {key} must be an object; got {str(value)[:60]}: get it again")
            alphas = value or {}
        for one, alpha in alphas.items() if name in ("lora_alpha", "alpha_pattern") else ():
            if type(alpha) not in (int, float) or not abs(alpha) < float("inf"):
                raise ValueError(f"{where}: {one} must be a number; got {alpha!r}: get it again")


def _peft_alphas(told: Mapping[str, Any]) -> Callable[[str, int], float]:
    """Alpha of a layer and its rank; the rank where nothing is told of its component."""
    parts = {key.rpartition(".lora_alpha")[0]: value for key, value in told.items() if key.endswith(".lora_alpha")}

    def alpha(layer: str, rank: int) -> float:
        part = next((part for part in parts if layer.startswith(f"{part}.")), None)
        if part is None:
            return float(rank)
        patterns = told.get(f"{part}.alpha_pattern") or {}
        name = layer.removeprefix(f"{part}.")
        own = next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name)), parts[part])  # as PEFT
        return float(own) * (rank**0.5 if told.get(f"{part}.use_rslora") else 1.0)

    return alpha


def _converted(tensors: dict[str, Tensor], source: Source | SingleFile, path: Path) -> dict[str, Tensor]:
    """Under diffusers' names: the component, the layer, `lora_A` or `lora_B`."""
    known, named = family(source.family), tensors
    kind = pipeline_class(source)
    if hasattr(kind, "lora_state_dict"):
        config = {"unet_config": _Config(source)} if known.TRAINED == "unet" else {}
        try:
            made: Any = kind.lora_state_dict(named, **config)
        except (ValueError, KeyError, IndexError, TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{path} is not a LoRA that diffusers reads for {known.NAME}: {_first(error)}") from error
        named = made[0] if isinstance(made, tuple) else made
    found: dict[str, Tensor] = {}
    for part in dict.fromkeys(name.split(".")[0] for name in named):
        own = {name.removeprefix(f"{part}."): t for name, t in named.items() if name.startswith(f"{part}.")}
        if part.startswith("text_encoder"):
            for form in (converters.StateDictType.DIFFUSERS_OLD, converters.StateDictType.DIFFUSERS):
                own = converters.convert_state_dict_to_peft(own, form)
        elif not any(".lora_A." in name for name in own):
            own = converters.convert_unet_state_dict_to_peft(own)
        found |= {f"{part}.{name}": t for name, t in own.items()}
    return found


class _Config:
    """What diffusers' converter asks a UNet's configuration."""

    def __init__(self, source: Source | SingleFile) -> None:
        self.layers_per_block = folders.network_config(source).get("layers_per_block", 2)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def pipeline_class(source: Source | SingleFile) -> Any:
    """The class of the model's pipeline in diffusers."""
    own = FAMILIES[source.family][0]
    name = folders.read_index(source.folder)["_class_name"] if isinstance(source, Source) else own
    module = importlib.import_module("diffusers")
    return getattr(module, name, None) or getattr(module, own)  # classes are renamed, and old names go


def _pairs(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Up and down, by component and layer."""
    found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, up in tensors.items():
        place = re.fullmatch(r"(unet|transformer|text_encoder\w*)\.(.+)\.lora_B\.weight", name)
        if place is not None:
            found.setdefault(place[1], {})[place[2]] = up, tensors[_down(name)]
    known = {f"{part}.{layer}.lora_{x}.weight" for part, layers in found.items() for layer in layers for x in "AB"}
    strange = sorted(tensors.keys() - known)
    if strange or not found:
        what = f"what erase does not know: {strange[0]}" if strange else "no layers"
        raise ValueError(f"{path} holds {what}, so it is not merged: leave it out, or fuse it with its own tool")
    return found


def _fitted(
    pairs: Pairs, part: str, source: Source | SingleFile, path: Path, header: Mapping[str, str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """By the names of the component's weights.

    Raises:
        ValueError: for a layer that the component does not have, or of another shape.
    """
    shapes = {name: t.shape for name, t in folders.part_tensors(source, part).sketches()}
    found, odd = dict[str, tuple[Tensor, Tensor]](), Counter[str]()
    for layer, (up, down) in pairs.items():
        plain = layer.removeprefix("text_model.")
        options = [f"{name}.weight" for name in dict.fromkeys((layer, plain, f"text_model.{plain}"))]
        name = next((name for name in options if name in shapes), None)
        if name is None:
            odd[f"{part}.{layer}, which it does not have"] += 1
        elif (len(up), down[0].numel()) != (shapes[name][0], shapes[name][1:].numel()):
            odd[f"{part}.{layer} by [{len(up)}, {down[0].numel()}], which is {list(shapes[name])}"] += 1
        else:
            found[name] = up, down
    if odd:
        base = header.get("modelspec.architecture") or header.get("ss_base_model_version")
        told = f"; its header says {base}" if base else ""
        raise ValueError(
            f"{path} is a LoRA of another model than {source.name}: it changes {next(iter(odd))} "
            f"({len(odd)} of {len(pairs)} layers){told}: leave it out, or name its base"
        )
    return found
