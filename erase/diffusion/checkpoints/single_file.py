"""A checkpoint in one file, `.safetensors` or `.ckpt`: find out what it is, and write it again.

Such a file holds tensors alone, of a whole pipeline or of the network that learns. What else the pipeline needs comes
from the header, if `erase convert` wrote the file, from the folder with the rest that the user names, and otherwise
from the released models (`released.py`, `vocabulary.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from erase.diffusion.checkpoints import detect, quantised
from erase.diffusion.checkpoints.header import NAMES, mapping, stored
from erase.diffusion.checkpoints.layout import (
    Layout,
    Part,
    Place,
    Prediction,
    Shapes,
    part_of,
    sketch_of,
)
from erase.diffusion.checkpoints.pickles import MoreThanWeightsError, read_pickle
from erase.diffusion.lora.adapter import Lora
from erase.store.safetensors import Lazy, open_safetensors, write_safetensors
from erase.store.safety import check_kinds
from erase.store.weights import fitted, without_provenance

if TYPE_CHECKING:
    from erase.diffusion.checkpoints.folders import Source

SUFFIXES = (".safetensors", ".ckpt")
EMA = "model_ema."
"""Running averages of the weights, which a training script may leave."""


class RestMissingError(ValueError):
    """A single file that holds some networks of a pipeline, without a folder that has the others."""


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint in one file."""

    name: str
    """As the user gave it."""
    path: Path
    texts: Mapping[str, str]
    """Files of the diffusers folder that it stands for, weights and CLIP's vocabulary left out, by path in it."""
    held: Mapping[str, Part]
    """The networks in the file."""
    places: Mapping[str, Place]
    """Where each of their tensors belongs, by its name in the file."""
    spelled: Mapping[str, Place]
    """The same for the folder that it stands for, whose names may be older; buffers among them."""
    left_out: tuple[str, ...] = ()
    """What the file holds besides tensors; a `.ckpt` may."""
    trusted: bool = False
    """Whether a pickle may run code."""
    family: str = "sd"
    """A module of `erase.diffusion.families`."""
    trained: str = "unet"
    """The network that learns; it is in the file."""
    rest: Source | None = None
    """The folder with the networks that are not in the file."""
    loras: tuple[Lora, ...] = ()
    """LoRAs that are in its weights wherever they are read."""

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
        return part_of(self.open()[0], self.places, part, self.held[part])


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
            f"{error}, so it is not read; if you trust its source, convert it with erase convert --allow-pickle"
        ) from error
    inner = whole.get("state_dict", whole)
    if not isinstance(inner, dict):
        raise ValueError(f"{path}: its state_dict is a {type(inner).__name__}; expected weights by name: get it again")
    tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    others = [str(name) for name, value in inner.items() if not isinstance(value, Tensor)]
    others += [str(name) for name in whole if inner is not whole and name != "state_dict"]
    return tensors, {}, tuple(others)


def find(
    name: str,
    path: Path,
    layout: Callable[[str], Layout],
    shapes: Callable[[Mapping[str, str], Mapping[str, Part]], Shapes],
    *,
    rest: Callable[[str, Iterable[str]], tuple[Source, dict[str, str]]] | None = None,
    prediction: Prediction | None = None,
    trusted: bool = False,
) -> SingleFile:
    """Find out what a single file is, and that it is whole.

    Args:
        name: as the user gave it.
        path: where it is.
        layout: of a family.
        shapes: tells what the networks of a folder's configuration need.
        rest: finds the folder with the networks that the file lacks, and its texts, for a family and the networks that
            the file has.
        prediction: what a model predicts whose file does not say.
        trusted: whether a pickle may run code.

    Raises:
        RestMissingError: for a file that lacks networks of its pipeline, without a folder that has them.
        ValueError: for a file that is broken, no family's, lacks a tensor, has one of another shape or of integers, or
            one that the network does not have, and for a pickle that holds more than weights and is not trusted.
    """
    tensors, header, left_out = read(path, trusted=trusted)
    quantised.refuse(path, tensors)
    family = detect.family_of_file(tensors)
    if family is None:
        raise ValueError(f"{path} is not a single file of a model that erase opens: {detect.explain(tensors)}")
    known = layout(family)
    held = known.held(tensors)
    told = stored(path, header, held)
    own = told or known.released(path, tensors, header, prediction)
    beside, texts = None, own
    if rest is not None:
        beside, more = rest(family, held)
        texts = _joined(path, known, held, own, bool(told), beside, more)
    elif missing := _missing(known, held, own):
        raise RestMissingError(
            f"{path} holds only {', '.join(held)}: give components=DIR (--components DIR), a diffusers folder with the "
            f"rest ({', '.join(missing)})"
        )
    if "model_index.json" not in texts:
        raise ValueError(f"{path}: its header lacks model_index.json: get it again")
    index = json.loads(texts["model_index.json"])
    held = {part: kind for part, kind in held.items() if index.get(part) != [None, None]}
    configs = {part: json.loads(texts[f"{part}/config.json"]) for part in held}
    needed = shapes(texts, held)
    where = known.as_named(known.places(needed, configs), tensors, path)
    _check(path, tensors, where, needed, known.trained)
    spelled = _spelled(path, header, tensors, where, known, held, configs)
    _check_known(path, tensors, known, where, spelled)
    return SingleFile(name, path, texts, held, where, spelled, left_out, trusted, family, known.trained, rest=beside)


