"""Write a change of weights as a LoRA, or as it is in ComfyUI's `.diff` form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase.diffusion.lora.keys import BIAS, LoraLayout
from erase.diffusion.lora.svd import Factors, Ranks, factor
from erase.store.safetensors import Lazy, write_safetensors

HEADER = "erase_lora"
"""The key of a header that says how much of the change a file keeps, JSON."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Kept:
    """What a file holds of a change."""

    layers: int
    ranks: tuple[int, ...]
    """Of the layers; none of a file that holds differences."""
    share: float
    """Of the change, by sums of squares over all tensors."""
    left_out: Mapping[str, float]
    """Shares of the tensors that the form cannot carry, by name."""

    @property
    def told(self) -> dict[str, str]:
        """As the header says it."""
        found: dict[str, Any] = {"layers": self.layers, "kept": round(self.share, 6), "left_out": len(self.left_out)}
        if self.ranks:
            found |= {"rank": [min(self.ranks), max(self.ranks)]}
        return {HEADER: json.dumps(found)}

    @property
    def lines(self) -> list[str]:
        """In words: how much is kept, and what is not."""
        first = f"{self.layers} layers"
        if self.ranks:
            first += (
                f", rank {min(self.ranks)} to {max(self.ranks)}, {sum(self.ranks) / len(self.ranks):.1f} on average"
            )
        lines = [first, f"keeps {percent(self.share)} of the change (sum of squares)"]
        if self.left_out:
            names = sorted(self.left_out, key=lambda name: -self.left_out[name])
            more = f" … ({len(names)})" if len(names) > 6 else ""
            share = percent(sum(self.left_out.values()))
            lines.append(f"leaves out what this form cannot carry, {share} of it: {', '.join(names[:6])}{more}")
        return lines


def percent(share: float) -> str:
    """A share with as many digits as tell it from none and from all."""
    return "100 %" if share == 1 else f"{100 * share:.2f} %" if 0.0001 <= share <= 0.9999 else f"{100 * share:.2g} %"


def difference(base: Mapping[str, Tensor], erased: Mapping[str, Tensor]) -> Lazy:
    """What changed, float32, by the names of the weights; tensors that did not change are left out.

    Args:
        base: all tensors before.
        erased: those that may have changed.
    """
    names = [name for name in erased if not torch.equal(erased[name].cpu().to(base[name].dtype), base[name])]
    return Lazy(names, lambda name: erased[name].detach().cpu().float() - base[name].float())


def write_lora(
    change: Mapping[str, Tensor],
    layout: LoraLayout,
    layers: Mapping[str, str],
    path: Path,
    meta: Mapping[str, str],
    ranks: Ranks,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], object] | None = None,
    rounding: Callable[[str], float] = lambda name: 0.0,
) -> Kept:
    """Write a change in low rank.

    Args:
        change: of the weights that changed, float32, by name.
        layout: of the family.
        layers: what the file calls each layer (`LoraLayout.layers`).
        path: the file; must not exist.
        meta: provenance for the header.
        ranks: how ranks are chosen.
        dtype: of the factors.
        progress: called with 1 for each tensor that was looked at.
        rounding: how much of each tensor's change is rounding (`svd.rounded`).

    Raises:
        ValueError: if the path exists, or for a change that no LoRA carries.
    """
    check_new(path)
    up, down, alpha = layout.suffixes
    found: dict[str, Factors] = {}
    whole, lost, left_out = 0.0, 0.0, dict[str, float]()
    for name, delta, size in _sized(change, progress):
        whole += size
        if not layout.carried(name, delta.ndim):
            left_out[name] = size
            continue
        factors = factor(delta, ranks, rounding(name))
        lost += factors.lost
        found[layers[name.removesuffix(".weight")]] = factors
    if not found:
        raise ValueError(nothing(path, left_out))
    used = tuple(factors.rank for factors in found.values())
    kept = Kept(len(found), used, 1 - (lost + sum(left_out.values())) / whole, _shares(left_out, whole))
    tensors: dict[str, Tensor] = {}
    for layer, factors in found.items():
        # One alpha for all layers: of alphas that differ, diffusers 0.42 loses those of attention.
        scale = 1.0 if alpha is None else factors.rank / max(used)
        tensors |= {layer + up: (scale * factors.up).to(dtype), layer + down: factors.down.to(dtype)}
        if alpha is not None:
            tensors[layer + alpha] = torch.tensor(float(max(used)))
    write_safetensors(path, tensors, {"format": "pt", **_header(layout, kept, tensors), **meta, **kept.told})
    return kept


