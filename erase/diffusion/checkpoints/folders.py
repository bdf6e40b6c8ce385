"""Checkpoints on disk: find a diffusers folder, find out that it is whole, and write it again with other weights."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from erase import resources
from erase.diffusion.checkpoints import single_file
from erase.diffusion.checkpoints.pickles import read_pickle
from erase.diffusion.checkpoints.single_file import EMA, SingleFile
from erase.diffusion.lora.adapter import Lora, changed_by, merged
from erase.store import card, files, safety
from erase.store import hub as hub_client
from erase.store.safetensors import Lazy, open_safetensors, write_safetensors
from erase.store.weights import HEAVY, index_file, rewrite, weight_files

WEIGHTS = "diffusion_pytorch_model"
VARIANTS = ("fp16", "bf16")
"""Words in the names of weight files that hold the same weights in 16 bits."""
LEFTOVERS = "leftovers.safetensors"
"""Tensors of a single file that no component of the folder has."""
HIDES = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that hide images, or that nothing here needs: they are not loaded."""
SINGLE = "model.safetensors"
FORGOTTEN = "erase_forgotten"
"""The key of a weight file's header that says what was forgotten, a JSON list: class names, or marks of prompts."""
LABELS = "erase_labels"
"""The key that names the classes of a folder that names none itself, a JSON list."""


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk: a diffusers folder, and where in it the UNet's weights lie."""

    name: str
    """As the user gave it."""
    folder: Path
    trained: str = "unet"
    """Subfolder of the weights to start from: `unet_ema` where the checkpoint has one; `.` for a lone network."""
    variant: str | None = None
    """One of `VARIANTS`, for files named so."""
    family: str = "sd"
    """A module of `erase.diffusion.families`."""
    labels: tuple[str, ...] = ()
    """Class names that the user gives, or that its header has (`LABELS`), for a folder that has none."""
    loras: tuple[Lora, ...] = ()
    """LoRAs that are in its weights wherever they are read."""

    @property
    def place(self) -> Path:
        """Where it is, for messages."""
        return self.folder

    @property
    def component(self) -> str:
        """The subfolder that the weights are written to: `unet`, not `unet_ema`."""
        return self.trained.removesuffix("_ema")

    @property
    def index(self) -> Path:
        """Where the list of the trained network's shards is, if there are shards."""
        return index_file(self.folder / self.trained, WEIGHTS, self.variant)

    @property
    def weights(self) -> list[Path]:
        """The trained network's weight files: one, or the shards."""
        return weight_files(self.folder / self.trained, WEIGHTS, self.variant)


def read_weights(paths: Sequence[Path]) -> Lazy:
    """Tensors of weight files, as they are stored.

    Raises:
        ValueError: for a file that is broken, or a pickle that holds more than weights.
    """
    found: dict[str, Lazy] = {}
    for path in paths:
        if path.suffix == ".bin":
            held = read_pickle(path)
            tensors = Lazy(held, held.__getitem__)
        else:
            tensors = open_safetensors(path)[0]
        found |= dict.fromkeys(tensors, tensors)

    def sketch(name: str) -> Tensor:
        whole = found[name]
        return whole.sketch(name) if whole.sketch is not None else whole[name].to("meta")

    return Lazy(found, lambda name: found[name][name], sketch)


def saved(source: Source | SingleFile, out: Path) -> Source | SingleFile:
    """What `save` wrote into a folder, as a source."""
    if isinstance(source, SingleFile):
        return replace(source, path=out / SINGLE, loras=())
    return replace(source, folder=out, trained=source.component, loras=())


def tensors(source: Source | SingleFile) -> Lazy:
    """The tensors of the network that learns under diffusers' names, as they are stored; with its LoRAs in them."""
    if isinstance(source, SingleFile):
        return merged(source.part(source.trained), source.trained, source.loras)
    return merged(read_weights(source.weights), source.component, source.loras)


