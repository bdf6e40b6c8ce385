"""A diffusers folder as a single file, and a single file as a diffusers folder: weights are carried bit for bit."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from erase.diffusion.checkpoints import folders, vocabulary
from erase.diffusion.checkpoints.folders import LEFTOVERS, WEIGHTS, Source, read_index, read_weights
from erase.diffusion.checkpoints.ldm import PARTS, POSITIONS, places
from erase.diffusion.checkpoints.networks import shapes
from erase.diffusion.checkpoints.single_file import NAMES, TEXT_FILE, TEXTS, SingleFile, odd_names, part_of, write_texts
from erase.store import card, files
from erase.store.safetensors import Lazy, open_safetensors, write_safetensors
from erase.store.safety import check_finite, check_kinds
from erase.store.weights import provenance, weight_files, without_provenance

STEMS = {"unet": WEIGHTS, "vae": WEIGHTS, "text_encoder": "model"}
CARRIED = (*PARTS, "tokenizer", "scheduler")


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
    return sum(len(read_weights(_weights(source, part))) for part in PARTS)


def to_file(source: Source, out: Path, progress: Callable[[int], object] | None = None) -> Converted:
    """Write a folder as a single `.safetensors`; its configuration and tokenizer go into the header.

    So does what the header of the UNet's weights tells of how it was erased.

    Raises:
        ValueError: if `out` exists, for an architecture that has no place in a single file, or weights that are broken.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another name, or remove it")
    read = {part: _checked(read_weights(_weights(source, part)), source.folder / part) for part in PARTS}
    bare = [part for part, tensors in read.items() if not tensors]
    if bare:
        raise ValueError(f"{source.folder / bare[0]} has no weights ({STEMS[bare[0]]}.safetensors)")
    names = {part: list(tensors) for part, tensors in read.items()}
    texts = _texts(source)
    configs = {part: json.loads(texts[f"{part}/config.json"]) for part in PARTS}
    where = places(names, configs)
    missing = sorted(places(shapes(texts), configs).keys() - where.keys())
    if missing:
        raise ValueError(f"{source.folder} is not whole: its networks lack what a single file calls {missing[0]}")
    others, header = Lazy((), lambda name: read["unet"][name]), dict[str, str]()
    if (source.folder / LEFTOVERS).is_file():
        others, header = open_safetensors(source.folder / LEFTOVERS)
    twice = sorted(where.keys() & others.keys())
    if twice:
        raise ValueError(f"{source.folder / LEFTOVERS} holds {twice[0]}, which its components hold too")

    def get(ldm: str) -> Tensor:
        if ldm in others:
            return others[ldm]
        place = where[ldm]
        found = [read[place.part][name] for name in place.names]
        if len({tensor.dtype for tensor in found}) > 1:
            raise ValueError(f"{source.folder / place.part}: {', '.join(place.names)} are of different dtypes")
        return place.to_ldm(found)

    kept = {k: v for k, v in texts.items() if not (k in vocabulary.VOCABULARY and vocabulary.is_clip(texts))}
    odd = odd_names(names)
    told = {**header, **provenance(folders.header(source)), TEXTS: json.dumps(kept)}
    meta = {"format": "pt", **told, **({NAMES: json.dumps(odd)} if odd else {})}
    write_safetensors(out, Lazy([*where, *others], get), meta, progress)
    return Converted(len(where) + len(others), left_out=tuple(_left_out(source)))


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
    weights = _checked({ldm: tensors[ldm] for ldm in source.places}, source.path)
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
        write_texts(source.texts, target)
        for part in PARTS:
            found = _checked(part_of(tensors, source.spelled, part), source.path)
            meta = {"format": "pt", **(told if part == "unet" else {})}
            write_safetensors(target / part / f"{STEMS[part]}.safetensors", found, meta, progress)
        others = Lazy((name for name in tensors if name not in source.spelled), tensors.__getitem__)
        rest = {key: value for key, value in without_provenance(header).items() if key not in (TEXTS, NAMES)}
        if others or rest.keys() - {"format"}:
            write_safetensors(target / LEFTOVERS, others, rest, progress)
        card.write(target, told, "diffusers")
        target.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Converted(len(tensors), tuple(others), source.left_out)


def _checked(tensors: Mapping[str, Tensor], where: Path) -> Lazy:
    """The same tensors; each is looked at when it is first asked for."""
    sound = {name for name in tensors if name.endswith(POSITIONS)}

    def get(name: str) -> Tensor:
        if name not in sound:
            check_kinds({name: tensors[name]}, where)
            check_finite({name: tensors[name]}, where)
            sound.add(name)
        return tensors[name]

    return Lazy(tensors, get)


def _folder(source: Source, part: str) -> Path:
    return source.folder / (source.trained if part == "unet" else part)


def _weights(source: Source, part: str) -> list[Path]:
    """A component's weight files: of the UNet's variant, else of any."""
    folder, variants = _folder(source, part), dict.fromkeys((source.variant, None, "fp16"))
    stems = ("model", "pytorch_model") if part == "text_encoder" else (WEIGHTS,)
    return next((found for v in variants for stem in stems if (found := weight_files(folder, stem, v))), [])


def _texts(source: Source) -> dict[str, str]:
    """Configuration and tokenizer files, by their path in the folder."""
    index = read_index(source.folder)
    for part, kinds in (("tokenizer", "CLIPTokenizer CLIPTokenizerFast"), ("text_encoder", "CLIPTextModel")):
        if index[part][-1] not in kinds.split():
            raise ValueError(f"{source.folder} has a {index[part][-1]}; a single file needs a {kinds.split()[0]}")
    gone = {name: [None, None] for name, value in index.items() if isinstance(value, list) and name not in CARRIED}
    out = {"model_index.json": (source.folder / "model_index.json").read_text(encoding="utf-8")}
    if any(index[name] != value for name, value in gone.items()):
        whole = {**index, **gone, "requires_safety_checker": False}
        out["model_index.json"] = json.dumps(whole, indent=2) + "\n"
    for part in CARRIED:
        for path in sorted(_folder(source, part).iterdir()):
            name = f"{part}/{path.name}"
            if TEXT_FILE.fullmatch(name) and ".index." not in name:
                out[name] = _without_path(path.read_text(encoding="utf-8"))
    return out


def _without_path(text: str) -> str:
    """A configuration without the place on somebody's disk that it came from: files are passed on."""
    config: Any = json.loads(text) if "name_or_path" in text else None
    found = [key for key in ("_name_or_path", "name_or_path") if isinstance(config, dict) and key in config]
    local = {key: Path(config[key]).name for key in found if Path(str(config[key])).is_absolute()}
    return json.dumps({**config, **local}, indent=2) + "\n" if local else text


def _left_out(source: Source) -> list[str]:
    """Everything in the folder that the file does not hold."""
    carried = {"model_index.json", LEFTOVERS, *(_folder(source, part).name for part in CARRIED)}
    return sorted(path.name for path in source.folder.iterdir() if path.name not in carried)
