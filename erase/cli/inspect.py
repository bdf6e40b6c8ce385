"""`erase inspect`: what a file or folder is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from erase.cli import complete
from erase.cli.common import (
    Components,
    app,
    mapping,
    no_loading_bars,
    quiet,
)
from erase.programs.locating import is_classifier, locate_any


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="A model (folder or file), mask, delta, run, comparison, folder of images, or any other file.",
            autocompletion=complete.models,
        ),
    ],
    *,
    components: Components = None,
) -> None:
    """Describe a file or folder: what it is, and how erase made it.

    Example: erase inspect runs/demo/saliency.safetensors
    """
    quiet()
    import json

    typer.echo(json.dumps(_describe(path, components), indent=2, default=str, ensure_ascii=False))


def _describe(path: Path, components: str | None) -> dict[str, Any]:
    if not path.exists():
        from erase import resources

        if str(path) not in resources.list_tiny():
            raise ValueError(f"no such file or folder: {path}")
        path = resources.tiny_path(str(path))
    return _describe_folder(path, components) if path.is_dir() else _describe_file(path, components)


def _describe_folder(path: Path, components: str | None) -> dict[str, Any]:
    alone = list(path.glob("*.safetensors")) if not (path / "config.json").exists() else []
    if (path / "model_index.json").exists():
        return _describe_pipeline(path)
    if (path / "run.json").exists():
        return {"kind": "run of erase", **_describe_run(path)}
    if (path / "compare.json").exists():
        runs = mapping(path / "compare.json", "command", "runs")
        done = sum((path / name / "report.json").exists() for name in runs["runs"])
        return {"kind": "comparison of erase", "command": runs["command"], "runs": len(runs["runs"]), "finished": done}
    if len(alone) == 1:
        return _describe_file(alone[0], components)
    if (path / "config.json").exists():
        config = mapping(path / "config.json")
        if config.get("_class_name") == "UNet2DModel" or is_classifier(config):
            return _describe_model(path)
        if "_class_name" in config:
            return {"kind": "network of diffusers, without a pipeline", "class": config["_class_name"]}
        return {"kind": "transformers model", "architectures": config.get("architectures")}
    from erase.evaluation.image_files import SUFFIXES

    images = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if images:
        return _describe_images(path, images)
    raise ValueError(
        f"{path} is a folder that erase does not know: no model_index.json, config.json or run.json, and no images"
    )


def _describe_pipeline(path: Path) -> dict[str, Any]:
    """A diffusers folder of any class; of one that erase opens, what it holds."""
    from erase.diffusion import describe
    from erase.diffusion.families import FAMILIES

    found = describe.describe_pipeline(path)
    if not found["support"].startswith("supported"):
        return found
    try:
        return {**_describe_model(path), "class": found["class"], "support": found["support"]}
    except ValueError as error:
        if any(found["class"] in kinds for kinds in FAMILIES.values()):
            raise
        return {**found, "support": f"not supported: {error}"}


def _describe_images(folder: Path, paths: Sequence[Path]) -> dict[str, Any]:
    """A folder of images: how many of which size, in which folders, and what says what they show."""
    from collections import Counter

    from PIL import Image

    from erase.evaluation import manifest

    sizes: Counter[str] = Counter()
    broken = []
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()  # a truncated one has a whole header
                sizes[f"{image.width} × {image.height}, {image.mode}"] += 1
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            broken.append(str(path.relative_to(folder)))
    found: dict[str, Any] = {"kind": "folder of images", "images": len(paths), "sizes": dict(sizes.most_common())}
    places = Counter(path.parent.relative_to(folder).as_posix() for path in paths)
    if list(places) != ["."]:
        found["folders"] = dict(sorted(places.items()))
    if broken:
        found["not_images"] = broken
    captions = [name for name in ("metadata.jsonl", manifest.MANIFEST, "metadata.csv") if (folder / name).exists()]
    found["captions"] = captions[0] if captions else None
    if (folder / manifest.MANIFEST).exists():
        rows = manifest.read_manifest(folder)
        found |= {"prompts": len({row.prompt for row in rows}), "generated_by": manifest.generated_by(folder)}
    return found


def _describe_run(folder: Path) -> dict[str, Any]:
    """A run by its settings, and what it printed of its results if it finished."""
    run = mapping(folder / "run.json", "command", "base")
    found = {"finished": (folder / "report.json").exists(), "command": run["command"], "base": run["base"]}
    if not found["finished"]:
        return found
    from erase.evaluation import report

    result = mapping(folder / "report.json")
    config = run.get("config")
    if isinstance(config, dict) and config.get("pipeline") == "classify":
        from erase.programs.classify.report import table

        lines = table(result)
    else:
        lines = [*report.verdict(result, run), *report.robustness_lines(result.get("robustness", {}))]
    return {**found, "results": lines}


def _told(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    """A header, with what was forgotten as a list."""
    from erase.diffusion.checkpoints import folders

    if folders.FORGOTTEN not in header:
        return dict(header)
    return {**header, folders.FORGOTTEN: folders.forgotten_in(header, path)}


def _describe_model(path: Path, components: str | None = None) -> dict[str, Any]:
    from erase.classification import folders as classifiers
    from erase.programs import saving
    from erase.store import weights

    no_loading_bars()
    source = locate_any(str(path), components=components)
    if isinstance(source, classifiers.Source):
        what, hashes = classifiers.describe(source), classifiers.fingerprint(source)
    else:
        from erase.diffusion.checkpoints import folders
        from erase.diffusion.describe import describe

        what, hashes = describe(source), folders.fingerprint(source)
    return {**what, **_told(weights.provenance(saving.header(source)), path), "sha256": hashes}


def _describe_file(path: Path, components: str | None) -> dict[str, Any]:
    from erase.store import files

    if path.suffix == ".safetensors":
        from erase.diffusion.checkpoints import detect, lora
        from erase.store.safetensors import open_safetensors

        tensors, meta = open_safetensors(path)
        if meta.get("format") == "erase-mask-1":
            from erase.engine.saliency import load_mask

            mask = load_mask(path)
            return {"kind": "saliency mask", **mask.meta, "kept": mask.density, "per_layer": mask.per_layer()}
        if meta.get("format") == "erase-delta-1":
            names = [name.removeprefix("xor/") for name in tensors if name.startswith("xor/")]
            return {"kind": "delta of erase", **_told(meta, path), "tensors": len(names), "sha256": files.sha256(path)}
        if (name := detect.family_of_file(tensors)) is not None:
            return _describe_single(path, components, name, _told(meta, path))
        if lora.is_lora(path):
            from erase.diffusion.lora.describe import describe_lora

            return {**describe_lora(tensors, meta), "metadata": _told(meta, path), "sha256": files.sha256(path)}
        state = meta.get("format") == "erase-state-1"
        return {
            "kind": "run state of erase" if state else "safetensors file",
            **({} if state else {"holds": detect.kind_of(tensors)}),
            "tensors": len(tensors),
            "first": list(tensors)[:5],
            "metadata": _told({k: v for k, v in meta.items() if k not in ("tree", "shapes")}, path),
            "sha256": files.sha256(path),
        }
    if path.suffix == ".ckpt":
        return _describe_model(path, components)
    if path.name == "run.json":
        return {"kind": "settings of a run of erase", "run": str(path.parent), **_describe_run(path.parent)}
    if path.name == "split.json":
        from erase.classification import splits

        return {"kind": "split of training images", **splits.describe(path)}
    what = files.guess_kind(path)
    return {
        "kind": f"a file that erase does not know: {what}",
        "bytes": path.stat().st_size,
        "sha256": files.sha256(path),
    }


def _describe_single(path: Path, components: str | None, family: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    """A single file of a family; of a network alone what it says by itself, and what it needs."""
    from erase.diffusion.checkpoints.quantised import QuantisedError
    from erase.diffusion.checkpoints.single_file import RestMissingError
    from erase.diffusion.describe import describe_network
    from erase.store import files

    try:
        return _describe_model(path, components)
    except (RestMissingError, QuantisedError) as error:
        what = describe_network(path, family)
        why = {"needs": str(error)} if isinstance(error, RestMissingError) else {"support": f"not supported: {error}"}
        header = {key: value for key, value in meta.items() if not key.startswith("diffusers_")}
        return {**what, **why, "metadata": header, "sha256": files.sha256(path)}
