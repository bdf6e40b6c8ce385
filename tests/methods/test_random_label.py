from typing import Any

import pytest
import torch
import toys

from erase.engine.loop import unlearn
from erase.engine.losses import DESCENT, Objective, plain
from erase.engine.updates import Joint
from erase.methods.finetune import finetune
from erase.methods.random_label import random_label


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