def part_tensors(source: Source | SingleFile, part: str) -> Lazy:
    """A component's tensors, as `tensors` gives those of the network that learns; none where it has no weights."""
    if part == learner(source):
        return tensors(source)
    if isinstance(source, SingleFile):
        return source.part(part) if part in source.held else read_weights([])
    return merged(read_weights(_others(source, part)), part, source.loras)


def learner(source: Source | SingleFile) -> str:
    """The component that learns."""
    return source.trained if isinstance(source, SingleFile) else source.component


def _others(source: Source, part: str) -> list[Path]:
    """The weight files of a component beside the network that learns: those that are loaded."""
    variants = dict.fromkeys((source.variant, None, *VARIANTS))
    stems = (WEIGHTS, "model", "pytorch_model")
    return next((w for v in variants for stem in stems if (w := weight_files(source.folder / part, stem, v))), [])


def network_config(source: Source | SingleFile) -> dict[str, Any]:
    """`config.json` of the network that learns."""
    if isinstance(source, SingleFile):
        return source.config(source.trained)
    found: dict[str, Any] = files.read_json(source.folder / source.trained / "config.json")
    return found


def header(source: Source | SingleFile) -> dict[str, str]:
    """The header of the file, or of the first, that holds the UNet's weights; a pickle has none."""
    if isinstance(source, SingleFile):
        return source.open()[1]
    return open_safetensors(source.weights[0])[1] if source.weights[0].suffix == ".safetensors" else {}


def forgotten(source: Source | SingleFile) -> list[str]:
    """What a checkpoint of ours was made to forget, as the header of its weights says: see `FORGOTTEN`.

    Raises:
        ValueError: for a header that cannot be read.
    """
    return forgotten_in(header(source), source.name)


def forgotten_in(header: Mapping[str, str], where: str | Path) -> list[str]:
    """As `forgotten`, of a header."""
    return _list_in(header, FORGOTTEN, where)


def labels(source: Source | SingleFile) -> tuple[str, ...]:
    """Names of the classes that a checkpoint of ours was erased with, where its folder names none: see `LABELS`.

    Raises:
        ValueError: for a header that cannot be read.
    """
    return tuple(_list_in(header(source), LABELS, source.name))


def _list_in(header: Mapping[str, str], key: str, where: str | Path) -> list[str]:
    text = header.get(key, "[]")
    try:
        return [str(name) for name in json.loads(text)]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{where}: {key} in its header must be a JSON list of names; got {text[:80]}: get it again"
        ) from error


def find(model: str | Path, downloader: Any = None) -> Path:
    """The folder of a model: an embedded one's name, a folder, or a hub id (downloaded once, then cached).

    Args:
        model: as the user gave it.
        downloader: a pipeline class whose `download` asks the hub; without it there are no hub ids.

    Raises:
        ValueError: for a path or id that leads nowhere.
    """
    name = str(model)
    embedded = [each for each in resources.list_tiny() if (resources.tiny_path(each) / "model_index.json").exists()]
    hub = ", a hub id (owner/name)" if downloader is not None else ""
    allowed = f"a diffusers folder{hub} or one of: {', '.join(embedded) or '(no embedded models)'}"
    if name in resources.list_tiny():
        return resources.tiny_path(name)
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise ValueError(f"{name} is a file, and no model that can be opened here; give {allowed}")
    if downloader is not None and hub_client.is_id(name) and not Path(name).parent.is_dir():
        cached = not hub_client.reachable(name)
        try:
            folder = Path(downloader.download(name, local_files_only=cached))
            for variant in VARIANTS:  # of a repository that has nothing else
                if not any(folder.glob("*/*.safetensors")) and not any(folder.glob("*/*.bin")):
                    with suppress(ValueError):  # it has none of these
                        folder = Path(downloader.download(name, local_files_only=cached, variant=variant))
            return folder
        except Exception as error:  # the hub client raises a dozen unrelated types
            raise hub_client.refusal(name, error, cached) from error
    if Path(name).suffix in (".safetensors", ".ckpt"):
        raise ValueError(f"no model {name!r}: there is no such file")
    raise ValueError(f"no model {name!r}: there is no such folder; give {allowed}")


