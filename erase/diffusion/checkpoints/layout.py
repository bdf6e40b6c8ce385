"""How the tensors of a family's networks are named and shaped in a single file, and the same in a diffusers folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from erase.store.safetensors import Lazy

Prediction = Literal["epsilon", "v_prediction"]
Config = Mapping[str, Any]
Form = Literal["same", "conv", "transposed", "swapped"]
Shapes = Mapping[str, Mapping[str, torch.Size]]
"""Of the tensors that the networks need, by part and name."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of a single file lies in a diffusers folder."""

    part: str
    """The component, such as `unet`."""
    names: tuple[str, ...]
    """In that part; where there are several, the file stacks them along their first dimension."""
    form: Form = "same"
    """The file has a 1×1 convolution `[O, I, 1, 1]` or the transpose `[I, O]` where diffusers has `[O, I]`, or the
    second half of the rows before the first."""
    shares: tuple[int, ...] = ()
    """Of the rows that each of `names` has; by default all the same."""

    def to_file(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor of those in `names`."""
        whole = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        return whole[:, :, None, None] if self.form == "conv" else self._turned(whole)

    def to_diffusers(self, tensor: Tensor) -> list[Tensor]:
        """What `to_file` took."""
        whole = tensor[:, :, 0, 0] if self.form == "conv" else self._turned(tensor)
        shares = self.shares or (1,) * len(self.names)
        unit = len(whole) // sum(shares) if len(shares) > 1 else 0
        return list(torch.split(whole, [unit * share for share in shares])) if unit else [whole]

    def _turned(self, tensor: Tensor) -> Tensor:
        """What is its own inverse."""
        if self.form == "transposed":
            return tensor.T.contiguous()
        return torch.cat(tensor.chunk(2)[::-1]) if self.form == "swapped" else tensor

    def size(self, shapes: Shapes) -> list[int]:
        """Shape in the file."""
        with torch.device("meta"):
            return list(self.to_file([torch.empty(shapes[self.part][name]) for name in self.names]).shape)


@dataclass(frozen=True)
class Part:
    """A network of a pipeline that a single file may hold."""

    library: Literal["diffusers", "transformers"]
    kind: str
    """Its class."""
    prefix: str
    """What the names of its tensors in a file begin with."""
    names: Callable[[Sequence[str], Config, str], Mapping[str, Place]]
    """Places by their names without the prefix, from its tensors' names, its `config.json` and the part's name."""
    identity: tuple[str, str] | None = None
    """A tensor of a folder that is an identity matrix, which no file holds; and one that has its width and dtype."""

    @property
    def stem(self) -> str:
        """What its weight file in a folder is called."""
        return "diffusion_pytorch_model" if self.library == "diffusers" else "model"


@dataclass(frozen=True)
class Layout:
    """The single files of a family."""

    title: str
    """As people call the models."""
    trained: str
    """The part that learns; no file is without it."""
    parts: Mapping[str, Part]
    released: Callable[[Path, Mapping[str, Tensor], Mapping[str, str], Prediction | None], dict[str, str]]
    """Texts of the folder that a file of others stands for, by its tensors, header, and what it predicts if the user
    says so. Those of parts that the file lacks may be missing, and with them those of no part."""
    needed: tuple[str, ...]
    """Files of the folder without which there is no pipeline."""
    others: tuple[str, ...] = ()
    """Components without weights whose files go into the header, beside the parts' and `model_index.json`; without
    any, the header has the parts' own configurations alone."""
    tokenizers: Mapping[str, tuple[str, ...]] | None = None
    """The classes that each tokenizer may have."""
    alike: tuple[str, ...] = ()
    """Keys of configurations in which a folder with the rest must agree: it is of another model otherwise."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Beginnings of names, and what some files have in their place."""

    @property
    def carried(self) -> tuple[str, ...]:
        """Subfolders whose texts go into the header of a file that holds every part."""
        return (*self.parts, *self.others)

    def places(self, names: Mapping[str, Iterable[str]], configs: Mapping[str, Config]) -> dict[str, Place]:
        """Where each tensor of a single file comes from, by its name there.

        Args:
            names: of the tensors of each part, as diffusers has them.
            configs: `config.json` of each.

        Raises:
            ValueError: for an architecture or a tensor that has no place in a single file.
        """
        found: dict[str, Place] = {}
        for name, part in self.parts.items():
            if name in names:
                inside = part.names([n for n in names[name] if n not in (part.identity or ())[:1]], configs[name], name)
                found |= {part.prefix + key: place for key, place in inside.items()}
        return found

    def as_named(self, where: Mapping[str, Place], tensors: Mapping[str, Tensor], path: Path) -> dict[str, Place]:
        """Places by the names that a file has.

        Raises:
            ValueError: for a file that holds a tensor under two names.
        """

        def name(usual: str) -> str:
            other = self._other(usual)
            if other is None or other not in tensors:
                return usual
            if usual in tensors:
                raise ValueError(f"{path} holds a tensor twice: as {usual} and as {other}: get it again")
            return other

        return {name(usual): place for usual, place in where.items()}

    def begin(self, where: Mapping[str, Place]) -> str:
        """What the names of the tensors of the network that learns begin with in a file, by its `as_named` places."""
        usual = self.parts[self.trained].prefix
        other = next((other for begin, other in self.aliases if begin == usual), usual)
        first = next(key for key, place in where.items() if place.part == self.trained)
        return next(begin for begin in sorted((usual, other), key=len, reverse=True) if first.startswith(begin))

    def held(self, tensors: Mapping[str, Tensor]) -> dict[str, Part]:
        """The parts that a file holds something of."""
        begins = {part.prefix for part in self.parts.values() if any(n.startswith(part.prefix) for n in tensors)}
        return {n: part for n, part in self.parts.items() if part.prefix in begins or n == self.trained}

    def _other(self, usual: str) -> str | None:
        for begin, other in self.aliases:
            if usual.startswith(begin):
                return other + usual.removeprefix(begin)
        return None


def part_of(tensors: Mapping[str, Tensor], where: Mapping[str, Place], name: str, part: Part) -> Lazy:
    """Tensors of one network, which a pipeline calls `name`, under diffusers' names."""
    at = {n: (key, i) for key, place in where.items() if place.part == name for i, n in enumerate(place.names)}
    made, like = part.identity or ("", "")

    def make(wanted: str, get: Callable[[Mapping[str, Tensor], str], Tensor]) -> Tensor:
        if wanted == made:
            return identity_like(make(like, get))
        key, i = at[wanted]
        return where[key].to_diffusers(get(tensors, key))[i]

    names = [*at, made] if made else at
    return Lazy(names, lambda n: make(n, lambda whole, key: whole[key]), lambda n: make(n, sketch_of))


def identity_like(row: Tensor) -> Tensor:
    """An identity matrix as wide as a tensor `[D]`, with its dtype."""
    return torch.eye(len(row), dtype=row.dtype, device=row.device)


def sketch_of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor's shape and dtype, on torch's "meta" device: of a safetensors file nothing else is read."""
    sketch = tensors.sketch if isinstance(tensors, Lazy) else None
    return tensors[name].to("meta") if sketch is None else sketch(name)


@dataclass(frozen=True)
class Slot:
    """Where one tensor of diffusers goes in a single file."""

    key: str
    at: int = 0
    """Its number among those that the file stacks."""
    shares: tuple[int, ...] = (1,)
    """Of the rows of these."""
    form: Form = "same"


def gathered(part: str, slots: Mapping[str, Slot]) -> dict[str, Place]:
    """Places by names in the file, from slots by diffusers' names.

    Raises:
        ValueError: for a tensor without those that the file stacks with it.
    """
    groups: dict[str, dict[int, str]] = {}
    for name, slot in slots.items():
        groups.setdefault(slot.key, {})[slot.at] = name
    found = {}
    for key, group in groups.items():
        slot, first = slots[next(iter(group.values()))], next(iter(group.values()))
        if len(group) < len(slot.shares):
            raise ValueError(f"the {part} lacks tensors that a single file merges with {first} as {key}: get it again")
        shares = slot.shares if len(set(slot.shares)) > 1 else ()
        found[key] = Place(part, tuple(group[at] for at in sorted(group)), slot.form, shares)
    return found


def homeless(part: str, name: str) -> ValueError:
    """The error for a tensor that has no place in a single file."""
    return ValueError(f"the {part}'s tensor {name} has no place in a single file: it is of another architecture")
