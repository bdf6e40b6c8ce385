from dataclasses import dataclass
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from erase.classification.backend import RELABEL, Classifier
from erase.engine.backend import seeded
from erase.engine.batches import Batches, Together
from erase.engine.loop import unlearn
from erase.engine.losses import DESCENT, Objective, plain
from erase.engine.updates import Epoch, InTurn, Joint
from erase.methods.finetune import finetune
from erase.methods.random_label import random_label
from erase.methods.salun import salun


@pytest.mark.parametrize("clip", [None, 0.3])
def test_a_step_is_one_joint_step_on_both_losses(clip: float | None) -> None:
    """θ ← θ - η (∇ remain + β ∇ forget), by hand; the norm is that of the sum, and so is the clip."""
    net, other = toys.mlp(), toys.mlp()
    forget, remain = toys.batches(1), toys.batches(2)
    rows: list[Any] = []
    method = random_label(fast_rate=0.7, slow_schedule="cosine", clip_remain=clip)
    unlearn(
        toys.Plain(net),
        method,
        forget,
        remain,
        steps=4,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        seed=0,
        log=rows.append,
    )
    params = dict(other.named_parameters())
    norms = []
    for t in range(4):
        grads = [
            torch.autograd.grad(toys.Plain(other).losses(batch[t % 3], toys.gen()).mean(), list(params.values()))
            for batch in (forget, remain)
        ]
        joint = [0.7 * f + r for f, r in zip(*grads, strict=True)]
        norm = torch.cat([g.flatten() for g in joint]).norm()
        norms.append(float(norm))
        scale = 1.0 if clip is None else min(1.0, float(clip / (norm + 1e-6)))
        rate = 0.1 * (1 + torch.cos(torch.tensor(torch.pi * t / 4, dtype=torch.float64))) / 2
        with torch.no_grad():
            for p, g in zip(params.values(), joint, strict=True):
                p.sub_(rate * scale * g)
    toys.close(toys.weights(net), toys.weights(other))
    assert [row["remain_norm"] for row in rows] == pytest.approx(norms)
    assert clip is None or min(norms) > clip
    assert [row["fast_rate"] for row in rows] == [0.7] * 4  # the weight of the forget loss does not fade
    assert all(row["forget_loss"] > 0 and row["remain_loss"] > 0 for row in rows)