def read_index(folder: Path) -> dict[str, Any]:
    """A pipeline's `model_index.json`.

    Raises:
        ValueError: for a folder that has none.
    """
    index = files.read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else None
    if not isinstance(index, dict):
        raise ValueError(
            f"{folder} is not a diffusers pipeline: it has no model_index.json; name a folder that has one"
        )
    safety.check_components(index, folder / "model_index.json")
    return {"_class_name": None, **index}


def check(name: str, folder: Path, parts: Sequence[str], places: Sequence[str], family: str) -> Source:
    """Find out that a checkpoint is whole.

    Args:
        name: as the user gave it.
        folder: where it is.
        parts: subfolders that it must have.
        places: subfolders that may hold the weights to start from, in order of preference.
        family: a module of `erase.diffusion.families`.

    Raises:
        ValueError: for a missing part, a link out of the folder, and a weight file that is missing, cut short or of
            integers.
    """
    check_parts(folder, parts, places)
    for at in places:
        for variant in (None, *VARIANTS):
            source = Source(name, folder, at, variant, family)
            if source.weights:
                missing = [p for p in source.weights if not p.is_file()]
                if missing:
                    raise ValueError(
                        f"{folder} is incomplete: {missing[0].relative_to(folder)} is missing: get it again"
                    )
                return source
    raise ValueError(f"{folder / places[-1]} has no weights ({WEIGHTS}.safetensors): get it again")


def check_parts(folder: Path, parts: Sequence[str], places: Sequence[str] = ()) -> None:
    """Find out that a folder has some subfolders, and that no component of it is broken; arguments as those of `check`.

    Raises:
        ValueError: for a missing part, a link out of the folder, and a weight file that is cut short or of integers.
    """
    safety.check_links(folder)
    index = read_index(folder) if parts else {}
    for part in parts:
        if part in index and index[part] == [None, None]:
            raise ValueError(
                f"{folder} has no {part} (null in its model_index.json): refiners and pipelines that were saved "
                "without a part are not supported: name a whole pipeline"
            )
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} is incomplete: the subfolder {part} is missing: get it again")
    for place in sorted({folder / at for at in (*parts, *places, *index) if (folder / at).is_dir()}):
        for config in (*place.glob("config.json"), *place.glob("scheduler_config.json")):
            if not isinstance(files.read_json(config), dict):
                raise ValueError(f"{config} is broken: it must hold a JSON object; get it again")
        for weights in place.glob("*.safetensors"):
            found = open_safetensors(weights)[0]
            safety.check_kinds({n: t for n, t in found.sketches() if not n.endswith("position_ids")}, weights)


