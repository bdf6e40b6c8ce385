import itertools
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import two_processes
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from erase.engine.loop import Checkpoint, NonFiniteError, Probe, StoppedError, unlearn
from erase.engine.losses import ASCENT, DESCENT, Objective, plain
from erase.engine.method import Method, Weights
from erase.engine.saliency import Mask
from erase.engine.state import load_state, save_state
from erase.engine.updates import ClosedForm, Descent, Epoch, FastSlow, Joint, Shared, Solved, Update
from erase.methods.salun import salun
from erase.methods.sfron import sfron
from erase.store.safetensors import read_safetensors

RULES = ("sgd", "normalized", "adam")
UPDATES: dict[str, Update] = {
    "fast and slow": FastSlow(0.01),
    "shared": Shared(0.01, schedule="linear"),
    "joint": Joint(0.01, schedule="linear"),
}


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01, weight_decay=0.1)


def go(backend: Any, method: Method, **changes: Any) -> Any:
    settings = {"forget": toys.batches(1), "remain": toys.batches(2), "steps": 4, "optimizer": adam, "seed": 0}
    return unlearn(backend, method, **{**settings, **changes})


# ------------------------------------------------------------ what R-on computes


class Point(nn.Module):
    def __init__(self, at: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(at.clone())


@pytest.mark.parametrize("eta", [0.05, 0.2])
@pytest.mark.parametrize("slow_steps", [0, 1, 2, 5])
def test_displacement_on_a_quadratic(slow_steps: int, eta: float) -> None:
    """θ - θ_r = β (I - ηH)^K g, with H of the remain loss and g of the forget loss."""
    g = toys.gen()
    root = torch.randn(5, 5, generator=g, dtype=torch.float64)
    H, slope, start = root @ root.T, *torch.randn(2, 5, generator=g, dtype=torch.float64)

    def forget(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:
        return (backend.net.theta @ slope).expand(len(batch["x"]))

    def remain(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:
        theta = backend.net.theta
        return (0.5 * theta @ H @ theta).expand(len(batch["x"]))

    ends = []
    for beta in (0.3, 0.0):
        net = Point(start)
        update = FastSlow(beta, "sgd", slow_steps)
        method = Method("test", Objective(forget, -1), Objective(remain, 1), update)
        go(toys.Plain(net), method, steps=1, optimizer=lambda p: torch.optim.SGD(p, lr=eta))
        ends.append(net.theta.detach())
    contraction = torch.linalg.matrix_power(torch.eye(5, dtype=torch.float64) - eta * H, slow_steps)
    torch.testing.assert_close(ends[0] - ends[1], 0.3 * contraction @ slope, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------ S: masked weights


@pytest.mark.parametrize("make", [toys.mlp, toys.conv])
@pytest.mark.parametrize("rule", RULES)
def test_fast_step_leaves_masked_weights_bit_identical(rule: Any, make: Any) -> None:
    """With a slow optimizer whose moments and weight decay are at work between the fast steps."""
    net = make()
    mask = toys.some_mask(net)
    before: list[toys.Weights] = []

    def forget(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:
        before.append(toys.weights(net))
        return plain(backend, batch, generator)

    def remain(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:  # the first thing after the fast step
        for name, p in net.named_parameters():
            keep = mask[name]
            assert torch.equal(p[~keep], before[-1][name][~keep])
            assert bool((p[keep] != before[-1][name][keep]).all())
        return plain(backend, batch, generator)

    shape = () if make is toys.mlp else (2, 2)
    method = sfron(mask=mask, fast_rate=0.01, fast_rule=rule, forget=Objective(forget, -1), remain=Objective(remain, 1))
    go(toys.Noisy(net), method, forget=toys.batches(1, shape=shape), remain=toys.batches(2, shape=shape))
    assert len(before) == 4
    moved = before[3]["0.weight"] != before[0]["0.weight"]  # the mask binds the fast step alone
    assert bool(moved.all())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fast_steps_on_a_unet_leave_masked_weights_bit_identical(rule: Any, layout: Any) -> None:
    net = toys.unet().to(memory_format=layout)
    mask, before = toys.some_mask(net), toys.weights(net)
    data = [toys.latents(seed) for seed in (1, 2)]
    go(
        toys.denoiser(net),
        sfron(mask=mask, fast_rate=10.0 if rule == "sgd" else 1e-3, fast_rule=rule, slow_steps=0),
        forget=data,
        remain=data,
        steps=3,
    )
    moved = 0
    for name, p in net.named_parameters():
        assert torch.equal(p[~mask[name]], before[name][~mask[name]])
        moved += int((p != before[name]).sum())
    assert moved > 0.95 * mask.density * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("published", [False, True])
def test_masks_of_other_parameters_are_refused_before_the_first_step(published: bool) -> None:
    net = toys.mlp()
    before = toys.weights(net)
    short = Mask({"0.weight": toys.some_mask(net)["0.weight"]})
    with pytest.raises(KeyError, match="no entry for"):
        go(toys.Plain(net), sfron(mask=short, fast_rate=0.1, published=published))
    flipped = Mask({name: m.t() if m.ndim == 2 else m for name, m in toys.some_mask(net).named.items()})
    with pytest.raises(ValueError, match=r"the mask of '0\.weight' has shape \[4, 8\], the weight \[8, 4\]"):
        go(toys.Plain(net), sfron(mask=flipped, fast_rate=0.1, published=published))
    assert toys.same(toys.weights(net), before)


# ------------------------------------------------------------ the outer step, schedules, every


def test_outer_rate() -> None:
    start = toys.weights(toys.mlp())
    ends = {}
    for rate in (0.0, 0.5, 1.0):
        net = toys.mlp()
        go(toys.Noisy(net), sfron(fast_rate=0.1, fast_rule="sgd", outer_rate=rate), steps=1, optimizer=sgd)
        ends[rate] = toys.weights(net)
    assert toys.same(ends[0.0], start)
    toys.close(ends[0.5], {name: (start[name] + ends[1.0][name]) / 2 for name in start})
    assert not toys.same(ends[1.0], start)


def test_outer_rate_over_several_steps_is_the_plain_loop() -> None:
    net = toys.mlp()
    method = sfron(fast_rate=0.1, fast_rule="sgd", outer_rate=0.3, schedule="constant", lambd=0)
    forget, remain = toys.batches(1), toys.batches(2)
    go(toys.Plain(net), method, forget=forget, remain=remain, steps=3, optimizer=sgd)
    other = toys.mlp()
    backend, params = toys.Plain(other), list(other.parameters())
    for f, r in zip(forget, remain, strict=True):
        phi = [p.detach().clone() for p in params]
        for batch, rate in ((f, 0.1), (r, -0.1)):
            grads = torch.autograd.grad(backend.losses(batch, toys.gen()).mean(), params)
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    p.add_(g, alpha=rate)
        with torch.no_grad():
            for p, q in zip(params, phi, strict=True):
                p.copy_(q + 0.3 * (p - q))
    toys.close(toys.weights(net), toys.weights(other))


@pytest.mark.parametrize("average", [0.2, 0.9])
def test_a_run_ends_with_the_running_mean_of_its_weights(average: float) -> None:
    """Decay min(average, (1 + t) / (10 + t)): 0.2 caps it from the third of four steps on, 0.9 never."""
    net, raw = toys.mlp(), list[toys.Weights]()
    mean, method = toys.weights(net), sfron(fast_rate=0.1, outer_rate=0.5)
    go(toys.Noisy(net), replace(method, average=average), log=lambda row: raw.append(toys.weights(net)))
    for decay, now in zip((1 / 10, 2 / 11, 3 / 12, 4 / 13), raw, strict=True):
        d = min(average, decay)
        mean = {name: d * mean[name] + (1 - d) * now[name] for name in mean}
    toys.close(toys.weights(net), mean)
    last = toys.mlp()
    go(toys.Noisy(last), method)  # without, the run ends with its last weights, which the mean did not touch
    assert toys.same(toys.weights(last), raw[-1])


@pytest.mark.parametrize("average", [1.0, -0.1, float("nan")])
def test_an_average_is_a_decay(average: float) -> None:
    with pytest.raises(ValueError, match=rf"average must be in \[0, 1\); got {average}"):
        replace(sfron(fast_rate=0.1), average=average)


def test_a_look_that_is_enough_ends_the_run() -> None:
    """With the weights, and on the schedule, of that step of a whole run; looks are asked after each step, once."""
    whole: list[toys.Weights] = []
    net, method = toys.mlp(), sfron(fast_rate=0.1, outer_rate=0.5)
    go(toys.Noisy(net), method, log=lambda row: whole.append(toys.weights(net)))
    asked, rows = list[int](), list[Any]()

    def until(done: int) -> Probe | None:
        asked.append(done)
        return Probe({"seen": done / 2}, enough=done == 3) if done > 1 else None

    other = toys.mlp()
    result = go(toys.Noisy(other), method, until=until, log=rows.append)
    assert (result.steps, asked) == (3, [1, 2, 3])
    assert toys.same(toys.weights(other), whole[2])
    assert [row.get("seen") for row in rows] == [None, 1.0, 1.5]
    assert ["look_seconds" in row for row in rows] == [False, True, True]


def test_a_run_killed_after_a_look_that_was_enough_ends_there_again(tmp_path: Path) -> None:
    ends = []
    for resume in (False, True):
        net = toys.mlp()
        checkpoint = Checkpoint(tmp_path / "state", 1, resume)
        done = go(toys.Noisy(net), sfron(fast_rate=0.1), checkpoint=checkpoint, until=lambda n: Probe({}, n == 3)).steps
        ends.append((done, toys.weights(net)))
    assert ends[0][0] == ends[1][0] == 3
    assert toys.same(ends[0][1], ends[1][1])


def test_rows_every_and_schedules() -> None:
    rows: list[Any] = []
    rates: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    method = sfron(fast_rate=0.2, every=3, slow_steps=2, schedule="linear", slow_schedule="linear")
    result = go(toys.Noisy(toys.mlp()), method, steps=4, optimizer=lambda p: Watched(p, lr=0.1), log=rows.append)
    assert result.steps == 4
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row.get("fast_rate") for row in rows] == pytest.approx([0.2, None, None, 0.05])
    assert ["forget_loss" in row for row in rows] == [True, False, False, True]
    assert rates == pytest.approx([0.1, 0.1, 0.075, 0.075, 0.05, 0.05, 0.025, 0.025])
    for row in rows:
        assert {"remain_loss", "remain_norm", "seconds", "skipped_fast", "skipped_slow"} <= row.keys()
        assert all(isinstance(v, int | float) for v in row.values())


@pytest.mark.parametrize("update", [FastSlow(0.01, every=2), Shared(0.01, every=2), Descent()])
def test_methods_with_one_side_only(update: Update) -> None:
    """Gradient ascent and fine-tuning, the two halves of the baselines."""
    forget, remain = (None, DESCENT) if isinstance(update, Descent) else (ASCENT, None)
    net = toys.mlp()
    batches = toys.batches(1, count=1)
    before = toys.Plain(net).losses(batches[0], toys.gen()).mean()
    sides: Any = {"forget": batches if forget else None, "remain": batches if remain else None}
    go(toys.Plain(net), Method("half", forget, remain, update), **sides, optimizer=sgd)
    after = toys.Plain(net).losses(batches[0], toys.gen()).mean()
    assert (after > before) == (forget is not None)


def test_a_users_own_module_is_unlearned() -> None:
    """Ten lines of backend: two clusters of labels, one of them forgotten, the other kept."""

    class Mine:
        def __init__(self) -> None:
            self.net = toys.mlp(torch.float32)

        def losses(self, batch: Any, generator: torch.Generator) -> Tensor:
            x, labels = batch
            return nn.functional.cross_entropy(self.net(x), labels, reduction="none")

    mine = Mine()
    g = toys.gen()
    centres = 2 * torch.randn(3, 4, generator=g)
    sides = [
        [(centres[c] + 0.3 * torch.randn(16, 4, generator=g), torch.full((16,), c)) for c in cs] for cs in ([0], [1, 2])
    ]
    fit = lambda p: torch.optim.Adam(p, lr=0.02)  # noqa: E731
    go(mine, Method("fit", None, DESCENT, Descent()), remain=sides[0] + sides[1], steps=300, optimizer=fit)

    def mean(side: Any) -> float:
        return sum(mine.losses(batch, g).mean().item() for batch in side) / len(side)

    forget, remain = map(mean, sides)
    assert max(forget, remain) < 0.1
    result = go(mine, sfron(fast_rate=0.02, slow_steps=2), forget=sides[0], remain=sides[1], steps=60, optimizer=fit)
    assert mean(sides[0]) > 2  # far worse than guessing, ln 3
    assert mean(sides[1]) < remain + 0.05
    assert (result.skipped_fast, result.skipped_slow) == (0, 0)


# ------------------------------------------------------------ parts of a batch


@pytest.mark.parametrize("kind", [toys.Noisy, toys.Plain])
@pytest.mark.parametrize("rule", UPDATES)
@pytest.mark.parametrize("micro_batch", [1, 3, 9])
def test_micro_batches_are_the_whole_batch(kind: Any, rule: Any, micro_batch: int) -> None:
    """Weights over the whole batch too; in float64 to the order of additions."""
    ends, seen = [], []
    for micro in (None, micro_batch):
        rows: list[Any] = []
        net = toys.mlp()
        clips = {"clip": 0.3} if rule == "joint" else {"clip_forget": 0.3, "clip_remain": 0.3}
        update = replace(UPDATES[rule], **clips)  # type: ignore[arg-type]
        go(kind(net), Method("test", ASCENT, DESCENT, update, Weights(0.5)), micro_batch=micro, log=rows.append)
        ends.append(toys.weights(net))
        seen.append([[v for k, v in row.items() if k != "seconds"] for row in rows])
    toys.close(ends[0], ends[1], rtol=1e-9)
    for a, b in zip(*seen, strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def test_a_micro_batch_is_the_most_that_is_taken_at_once() -> None:
    class Watched(toys.Noisy):
        def losses(self, batch: Any, generator: torch.Generator) -> Tensor:
            sizes.append((len(batch["x"]), torch.is_grad_enabled()))
            return super().losses(batch, generator)

    sizes: list[Any] = []
    go(Watched(toys.mlp()), sfron(fast_rate=0.1), steps=1, micro_batch=3)
    forget = [(3, False), (1, False), (3, True), (1, True)]
    assert sizes == [*forget, (3, True), (1, True)]
    sizes.clear()
    go(Watched(toys.mlp()), sfron(fast_rate=0.1, lambd=0.0), steps=1, micro_batch=3)
    assert sizes == [(3, True), (1, True)] * 2  # all weights are 1: no pass finds them out
    sizes.clear()
    go(Watched(toys.mlp()), sfron(fast_rate=0.1), steps=1)
    assert sizes == [(4, True), (4, True)]
    with pytest.raises(ValueError, match="micro_batch must be at least 1; got 0"):
        go(toys.Noisy(toys.mlp()), sfron(fast_rate=0.1), micro_batch=0)


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("sense", [-1, 1])
def test_negative_losses_are_not_weighted(sense: Any, micro_batch: int | None) -> None:
    """Of all parts of the batch; what the floor hides may be rounding, and remain losses have no weights."""

    def lowered(by: float) -> Any:
        def loss(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:
            losses = plain(backend, batch, generator)
            return losses.where(losses > losses.min(), -by)

        return loss

    def run(by: float, lambd: float) -> None:
        objectives = Objective(lowered(by), sense), Objective(lowered(2.0), 1)
        method = Method("test", *objectives, UPDATES["fast and slow"], Weights(lambd))
        go(toys.Noisy(toys.mlp()), method, steps=1, micro_batch=micro_batch)

    with pytest.raises(ValueError, match=r"method\.lambd=0\.5.*got -2.*method\.lambd=0"):
        run(2.0, 0.5)
    run(2.0, 0.0)
    run(1e-7, 0.5)


# ------------------------------------------------------------ losses that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("lambd", [0.0, 0.5])
@pytest.mark.parametrize("rule", UPDATES)
@pytest.mark.parametrize("bad", ["forget", "remain"])
def test_exactly_the_phase_that_is_not_finite_is_skipped(bad: str, rule: Any, lambd: float, value: float) -> None:
    net = toys.mlp()
    seen: list[tuple[str, bool, toys.Weights]] = []

    def watched(side: str) -> Any:
        def loss(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:
            turn = sum(s == side for s, *_ in seen)
            spoil = side == bad and turn == 1
            seen.append((side, spoil, toys.weights(net)))
            losses = plain(backend, batch, generator)
            # a constant: the loss is not finite and its gradient is, so only the loss itself can tell
            return losses + losses.new_tensor([value, 0, 0, 0]) if spoil else losses

        return loss

    objectives = Objective(watched("forget"), -1), Objective(watched("remain"), 1)
    result = go(toys.Noisy(net), Method("test", *objectives, UPDATES[rule], Weights(lambd)), steps=3)
    skips = [0, 0]
    skips[bad == "remain" or rule == "joint"] = 1  # jointly there is one phase
    assert [result.skipped_fast, result.skipped_slow] == skips
    seen.append(("end", False, toys.weights(net)))
    for (side, spoilt, before), (_, _, after) in itertools.pairwise(seen):
        if rule == "joint":
            stands = side == "forget" or spoilt or (bad == "forget" and before is seen[3][2])
        else:
            stands = spoilt
        assert toys.same(before, after) == stands


@pytest.mark.parametrize("bad", ["forget", "remain"])
def test_too_many_skips_in_a_row_stop_the_run(bad: str) -> None:
    """Counted per phase: a sound remain phase after every skipped forget phase must not hide that nothing forgets."""

    def broken(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:
        return plain(backend, batch, generator) * float("nan")

    net, rows = toys.mlp(), list[Any]()
    method = sfron(fast_rate=0.01, **{bad: Objective(broken, 1)})
    with pytest.raises(NonFiniteError, match=rf"3 {bad} phases in a row .*\(step 2\): .*nothing was saved"):
        go(toys.Noisy(net), method, steps=10, max_skips=3, log=rows.append)
    assert [row[f"{bad}_loss"] for row in rows] == [None, None]
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_a_skipped_phase_leaves_running_statistics_alone() -> None:
    """An overflow would make a running mean infinite for good."""
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double().train()
    means = []

    def watched(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:
        means.append(net[1].running_mean.clone())
        if len(means) == 2:
            net[0](batch["x"])  # as the network's own pass does
            net[1](torch.full((4, 8), float("inf"), dtype=torch.float64))
            return plain(backend, batch, generator) * float("inf")
        return plain(backend, batch, generator)

    method = Method("test", None, Objective(watched, 1), Descent())
    result = go(toys.Plain(net), method, forget=None, steps=4)
    assert result.skipped_slow == 1
    assert torch.equal(means[1], means[2])
    assert not torch.equal(means[0], means[1])
    assert all(bool(b.isfinite().all()) for b in net.buffers())


def test_a_run_that_is_stopped_after_a_skipped_phase_is_saved(tmp_path: Path) -> None:
    """A forget phase in every tenth step leaves it the last of its side for long."""
    path, calls = tmp_path / "state.safetensors", list[int]()

    def broken(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:
        return plain(backend, batch, generator) * (float("nan") if calls.append(0) is None and len(calls) == 1 else 1)

    def run(stop: Any = None, resume: bool = False) -> toys.Weights:
        net = toys.mlp()
        method = sfron(fast_rate=0.01, every=5, lambd=0.0, forget=Objective(broken, -1))
        go(toys.Noisy(net), method, steps=8, checkpoint=Checkpoint(path, 2, resume=resume), stop=stop)
        return toys.weights(net)

    whole = run()
    calls.clear()
    path.unlink()
    asked = itertools.count()
    with pytest.raises(StoppedError):
        run(lambda: next(asked) == 2)
    assert path.exists()
    assert toys.same(run(resume=True), whole)


# ------------------------------------------------------------ closed forms


def halved(net: nn.Module) -> Solved:
    """Of the first layer alone."""
    weights = {name: p.detach() / 2 for name, p in net.named_parameters() if name.startswith("0.")}
    return Solved(weights, {"halves": len(weights)})


def edited(edit: Any = halved, **changes: Any) -> Method:
    return Method("edited", None, None, ClosedForm(edit), **changes)


def test_an_edit_is_applied_in_each_step_and_leaves_other_weights_alone() -> None:
    net, before, rows = toys.mlp(), toys.weights(toys.mlp()), list[Any]()
    go(toys.Plain(net), edited(), forget=None, remain=None, steps=2, log=rows.append)
    assert toys.same(toys.weights(net), {n: x / 4 if n.startswith("0.") else x for n, x in before.items()})
    assert all(row["edit_norm"] > 0 and row["halves"] == 2 for row in rows)


def test_an_edit_that_is_not_finite_ends_the_run_and_changes_nothing() -> None:
    net = toys.mlp()
    before = toys.weights(net)
    method = edited(lambda net: Solved({**halved(net).weights, "2.bias": net[2].bias.detach() * float("nan")}))
    with pytest.raises(NonFiniteError):
        go(toys.Plain(net), method, forget=None, remain=None)
    assert toys.same(toys.weights(net), before)


# ------------------------------------------------------------ processes


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, two_processes.__file__, str(tmp_path)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    one = two_processes.run(Accelerator(cpu=True))
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    for rank in range(2):
        two, _ = read_safetensors(tmp_path / f"{rank}.safetensors")
        assert int(two.pop("world")) == 2
        for name, value in one.items():
            # Fisher sums are float64, rounded to float32 in the end: the order does not show, nor in the mask. Weights
            # are float64; Adam divides by the gradient's size, which magnifies rounding for small gradients.
            rtol = 0 if name.startswith(("fisher", "mask")) else 1e-9
            torch.testing.assert_close(two[name], value, rtol=rtol, atol=0 if rtol == 0 else 1e-12)


def test_batches_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "num_processes", 3)
    with pytest.raises(ValueError, match="a batch of 4 does not divide over 3 processes"):
        go(toys.Noisy(toys.mlp()), sfron(fast_rate=0.1), accelerator=accelerator)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("FSDP", "fsdp_version must be 2"), ("DEEPSPEED", "DEEPSPEED is not"), ("MEGATRON_LM", "MEGATRON_LM is not")],
)
def test_other_ways_to_shard_are_refused(monkeypatch: pytest.MonkeyPatch, kind: str, words: str) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "distributed_type", DistributedType(kind))
    with pytest.raises(ValueError, match=words):
        go(toys.Noisy(toys.mlp()), sfron(fast_rate=0.1), accelerator=accelerator)


def test_gradient_accumulation_is_refused() -> None:
    with pytest.raises(ValueError, match="gradient_accumulation_steps must be 1"):
        go(
            toys.Noisy(toys.mlp()),
            sfron(fast_rate=0.1),
            accelerator=Accelerator(cpu=True, gradient_accumulation_steps=2),
        )


def test_leaves_the_precision_of_later_accelerators_open() -> None:
    go(toys.Noisy(toys.mlp()), sfron(fast_rate=0.1), steps=1)
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"


# ------------------------------------------------------------ run states


def interrupted(path: Path, **changes: Any) -> None:
    """A run of four steps that saved after two, and was killed after three."""

    def log(row: Any) -> None:
        if row["step"] == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        go(toys.Noisy(toys.mlp()), changes.pop("method"), checkpoint=Checkpoint(path, 2), log=log, **changes)


@pytest.mark.parametrize(
    "method",
    [
        sfron(fast_rate=0.1, outer_rate=0.5, slow_steps=2, every=3),
        sfron(fast_rate=0.1, published=True),
        sfron(fast_rate=0.1, ron=False),
        replace(sfron(fast_rate=0.1, fast_rule="normalized"), average=0.9),
        salun(mask=toys.some_mask(toys.mlp()), order="turn", epoch=Epoch(1, 2)),
    ],
    ids=["fast and slow", "shared", "joint", "average", "in turn"],
)
def test_a_resumed_run_is_the_whole_one_to_the_bit(tmp_path: Path, method: Method) -> None:
    whole, net, path = toys.mlp(), toys.mlp(), tmp_path / "state.safetensors"
    go(toys.Noisy(whole), method)
    interrupted(path, method=method)
    rows: list[Any] = []
    go(toys.Noisy(net), method, checkpoint=Checkpoint(path, 2, resume=True), log=rows.append)
    assert toys.same(toys.weights(whole), toys.weights(net))
    assert [row["step"] for row in rows] == [2, 3]


def test_states_of_another_run_or_another_schema_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    interrupted(path, method=sfron(fast_rate=0.1))
    resume = {"checkpoint": Checkpoint(path, 2, resume=True)}
    before = toys.weights(toys.mlp())
    others: list[tuple[float, dict[str, int], str]] = [
        (0.1, {"seed": 1}, "seed"),
        (0.1, {"steps": 5}, "steps"),
        (0.2, {}, "settings"),
    ]
    for rate, changes, name in others:
        net = toys.mlp()
        with pytest.raises(ValueError, match=f"{path}.*{name}"):
            go(toys.Noisy(net), sfron(fast_rate=rate), **resume, **changes)
        assert toys.same(toys.weights(net), before)
    net = toys.mlp()
    net[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=rf"{path}.*train\.parameters"):
        go(toys.Noisy(net), sfron(fast_rate=0.1), **resume)
    state = load_state(path)
    save_state(path, {**state, "schema": 1})
    with pytest.raises(ValueError, match=r"schema 1, .* schema 2") as caught:
        go(toys.Noisy(toys.mlp()), sfron(fast_rate=0.1), **resume)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------ data and randomness


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"forget": None}, "needs forget data, got none"),
        ({"remain": None}, "needs remain data, got none"),
        ({"forget": []}, "the forget data has no batches"),
        ({"remain": iter([])}, "the remain data has no batches"),
        ({"remain": iter(toys.batches(2))}, "the remain data .* cannot be started again"),
    ],
)
def test_bad_data(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        go(toys.Noisy(toys.mlp()), sfron(fast_rate=0.01), **change)


def test_bad_losses() -> None:
    scalar = Objective(lambda backend, batch, generator: backend.losses(batch, generator).mean(), 1, "scalar")
    with pytest.raises(ValueError, match=r"objective 'scalar' must give one loss per sample, \[B\]; got \[\]"):
        go(toys.Noisy(toys.mlp()), sfron(fast_rate=0.1, remain=scalar))


def test_randomness_is_the_seeds_alone() -> None:
    ends = []
    for seed, noise in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(noise)  # the global state plays no part
        net = toys.mlp()
        go(toys.Noisy(net), sfron(fast_rate=0.01, slow_steps=2), seed=seed)
        ends.append(toys.weights(net))
    assert toys.same(ends[0], ends[1])
    assert not toys.same(ends[1], ends[2])


def test_every_phase_draws_anew() -> None:
    class Spy(toys.Noisy):
        def losses(self, batch: Any, generator: torch.Generator) -> Tensor:
            noises.append(tuple(batch["noise"].flatten().tolist()))
            return super().losses(batch, generator)

    noises: list[Any] = []
    go(Spy(toys.mlp()), sfron(fast_rate=0.01, slow_steps=2), steps=3)
    assert len(set(noises)) == len(noises) == 9


def test_what_a_network_keeps_besides_weights_is_resumed(tmp_path: Path) -> None:
    """Running statistics of batch normalisation: to the bit."""

    def net() -> nn.Module:
        made = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        return toys.randomize(made).double().train()

    def run(model: nn.Module, steps: int, log: Any = None, **keywords: Any) -> nn.Module:
        unlearn(
            toys.Plain(model),
            sfron(fast_rate=0.01),
            toys.batches(0),
            toys.batches(1),
            steps=steps,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            seed=0,
            log=log,
            **keywords,
        )
        return model

    def stop(row: Any) -> None:
        if row["step"] == 3:
            raise InterruptedError

    whole, path = run(net(), 5), tmp_path / "state.safetensors"
    with pytest.raises(InterruptedError):
        run(net(), 5, stop, checkpoint=Checkpoint(path, 2))
    gone_on = run(net(), 5, checkpoint=Checkpoint(path, 2, resume=True))
    assert toys.same(toys.weights(whole), toys.weights(gone_on))
    for name, b in whole.named_buffers():
        assert torch.equal(b, gone_on.get_buffer(name)), name
