"""How much memory a run will take, before it takes any: its passes are followed on tensors without data."""

from __future__ import annotations

import copy
import ctypes
import os
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import is_dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from erase.engine.backend import Backend, Drawing, LossFn, batch_tensors, device_of, map_batch, trainable
from erase.engine.method import Method
from erase.engine.per_sample import PerSample
from erase.engine.updates import ClosedForm, Shared

OPTIMIZERS = {"adam": 8, "adamw": 8, "sgd": 4, "adam8bit": 2}
"""Bytes of state a weight."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers of the settings (malloc.h)."""
LARGE = 2 * 2**20
"""Bytes from which on a tensor's memory is given back. From 1 MiB on, the passes of a small model take a quarter longer
(each new page costs a fault); from 32 MiB on, a CIFAR-10 DDPM holds a quarter more."""
HELD = 128 * 2**20
"""Bytes of freed smaller tensors from which on these are given back."""
SPREAD = ("weights", "sums", "optimizer", "fast step", "fast step's work", "copies of weights", "gradients")
"""What processes can share; a mask is whole in each."""
LONG = 8
"""Equal blocks in a run up to which all are followed."""


class Model(Backend[Any], Drawing, Protocol):
    """What can be followed: a backend whose randomness is drawn apart from its loss."""


def used() -> int:
    """Bytes of memory that this process holds (on Linux; elsewhere 0)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def give_back() -> None:
    """Have glibc give large freed tensors back to the system at once; other allocators stay as they are.

    Left alone it keeps ever larger ones for later, and holds a fifth to a third more than the tensors of a small model.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, HELD)


def peak() -> dict[str, int]:
    """Most bytes that this process has held so far: `ram_bytes` and, where tensors are on GPUs, `gpu_bytes` of them."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    found = {"ram_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        found["gpu_bytes"] = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return found


@contextmanager
def hollow(backend: Model) -> Iterator[Model]:
    """A copy of the model whose network has no data: within the context what weights touch has a size, no values."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        memo: dict[int, Any] = {id(x): _fake(mode, x) for x in (*backend.net.parameters(), *backend.net.buffers())}
        with _Known():  # type: ignore[no-untyped-call]  # not before: weights on "meta" would be made real
            yield copy.deepcopy(backend, memo)


