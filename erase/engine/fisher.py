"""S, first half: Fisher diagonals.

Definition: `F_j = mean_i (∂ℓ_i/∂θ_j)²`: per sample, then squared, then averaged. The scripts published with
arXiv 2409.19732 square the gradient of the batch mean instead, a different and smaller quantity (by up to the
batch size); it is offered as `per="batch"`, recorded in the result, and never mixed with the other. So is `clip`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from erase.engine.backend import Backend, Drawing, LossFn, batch_size, map_batch, trainable
from erase.engine.losses import plain
from erase.engine.per_sample import PerSample
from erase.engine.sharding import as_shard, clip_factor, is_sharded, local, piece, restored, total_norm
from erase.engine.state import Checkpoint, load_state, save_state, there

Per = Literal["sample", "batch", "image"]
"""`image` is `erase.engine.image_fisher`'s."""


@dataclass(frozen=True)
class Fisher:
    """A Fisher diagonal. Scaling: mean over samples (or, `per="batch"`, over batches) of squared gradients."""

    named: Mapping[str, Tensor]
    """float32, shaped like the parameter of that name."""
    per: Per
    count: int
    """Squared gradients averaged: samples × draws, or batches × draws."""
    meta: dict[str, str] = field(default_factory=dict)
    """What else was done to the gradients: `clip`."""


Autocast = Callable[[], AbstractContextManager[Any]]


def default_chunk(params: Mapping[str, Tensor]) -> int:
    """Samples whose float32 gradients of the largest weight fit in 256 MB; 1 to 32, beyond which it gets no faster."""
    return max(1, min(32, int(256e6 / (4 * max(p.numel() for p in params.values())))))


def fisher_diagonal(
    backend: Backend[Any],
    batches: Iterable[Any],
    *,
    per: Per = "sample",
    draws: int = 1,
    generator: torch.Generator,
    loss: LossFn = plain,
    clip: float | None = None,
    chunk: int | None = None,
    autocast: Autocast = nullcontext,
    scale: float = 1.0,
    share: tuple[int, int] = (0, 1),
    total: Callable[[Tensor], Tensor] | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int], None] | None = None,
) -> Fisher:
    """The Fisher diagonal of a loss over batches, at the network's present weights.

    The network is in eval mode throughout, and put back afterwards. Give forget and remain generators in the
    same state: with batches of equal shape both then see the same timesteps and noise.

    With several processes all are given the same batches and generator, and take the draws in turn. A backend that
    can `draw` then sees what one process would, and the result is the same. Weights that are spread over processes
    (`erase.engine.sharding`) need all of them for every pass: each process then takes every sample, and squares its
    own rows of the sample's gradient. The mean of equal gradients, which FSDP makes, is the gradient, so that the
    result is the same here too; the work is not shared, the memory is. Its entries are spread as the weights are.

    Args:
        backend: the model; only trainable parameters get entries.
        batches: each of B samples.
        per: square each sample's gradient (the definition), or the batch mean's (the published scripts).
        draws: random draws (timestep, noise) per batch.
        generator: all randomness.
        loss: `(backend, batch, generator) -> [B]`.
        clip: most that the norm of a gradient may be before it is squared, of the batch mean's or of each sample's (one
            by one then). Not Fisher's definition: the DDPM script published with arXiv 2409.19732 clips to 1.
        chunk: samples taken at once, by `PerSample`; 1 takes them one by one, `None` picks at most 64 (see
            `default_chunk`). Needs a backend that can `draw`, and a network whose layers give the
            gradients of the first two samples, which is looked at; others go one by one.
        autocast: makes the precision context of passes; sums are float64.
        scale: losses are multiplied by it before the backward pass and gradients divided after (fp16).
        share: this process's number, and how many there are.
        total: sums a tensor over processes.
        checkpoint: save the sums every so many draws, and at the end; go on from them bit-identically.
        progress: called with the samples done.

    Raises:
        ValueError: for no batches, draws < 1, an unknown `per`, a clip that is not positive, gradients that are not
            finite, or a checkpoint of another diagonal.
    """
    _check(per, draws, clip)
    meta = {} if clip is None else {"clip": repr(clip)}
    net = backend.net
    params = trainable(net)
    chunk = 1 if clip is not None else default_chunk(params) if chunk is None else chunk
    spread = is_sharded(net)
    layered = None if chunk > 1 and isinstance(backend, Drawing) and not spread else False  # not known yet
    losses = partial(_losses, backend, loss, generator, autocast)
    # Frozen weights in 16 bits beside float32 ones go together under autocast alone.
    whole = len({p.dtype for p in net.parameters()}) == 1
    exact = partial(_losses, backend, loss, generator, nullcontext if whole else autocast)
    rank, world = (0, 1) if spread else share
    total = None if spread else total
    sums = _Sums(
        params, {"per": per, "draws": draws, "names": list(params), **meta}, generator, rank, total, checkpoint
    )
    done = 0
    with evaluating(net):
        for batch in batches:
            size = batch_size(batch)
            for _ in range(draws):
                sums.number += 1
                if sums.number <= sums.saved:
                    continue
                drawn = backend.draw(batch, generator) if isinstance(backend, Drawing) else batch
                if sums.number % world == rank:
                    if per == "batch":
                        with _squares(params, sums.named, scale, clip) as squares:
                            squares(losses(drawn).mean() * scale)
                    else:
                        if layered is None and size > 1:
                            layered = _layers_suffice(exact, drawn, net, params, 1e-2 if whole else 1e-1)
                        _add_samples(losses, drawn, net, params, sums.named, scale, chunk if layered else 1, clip)
                    sums.count += 1 if per == "batch" else size
                if checkpoint is not None and sums.number % checkpoint.every == 0:
                    sums.gather()
            done += size
            if progress is not None:
                progress(done)
    return Fisher(named=sums.means(), per=per, count=int(sums.count), meta=meta)


