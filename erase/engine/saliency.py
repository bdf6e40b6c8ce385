"""S, second half: masks over weights, from a Fisher ratio or a magnitude, and their bit-packed files."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from erase.engine.fisher import Fisher
from erase.engine.sharding import as_shard, local, summed, whole
from erase.store.safetensors import Lazy, open_safetensors, read_safetensors, write_safetensors

FORMAT = "erase-mask-1"


class Bits(Mapping[str, Tensor]):
    """Named bool tensors held at one bit an element: each is unpacked when it is asked for."""

    def __init__(self, packed: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
        self.packed, self.shapes = dict(packed), {name: list(shape) for name, shape in shapes.items()}

    @classmethod
    def pack(cls, named: Mapping[str, Tensor]) -> Bits:
        """Bits of bool tensors, on the CPU."""
        packed, shapes = {}, {}
        for name, m in named.items():
            packed[name] = torch.from_numpy(np.packbits(m.cpu().numpy().reshape(-1), bitorder="little"))
            shapes[name] = m.shape
        return cls(packed, shapes)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        flat = np.unpackbits(self.packed[name].numpy(), count=math.prod(shape), bitorder="little")
        return torch.from_numpy(flat.view(bool)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True)
class Mask:
    """Which weights the forget step may change."""

    named: Mapping[str, Tensor]
    """bool, shaped like the parameter of that name."""
    meta: dict[str, str] = field(default_factory=dict)
    """How it was made: source, per, clip, threshold or density asked for; `free`, if it lets some parameters be."""

    def __getitem__(self, name: str) -> Tensor:
        """The mask of one parameter.

        Raises:
            KeyError: for a parameter the mask does not know: it was made for other trainable parameters.
        """
        try:
            return self.named[name]
        except KeyError:
            raise KeyError(
                f"the mask has no entry for {name!r} ({len(self.named)} entries): make it with the same "
                "train.parameters as the run"
            ) from None

    def frees(self, name: str) -> bool:
        """Whether it is not about a parameter, all of which may then change: one with `meta["free"]` in its name."""
        return "free" in self.meta and self.meta["free"] in name

    @property
    def density(self) -> float:
        """Fraction of weights kept, over all parameters that it is about."""
        kept = sum(int(m.sum()) for m in self.named.values())
        return kept / sum(m.numel() for m in self.named.values())

    def per_layer(self) -> dict[str, float]:
        """Fraction of weights kept in each parameter."""
        return {name: float(m.float().mean()) for name, m in self.named.items()}


@contextmanager
def parked(found: Fisher, folder: Path | None) -> Iterator[Fisher]:
    """The same diagonal, whose entries are in a file of `folder` until they are asked for.

    While another diagonal is computed this one takes no memory. Without a folder it stays. Of entries that are spread
    over processes each keeps its own rows, in a file of its own.
    """
    if folder is None:
        yield found
        return
    like = {name: as_shard(local(value).new_empty(0), value) for name, value in found.named.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fisher-", suffix=".tmp", dir=folder) as place:
        path = Path(place) / "mean.safetensors"
        write_safetensors(path, {name: local(value) for name, value in found.named.items()}, {})
        stored, _ = open_safetensors(path)

        def read(name: str) -> Tensor:
            return as_shard(stored[name].to(like[name].device), like[name])

        found = replace(found, named=Lazy(like, read))  # every process in the same order
        yield found


def fisher_ratio_mask(
    forget: Fisher, remain: Fisher, *, threshold: float | None = None, density: float | None = None
) -> Mask:
    """`m = 1[F_f / F_r ≥ γ]`, by γ (`threshold`) or by the fraction of weights to keep (`density`).

    A weight that moves neither loss (0/0) is kept only at γ = 0; one that moves the forget loss alone (x/0)
    is always kept. With `density` the cut is exact up to ties.

    Raises:
        ValueError: for diagonals of different kind (`per`, `clip`) or of different parameters, unless exactly one of
            `threshold` ≥ 0 and 0 < `density` ≤ 1 is given, and if the mask keeps nothing, or everything at γ > 0.
    """
    if forget.per != remain.per:
        raise ValueError(
            f"Fisher diagonals of different kinds cannot be divided: forget is per {forget.per!r}, "
            f"remain is per {remain.per!r}"
        )
    if forget.meta != remain.meta:
        raise ValueError(f"Fisher diagonals of different kinds cannot be divided: {forget.meta} and {remain.meta}")
    if forget.named.keys() != remain.named.keys():
        odd = sorted(forget.named.keys() ^ remain.named.keys())
        raise ValueError(f"forget and remain diagonals cover different parameters: {', '.join(odd[:3])} …")
    if (threshold is None) == (density is None):
        raise ValueError(f"give exactly one of threshold and density; got {threshold} and {density}")
    meta = {"source": "fisher", "per": forget.per, **forget.meta}
    meta |= {"forget_count": str(forget.count), "remain_count": str(remain.count)}
    if threshold is not None:
        if not threshold >= 0:
            raise ValueError(f"threshold must be ≥ 0; got {threshold}")
        above = Lazy(forget.named, lambda name: _above(local(forget.named[name]), local(remain.named[name]), threshold))
        named = Bits.pack(Lazy(above, lambda name: whole(above[name], forget.named[name])))
        meta["threshold"] = repr(threshold)
    else:
        assert density is not None
        ratios = Lazy(forget.named, lambda name: _ratio(local(forget.named[name]), local(remain.named[name])))
        named = _top(ratios, density, forget.named)
        meta["density"] = repr(density)
    return _checked(Mask(named, meta), partial=bool(threshold) or (density is not None and density < 1))


def magnitude_mask(scores: Mapping[str, Tensor], *, density: float) -> Mask:
    """The `density` fraction of weights with the largest score ≥ 0 (SalUn, arXiv 2310.12508: |∇L_f|).

    Raises:
        ValueError: for a density outside (0, 1], or scores that are negative or NaN.
    """
    if not all(bool((local(s) >= 0).all()) for s in scores.values()):  # so said, NaN fails too
        raise ValueError("magnitude_mask takes scores ≥ 0, such as |gradient|")
    named = _top(Lazy(scores, lambda name: local(scores[name]).float()), density, scores)
    return _checked(Mask(named, {"source": "magnitude", "density": repr(density)}), partial=density < 1)


def _ratio(forget: Tensor, remain: Tensor) -> Tensor:
    """F_f / F_r, float32 ≥ 0, with 0/0 = 0 and x/0 = inf."""
    return torch.nan_to_num(forget / remain, nan=0.0, posinf=float("inf"))


def _above(forget: Tensor, remain: Tensor, threshold: float) -> Tensor:
    keep = forget >= threshold * remain
    return keep if threshold == 0 else keep & (forget > 0)


def _top(scores: Mapping[str, Tensor], density: float, of: Mapping[str, Tensor]) -> Bits:
    """Keep the top `density` of all scores together, exactly, without sorting them.

    Non-negative float32 order like their bits as integers, so two histograms (high and low 16 bits) find the cut.
    Of what is spread over processes, as `of` says, `scores` are the process's own rows; histograms are summed, and
    all processes get all of the mask.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1]; got {density}")
    numel = sum(s.numel() for s in of.values())
    want = max(1, round(density * numel))
    if want >= numel:
        return Bits.pack(Lazy(of, lambda name: torch.ones(of[name].shape, dtype=torch.bool)))
    one = next(iter(of.values()))

    def bits(s: Tensor) -> Tensor:
        return s.contiguous().abs().view(torch.int32).flatten()

    def at_least(counts: Tensor, needed: int) -> tuple[int, int]:
        """The highest bucket with `needed` elements in it and above, and how many lie above it."""
        above = counts.flip(0).cumsum(0).flip(0)
        bucket = int((above >= needed).nonzero().max())
        return bucket, int(above[bucket]) - int(counts[bucket])

    high = torch.zeros(1 << 16, dtype=torch.int64)
    for s in scores.values():
        high += torch.bincount((bits(s) >> 16).to(torch.int64), minlength=1 << 16).cpu()
    high = summed(high, one)
    bucket, above = at_least(high, want)
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for s in scores.values():
        b = bits(s)
        inside = b[(b >> 16) == bucket] & 0xFFFF
        low += torch.bincount(inside.to(torch.int64), minlength=1 << 16).cpu()
    low = summed(low, one)
    cut = (bucket << 16) | at_least(low, want - above)[0]

    def keep(name: str) -> Tensor:
        s = scores[name]
        return whole((bits(s) >= cut).view(s.shape) & (s > 0), of[name])

    return Bits.pack(Lazy(scores, keep))


