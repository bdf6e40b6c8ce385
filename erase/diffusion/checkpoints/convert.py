"""A diffusers folder as a single file, and a single file as a diffusers folder: weights are carried bit for bit."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from erase.diffusion.checkpoints import folders, vocabulary
from erase.diffusion.checkpoints.folders import LEFTOVERS, VARIANTS, Source, read_index, read_weights
from erase.diffusion.checkpoints.header import NAMES, TEXTS, write_texts
from erase.diffusion.checkpoints.layout import Layout, Place, identity_like, part_of, sketch_of
from erase.diffusion.checkpoints.ldm import POSITIONS
from erase.diffusion.checkpoints.networks import shapes
from erase.diffusion.checkpoints.single_file import SingleFile, usual_names
from erase.diffusion.checkpoints.texts import folder_of, read_texts
from erase.diffusion.families import layout_of
from erase.store import card, files
from erase.store.safetensors import Lazy, open_safetensors, write_safetensors
from erase.store.safety import check_finite, check_kinds
from erase.store.weights import provenance, weight_files, without_provenance


@dataclass(frozen=True)
class Converted:
    """What became of a checkpoint."""

    tensors: int
    """Written, the leftovers among them."""
    leftovers: tuple[str, ...] = ()
    """Tensors of a single file that no component of a folder has: kept in `leftovers.safetensors`."""
    left_out: tuple[str, ...] = ()
    """What has no place in the other form."""


def count(source: Source | SingleFile) -> int:
    """How many tensors there are to write, for progress bars."""
    if isinstance(source, SingleFile):
        return len(source.open()[0])
    return sum(len(read_weights(_weights(source, part))) for part in _parts(source, layout_of(source.family)))


def to_file(source: Source, out: Path, progress: Callable[[int], object] | None = None) -> Converted:
    """Write a folder as a single `.safetensors`; its configuration and tokenizers go into the header.

    So does what the header of the trained network's weights says of how it was erased.

    Raises:
        ValueError: if `out` exists, for an architecture that has no place in a single file, or weights that are broken.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another name, or remove it")
    layout = layout_of(source.family)
    parts = _parts(source, layout)
    read = {part: _checked(read_weights(_weights(source, part)), source.folder / part) for part in parts}
    bare = [part for part, tensors in read.items() if not tensors]
    if bare:
        raise ValueError(
            f"{source.folder / bare[0]} has no weights ({layout.parts[bare[0]].stem}.safetensors): get it again"
        )
    _check_kinds(source, layout)
    _check_identities(source, layout, read)
    carried = [part for part in layout.carried if part in parts or part in layout.others]
    texts = read_texts(source, carried, bare=not layout.others)
    names = {part: list(tensors) for part, tensors in read.items()}
    configs = {part: json.loads(texts[f"{part}/config.json"]) for part in parts}
    where = layout.places(names, configs)
    needed = shapes(texts, {part: layout.parts[part] for part in parts})
    missing = sorted(layout.places(needed, configs).keys() - where.keys())
    if missing:
        raise ValueError(
            f"{source.folder} is incomplete: its networks lack the tensor that single files call {missing[0]}: "
            "get it again"
        )
    others, header = Lazy((), lambda name: read[layout.trained][name]), dict[str, str]()
    if (source.folder / LEFTOVERS).is_file():
        others, header = open_safetensors(source.folder / LEFTOVERS)
    twice = sorted(where.keys() & others.keys())
    if twice:
        raise ValueError(
            f"{source.folder / LEFTOVERS} holds {twice[0]}, which its components hold too: remove the file"
        )
    usual = {part: usual_names(needed[part], layout.parts[part]) for part in parts}
    odd = {part: found for part, found in names.items() if set(found) != set(usual[part])}
    told = {**header, **provenance(folders.header(source)), TEXTS: json.dumps(vocabulary.without(texts))}
    meta = {"format": "pt", **told, **({NAMES: json.dumps(odd)} if odd else {})}
    write_safetensors(out, Lazy([*where, *others], *_makers(source, where, read, others)), meta, progress)
    return Converted(len(where) + len(others), left_out=tuple(_left_out(source, carried)))


def _makers(
    source: Source, where: Mapping[str, Place], read: Mapping[str, Lazy], others: Lazy
) -> tuple[Callable[[str], Tensor], Callable[[str], Tensor]]:
    """Make a file's tensors of a folder's; and sketch them."""

    def make(key: str, get: Callable[[Lazy, str], Tensor]) -> Tensor:
        if key in others:
            return get(others, key)
        place = where[key]
        found = [get(read[place.part], name) for name in place.names]
        if len({tensor.dtype for tensor in found}) > 1:
            raise ValueError(
                f"{source.folder / place.part}: {', '.join(place.names)} are of different dtypes, and a single file "
                "has them as one tensor: save that component in one dtype"
            )
        return place.to_file(found)

    return lambda key: make(key, Lazy.__getitem__), lambda key: make(key, sketch_of)


