"""Checkpoints on disk: find a diffusers folder, find out that it is whole, and write it again with other weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from erase import files, resources
from erase.checkpoint import read_safetensors, write_safetensors

WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk: a diffusers folder, and where in it the UNet's weights lie."""

    name: str
    """As the user gave it."""
    folder: Path
    unet: str = "unet"
    """Subfolder of the weights to start from: `unet_ema` where the checkpoint has one; `.` for a lone UNet."""
    variant: str | None = None
    """`fp16` for files named so."""

    @property
    def index(self) -> Path:
        """Where the list of the UNet's shards is, if there are shards."""
        tag = f".{self.variant}" if self.variant else ""
        return self.folder / self.unet / f"{WEIGHTS}.safetensors.index{tag}.json"

    @property
    def weights(self) -> list[Path]:
        """The UNet's weight files: one, or the shards."""
        tag = f".{self.variant}" if self.variant else ""
        folder = self.folder / self.unet
        if self.index.is_file():
            return [folder / name for name in sorted(set(files.read_json(self.index)["weight_map"].values()))]
        for suffix in (".safetensors", ".bin"):
            if (folder / f"{WEIGHTS}{tag}{suffix}").is_file():
                return [folder / f"{WEIGHTS}{tag}{suffix}"]
        return []


def find(model: str | Path, downloader: Any = None) -> Path:
    """The folder of a model: an embedded one's name, a folder, or a hub id (downloaded once, then cached).

    Args:
        model: as the user gave it.
        downloader: a pipeline class whose `download` asks the hub; without it there are no hub ids.

    Raises:
        ValueError: for a path or id that leads nowhere.
    """
    name, names = str(model), ", ".join(resources.list_tiny()) or "(no embedded models)"
    hub = ", a hub id" if downloader is not None else ""
    if name in resources.list_tiny():
        return resources.tiny_path(name)
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise ValueError(f"{name} is a file; a model is a diffusers folder{hub}, or one of: {names}")
    plain = name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not Path(name).parent.is_dir()
    if downloader is not None and plain:
        try:
            return Path(downloader.download(name))
        except Exception as error:  # the hub client raises a dozen unrelated types
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"model {name!r} is no folder here, and the hub did not give it: {reason}") from error
    raise ValueError(
        f"no model {name!r}: not a folder{', not a hub id (owner/name)' if hub else ''}, not one of: {names}"
    )


def read_index(folder: Path) -> dict[str, Any]:
    """A pipeline's `model_index.json`.

    Raises:
        ValueError: for a folder that has none.
    """
    index = files.read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else None
    if not isinstance(index, dict):
        raise ValueError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    return {"_class_name": None, **index}


def check(name: str, folder: Path, parts: Sequence[str], unets: Sequence[str] = ("unet_ema", "unet")) -> Source:
    """Find out that a checkpoint is whole.

    Args:
        name: as the user gave it.
        folder: where it is.
        parts: subfolders that it must have.
        unets: subfolders that may hold the weights to start from, in order of preference.

    Raises:
        ValueError: for a missing part, and a weight file that is missing or cut short.
    """
    for part in parts:
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} is not whole: the subfolder {part} is missing")
    places = sorted({folder / unet for unet in unets} | set(folder.glob("*/")))
    for place in places:
        for config in (*place.glob("config.json"), *place.glob("scheduler_config.json")):
            files.read_json(config)
        for weights in place.glob("*.safetensors"):
            try:
                with safe_open(weights, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{weights} is cut short or no safetensors file ({error}): get it again") from error
    for unet in unets:
        for variant in (None, "fp16"):
            source = Source(name, folder, unet, variant)
            if source.weights:
                missing = [p for p in source.weights if not p.is_file()]
                if missing:
                    raise ValueError(f"{folder} is not whole: {missing[0].relative_to(folder)} is missing")
                return source
    raise ValueError(f"{folder / unets[-1]} has no weights ({WEIGHTS}.safetensors)")


def save(source: Source, tensors: Mapping[str, Tensor], out: Path, meta: Mapping[str, str]) -> None:
    """Write the checkpoint again with other UNet weights, in the form it came in.

    Files, shards, names and dtypes are the original's; a tensor that did not change is bit-identical; other
    components are copied as they are. Other variants of the UNet, single-file checkpoints and folders that are no
    component are left out: they could still hold the concept. The folder appears whole or not at all.

    Args:
        source: the checkpoint that was opened.
        tensors: new values of the trained parameters, by name.
        out: the folder to write; must not exist.
        meta: added to the safetensors header.

    Raises:
        ValueError: if `out` exists, a name is not among the checkpoint's tensors, or a value is beyond its dtype.
        OSError: if the disk is full or cannot be written.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        target = temporary / out.name
        shutil.copytree(source.folder, target, ignore=_left_out(source))
        unet = target if source.unet == "." else target / "unet"
        unet.mkdir(exist_ok=True)
        config = source.folder / source.unet / "config.json"
        files.write_bytes(unet / "config.json", config.read_bytes())
        left = set(tensors)
        for path in source.weights:
            left -= _rewrite(path, tensors, unet, meta)
        if left:
            raise ValueError(f"{source.folder} has no tensor named {sorted(left)[0]!r} in its UNet")
        if source.index.is_file():
            files.write_bytes(unet / source.index.name, source.index.read_bytes())
        target.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _left_out(source: Source) -> Callable[[str, list[str]], set[str]]:
    heavy = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data")
    top, unet = source.folder, source.folder if source.unet == "." else source.folder / "unet"
    components = files.read_json(top / "model_index.json").keys() if source.unet != "." else ()

    def ignore(folder: str, names: list[str]) -> set[str]:
        here = Path(folder)
        if here not in (top, unet):
            return set()
        kept = components if here == top else ()
        return {
            n
            for n in names
            if n.lower().endswith(heavy) or (here == unet and ".index" in n) or ((here / n).is_dir() and n not in kept)
        }

    return ignore


def _rewrite(path: Path, tensors: Mapping[str, Tensor], folder: Path, meta: Mapping[str, str]) -> set[str]:
    """Write one weight file with new values; the names of those written."""
    old, header = (read_bin(path), {"format": "pt"}) if path.suffix == ".bin" else read_safetensors(path)
    taken = set(tensors) & set(old)
    for name in taken:
        if old[name].shape != tensors[name].shape:
            raise ValueError(f"{path}: {name} has shape {list(old[name].shape)}, got {list(tensors[name].shape)}")
        old[name] = tensors[name].detach().to("cpu", old[name].dtype)
        if not old[name].isfinite().all():
            raise ValueError(f"{name} holds values that {str(old[name].dtype).removeprefix('torch.')} does not reach")
    write_safetensors(folder / f"{path.stem}.safetensors", old, {"format": "pt", **header, **meta})
    return taken


def read_bin(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Weights that were pickled; nothing but tensors is unpickled."""
    try:
        found: dict[str, Tensor] = torch.load(path, map_location=device, weights_only=True)  # noqa: TID251
    except Exception as error:  # broken pickles raise a dozen unrelated types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is cut short, or holds more than weights ({reason})") from error
    return found


def fingerprint(source: Source) -> dict[str, str]:
    """SHA-256 of every weight file of the checkpoint, by path inside it."""
    others = [p for part in ("vae", "text_encoder") for p in (source.folder / part).glob("*")]
    paths = sorted({*source.weights, *(p for p in others if p.suffix in (".safetensors", ".bin"))})
    return {p.relative_to(source.folder).as_posix(): files.sha256(p) for p in paths}
