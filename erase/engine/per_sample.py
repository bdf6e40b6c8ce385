"""Gradients of single samples from one backward pass of their batch.

A layer's weight gradient of sample i is a function of the sample's input to the layer and of the gradient of its
output (Goodfellow, arXiv 1510.01799). One pass gives both for all samples, at a batch's speed and in its precision.
Dense, convolution and normalisation layers have their formula here; any other module that owns weights is
differentiated by itself, sample by sample, by `vmap`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

Take = Callable[[str, Tensor], None]
Grads = dict[str, Tensor]


class PerSample:
    """While it is open, `backward` hands on the gradient of every sample in every weight, weight by weight.

    Samples must not see each other (normalise by running statistics), and what is a sample must come first in every
    tensor that a layer is given, in the batch's order. What a network does outside of its modules' `forward` (weights
    taken from a module, attention kernels fused with their projections) is not seen: compare a few samples with
    plain gradients first.

    Args:
        net: the network.
        params: weights of it whose gradients are wanted, by name.
        take: is given a weight's name and its gradients `[B, …]`, once a backward pass, in the precision of the pass.

    Raises:
        Exception: of any kind, out of a network's forward or backward pass that is not as said.
    """

    def __init__(self, net: nn.Module, params: Mapping[str, nn.Parameter], take: Take) -> None:
        self.take, self.params = take, params
        names = {id(p): name for name, p in params.items()}
        self.owned = {
            module: {key: names[id(p)] for key, p in module.named_parameters(recurse=False) if id(p) in names}
            for module in net.modules()
        }
        self.batch = 0
        self.off = False
        self.calls: Counter[str] = Counter()  # of a weight, whose gradients have not come yet
        self.grads: Grads = {}  # of weights that were used several times

    def __enter__(self) -> PerSample:
        for p in self.params.values():
            p.requires_grad_(False)  # their own gradients would be of the batch
        self.hooks = [
            module.register_forward_hook(partial(self._seen, owned), with_kwargs=True)
            for module, owned in self.owned.items()
            if owned
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        for p in self.params.values():
            p.requires_grad_(True)

    def backward(self, losses: Tensor) -> None:
        """Take the gradients of losses, `[B]`, that were computed once, since it was opened or since the last call."""
        self.batch = len(losses)
        if losses.requires_grad:
            torch.autograd.backward(losses.sum())
        self.calls.clear()
        self.grads.clear()

    def _seen(self, owned: dict[str, str], module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        if self.off or not torch.is_grad_enabled():
            return None
        first, *rest = out if isinstance(out, tuple) else (out,)
        if not first.requires_grad:  # a leaf may not be changed in place: a copy may
            first = first.detach().requires_grad_().clone()
        self.calls.update(owned.values())
        first.register_hook(partial(self._reached, owned, module, args, kwargs))
        return (first, *rest) if isinstance(out, tuple) else first

    def _reached(self, owned: dict[str, str], module: nn.Module, args: Any, kwargs: Any, grad: Tensor) -> None:
        formula = FORMULAS.get(type(module)) if plain(module) else None
        if formula is not None and not kwargs:
            grads = formula(module, args[0], grad, self.batch, owned.keys())
        else:
            self.off = True
            grads = by_vmap(module, args, kwargs, grad, self.batch, owned.keys())
            self.off = False
        for key, name in owned.items():
            new = grads[key]
            self.calls[name] -= 1
            if name in self.grads:
                new = new + self.grads.pop(name)
            if self.calls[name]:
                self.grads[name] = new
            else:
                self.take(name, new)


def plain(module: nn.Module) -> bool:
    """Whether a module is what its class says, and its weights are its own: the formulas below hold."""
    ordinary = not getattr(module, "groups", 1) > 1 and getattr(module, "padding_mode", "zeros") == "zeros"
    return ordinary and not isinstance(getattr(module, "padding", 0), str)


def dense(module: Any, x: Tensor, grad: Tensor, batch: int, keys: Any) -> Grads:
    """Gradients of a `Linear`: `[B, …, in]`, `[B, …, out]` → `[B, out, in]`."""
    g = grad.reshape(batch, -1, grad.shape[-1])
    grads = {}
    if "weight" in keys:
        grads["weight"] = g.mT @ x.reshape(batch, -1, x.shape[-1]).to(g.dtype)
    if "bias" in keys:
        grads["bias"] = g.sum(1)
    return grads


def convolution(module: Any, x: Tensor, grad: Tensor, batch: int, keys: Any) -> Grads:
    """Gradients of a `Conv2d`: `[B, in, H, W]`, `[B, out, h, w]` → `[B, out, in, k, k]`."""
    g = grad.flatten(2)
    grads = {}
    if "weight" in keys:
        out, inside, *kernel = module.weight.shape
        products = g @ patches(module, x.to(g.dtype), grad.shape[2:])
        grads["weight"] = products.view(-1, out, *kernel, inside).permute(0, 1, 4, 2, 3)
    if "bias" in keys:
        grads["bias"] = g.sum(2)
    return {key: per(g, batch) for key, g in grads.items()}


def patches(module: Any, x: Tensor, size: Sequence[int]) -> Tensor:
    """What a convolution multiplies its weights with, `[B, h × w, k × k × in]`.

    Channels come last: `F.unfold` takes eight times as long on a CPU.
    """
    (up, left), (down, right), (steps_down, steps_right) = module.padding, module.stride, module.dilation
    height, width = (side * (n - 1) + 1 for side, n in zip((down, right), size, strict=True))
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, up, up))
    shifted = [
        x[:, i * steps_down :, j * steps_right :][:, :height:down, :width:right]
        for i in range(module.kernel_size[0])
        for j in range(module.kernel_size[1])
    ]
    return torch.cat(shifted, 3).flatten(1, 2)


def channels(module: Any, x: Tensor, grad: Tensor, batch: int, keys: Any) -> Grads:
    """Gradients of a `GroupNorm`, or a `BatchNorm` by its running statistics: `[B, C, …]` → `[B, C]`."""
    high = torch.promote_types(x.dtype, torch.float32)
    x, g = x.to(high), grad.to(high)
    if isinstance(module, nn.GroupNorm):
        x = F.group_norm(x, module.num_groups, eps=module.eps)
    else:
        x = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
    found = {"weight": g * x, "bias": g}
    return {key: per(found[key].reshape(*x.shape[:2], -1).sum(2), batch) for key in keys}


def layer(module: Any, x: Tensor, grad: Tensor, batch: int, keys: Any) -> Grads:
    """Gradients of a `LayerNorm` over the last dimensions: `[B, …, C]` → `[B, C]`."""
    high = torch.promote_types(x.dtype, torch.float32)
    x, g = F.layer_norm(x.to(high), module.normalized_shape, eps=module.eps), grad.to(high)
    found = {"weight": g * x, "bias": g}
    return {key: found[key].reshape(batch, -1, *module.normalized_shape).sum(1) for key in keys}


def parts(x: Tensor, batch: int) -> Tensor:
    """`[B × parts, …]` to `[B, parts, …]`."""
    return x.reshape(batch, -1, *x.shape[1:])


def per(grads: Tensor, batch: int) -> Tensor:
    """Of rows that are parts of samples, `[B × parts, …]`, to `[B, …]`."""
    return grads if len(grads) == batch else parts(grads, batch).sum(1)


def by_vmap(module: nn.Module, args: Any, kwargs: Any, grad: Tensor, batch: int, keys: Any) -> Grads:
    """Gradients of any module in its own weights: `vmap` over samples of its vector-Jacobian product."""
    weights = {key: module.get_parameter(key).detach() for key in keys}
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if not inputs:
        raise ValueError(f"what {type(module).__name__} returns cannot be assigned to samples: it receives no tensor")
    rows = len(inputs[0])
    high = next(iter(weights.values())).dtype

    def of_samples(x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim > 0 and len(x) == rows

    def split(x: Any) -> Any:
        x = x.detach().to(high) if isinstance(x, Tensor) and x.is_floating_point() else x
        return parts(x, batch) if of_samples(x) else x

    def one(given: Any, g: Tensor) -> Grads:
        def call(own: Grads) -> Tensor:
            out = torch.func.functional_call(module, own, *given)
            first: Tensor = out[0] if isinstance(out, tuple) else out
            return first

        grads: Grads = torch.func.vjp(call, weights)[1](g)[0]
        return grads

    given = (args, kwargs)
    where = tree_map(lambda x: 0 if of_samples(x) else None, given)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no batching rule
        found: Grads = torch.func.vmap(one, in_dims=(where, 0))(tree_map(split, given), parts(grad.to(high), batch))
    return found


FORMULAS: dict[type, Callable[..., Grads]] = {
    nn.Linear: dense,
    nn.Conv2d: convolution,
    nn.GroupNorm: channels,
    nn.BatchNorm1d: channels,
    nn.BatchNorm2d: channels,
    nn.LayerNorm: layer,
}
