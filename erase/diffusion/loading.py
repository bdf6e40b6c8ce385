"""Open a checkpoint as a diffusers pipeline, and find out that no weight is missing or broken."""

from __future__ import annotations

import importlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erase.diffusion.checkpoints import folders, single_file
from erase.diffusion.checkpoints.folders import HIDES, VARIANTS, WEIGHTS, Source
from erase.diffusion.checkpoints.networks import network, text_config
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.store.safety import check_finite
from erase.store.weights import weight_files

STEMS = (WEIGHTS, "model", "pytorch_model")
"""What the weight files of diffusers' and transformers' networks are called, without variant and suffix."""


def open_pipeline(
    source: Source | SingleFile,
    kind: Any,
    trained: str,
    device: torch.device | str = "cpu",
) -> Any:
    """The whole pipeline in float32, frozen, in eval mode, and without a safety checker.

    Args:
        source: the checkpoint.
        kind: the pipeline's class.
        trained: the component that learns.
        device: where its networks go.

    Raises:
        ValueError: for weights that are missing, do not fit their configuration, or are NaN or infinite.
    """
    try:
        pipe = _open_file(source, kind) if isinstance(source, SingleFile) else _open_folder(source, kind, trained)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ValueError(f"{source.place} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    for name, net in networks(pipe).items():
        # Weights that their files lack: diffusers leaves them on "meta".
        missing = [weight for weight, p in net.named_parameters() if p.is_meta]
        if missing:
            raise ValueError(
                f"{source.place / name}: {len(missing)} weights are missing, such as {missing[0]}: get it again"
            )
        check_finite(dict(net.named_parameters()), source.place / name)
        net.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that have weights, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def check_betas(pipe: Any, where: Path) -> None:
    """Refuse a scheduler without a schedule of betas, which `erase.diffusion.process.Discrete` needs.

    Raises:
        ValueError: for the scheduler of an EDM or a flow.
    """
    if "beta_schedule" not in pipe.scheduler.config:
        raise ValueError(
            f"{where} has the noise schedule {type(pipe.scheduler).__name__}, which has no betas: not supported for "
            f"{type(pipe).__name__}"
        )


def keep_vae_exact(vae: Any) -> None:
    """Have a VAE with `force_upcast` work in its own dtype under autocast too: its activations overflow in float16."""
    if not vae.config.force_upcast:
        return

    def exact(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, *args: Any, **given: Any) -> Any:
            with torch.autocast(x.device.type, enabled=False):
                return function(x.to(vae.dtype), *args, **given)

        return run

    vae.encode, vae.decode = exact(vae.encode), exact(vae.decode)


def check_sentencepiece(folder: Path) -> None:
    """Refuse a T5 tokenizer that cannot be read: transformers would ask for another package.

    Raises:
        ValueError: for a `spiece.model` without a `tokenizer.json`, where a package that reads it is missing.
    """
    old = (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file()
    missing = [name for name in ("sentencepiece", "google.protobuf") if old and not _installed(name)]
    if missing:
        raise ValueError(
            f"{folder} is a SentencePiece model, and {' and '.join(missing)} is not installed: pip install 'erase[t5]'"
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _variant(folder: Path, first: str | None) -> str | None:
    """Which weights of a component there are: those of a variant, else the plain ones, else of any variant."""
    for variant in (first, None, *VARIANTS):
        if any(weight_files(folder, stem, variant) for stem in STEMS):
            return variant
    return first


def _open_folder(source: Source, kind: Any, trained: str) -> Any:
    index = folders.read_index(source.folder)
    loaded: dict[str, Any] = {}
    for name, value in index.items():
        if not isinstance(value, list) or name in HIDES or value[0] not in ("diffusers", "transformers"):
            continue
        check_sentencepiece(source.folder / name)
        made = getattr(importlib.import_module(value[0]), value[1])
        if not (isinstance(made, type) and issubclass(made, nn.Module)):
            continue
        where = source.trained if name == trained else name
        variant = source.variant if name == trained else _variant(source.folder / name, source.variant)
        given: dict[str, Any] = {"subfolder": where, "variant": variant, "dtype": torch.float32}
        loader: Any = made
        if value[0] == "diffusers":
            loaded[name] = loader.from_pretrained(source.folder, **given)
            continue
        loaded[name], info = loader.from_pretrained(source.folder, **given, output_loading_info=True)
        absent = sorted(info["missing_keys"])  # transformers makes them up
        if absent:
            raise ValueError(
                f"{source.folder / name}: {len(absent)} weights are missing, such as {absent[0]}: get it again"
            )
    return _assemble(source.folder, kind, loaded)


def _open_file(source: SingleFile, kind: Any) -> Any:
    def values(part: str) -> dict[str, Tensor]:
        return {name: tensor.to(torch.float32, copy=True) for name, tensor in source.part(part).items()}

    from transformers.models.clip.modeling_clip import CLIPTextModel

    nets: dict[str, Any] = {}
    for part in ("unet", "vae"):
        with torch.device("meta"):
            nets[part] = network(part, source.config(part))
        nets[part].load_state_dict(values(part), assign=True)
    encoder: Any = CLIPTextModel
    nets["text_encoder"] = encoder.from_pretrained(
        None, config=text_config(source.texts), state_dict=values("text_encoder"), dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        single_file.write_texts(source.texts, Path(folder))
        return _assemble(Path(folder), kind, nets)


def _assemble(folder: Path, kind: Any, parts: Mapping[str, Any]) -> Any:
    """The pipeline of a folder, whose networks are loaded."""
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    absent = [name for name, value in index.items() if name in HIDES or value == [None, None]]
    hidden: dict[str, Any] = dict.fromkeys(absent, None)
    if "safety_checker" in index:
        hidden["requires_safety_checker"] = False
    return kind.from_pretrained(folder, dtype=torch.float32, **hidden, **parts)