def _checked(mask: Mask, *, partial: bool) -> Mask:
    density = mask.density
    how = ", ".join(f"{k} {v}" for k, v in mask.meta.items())
    if density == 0:
        raise ValueError(
            f"the mask keeps no weights ({how}): lower saliency.threshold, or set saliency.density instead"
        )
    if partial and density == 1:
        raise ValueError(
            f"the mask keeps every weight ({how}): raise saliency.threshold, set saliency.density instead, or set "
            "saliency.kind=none"
        )
    return mask


def save_mask(mask: Mask, path: Path) -> None:
    """Write a mask bit-packed (1/8 byte a weight): safetensors with one uint8 vector per parameter, atomically."""
    bits = mask.named if isinstance(mask.named, Bits) else Bits.pack(mask.named)
    meta = {
        "format": FORMAT,
        "shapes": json.dumps(bits.shapes),
        "mask": json.dumps({**mask.meta, "kept": f"{mask.density:.6f}"}),
    }
    write_safetensors(path, bits.packed, meta)


def load_mask(path: Path) -> Mask:
    """Read what `save_mask` wrote.

    Raises:
        ValueError: for a file that is missing, broken, or no mask.
    """
    packed, header = read_safetensors(path)
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a saliency mask (format {header.get('format')!r}, expected {FORMAT!r})")
    if lost := sorted({"shapes", "mask"} - header.keys()):
        raise ValueError(f"{path} is a damaged saliency mask: its header lacks {' and '.join(lost)}")
    shapes: dict[str, list[int]] = json.loads(header["shapes"])
    meta: dict[str, str] = json.loads(header["mask"])
    meta.pop("kept", None)
    return Mask(Bits(packed, shapes), meta)
