import platform
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from typing import Any

import micro_ddpm
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from erase.diffusion.losses import forget_objective
from erase.engine import memory
from erase.engine.backend import batch_tensors, map_batch, seeded
from erase.engine.losses import plain
from erase.engine.memory import Made, hollow, in_step, passes, tensors_of
from erase.engine.per_sample import PerSample
from erase.methods.finetune import finetune
from erase.methods.sfron import sfron

SAMPLE = {"mean": torch.zeros(1, 1, 8, 8), "cond": {"label": torch.zeros(1, dtype=torch.long)}}
NULL = {"label": torch.tensor([3])}


@pytest.mark.slow
def test_bytes_are_those_that_a_real_pass_makes() -> None:
    backend = micro_ddpm.wrap(micro_ddpm.model()).denoiser(NULL)
    params = list(backend.net.parameters())
    by_name = backend.net, dict(backend.net.named_parameters())
    four = map_batch(lambda v: v.repeat(4, *[1] * (v.ndim - 1)), SAMPLE)
    batch = backend.draw(four, seeded("cpu", 0))
    with Made([*params, *batch_tensors(batch), backend.process.alphas_cumprod]) as made:
        torch.autograd.backward(plain(backend, batch, seeded("cpu", 0)).mean())
    with hollow(backend) as model:
        measure = partial(passes, model, plain, SAMPLE)
        whole, half = measure(4, nullcontext), measure(4, partial(torch.autocast, "cpu", torch.bfloat16))
        alone, used_up = measure(1, nullcontext), measure(1, nullcontext, "squares")
        samples = measure(4, nullcontext, "samples")
    assert whole == made.peak
    assert used_up < alone < whole
    with (
        Made([*params, *batch_tensors(batch), backend.process.alphas_cumprod]) as made,
        PerSample(*by_name, lambda *_: None) as layers,
    ):
        layers.backward(plain(backend, batch, seeded("cpu", 0)))
    assert samples == made.peak
    assert half != whole
    assert all(p.grad is not None for p in params)  # the real passes'; the hollow model has its own


@pytest.mark.slow
def test_a_network_whose_layers_do_not_tell_goes_one_sample_at_a_time() -> None:
    backend = micro_ddpm.wrap(micro_ddpm.model()).denoiser(NULL)

    def loss(backend: Any, batch: Any, generator: torch.Generator) -> torch.Tensor:
        losses = plain(backend, batch, generator)
        losses.register_hook(fail)
        return losses

    def fail(grad: torch.Tensor) -> None:
        if len(grad) > 1:
            raise ValueError("to samples")

    with hollow(backend) as model:
        assert passes(model, loss, SAMPLE, 4, nullcontext, "samples") == passes(
            model, plain, SAMPLE, 1, nullcontext, "squares"
        )


class Deep:
    """A backend whose network has two long runs of equal blocks, and two other blocks."""

    def __init__(self, blocks: type[torch.nn.Module]) -> None:
        self.net: Any = Blocks(blocks)

    def draw(self, batch: Any, generator: torch.Generator) -> Any:
        return batch

    def losses(self, batch: Any, generator: torch.Generator) -> torch.Tensor:
        prediction = self.net(batch["x"])  # first, as in `Exchanged`
        with torch.no_grad():
            target = self.net(batch["x"] + 1)
        loss: torch.Tensor = ((prediction - target) ** 2).mean((1, 2))
        return loss