def save(
    source: Source | SingleFile,
    tensors: Mapping[str, Tensor],
    out: Path,
    meta: Mapping[str, str],
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write the checkpoint again with other UNet weights, in the form it came in.

    Files, shards, names and dtypes are the original's; a tensor that did not change is bit-identical; other
    components are copied as they are. Other variants of the UNet, running averages (`model_ema`), single-file
    checkpoints beside a folder and folders that are no component are left out: they could still hold the concept.
    A single file becomes `model.safetensors` in the folder, or `out` itself if that is named `.safetensors`. What is
    written appears whole or not at all.

    Args:
        source: the checkpoint that was opened.
        tensors: new values of the trained parameters, by name.
        out: the folder to write; must not exist.
        meta: provenance for the safetensors header and the model card, in the place of what was there.
        progress: called with 1 for each tensor that is written.

    Raises:
        ValueError: if `out` exists, a name is not among the checkpoint's tensors, or a value is beyond its dtype.
        OSError: if the disk is full or cannot be written.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder, or remove it")
    tensors = {**_by_loras(source), **tensors}
    if out.suffix == ".safetensors":
        if isinstance(source, Source):
            raise ValueError(f"{out} is the name of a single file, but {source.name} is a folder: give a folder")
        single_file.rewrite(source, tensors, out, meta, progress)
        return
    with files.writing_to(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        target = temporary / out.name
        if isinstance(source, SingleFile):
            single_file.rewrite(source, tensors, target / SINGLE, meta, progress)
        else:
            _save_folder(source, tensors, target, meta, progress)
        card.write(target, meta, "diffusers")
        target.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _by_loras(source: Source | SingleFile) -> Mapping[str, Tensor]:
    """The weights of the network that learns which LoRAs changed before."""
    now = tensors(source)
    return {name: now[name] for name in changed_by(learner(source), source.loras)}


def _save_folder(
    source: Source,
    tensors: Mapping[str, Tensor],
    target: Path,
    meta: Mapping[str, str],
    progress: Callable[[int], object] | None,
) -> None:
    files.copy_folder(source.folder, target, _left_out(source))
    net = target / source.component
    net.mkdir(exist_ok=True)
    config = source.folder / source.trained / "config.json"
    files.write_bytes(net / "config.json", config.read_bytes())
    left = set(tensors)
    for path in source.weights:
        old, header = (read_weights([path]), {}) if path.suffix == ".bin" else open_safetensors(path)
        left -= rewrite(path, old, header, tensors, net / f"{path.stem}.safetensors", meta, progress)
    if left:
        raise ValueError(
            f"{source.folder / source.component} has no tensor named {sorted(left)[0]!r}: name the base of this delta "
            "or run"
        )
    if source.index.is_file():
        files.write_bytes(net / source.index.name, source.index.read_bytes())
    for part in {part for lora in source.loras for part in lora.parts} - {source.component}:
        _save_merged(source, part, target)
    if (source.folder / LEFTOVERS).is_file() and source.trained != ".":
        others, header = open_safetensors(source.folder / LEFTOVERS)
        kept = Lazy((n for n in others if not n.startswith(EMA)), others.make)
        write_safetensors(target / LEFTOVERS, kept, header)


def _save_merged(source: Source, part: str, target: Path) -> None:
    """Write a text encoder's weights with LoRAs in them, in the place of the copy."""
    now, read = part_tensors(source, part), _others(source, part)
    for path in [*(target / part).iterdir()]:
        if path.name.lower().endswith(HEAVY):
            path.unlink()
    for path in read:
        old, header = (read_weights([path]), {}) if path.suffix == ".bin" else open_safetensors(path)
        new = {name: now[name] for name in changed_by(part, source.loras) if name in old}
        rewrite(path, old, header, new, target / part / f"{path.stem}.safetensors", {})


def _left_out(source: Source) -> Callable[[str, list[str]], set[str]]:
    top, net = source.folder, source.folder / source.component
    components = files.read_json(top / "model_index.json").keys() if source.trained != "." else ()

    def ignore(folder: str, names: list[str]) -> set[str]:
        here = Path(folder)
        if here not in (top, net):
            return set()
        kept = components if here == top else ()
        return {
            n
            for n in names
            if n.lower().endswith(HEAVY) or (here == net and ".index" in n) or ((here / n).is_dir() and n not in kept)
        }

    return ignore


def fingerprint(source: Source | SingleFile) -> dict[str, str]:
    """SHA-256 of every weight file of the checkpoint, by path inside it, and of the LoRAs in it."""
    inside = {f"lora {lora.title}": lora.sha256 for lora in source.loras}
    if isinstance(source, SingleFile):
        beside = {} if source.rest is None else _hashes(source.rest.folder, [], source.held)
        return {source.path.name: files.sha256(source.path), **beside, **inside}
    return {**_hashes(source.folder, source.weights, [source.component]), **inside}


def _hashes(folder: Path, weights: Sequence[Path], left_out: Collection[str]) -> dict[str, str]:
    """SHA-256 of some weight files, and of those of all components that are not left out."""
    index = read_index(folder) if (folder / "model_index.json").exists() else {}
    parts = [name for name, value in index.items() if isinstance(value, list) and name not in (*HIDES, *left_out)]
    others = [p for part in parts for p in (folder / part).glob("*") if p.suffix in (".safetensors", ".bin")]
    return {p.relative_to(folder).as_posix(): files.sha256(p) for p in sorted({*weights, *others})}
