"""Gradients by layers are those of single samples, whatever the layer; what layers do not tell goes one by one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn

from erase.engine.fisher import fisher_diagonal
from erase.engine.per_sample import PerSample


class Twice(nn.Module):
    """One layer used twice, and its weights by a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))


class Windows(nn.Module):
    """Every sample becomes two rows, with a table that all share, and comes together again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dense, self.conv = nn.LayerNorm(4), nn.Linear(4, 4), nn.Conv2d(1, 2, 3, padding=1)
        self.table = nn.Parameter(torch.ones(2, 4))
        self.shift = Shift()

    def forward(self, x: Tensor) -> Tensor:
        x = (x[:, None] * self.table).flatten(0, 1)
        x, _ = self.shift(x=self.dense(self.norm(x)), by=torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=x.dtype))
        return self.conv(x.view(-1, 1, 2, 2)).reshape(len(x) // 2, -1)


class Shift(nn.Module):
    """Takes its tensors by name and gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(4))

    def forward(self, *, x: Tensor, by: Tensor) -> tuple[Tensor, None]:
        return (x * self.by + by * self.by.square(), None)


class First(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x=x, by=x)[0]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.words((x > 0).long()).flatten(1)


class Apart(nn.Module):
    """Takes a layer's weights without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(F.linear(x, self.dense.weight) + self.dense(x)))


class Mixed(nn.Module):
    """Samples see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x - x.mean(0))


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (4, 6, 5)), *layers, nn.Flatten())


SEEN = {
    "dense": nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3, bias=False)),
    "sequences": nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 3), nn.LayerNorm((2, 3)), nn.Tanh()),
    "convolutions": images(
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        nn.GroupNorm(3, 6),
        nn.SiLU(inplace=True),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 2, 1, bias=False),
    ),
    "groups": images(
        nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 2, padding="same", padding_mode="circular")
    ),
    "words": Words(),
    "used twice": Twice(),
    "windows": Windows(),
    "tuples and names": First(Shift()),
}


def wide(kind: str) -> bool:
    return kind in ("convolutions", "groups")


def data(net: nn.Module, width: int) -> Any:
    x = torch.randn(5, width, generator=toys.gen(), dtype=torch.float64)
    with torch.no_grad():
        y = net.eval()(x)
    return {"x": x, "y": torch.randn(y.shape, generator=toys.gen(1), dtype=y.dtype)}


@pytest.mark.parametrize("kind", SEEN)
def test_gradients_of_a_batch_are_those_of_its_samples(kind: str) -> None:
    net = toys.randomize(SEEN[kind]).double()
    params = dict(net.named_parameters())
    batch = data(net, 120 if wide(kind) else 4)
    backend = toys.Plain(net)
    losses = backend.losses(batch, toys.gen())
    rows = [torch.autograd.grad(loss, list(params.values()), retain_graph=True) for loss in losses]
    expected = {name: torch.stack(g) for name, *g in zip(params, *rows, strict=True)}
    found: dict[str, Tensor] = {}
    with PerSample(net, params, found.__setitem__) as layers:
        for _ in range(2):  # nothing is left of the last pass
            layers.backward(backend.losses(batch, toys.gen()))
    toys.close(found, expected)
    assert found.keys() == params.keys()
    assert all(p.requires_grad and p.grad is None for p in params.values())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_in_the_precision_of_the_pass(half: torch.dtype) -> None:
    net = toys.randomize(SEEN["convolutions"]).float()
    batch = {name: x.float() for name, x in data(net.double(), 120).items()}
    params = dict(net.float().named_parameters())
    found: dict[str, Tensor] = {}
    with PerSample(net, params, found.__setitem__) as layers:
        with torch.autocast("cpu", half):
            losses = toys.Plain(net).losses(batch, toys.gen())
        layers.backward(losses)
    whole = torch.autograd.grad(toys.Plain(net).losses(batch, toys.gen()).sum(), list(params.values()))
    for name, exact in zip(params, whole, strict=True):
        assert found[name].dtype == (half if name[0] in "15" else torch.float32)  # convolutions
        torch.testing.assert_close(found[name].float().sum(0), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


def test_only_wanted_weights_and_only_passes_that_learn() -> None:
    net = toys.mlp()
    net[0].weight.requires_grad_(False)
    batch = data(net, 4)
    found: dict[str, Tensor] = {}
    params = {name: p for name, p in net.named_parameters() if name in ("0.bias", "2.weight")}
    with PerSample(net, params, found.__setitem__) as layers:
        with torch.no_grad():
            net(batch["x"])
        layers.backward(toys.Plain(net).losses(batch, toys.gen()))
        layers.backward(torch.zeros(5))  # a loss without the network
    assert found.keys() == params.keys()
    assert not net[0].weight.requires_grad


@pytest.mark.parametrize("net", [*SEEN.values(), Apart(), Mixed()], ids=lambda net: type(net).__name__)
def test_a_fisher_diagonal_is_right_whether_layers_tell_or_not(net: nn.Module, monkeypatch: Any) -> None:
    passes: list[int] = []
    was = PerSample.backward
    monkeypatch.setattr(PerSample, "backward", lambda self, x: (passes.append(len(x)), was(self, x))[1])
    net = toys.randomize(net).double()
    batch = data(net, 120 if any(net is SEEN[kind] for kind in SEEN if wide(kind)) else 4)
    if not isinstance(net, Words):
        batch = toys.Noisy(net).draw(batch, toys.gen())
    fast, slow = (fisher_diagonal(toys.Noisy(net), [batch], generator=toys.gen(), chunk=n) for n in (3, 1))
    toys.close(fast.named, slow.named, rtol=2e-6, atol=1e-9)
    seen = not isinstance(net, Apart | Mixed)
    assert passes == ([2, 3, 2] if seen else [2])  # two samples first; then all in threes