def to_safetensors(source: SingleFile, out: Path, progress: Callable[[int], object] | None = None) -> Converted:
    """Write a `.ckpt` as a `.safetensors`: the same tensors under the same names.

    Raises:
        ValueError: if `out` exists, the file is no pickle, or for weights that are broken.
    """
    if source.path.suffix == ".safetensors":
        raise ValueError(f"{source.path} is a .safetensors already: name a folder to write")
    if out.exists():
        raise ValueError(f"{out} exists: choose another name, or remove it")
    tensors, _ = source.open()
    weights = _checked(Lazy(source.places, tensors.__getitem__), source.path)
    whole = Lazy(tensors, lambda name: weights[name] if name in weights else tensors[name])
    write_safetensors(out, whole, {"format": "pt"}, progress)
    return Converted(len(tensors), left_out=source.left_out)


def to_folder(source: SingleFile, out: Path, progress: Callable[[int], object] | None = None) -> Converted:
    """Write a single file as a diffusers folder; it appears whole or not at all.

    How it was erased is told by the header of the UNet's weights and by a card, as a run does.

    Raises:
        ValueError: if `out` exists, or for weights that are broken.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder, or remove it")
    tensors, header = source.open()
    told = provenance(header)
    with files.writing_to(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        target = temporary / out.name
        _write_rest(source, target)
        for name, part in source.held.items():
            found = _checked(part_of(tensors, source.spelled, name, part), source.path)
            meta = {"format": "pt", **(told if name == source.trained else {})}
            write_safetensors(target / name / f"{part.stem}.safetensors", found, meta, progress)
        others = Lazy((name for name in tensors if name not in source.spelled), tensors.__getitem__)
        rest = {key: value for key, value in without_provenance(header).items() if key not in (TEXTS, NAMES)}
        if others or rest.keys() - {"format"}:
            write_safetensors(target / LEFTOVERS, others, rest, progress)
        card.write(target, told, "diffusers")
        target.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Converted(len(tensors), tuple(others), source.left_out)


def _write_rest(source: SingleFile, target: Path) -> None:
    """Everything of a folder but the weights of the file: the components that it lacks are copied as they are."""
    if source.rest is None:
        write_texts(source.texts, target)
        return
    folder, held = source.rest.folder, source.held
    for name, value in read_index(folder).items():
        if isinstance(value, list) and name not in held and (folder / name).is_dir():
            files.copy_folder(folder / name, target / name)
    files.write_bytes(target / "model_index.json", (folder / "model_index.json").read_bytes())
    write_texts({name: text for name, text in source.texts.items() if name.partition("/")[0] in held}, target)


def _checked(tensors: Lazy, where: Path) -> Lazy:
    """The same tensors; each is looked at when it is first asked for."""
    sound = {name for name in tensors if name.endswith(POSITIONS)}

    def get(name: str) -> Tensor:
        tensor = tensors[name]
        if name not in sound:
            check_kinds({name: tensor}, where)
            check_finite({name: tensor}, where)
            sound.add(name)
        return tensor

    return Lazy(tensors, get, tensors.sketch)


def _parts(source: Source, layout: Layout) -> list[str]:
    """The networks of a folder that a single file holds."""
    index = read_index(source.folder)
    return [part for part in layout.parts if index.get(part) != [None, None]]


def _weights(source: Source, part: str) -> list[Path]:
    """A component's weight files: of the trained network's variant, else of any."""
    folder, variants = folder_of(source, part), dict.fromkeys((source.variant, None, *VARIANTS))
    stems = (layout_of(source.family).parts[part].stem, "pytorch_model")
    return next((found for v in variants for stem in stems if (found := weight_files(folder, stem, v))), [])


def _check_kinds(source: Source, layout: Layout) -> None:
    """Refuse a folder with a text encoder or a tokenizer of another class than a single file has."""
    index = read_index(source.folder)
    kinds = {name: (part.kind,) for name, part in layout.parts.items()} | dict(layout.tokenizers or {})
    for name, allowed in kinds.items():
        kind = index[name][-1] if isinstance(index.get(name), list) else None
        if kind is not None and kind not in allowed:
            raise ValueError(f"{source.folder} has a {kind}; a single file needs a {allowed[0]}: keep the folder")


def _check_identities(source: Source, layout: Layout, read: Mapping[str, Lazy]) -> None:
    """Refuse a folder with a matrix that readers of single files take for the identity, and that is none."""
    for name, tensors in read.items():
        matrix, like = layout.parts[name].identity or ("", "")
        if matrix in tensors and like in tensors:
            wanted, found = identity_like(tensors[like]), tensors[matrix]
            if found.dtype != wanted.dtype or not torch.equal(found, wanted):
                raise ValueError(
                    f"{source.folder / name}: {matrix} is not the identity matrix, as single files assume: keep the "
                    "folder"
                )


def _left_out(source: Source, carried: Sequence[str]) -> list[str]:
    """Everything in the folder that the file does not hold."""
    kept = {"model_index.json", LEFTOVERS, *(folder_of(source, part).name for part in carried)}
    return sorted(path.name for path in source.folder.iterdir() if path.name not in kept)
