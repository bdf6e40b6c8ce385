"""Run state on disk: any tree of numbers, text and tensors, as safetensors and JSON.

A state of weights that are spread over processes is a folder beside the file that it would be: a file of each process,
and `latest.json`, which is written last and says which files belong together. Any number of processes can read it.
(`torch.distributed.checkpoint` would do the same with pickles.)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from erase.engine.sharding import Piece, Pieces
from erase.store.files import read_json, write_json
from erase.store.safetensors import open_safetensors, read_safetensors, write_safetensors

STATE_FORMAT = "erase-state-1"
"""Of the file: how a tree is laid out in it."""
RUN_SCHEMA = 2
"""Of the run state in it. Files of another schema are refused: raise it whenever what is saved changes its meaning."""


@dataclass(frozen=True)
class Checkpoint:
    """Where run state is saved, every how many steps, and whether to resume from it."""

    path: Path
    every: int
    resume: bool = False

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: for `every` < 1.
        """
        if self.every < 1:
            raise ValueError(f"checkpoint_every must be at least 1; got {self.every}")


LATEST = "latest.json"
"""Of a folder of process's files: their number, and how many processes wrote them."""


def folder_of(path: Path) -> Path:
    """Where the state is that would be in the file `path`, of weights that are spread."""
    return path.with_suffix("")


def there(path: Path) -> bool:
    """Whether a state is there, in the file or in the folder beside it."""
    return path.exists() or (folder_of(path) / LATEST).exists()


def remove_state(path: Path) -> None:
    """Remove a state, the file or the folder beside it, where it is."""
    path.unlink(missing_ok=True)
    if (folder_of(path) / LATEST).exists():
        shutil.rmtree(folder_of(path))


def pack(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON-able copy of a tree of mappings, lists and scalars; its tensors go into `tensors` under dotted names."""
    if isinstance(tree, Piece):
        tensors[prefix] = tree.local.detach().to("cpu", copy=True)
        return {"__piece__": prefix, "start": tree.start, "rows": tree.rows}
    if isinstance(tree, Tensor):
        tensors[prefix] = tree.detach().to("cpu", copy=True)  # off the accelerator first: it may be full
        return {"__tensor__": prefix}
    if isinstance(tree, Mapping):
        return {"__map__": [[k, pack(v, f"{prefix}.{k}", tensors)] for k, v in tree.items()]}
    if isinstance(tree, tuple | list):
        return [pack(v, f"{prefix}.{i}", tensors) for i, v in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{prefix}: {type(tree).__name__} cannot be stored in a run state")


def unpack(packed: Any, tensors: Mapping[str, Any]) -> Any:
    """The tree that `pack` was given; of pieces, what `tensors` has of them."""
    if isinstance(packed, dict):
        if "__piece__" in packed:
            return tensors[packed["__piece__"]]
        if "__tensor__" in packed:
            return tensors[packed["__tensor__"]]
        return {k: unpack(v, tensors) for k, v in packed["__map__"]}
    if isinstance(packed, list):
        return [unpack(v, tensors) for v in packed]
    return packed


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a run state: any tree of mappings, lists, scalars and tensors; with `Piece`s, all processes must."""
    tensors: dict[str, Tensor] = {}
    tree = pack(state, "state", tensors)
    pieces = pieces_in(tree)
    if not tensors:
        tensors["empty"] = torch.zeros(0)
    meta = {"format": STATE_FORMAT, "tree": json.dumps(tree)}
    if not pieces:
        write_safetensors(path, tensors, meta)
        if (folder_of(path) / LATEST).exists():  # of more processes, before: it would be read in its place
            shutil.rmtree(folder_of(path))
        return
    folder, rank, world = folder_of(path), dist.get_rank(), dist.get_world_size()
    latest = folder / LATEST
    number = int(read_json(latest)["number"]) + 1 if latest.exists() else 0
    write_safetensors(_shard_path(folder, number, rank), tensors, meta | {"pieces": json.dumps(pieces)})
    dist.barrier()
    if rank == 0:
        write_json(latest, {"schema": 1, "number": number, "processes": world})
        path.unlink(missing_ok=True)
        ours = {_shard_path(folder, number, each).name for each in range(world)}
        for old in folder.glob("*.safetensors"):
            if old.name not in ours:
                old.unlink()
    dist.barrier()


def _shard_path(folder: Path, number: int, rank: int) -> Path:
    return folder / f"{number:08d}-{rank:05d}.safetensors"


def pieces_in(packed: Any) -> dict[str, tuple[int, int]]:
    """First row and number of all rows of every piece of a packed tree."""
    if isinstance(packed, list):
        parts = [pieces_in(value) for value in packed]
    elif isinstance(packed, dict) and "__piece__" in packed:
        return {packed["__piece__"]: (packed["start"], packed["rows"])}
    elif isinstance(packed, dict) and "__map__" in packed:
        parts = [pieces_in(value) for _, value in packed["__map__"]]
    else:
        return {}
    return {name: place for part in parts for name, place in part.items()}


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; of tensors in pieces, `Pieces`.

    Raises:
        ValueError: for a file that is missing, broken, or not a run state.
    """
    latest = folder_of(path) / LATEST
    if latest.exists():
        return _load_shards(latest)
    tensors, meta = read_safetensors(path)
    state: dict[str, Any] = unpack(_tree(path, meta), tensors)
    return state


def _tree(path: Path, meta: Mapping[str, str]) -> Any:
    if meta.get("format") != STATE_FORMAT:
        raise ValueError(f"{path} is not a run state (format {meta.get('format')!r}, expected {STATE_FORMAT!r})")
    return json.loads(meta["tree"])


def _load_shards(latest: Path) -> dict[str, Any]:
    said = read_json(latest)
    paths = [_shard_path(latest.parent, said["number"], rank) for rank in range(said["processes"])]
    opened = [open_safetensors(path) for path in paths]
    found: dict[str, Any] = {}
    for tensors, meta in opened:
        for name, (start, count) in json.loads(meta["pieces"]).items():
            pieces = found.setdefault(name, Pieces([], count))
            pieces.pieces.append((partial(tensors.__getitem__, name), start))
    own, meta = opened[0]
    whole = {name: own[name] for name in own if name not in found}
    state: dict[str, Any] = unpack(_tree(paths[0], meta), whole | found)
    return state


def save_run(path: Path, run: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the state of a run.

    Args:
        path: the file.
        run: what makes the run what it is; a run that resumes must have the same.
        state: the rest.
    """
    save_state(path, {"schema": RUN_SCHEMA, "run": run, **state})


def load_run(path: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """Read what `save_run` wrote, for the same run.

    Raises:
        ValueError: for a file of another schema or of another run.
    """
    state = load_state(path)
    if state.get("schema") != RUN_SCHEMA:
        raise ValueError(
            f"{path} holds a run state of schema {state.get('schema')}, and this version resumes schema {RUN_SCHEMA}: "
            "remove the file to start the steps again, or resume with the version that wrote it"
        )
    for key, mine in run.items():
        if state["run"][key] != mine:
            raise ValueError(
                f"{path} was saved with {key} {state['run'][key]!r}; this run has {mine!r}: resume with the same "
                "settings"
            )
    return state