def write_difference(
    change: Mapping[str, Tensor],
    layout: LoraLayout,
    layers: Mapping[str, str],
    path: Path,
    meta: Mapping[str, str],
    progress: Callable[[int], object] | None = None,
) -> Kept:
    """Write a change as it is, in ComfyUI's `.diff` and `.diff_b`; arguments and errors as those of `write_lora`."""
    check_new(path)
    if layout.comfy is None:
        raise ValueError(f"--to comfy-diff: ComfyUI does not know diffusers' names of {layout.base}: use --to lora")
    tensors: dict[str, Tensor] = {}
    whole, left_out = 0.0, dict[str, float]()
    for name, delta, size in _sized(change, progress):
        whole += size
        if not layout.as_difference(name):
            left_out[name] = size
            continue
        suffix = ".diff_b" if name.endswith(BIAS) else ".diff"
        tensors[layers[re.sub(r"\.(weight|bias)$", "", name)] + suffix] = delta
    if not tensors:
        raise ValueError(nothing(path, left_out))
    kept = Kept(len(tensors), (), 1 - sum(left_out.values()) / whole, _shares(left_out, whole))
    write_safetensors(path, tensors, {"format": "pt", **meta, **kept.told})
    return kept


def check_new(path: Path) -> None:
    """Refuse a file that exists, or is not named `.safetensors`.

    Raises:
        ValueError: for these.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must be a .safetensors file: name one")
    if path.exists():
        raise ValueError(f"{path} exists: choose another name, or remove it")


def nothing(path: Path, left_out: Mapping[str, float]) -> str:
    """Why there is nothing to write."""
    if not left_out:
        return f"{path} would be empty: no weight of the model differs from its base; name an erased model"
    some = ", ".join(list(left_out)[:3])
    return f"{path} would be empty: this form carries none of what changed ({some}); keep the model or a delta"


def _sized(
    change: Mapping[str, Tensor], progress: Callable[[int], object] | None
) -> Iterator[tuple[str, Tensor, float]]:
    """Every tensor of a change by name, one at a time, with its sum of squares."""
    for name in change:
        delta = change[name]
        size = float(delta.double().square().sum())
        if progress is not None:
            progress(1)
        yield name, delta, size


def _shares(sizes: Mapping[str, float], whole: float) -> dict[str, float]:
    return {name: size / whole for name, size in sizes.items()}


def _header(layout: LoraLayout, kept: Kept, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What WebUIs show and sort by: the base's kind, and the rank."""
    found = {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"{layout.base}/lora"}
    if layout.style != "kohya":
        return found
    wide = any("attn2_to_k.lora_down" in name and t.shape[-1] == 1024 for name, t in tensors.items())
    second = wide and not layout.sgm
    if second:
        found["modelspec.architecture"] = "stable-diffusion-v2/lora"
    version = "sdxl_base_v1-0" if layout.sgm else "sd_v2" if second else "sd_v1"
    most = str(max(kept.ranks))
    return found | {
        "ss_network_module": "networks.lora",
        "ss_network_dim": most if len({*kept.ranks}) == 1 else "Dynamic",
        "ss_network_alpha": most,
        "ss_base_model_version": version,
        "ss_v2": str(second),
    }