def _check(per: Per, draws: int, clip: float | None) -> None:
    if per not in ("sample", "batch"):  # that of images has a function of its own
        raise ValueError(f"per must be 'sample' or 'batch'; got {per!r}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1; got {draws}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0 or left out; got {clip}")


class _Sums:
    """Sums of squared gradients of this process, which a checkpoint keeps.

    They are float64: the order of additions, and with it the number of processes, does not show in a float32 result.

    Raises:
        ValueError: for a checkpoint of another diagonal.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        what: Mapping[str, Any],
        generator: torch.Generator,
        rank: int,
        total: Callable[[Tensor], Tensor] | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.params = params
        self.named = {name: torch.zeros_like(local(p), dtype=torch.float64) for name, p in params.items()}
        self.count = torch.zeros((), dtype=torch.float64, device=next(iter(params.values())).device)
        self.number = self.saved = 0
        """Draws so far, and those that the checkpoint has."""
        self._what, self._generator, self._rank, self._total, self._checkpoint = (
            what,
            generator,
            rank,
            total,
            checkpoint,
        )
        if checkpoint is not None and checkpoint.resume and there(checkpoint.path):
            state = load_state(checkpoint.path)
            if state["what"] != what:
                raise ValueError(f"{checkpoint.path} holds sums of another Fisher diagonal: remove it")
            self.saved = int(state["draws"])
            generator.set_state(state["generator"])
            if rank == 0:
                self.count.copy_(state["count"])
                for name, value in self.named.items():
                    value.copy_(restored(state["sums"][name], params[name]))

    def gather(self, last: bool = False) -> None:
        """Sums over processes, into the file too; until the last time the first process goes on with all there is."""
        parts = [self.count, *self.named.values()]
        if self._total is not None:
            for part in parts:
                part.copy_(self._total(part))
        if self._checkpoint is not None and self._rank == 0 and self.number > self.saved:
            sums = {name: piece(value, self.params[name]) for name, value in self.named.items()}
            state = {"what": self._what, "draws": self.number, "count": self.count, "sums": sums}
            save_state(self._checkpoint.path, {**state, "generator": self._generator.get_state()})
            self.saved = self.number
        if self._rank and not last:
            for part in parts:
                part.zero_()

    def means(self) -> dict[str, Tensor]:
        """The means over all processes, float32; the sums are used up.

        Raises:
            ValueError: if nothing was added, or what was is not finite.
        """
        self.gather(last=True)
        if self.count == 0:
            raise ValueError("fisher_diagonal got no batches")
        average(self.named, self.count.item())
        for name, value in self.named.items():
            self.named[name] = as_shard(value.float(), self.params[name])
        return self.named


def mean_gradient(
    backend: Backend[Any],
    batches: Iterable[Any],
    *,
    draws: int = 1,
    generator: torch.Generator,
    loss: LossFn = plain,
    autocast: Autocast = nullcontext,
    scale: float = 1.0,
    share: tuple[int, int] = (0, 1),
    total: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The gradient of the mean loss over all samples and draws, float32, in eval mode; arguments as `fisher_diagonal`.

    Raises:
        ValueError: for no batches, draws < 1, or gradients that are not finite.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1; got {draws}")
    params = trainable(backend.net)
    sums = {name: torch.zeros_like(local(p), dtype=torch.float32) for name, p in params.items()}
    rank, world = (0, 1) if is_sharded(backend.net) else share
    count = number = 0
    with evaluating(backend.net):
        for batch in batches:
            for _ in range(draws):
                drawn = backend.draw(batch, generator) if isinstance(backend, Drawing) else batch
                number += 1
                count += batch_size(batch)
                if number % world != rank:
                    continue
                add_gradient(sums, params, _losses(backend, loss, generator, autocast, drawn), scale)
    if total is not None and not is_sharded(backend.net):
        for part in sums.values():
            part.copy_(total(part))
    if count == 0:
        raise ValueError("mean_gradient got no batches")
    average(sums, count)
    return {name: as_shard(value, params[name]) for name, value in sums.items()}


def gradients(value: Tensor, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients of a loss in the weights that take part in it; what is in `.grad` stays.

    Weights that are spread over processes are no part of the graph themselves: theirs come by `.grad`.
    """
    before = [p.grad for p in params.values()]
    for p in params.values():
        p.grad = None
    torch.autograd.backward(value)
    found = {name: p.grad for name, p in params.items() if p.grad is not None}
    for p, grad in zip(params.values(), before, strict=True):
        p.grad = grad
    return found