class _Known(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes what no weight has part in: a network may ask a mask how long the text is, or keep tables."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if any(issubclass(kind, FakeTensor) for kind in types):
            return func(*args, **given)
        with _disable_current_modes():
            return func(*args, **given)


def _fake(mode: FakeTensorMode, x: Tensor) -> Tensor:
    """A tensor without data; one that has none already is taken to be on the CPU."""
    if not x.is_meta:
        return mode.from_tensor(x)
    made = torch.empty_like(x, device="cpu")
    return torch.nn.Parameter(made, requires_grad=x.requires_grad) if isinstance(x, torch.nn.Parameter) else made


def passes(
    backend: Model,
    loss: LossFn,
    sample: Mapping[str, Any],
    rows: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    of: Literal["batch", "squares", "samples"] = "batch",
) -> int:
    """Bytes of all that a forward and a backward pass make at their height, gradients of the weights among them.

    Of a long run of equal blocks three are followed; what the middle one does counts for all that are left out.

    Args:
        backend: a hollow model.
        loss: what is computed.
        sample: a batch of one, not drawn.
        rows: samples of a batch.
        autocast: makes the precision context of the forward pass.
        of: gradients of the `batch`, which stay; a Fisher diagonal uses up each as it comes (`squares`), or all
            `samples`' of it (where layers do not tell them, it takes one sample at a time).
    """
    generator = torch.Generator(device_of(backend.net))
    batch = backend.draw(map_batch(lambda x: x.repeat(rows, *[1] * (x.ndim - 1)), sample), generator)
    params = trainable(backend.net)

    def losses() -> Tensor:
        with autocast():
            return loss(backend, batch, generator)

    def drop(p: Tensor) -> None:
        p.grad = None

    if of == "samples":
        try:
            layers = PerSample(backend.net, params, lambda name, grads: None)
            there = [*tensors_of(backend), *batch_tensors(batch)]
            with Made(there) as made, _shortened(backend.net, made), layers:
                layers.backward(losses())
        except Exception:  # as in `fisher_diagonal`
            return passes(backend, loss, sample, 1, autocast, "squares")
        return int(made.peak)
    register: Any = torch.nn.Parameter.register_post_accumulate_grad_hook
    hooks = [register(p, drop) for p in params.values()] if of == "squares" else []
    with Made([*tensors_of(backend), *batch_tensors(batch)]) as made, _shortened(backend.net, made):
        torch.autograd.backward(losses().mean())
    for hook in hooks:
        hook.remove()
    for p in params.values():
        p.grad = None
    return int(made.peak)


class _Shortened(nn.ModuleList):
    """A list of blocks, only some of which a forward pass takes; parameters and their names stay.

    It marks in `made` where each of them begins, forward and, by hooks on what they give, backward.
    """

    made: Made
    seen: dict[int, tuple[int, Any]]
    """By a block's place, how many blocks it stands for, and its run."""

    def __iter__(self) -> Iterator[nn.Module]:
        for place, block in enumerate(self._modules.values()):
            if place in self.seen and block is not None:
                self.made.mark(*self.seen[place])
                yield block
        self.made.mark(1)


def _mark_backward(made: Made, marked: tuple[int, Any], block: nn.Module, args: Any, out: Any) -> None:
    """A hook on what a block gives: mark where its backward pass will begin.

    Blocks of two streams give a pair, and the last of them (Stable Diffusion 3's) `None` for the text.
    """
    for given in out if isinstance(out, tuple) else (out,):
        if isinstance(given, Tensor) and given.requires_grad:
            given.register_hook(lambda grad: made.mark(*marked))  # type: ignore[no-untyped-call]
            return


@contextmanager
def _shortened(net: nn.Module, made: Made) -> Iterator[None]:
    """Have forward passes take three blocks of each long run of equal ones that the network itself holds."""
    with ExitStack() as stack:
        for blocks in net.children():
            seen = _standing(blocks) if type(blocks) is nn.ModuleList else {}
            if any(times > 1 for times, _ in seen.values()):
                blocks.__class__ = _Shortened
                blocks.made, blocks.seen = made, seen  # type: ignore[assignment]
                stack.callback(_restore, blocks)
                for place, marked in seen.items():
                    hook = partial(_mark_backward, made, marked)
                    stack.callback(blocks[place].register_forward_hook(hook).remove)  # type: ignore[index]
        yield


def _restore(blocks: nn.Module) -> None:
    del blocks.made, blocks.seen
    blocks.__class__ = nn.ModuleList


def _standing(blocks: nn.ModuleList) -> dict[int, tuple[int, Any]]:
    """Which blocks of a list are followed, by place, how many each stands for and which run it is of."""
    found: dict[int, tuple[int, Any]] = {}
    start = 0
    for _, run in groupby(blocks, _kind):
        length, key = len(list(run)), (id(blocks), start)
        if length > LONG:
            found |= {start: (1, key), start + 1: (length - 2, key), start + length - 1: (1, key)}
        else:
            found |= dict.fromkeys(range(start, start + length), (1, key))
        start += length
    return found


def _kind(block: nn.Module) -> Any:
    """What equal blocks have in common."""
    return type(block), [(name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()]


class Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of tensors made in the context and still held (`now`), and the most there were at once (`peak`).

    What happens between two marks can count several times.

    Args:
        there: tensors made before, views of which do not count.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self._begin = self._top = 0
        self._times = 1
        self._run: object = None
        self._parts: list[tuple[int, int, int]] = []
        self.known = weakref.WeakSet[Any](x.untyped_storage() for x in there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call, and count what comes out."""
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, out)
        return out

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            self._top = max(self._top, self.now)
            weakref.finalize(storage, self._drop, storage.nbytes(), self._run, self._times)

    def _drop(self, size: int, run: object, times: int) -> None:
        """A tensor is gone: in the run that made it each block lets go of one, elsewhere all go at once."""
        self.now -= size if run == self._run else size * times // self._times

    def _part(self) -> tuple[int, int, int]:
        """Since the last mark: how many times it counts, its height, and what it left behind."""
        return self._times, self._top - self._begin, self.now - self._begin

    def mark(self, times: int, run: object = None) -> None:
        """What comes now, until the next mark, counts so many times: a block of a run of equal ones."""
        self._parts.append(self._part())
        self._begin = self._top = self.now
        self._times, self._run = times, run

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        now = peak = 0
        for times, height, change in [*self._parts, self._part()]:
            peak = max(peak, now + height, now + (times - 1) * change + height)
            now += times * change
        return peak


def held(backend: Model, data: int) -> dict[str, int]:
    """What is in memory all the time, by item; `data` bytes are cached, on the CPU."""
    weights = sum(x.nbytes for x in (*backend.net.parameters(), *backend.net.buffers()))
    if device_of(backend.net).type not in ("cpu", "meta"):
        return {"weights": weights}
    x, w = (torch.zeros(shape, requires_grad=True) for shape in ((2, 8, 8, 8), (8, 8, 3, 3)))
    F.conv2d(x, w).sum().backward()  # type: ignore[no-untyped-call]  # libraries take memory the first time that they work
    return {"libraries": max(0, used() - weights), "weights": weights, "cached data": data}


def in_step(n: int, method: Method, optimizer: str, kept: float | None, copies: int, height: int) -> dict[str, int]:
    """What a step adds at its height, by item.

    Args:
        n: weights that learn.
        method: its update says what else is held.
        optimizer: the slow one.
        kept: share of the weights in the mask; `None` without one.
        copies: bytes of teachers, frozen targets and Fisher diagonals.
        height: of its passes.
    """
    update = method.update
    fast = 0 if update.own_rule is None else round(n * (1.0 if kept is None else kept))
    state = 8 * fast if update.own_rule == "adam" else 0
    unpacked = n if kept is not None and update.whole_mask else 0
    slow = method.remain is not None or isinstance(update, Shared)
    return {
        "optimizer": OPTIMIZERS[optimizer] * n if slow else 0,
        "new weights": 4 * n if isinstance(update, ClosedForm) else 0,
        "fast step": state + (0 if kept is None else 4 * fast),
        "mask": 0 if kept is None else n // 8 + unpacked,
        "copies of weights": copies + 4 * n * ((update.outer_rate < 1) + bool(method.average)),
        "gradients": 4 * n if height else 0,
        "activations": max(height - 4 * n, 0),
        "fast step's work": max(8 * fast - max(height - 4 * n, 0), 0),  # it works where activations were
    }


def shared(items: Mapping[str, int], world: int, block: int) -> dict[str, int]:
    """The same of one of the processes that weights are spread over (`erase.engine.sharding`).

    Args:
        items: what one process would hold.
        world: how many processes.
        block: bytes of the largest part that is gathered at a time. It is there twice, as the next one comes before it
            is gone; and once more as gradients that are about to be averaged.
    """
    found = {name: -(-value // world) if name in SPREAD else value for name, value in items.items()}
    return {**found, "gathered weights": 3 * block}


def tensors_of(backend: Model) -> list[Tensor]:
    """Weights, buffers and whatever else the model holds."""
    own = [x for name, value in vars(backend).items() if name != "net" for x in _tensors_in(value)]
    return [*backend.net.parameters(), *backend.net.buffers(), *own]


def _tensors_in(value: Any) -> list[Tensor]:
    """Of a tensor, a mapping, or a record."""
    if isinstance(value, Tensor):
        return [value]
    parts = value if isinstance(value, Mapping) else vars(value) if is_dataclass(value) else {}
    return [x for part in parts.values() for x in _tensors_in(part)]
