"""Run state on disk: any tree of numbers, text and tensors, as safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase.store.safetensors import read_safetensors, write_safetensors

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


def pack(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON-able copy of a tree of mappings, lists and scalars; its tensors go into `tensors` under dotted names."""
    if isinstance(tree, Tensor):
        tensors[prefix] = tree.detach().to("cpu", copy=True)  # off the accelerator first: it may be full
        return {"__tensor__": prefix}
    if isinstance(tree, Mapping):
        return {"__map__": [[k, pack(v, f"{prefix}.{k}", tensors)] for k, v in tree.items()]}
    if isinstance(tree, tuple | list):
        return [pack(v, f"{prefix}.{i}", tensors) for i, v in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{prefix}: {type(tree).__name__} has no place in a run state")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `pack` was given."""
    if isinstance(packed, dict):
        if "__tensor__" in packed:
            return tensors[packed["__tensor__"]]
        return {k: unpack(v, tensors) for k, v in packed["__map__"]}
    if isinstance(packed, list):
        return [unpack(v, tensors) for v in packed]
    return packed


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a run state: any tree of mappings, lists, scalars and tensors."""
    tensors: dict[str, Tensor] = {}
    tree = pack(state, "state", tensors)
    if not tensors:
        tensors["empty"] = torch.zeros(0)
    write_safetensors(path, tensors, {"format": STATE_FORMAT, "tree": json.dumps(tree)})


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        ValueError: for a file that is missing, broken, or no run state.
    """
    tensors, meta = read_safetensors(path)
    if meta.get("format") != STATE_FORMAT:
        raise ValueError(f"{path} is not a run state (format {meta.get('format')!r}, expected {STATE_FORMAT!r})")
    state: dict[str, Any] = unpack(json.loads(meta["tree"]), tensors)
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
                f"{path} was saved with {key} {state['run'][key]!r}, this run has {mine!r}: resume the same run"
            )
    return state