def add_gradient(sums: Mapping[str, Tensor], params: Mapping[str, nn.Parameter], losses: Tensor, scale: float) -> None:
    """Add the gradient of the sum of losses `[B]`, in the sums' dtype; the backward pass is of `scale` times that."""
    for name, grad in gradients(losses.sum() * scale, params).items():
        sums[name].add_(local(grad).to(sums[name].dtype), alpha=1 / scale)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode for every module, put back afterwards."""
    modes = {m: m.training for m in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def average(sums: dict[str, Tensor], count: float) -> None:
    """Divide in place, and refuse what is not finite."""
    for name, value in sums.items():
        if not bool(torch.isfinite(value.div_(count)).all()):
            raise ValueError(f"the gradient of {name} is not finite; check the data, or use precision=no or bf16")


def _rows(batch: Any, start: int, stop: int) -> Any:
    return map_batch(lambda x: x[start:stop], batch)


class _Squares:
    """Adds the square of a loss's gradient to `sums`, weight by weight as the backward pass reaches it.

    No weight's gradient outlives its turn: they are never all in memory. Gradients that were there are put back.
    """

    def __init__(self, params: dict[str, nn.Parameter], sums: dict[str, Tensor], scale: float) -> None:
        self.before = [(p, p.grad) for p in params.values()]
        for p, _ in self.before:
            p.grad = None

        def take(name: str, p: Tensor) -> None:
            assert p.grad is not None
            g = local(p.grad).double()
            sums[name].addcmul_(g, g, value=1.0 / scale**2)
            p.grad = None

        register: Any = nn.Parameter.register_post_accumulate_grad_hook
        self.hooks = [register(p, partial(take, name)) for name, p in params.items()]

    def __call__(self, value: Tensor) -> None:
        torch.autograd.backward(value)

    def __enter__(self) -> _Squares:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        for p, grad in self.before:
            p.grad = grad


class _ClippedSquares:
    """Adds the square of a loss's gradient to `sums`, the gradient's norm limited first: all weights' are in memory."""

    def __init__(self, params: dict[str, nn.Parameter], sums: dict[str, Tensor], scale: float, clip: float) -> None:
        self.params, self.sums, self.scale, self.clip = params, sums, scale, clip

    def __call__(self, value: Tensor) -> None:
        grads = gradients(value, self.params)
        norm = total_norm(list(grads.values())).double() / self.scale
        factor = clip_factor(norm, self.clip)
        for name, g in grads.items():
            g = local(g).double() * (factor / self.scale)
            self.sums[name].addcmul_(g, g)

    def __enter__(self) -> _ClippedSquares:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _squares(
    params: dict[str, nn.Parameter], sums: dict[str, Tensor], scale: float, clip: float | None
) -> _Squares | _ClippedSquares:
    return _Squares(params, sums, scale) if clip is None else _ClippedSquares(params, sums, scale, clip)