def _joined(
    path: Path,
    layout: Layout,
    held: Mapping[str, Part],
    own: Mapping[str, str],
    told: bool,
    beside: Source,
    more: Mapping[str, str],
) -> dict[str, str]:
    """The texts of a pipeline of a file and the folder with the rest.

    Where the file's own are not `told` by its header, the folder says of its networks what shapes do not.

    Raises:
        ValueError: for a folder of another model.
    """
    joined = dict(more)
    for name in held:
        file = f"{name}/config.json"
        ours, theirs = json.loads(own.get(file, "{}")), json.loads(more.get(file, "{}"))
        for key in layout.alike:
            if key in ours and key in theirs and ours[key] != theirs[key]:
                raise ValueError(
                    f"{path} has {key}={ours[key]} and components={beside.name} {key}={theirs[key]}: name the folder "
                    "of the same model"
                )
        joined[file] = own[file] if told else json.dumps({**theirs, **ours}, indent=2) + "\n"
    return joined


def _missing(layout: Layout, held: Mapping[str, Part], texts: Mapping[str, str]) -> list[str]:
    """The components that a pipeline needs and a file has nothing of."""
    folders = {name.partition("/")[0]: name for name in layout.needed if "/" in name}
    networks = [part for part, file in folders.items() if file.endswith("/config.json")]
    absent = [part for part in networks if part not in held]
    others = {part: file for part, file in folders.items() if part not in networks}
    for part in held:  # an encoder that some pipelines lack goes with its tokenizer
        if part.startswith("text_encoder"):
            tokenizer = part.replace("text_encoder", "tokenizer")
            others[tokenizer] = f"{tokenizer}/tokenizer_config.json"
    return absent + [part for part, file in others.items() if file not in texts]


def _check(path: Path, tensors: Mapping[str, Tensor], where: Mapping[str, Place], needed: Shapes, trained: str) -> None:
    """Refuse a file without a tensor, or with one of another shape or kind."""
    for key, place in where.items():
        if key not in tensors:
            raise ValueError(f"{path} is incomplete: it lacks {key}: get it again")
        found, size = sketch_of(tensors, key), place.size(needed)
        if list(found.shape) != size:
            raise ValueError(f"{path}: {key} must have the shape {size}; got {list(found.shape)}: get it again")
        if place.part == trained:
            quantised.refuse_eight(path, tensors, key)
        elif found.dtype in quantised.EIGHT:
            continue
        check_kinds({key: found}, path)


def _check_known(
    path: Path,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    where: Mapping[str, Place],
    spelled: Mapping[str, Place],
) -> None:
    """Refuse tensors of the network that learns which it does not have: it is of another architecture then."""
    begin = layout.begin(where)
    others = tuple(part.prefix for name, part in layout.parts.items() if name != layout.trained)
    known = where.keys() | spelled.keys()
    odd = [n for n in tensors if n.startswith(begin) and n not in known and not n.startswith((*others, EMA))]
    if odd:
        raise ValueError(
            f"{path}: {odd[0]} is not a tensor of the {layout.trained} of {layout.title}: it is another "
            "architecture, which is not supported; give another model"
        )


def _spelled(
    path: Path,
    header: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    where: Mapping[str, Place],
    layout: Layout,
    held: Mapping[str, Part],
    configs: Mapping[str, Mapping[str, Any]],
) -> dict[str, Place]:
    """Places in a folder, whose names may differ from those that the libraries have today."""
    told = mapping(path, header, NAMES) if NAMES in header else {}
    told = {part: names for part, names in told.items() if part in held or part not in layout.parts}
    usual = {part: [n for place in where.values() if place.part == part for n in place.names] for part in held}
    names = {**{part: usual_names(usual[part], held[part]) for part in held}, **told}
    if names.keys() != held.keys() or not all(isinstance(n, str) for part in names.values() for n in part):
        raise ValueError(f"{path}: {NAMES} in its header must hold names of tensors of {', '.join(held)}: get it again")
    found = layout.as_named(layout.places(names, configs), tensors, path)
    odd = [*sorted(where.keys() - found.keys()), *sorted(found.keys() - tensors.keys())]
    if odd:
        raise ValueError(f"{path}: {NAMES} in its header do not fit its tensors, such as {odd[0]}: get it again")
    return found


def usual_names(names: Iterable[str], part: Part) -> list[str]:
    """What a folder of the hub calls the tensors of a network, by their names in the libraries of today."""
    if part.kind != "CLIPTextModel":
        return list(names)
    return [f"text_model.{name.removeprefix('text_model.')}" for name in names]


def rewrite(
    source: SingleFile,
    tensors: Mapping[str, Tensor],
    path: Path,
    meta: Mapping[str, str],
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write the checkpoint again with other weights of the network that learns; all else, and every dtype, stays.

    A running average of the weights (`model_ema`) is left out: it would still hold what is erased.

    Args:
        source: the checkpoint.
        tensors: new values of weights, by diffusers' names.
        path: the file to write.
        meta: provenance for the header, in the place of the old one.
        progress: called with 1 for each tensor that is written.

    Raises:
        ValueError: for a name that is not among the network's tensors, or a value beyond its dtype.
    """
    old, header = source.open()
    where = {n: key for key, place in source.places.items() if place.part == source.trained for n in place.names}
    unknown = sorted(tensors.keys() - where.keys())
    if unknown:
        raise ValueError(
            f"{source.path} has no tensor named {unknown[0]!r} in its {source.trained}: name the base of this "
            "delta or run"
        )
    new = {where[name] for name in tensors}

    def get(key: str) -> Tensor:
        if key not in new:
            return old[key]
        place = source.places[key]
        return place.to_file(
            [
                fitted(name, value, tensors[name], source.path) if name in tensors else value
                for name, value in zip(place.names, place.to_diffusers(old[key]), strict=True)
            ]
        )

    kept = Lazy((key for key in old if not key.startswith(EMA)), get, lambda key: sketch_of(old, key))
    write_safetensors(path, kept, {"format": "pt", **without_provenance(header), **meta}, progress)
