"""`erase inspect`: what a file or folder is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from erase.cli.common import (
    app,
    is_classifier,
    locate_any,
    mapping,
    quiet,
)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A model (folder or file), mask, delta, run folder or any other file.")],
) -> None:
    """Say what a file or folder is, and how it was made if erase made it.

    Example: erase inspect runs/demo/saliency.safetensors
    """
    quiet()
    import json

    typer.echo(json.dumps(_describe(path), indent=2, default=str))


def _describe(path: Path) -> dict[str, Any]:
    if not path.exists():
        from erase import resources

        if str(path) not in resources.list_tiny():
            raise ValueError(f"no such file or folder: {path}")
        path = resources.tiny_path(str(path))
    return _describe_folder(path) if path.is_dir() else _describe_file(path)


def _describe_folder(path: Path) -> dict[str, Any]:
    alone = list(path.glob("*.safetensors")) if not (path / "config.json").exists() else []
    if (path / "model_index.json").exists():
        return _describe_model(path)
    if (path / "run.json").exists():
        return {"kind": "run of erase", **_describe_run(path)}
    if len(alone) == 1:
        return _describe_file(alone[0])
    if (path / "config.json").exists():
        config = mapping(path / "config.json")
        if config.get("_class_name") == "UNet2DModel" or is_classifier(config):
            return _describe_model(path)
        return {"kind": "transformers model", "architectures": config.get("architectures")}
    raise ValueError(f"{path} is a folder that erase does not know: no model_index.json, config.json or run.json")


def _describe_run(folder: Path) -> dict[str, Any]:
    """A run by its settings, and what it printed of its results if it finished."""
    run = mapping(folder / "run.json", "command", "base")
    found = {"finished": (folder / "report.json").exists(), "command": run["command"], "base": run["base"]}
    if not found["finished"]:
        return found
    from erase.evaluation import report

    result = mapping(folder / "report.json")
    if run.get("config", {}).get("pipeline") == "classify":
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


def _describe_model(path: Path) -> dict[str, Any]:
    from erase.classification import folders as classifiers
    from erase.programs import saving
    from erase.store import weights

    source = locate_any(str(path))
    if isinstance(source, classifiers.Source):
        what, hashes = classifiers.describe(source), classifiers.fingerprint(source)
    else:
        from erase.diffusion.checkpoints import folders
        from erase.diffusion.describe import describe

        what, hashes = describe(source), folders.fingerprint(source)
    return {**what, **_told(weights.provenance(saving.header(source)), path), "sha256": hashes}


def _describe_file(path: Path) -> dict[str, Any]:
    from erase.store import files

    if path.suffix == ".safetensors":
        from erase.diffusion.checkpoints import single_file
        from erase.store.safetensors import open_safetensors

        tensors, meta = open_safetensors(path)
        if meta.get("format") == "erase-mask-1":
            from erase.engine.saliency import load_mask

            mask = load_mask(path)
            return {"kind": "saliency mask", **mask.meta, "kept": mask.density, "per_layer": mask.per_layer()}
        if meta.get("format") == "erase-delta-1":
            names = [name.removeprefix("xor/") for name in tensors if name.startswith("xor/")]
            return {"kind": "delta of erase", **_told(meta, path), "tensors": len(names), "sha256": files.sha256(path)}
        if all(
            any(name.startswith(part) for name in tensors) for part in ("model.diffusion_model.", "cond_stage_model.")
        ):
            return _describe_model(path)
        state = meta.get("format") == "erase-state-1"
        return {
            "kind": "run state of erase" if state else "safetensors file",
            **({} if state else {"holds": single_file.kind_of(tensors)}),
            "tensors": len(tensors),
            "first": list(tensors)[:5],
            "metadata": _told({k: v for k, v in meta.items() if k not in ("tree", "shapes")}, path),
            "sha256": files.sha256(path),
        }
    if path.suffix == ".ckpt":
        return _describe_model(path)
    if path.name == "run.json":
        return {"kind": "settings of a run of erase", "run": str(path.parent), **_describe_run(path.parent)}
    what = files.guess_kind(path)
    return {
        "kind": f"a file that erase does not know: {what}",
        "bytes": path.stat().st_size,
        "sha256": files.sha256(path),
    }