def _losses(backend: Backend[Any], loss: LossFn, generator: torch.Generator, autocast: Autocast, batch: Any) -> Tensor:
    with autocast():
        return loss(backend, batch, generator)


def _add_samples(
    losses: Callable[[Any], Tensor],
    batch: Any,
    net: nn.Module,
    params: dict[str, nn.Parameter],
    sums: dict[str, Tensor],
    scale: float,
    chunk: int,
    clip: float | None = None,
) -> None:
    """Add Σ_i g_i² of a drawn batch, `chunk` samples at once."""
    parts = [_rows(batch, i, i + chunk) for i in range(0, batch_size(batch), chunk)]
    if chunk == 1:
        with _squares(params, sums, scale, clip) as squares:
            for part in parts:
                squares(losses(part).sum() * scale)
        return

    def take(name: str, grads: Tensor) -> None:
        high = torch.promote_types(grads.dtype, torch.float32)
        if grads[0].numel() < 4096:
            total = grads.to(high).square().sum(0)
        else:  # a sample's gradient fits in a core's cache
            total = torch.zeros_like(grads[0], dtype=high)
            for g in grads:
                g = g.to(high)
                total.addcmul_(g, g)
        sums[name].add_(total, alpha=1.0 / scale**2)

    with PerSample(net, params, take) as layers:
        for part in parts:
            layers.backward(losses(part) * scale)


def _layers_suffice(
    losses: Callable[[Any], Tensor], batch: Any, net: nn.Module, params: dict[str, nn.Parameter], tolerance: float
) -> bool:
    """Whether the layers of a network give the squares that two samples' own backward passes give.

    `tolerance` is of the largest square of a weight: rounding in 16 bits is wide, and wrong layers are off by all.
    """
    two = _rows(batch, 0, 2)
    by_layers, by_one = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    _add_samples(losses, two, net, params, by_one, 1.0, 1)
    try:
        _add_samples(losses, two, net, params, by_layers, 1.0, 2)
    except Exception:  # a network may do anything: one that layers do not describe goes the plain way
        return False
    rounding = 1e-9 * max(float(x.max()) for x in by_one.values())  # of gradients that vanish
    return all(
        float((by_layers[n] - x).abs().max()) <= tolerance * float(x.max()) + rounding for n, x in by_one.items()
    )