class Blocks(torch.nn.Module):
    def __init__(self, blocks: Any) -> None:
        super().__init__()
        self.first = torch.nn.ModuleList([blocks(48), *[blocks(32) for _ in range(9)], blocks(16)])
        self.second = torch.nn.ModuleList([blocks(64) for _ in range(10)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for blocks in (self.first, self.second):
            for block in blocks:
                x = block(x)
        return x


class Block(torch.nn.Module):
    """A residual block of one width inside, whose input alone is kept for its backward pass if `AGAIN`."""

    AGAIN = False

    def __init__(self, inside: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, inside), torch.nn.GELU(), torch.nn.Linear(inside, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        again = self.AGAIN and torch.is_grad_enabled()
        more: torch.Tensor = checkpoint(self.layers, x, use_reentrant=False) if again else self.layers(x)
        return x + more


class Again(Block):
    AGAIN = True


@pytest.mark.parametrize(
    "precision", [nullcontext, pytest.param(partial(torch.autocast, "cpu", torch.bfloat16), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("of", ["batch", "squares"])
@pytest.mark.parametrize("blocks", [Block, Again])
def test_equal_blocks_are_counted_and_not_all_followed(blocks: Any, of: Any, precision: Any, monkeypatch: Any) -> None:
    calls = []
    monkeypatch.setattr(Block, "forward", lambda self, x, real=Block.forward: calls.append(self) or real(self, x))
    with hollow(Deep(blocks)) as model:
        few = passes(model, plain, {"x": torch.zeros(1, 64, 8)}, 4, precision, of)
        assert len(calls) == 2 * (1 + 3 + 1 + 3)
        assert type(model.net.first) is torch.nn.ModuleList
        monkeypatch.setattr(memory, "LONG", 100)
        assert passes(model, plain, {"x": torch.zeros(1, 64, 8)}, 4, precision, of) == few
        assert len(calls) == 2 * (8 + 21)


class Streams(torch.nn.Module):
    """Two streams through joint blocks, the last of which gives up the first one, as in Stable Diffusion 3."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Pair(32) for _ in range(10)] + [Pair(16)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        text: Any = x[:, :16]
        for block in self.blocks:
            text, x = block(text, x)
        assert text is None
        return x


class Pair(Block):
    def forward(self, text: torch.Tensor, x: torch.Tensor) -> Any:  # type: ignore[override]
        both = super().forward(torch.cat([text, x], 1))
        last = self.layers[0].out_features == 16
        return None if last else both[:, : text.shape[1]], both[:, text.shape[1] :]


def test_a_block_may_give_up_one_of_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Deep(Block)
    backend.net = Streams()
    with hollow(backend) as model:
        few = passes(model, plain, {"x": torch.zeros(1, 64, 8)}, 4, nullcontext)
        monkeypatch.setattr(memory, "LONG", 100)
        assert passes(model, plain, {"x": torch.zeros(1, 64, 8)}, 4, nullcontext) == few


class Asking:
    """A backend whose network keeps a table that is no buffer, and asks how long a text is."""

    def __init__(self) -> None:
        self.net: Any = torch.nn.Linear(4, 4)
        self.net.table = [torch.ones(64, 4)]

    def draw(self, batch: Any, generator: torch.Generator) -> Any:
        return batch

    def losses(self, batch: Any, generator: torch.Generator) -> torch.Tensor:
        lengths = batch["cond"]["mask"].sum(1).tolist()
        rows = [self.net(self.net.table[0][:length]).sum() for length in lengths]
        return torch.stack(rows)


def test_a_network_may_ask_for_what_no_weight_has_part_in() -> None:
    """Its memory depends on the answer."""
    backend: Any = Asking()
    with hollow(backend) as model:
        few, many = (
            passes(model, plain, {"cond": {"mask": torch.arange(64)[None] < length}}, 2, nullcontext)
            for length in (2, 64)
        )
        assert isinstance(model.net(torch.ones(1, 4)), FakeTensor)
    assert 0 < few < many


def test_weights_without_data_stay_without() -> None:
    """Those of a network on torch's "meta" device, too: real ones would be computed with."""
    backend = micro_ddpm.wrap(micro_ddpm.model()).denoiser(NULL)
    backend.net.to("meta")
    with hollow(backend) as model:
        assert all(isinstance(p, FakeTensor) for p in model.net.parameters())
        assert passes(model, plain, SAMPLE, 2, nullcontext) > 0


def test_copies_of_a_hollow_model_count() -> None:
    backend = micro_ddpm.wrap(micro_ddpm.model()).denoiser(NULL)
    size = sum(p.nbytes for p in backend.net.parameters())
    with hollow(backend) as model, Made(tensors_of(model)) as made:
        frozen = forget_objective("redirect", model.net, "frozen")
        assert made.now == size
        del frozen


def test_views_of_what_was_there_do_not_count_and_what_is_gone_does_not_stay() -> None:
    there = torch.zeros(100)
    with Made([there]) as made:
        view = there.view(10, 10).t()
        assert made.now == 0
        new = view + 1
        assert made.now == new.nbytes == 400
        del new
        assert (made.now, made.peak) == (0, 400)


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_a_step_by_item(rule: str) -> None:
    method = sfron(fast_rate=1.0, fast_rule=rule, outer_rate=0.5)  # type: ignore[arg-type]
    found = in_step(800, method, "sgd", 0.5, 7, 10_000)
    assert found == {
        "optimizer": 3200,
        "fast step": (8 + 4 if rule == "adam" else 4) * 400,
        "mask": 100,
        "copies of weights": 7 + 3200,
        "new weights": 0,
        "gradients": 3200,
        "activations": 6800,
        "fast step's work": 0,
    }
    assert in_step(800, finetune(), "adam", None, 0, 3300) == {
        "optimizer": 6400,
        "fast step": 0,
        "mask": 0,
        "copies of weights": 0,
        "new weights": 0,
        "gradients": 3200,
        "activations": 100,
        "fast step's work": 0,
    }
    low = in_step(800, method, "sgd", 0.5, 7, 3300)
    assert (low["activations"], low["fast step's work"]) == (100, 8 * 400 - 100)
    published = in_step(800, sfron(fast_rate=1.0, published=True), "adam", 0.5, 0, 3300)
    assert (published["fast step"], published["mask"]) == (0, 900)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc", reason="glibc's")
def test_freed_tensors_are_given_back_at_once() -> None:
    """Left alone, glibc keeps those below a threshold that grows with what is freed; so it does not end here."""
    code = """
import torch
from erase.engine.memory import give_back, used
give_back()
torch.empty(20_000_000, dtype=torch.uint8).fill_(1)  # freed: without give_back the threshold is 20 MB from now on
before = used()
held = [torch.full((6_000_000,), 1, dtype=torch.uint8) for _ in range(20)]
last = torch.full((100_000,), 1, dtype=torch.uint8)  # on top of them
top = used()
del held
print(top - before, used() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    made, kept = map(int, done.stdout.split())
    assert made > 100e6
    assert kept < 10e6
