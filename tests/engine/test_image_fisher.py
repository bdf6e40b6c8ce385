from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from erase.diffusion.denoiser import Denoiser
from erase.diffusion.process import Discrete, Flow
from erase.engine.fisher import fisher_diagonal
from erase.engine.image_fisher import image_diagonal

T, SHAPE = 10, (2, 3, 3)


class Net(nn.Module):
    """Noise from an image, a timestep and a label, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(18, 8)
        self.label = nn.Embedding(3, 8)
        self.outer = nn.Linear(8, 18)
        self.unused = nn.Linear(2, 2)
        toys.randomize(self)
        self.double()

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x.double().flatten(1)) + self.label(label) + t[:, None] / T)
        return self.outer(hidden).view(x.shape)


def denoiser(net: nn.Module, **changes: Any) -> Denoiser:
    process = Discrete(torch.linspace(0.99, 0.05, T, dtype=torch.float64))
    settings = {"process": process, "reduction": "sum", **changes}
    return Denoiser(net, lambda n, x, t, cond: n(x, t, cond["label"]), **settings)


def images(seed: int, count: int) -> Any:
    g = toys.gen(seed)
    mean = torch.randn(count, *SHAPE, generator=g, dtype=torch.float64)
    return {"mean": mean, "cond": {"label": torch.randint(3, (count,), generator=g)}}


@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_it_is_the_published_sum_over_timesteps_squared(chunk: int) -> None:
    """Each image alone: gradients of sums over pixels, of every timestep once, added up, squared; a mean of images."""
    net, batches, draws = Net(), [images(1, 3), images(2, 2)], 2
    found = image_diagonal(denoiser(net), batches, draws=draws, generator=toys.gen(3), chunk=chunk)
    alphas, g = torch.linspace(0.99, 0.05, T, dtype=torch.float64), toys.gen(3)
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for batch in batches:
        for i, x in enumerate(batch["mean"]):
            for _ in range(draws):
                noise = []
                for times in torch.arange(T).split(chunk):  # the order in which ours is drawn
                    torch.randperm(len(times), generator=g)
                    torch.rand(len(times), generator=g)
                    noise.append(torch.randn(len(times), *SHAPE, generator=g).double())
                    torch.rand(len(times), generator=g)
                net.zero_grad()
                for t, e in enumerate(torch.cat(noise)):
                    z = alphas[t].sqrt() * x + (1 - alphas[t]).sqrt() * e
                    out = net(z[None], torch.tensor([t]), batch["cond"]["label"][i : i + 1])[0]
                    (out - e).square().sum().backward()  # gradients of all timesteps add up
                for name, p in net.named_parameters():
                    expected[name] += 0 if p.grad is None else p.grad**2 / (5 * draws)
    assert (found.per, found.count) == ("image", 10)
    for name, value in expected.items():  # the diagonal is kept in float32
        torch.testing.assert_close(found.named[name], value.float(), rtol=2e-7, atol=0)
        assert bool((value != 0).any()) == ("unused" not in name)


def test_sums_before_they_are_rounded_agree_to_1e_9() -> None:
    """The sums in float64, against the square of one large backward pass."""
    net, sums = Net(), list[Tensor]()
    backend, batch = denoiser(net), images(1, 1)

    def total(x: Tensor) -> Tensor:
        sums.append(x.clone())
        return x

    image_diagonal(backend, [batch], generator=toys.gen(3), total=total)
    drawn = backend.draw_at(repeated(batch), torch.arange(T), toys.gen(3))
    net.zero_grad()
    backend.losses(drawn, toys.gen()).sum().backward()
    for p, ours in zip(net.parameters(), sums, strict=True):
        expected = torch.zeros_like(p) if p.grad is None else p.grad**2
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)


def repeated(batch: Any) -> Any:
    return {"mean": batch["mean"].expand(T, *SHAPE), "cond": {"label": batch["cond"]["label"].expand(T)}}


def test_processes_share_the_images() -> None:
    net, batches = Net(), [images(1, 3)]
    whole = image_diagonal(denoiser(net), batches, generator=toys.gen(3))
    parts: list[dict[str, Tensor]] = []
    for rank in range(2):
        found = image_diagonal(denoiser(net), batches, generator=toys.gen(3), share=(rank, 2))
        parts.append(found.named)
    for name, value in whole.named.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value)


def test_it_is_not_a_fisher_diagonal() -> None:
    """Sums over timesteps cancel or add up before they are squared."""
    net, batches = Net(), [images(1, 3)]
    ours = image_diagonal(denoiser(net), batches, generator=toys.gen(3)).named["outer.weight"]
    fisher = fisher_diagonal(denoiser(net), batches, generator=toys.gen(3), draws=T).named["outer.weight"]
    assert float(ours.sum() / fisher.sum()) > 2


@pytest.mark.parametrize(
    ("backend", "changes", "named"),
    [
        (toys.Plain(toys.mlp()), {}, "per=image"),
        (denoiser(Net(), process=Flow()), {}, "Flow"),
        (denoiser(Net()), {"draws": 0}, "draws"),
        (denoiser(Net()), {"batches": []}, "no batches"),
    ],
    ids=["plain", "flow", "draws", "none"],
)
def test_what_it_cannot_do(backend: Any, changes: dict[str, Any], named: str) -> None:
    settings = {"batches": [images(1, 1)], "generator": toys.gen(), **changes}
    with pytest.raises(ValueError, match=named):
        image_diagonal(backend, **settings)