class Pixels(nn.Module):
    """A classifier of 2 × 2 pixels into three classes, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.body = toys.randomize(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.double().flatten(1))


@dataclass(frozen=True)
class Images:
    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def gather(self, index: Tensor) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


def images(count: int, seed: int) -> Images:
    g = toys.gen(seed)
    return Images(
        torch.randint(256, (count, 1, 2, 2), generator=g, dtype=torch.uint8), torch.randint(3, (count,), generator=g)
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("relabel", ["other", "any"])
def test_in_turn_is_the_published_loop_of_classifiers(relabel: Any, masked: bool) -> None:
    """Each epoch all forget batches with labels by lot, then all remain batches; SalUn masks every gradient."""
    net, other, lr = Pixels(), Pixels(), 0.3
    forget, remain, mask = images(10, 1), images(7, 2), toys.some_mask(net)  # batches of 4, 4, 2 and of 4, 3
    sides = [Batches(data, 4, seed, whole=True) for seed, data in enumerate((forget, remain))]
    settings = {"order": "turn", "epoch": Epoch(*(side.per_epoch for side in sides)), "forget": RELABEL}
    method = salun(mask=mask, **settings) if masked else random_label(**settings)  # type: ignore[arg-type]
    backend = Classifier(net, 3, relabel=relabel)
    rows: list[Any] = []

    def momentum(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=lr, momentum=0.9)

    unlearn(backend, method, *sides, steps=13, optimizer=momentum, seed=5, log=rows.append)
    optimizer, t, drawn = momentum(other.parameters()), 0, []
    for epoch in range(3):
        for number, data in enumerate((forget, remain)):
            order = torch.randperm(len(data), generator=seeded("cpu", number, epoch))
            for start in range(0, len(data), 4):
                if t == 13:
                    break
                index = order[start : start + 4]
                target = data.y[index]
                lot = torch.randint(int(relabel == "other"), 3, target.shape, generator=seeded("cpu", 5, t, number, 0))
                if number == 0:
                    target = (target + lot) % 3
                    drawn += (target == data.y[index]).tolist()
                x = (data.x[index].float() / 255 - 0.5) / 0.5
                optimizer.zero_grad()
                nn.functional.cross_entropy(other(x), target).backward()
                for name, p in other.named_parameters():
                    p.grad = p.grad * mask[name] if masked else p.grad  # type: ignore[operator]
                optimizer.step()
                t += 1
    assert any(drawn) == (relabel == "any")
    toys.close(toys.weights(net), toys.weights(other), rtol=1e-9)
    assert [("forget_loss" in row, "remain_loss" in row) for row in rows[:6]] == [(True, False)] * 3 + [
        (False, True)
    ] * 2 + [(True, False)]
    assert method.update.phases(13) == {"forget": 9, "remain": 4}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("relabel", ["other", "any"])
def test_mixed_is_the_published_loop_of_classifiers_of_many_classes(relabel: Any, masked: bool) -> None:
    """Each epoch both sides in one shuffled pass, one mean a batch, forget data with labels by lot; decay is masked."""
    net, other, settings = Pixels(), Pixels(), {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1}
    forget, remain, mask = images(4, 1), images(7, 2), toys.some_mask(net)  # batches of 4, 4, 3
    method = salun(mask=mask, order="mixed") if masked else random_label(order="mixed")
    data = Batches(Together(forget, remain), 4, 1, whole=True)
    optimizer = lambda p: torch.optim.SGD(p, **settings)  # noqa: E731
    rows: list[Any] = []
    backend = Classifier(net, 3, relabel=relabel)
    unlearn(backend, method, None, data, steps=8, optimizer=optimizer, seed=5, log=rows.append)
    x, y = (torch.cat([getattr(side, name) for side in (forget, remain)]) for name in "xy")
    theirs, t, drawn = optimizer(other.parameters()), 0, []
    start = toys.weights(other)
    for epoch in range(3):
        order = torch.randperm(11, generator=seeded("cpu", 1, epoch))
        for index in order.split(4)[: 8 - t]:
            target = y[index]
            lot = torch.randint(int(relabel == "other"), 3, target.shape, generator=seeded("cpu", 5, t, 1, 0))
            target = torch.where(index < 4, (target + lot) % 3, target)
            drawn += (target == y[index])[index < 4].tolist()
            theirs.zero_grad()
            nn.functional.cross_entropy(other((x[index].float() / 255 - 0.5) / 0.5), target).backward()
            for name, p in other.named_parameters():
                p.grad = p.grad * mask[name] if masked else p.grad  # type: ignore[operator]
            theirs.step()
            with torch.no_grad():
                for name, p in other.named_parameters() if masked else ():
                    p.copy_(torch.where(mask[name], p, start[name]))
                    theirs.state[p]["momentum_buffer"].mul_(mask[name])
            t += 1
    assert t == 8
    assert any(drawn) == (relabel == "any")
    toys.close(toys.weights(net), toys.weights(other), rtol=1e-9)
    assert method.update.phases(8) == {"forget": 0, "remain": 8}
    assert all("forget_loss" not in row for row in rows)


def test_weight_0_is_training_on_the_remain_data() -> None:
    ends = []
    for method in (random_label(fast_rate=0), finetune(), random_label()):
        net = toys.mlp()
        unlearn(
            toys.Plain(net),
            method,
            toys.batches(1),
            toys.batches(2),
            steps=3,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            seed=0,
        )
        ends.append(toys.weights(net))
    assert toys.same(ends[0], ends[1])
    assert not toys.same(ends[0], ends[2])


def test_fits_other_labels_and_keeps_the_rest() -> None:
    """Forget data come with exchanged targets: they are learnt, and the remain data stay learnt."""
    backend = toys.Plain(toys.mlp())
    forget, remain = toys.batches(1, count=1), toys.batches(2, count=1)
    before = [backend.losses(batch, toys.gen()).mean().item() for (batch,) in (forget, remain)]
    unlearn(
        backend,
        random_label(),
        forget,
        remain,
        steps=200,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
        seed=0,
    )
    after = [backend.losses(batch, toys.gen()).mean().item() for (batch,) in (forget, remain)]
    assert after[0] < 0.2 * before[0]
    assert after[1] < 0.2 * before[1]


def test_settings() -> None:
    method = random_label()
    assert (method.forget, method.remain, method.mask, method.weights) == (DESCENT, DESCENT, None, None)
    assert method.update == Joint(1.0, schedule="constant", mask_all=False)
    mine = Objective(plain, 1, "mine")
    assert random_label(forget=mine, remain=mine).forget is mine
    with pytest.raises(ValueError, match="fast_rate"):
        random_label(fast_rate=float("nan"))
    assert random_label(order="turn").update == InTurn(1.0, Epoch(1, 1))
    with pytest.raises(ValueError, match="unknown order 'alternate'; allowed: joint, turn, mixed"):
        random_label(order="alternate")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fast_rate must be 1; got 0\.5"):
        random_label(order="mixed", fast_rate=0.5)
    with pytest.raises(ValueError, match="an epoch needs a batch of each side"):
        random_label(order="turn", epoch=Epoch(0, 2))
