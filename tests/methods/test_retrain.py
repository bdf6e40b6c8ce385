import torch
import toys

from erase.engine.loop import unlearn
from erase.engine.losses import Objective, plain
from erase.methods.retrain import METHOD, retrain


def test_is_plain_training_and_its_running_mean() -> None:
    """Against the loop that anyone would write; the rate fades linearly over the steps."""
    net, other, data = toys.mlp(), toys.mlp(), toys.batches(2)
    method = retrain(average=0.2, slow_schedule="linear")
    result = unlearn(
        toys.Plain(net), method, None, data, steps=3, optimizer=lambda p: torch.optim.Adam(p, lr=0.1), seed=0
    )
    optimizer, mean = torch.optim.Adam(other.parameters(), lr=0.1), toys.weights(other)
    for t, batch in enumerate(data):
        optimizer.param_groups[0]["lr"] = 0.1 * (3 - t) / 3
        optimizer.zero_grad()
        toys.Plain(other).losses(batch, toys.gen()).mean().backward()
        optimizer.step()
        d = min(0.2, (1 + t) / (10 + t))
        mean = {name: d * mean[name] + (1 - d) * p for name, p in toys.weights(other).items()}
    toys.close(toys.weights(net), mean)
    assert (result.steps, result.skipped_slow) == (3, 0)


def test_starts_afresh_and_forgets_nothing() -> None:
    method = retrain()
    assert METHOD.fresh
    assert (method.forget, method.mask, method.average) == (None, None, 0.999)
    mine = Objective(plain, 1, "mine")
    assert retrain(average=0, remain=mine).remain is mine
