import copy
from contextlib import nullcontext
from pathlib import Path

import launched
import micro_classify
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from erase.classification import models
from erase.classification.backend import (
    RELABEL,
    Augment,
    Classifier,
    Prepare,
    keeping_statistics,
    logits,
    together,
    without_statistics,
)
from erase.engine import distributed, losses
from erase.engine.backend import Comparing, Drawing
from erase.engine.fisher import fisher_diagonal
from erase.engine.loop import unlearn
from erase.engine.losses import Distance
from erase.methods.finetune import finetune
from erase.methods.gradient_ascent import gradient_ascent
from erase.methods.sfron import sfron
from erase.store.safetensors import write_safetensors

BATCH = micro_classify.batch()


def plain() -> nn.Module:
    """A user's own: a module that returns logits."""
    return toys.randomize(nn.Sequential(nn.Flatten(), nn.Linear(64, 3))).float()


def classifier(net: nn.Module | None = None, **settings: object) -> Classifier:
    return Classifier(net or micro_classify.model().net, 3, **settings)  # type: ignore[arg-type]


# ------------------------------------------------------------ losses


@pytest.mark.parametrize("net", [plain(), micro_classify.model().net], ids=["plain", "transformers"])
def test_a_loss_is_the_cross_entropy_of_a_sample(net: nn.Module) -> None:
    backend = classifier(net)
    losses = backend.losses(BATCH, toys.gen())
    x = BATCH["x"].float() / 127.5 - 1
    expected = F.cross_entropy(logits(net, x), BATCH["y"], reduction="none")
    torch.testing.assert_close(losses, expected)
    assert isinstance(backend, Drawing)
    assert isinstance(backend, Comparing)


def test_another_label_is_never_the_own_and_any_other_one() -> None:
    many = {key: value.repeat(50, *[1] * (value.ndim - 1)) for key, value in BATCH.items()}
    drawn = classifier().draw(many, toys.gen())
    assert not bool((drawn["other"] == drawn["y"]).any())
    for label in range(3):
        assert set(drawn["other"][drawn["y"] == label].tolist()) == {0, 1, 2} - {label}
    losses = RELABEL.loss(classifier(plain()), drawn, toys.gen())
    expected = F.cross_entropy(logits(plain(), drawn["x"]), drawn["other"], reduction="none")
    torch.testing.assert_close(losses, expected)


def test_a_drawn_batch_is_drawn_once_and_of_the_generator() -> None:
    backend = classifier(augment=Augment(2, True))
    a, b, c = (backend.draw(BATCH, toys.gen(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["x"], c["x"])
    assert backend.draw(a, toys.gen(5)) is a


def test_the_distance_to_a_teacher_is_the_divergence() -> None:
    net, teacher = plain(), toys.randomize(plain(), seed=7)
    backend = classifier(net)
    drawn = backend.draw(BATCH, toys.gen())
    p, q = (logits(n, drawn["x"]).double().softmax(1) for n in (teacher, net))
    expected = (p * (p / q).log()).sum(1)
    found = Distance(teacher, 2.0)(backend, drawn, toys.gen())
    torch.testing.assert_close(found.double(), 2 * expected, rtol=1e-4, atol=1e-6)  # float32 logits
    assert float(backend.distances(drawn, net, toys.gen()).detach().abs().max()) < 1e-6
    found.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_loss_beside_a_distance_is_of_the_same_pass() -> None:
    """Running statistics move once, and the network is asked once."""
    net, teacher, asked = plain(), toys.randomize(plain(), seed=7), []
    net.register_forward_hook(lambda *_: asked.append(None))
    backend = classifier(net)
    drawn = backend.draw(BATCH, toys.gen())
    found = Distance(teacher, 2.0, losses.plain)(backend, drawn, toys.gen())
    assert len(asked) == 1
    apart, own = (backend.distances(drawn, teacher, toys.gen()), backend.losses(drawn, toys.gen()))
    torch.testing.assert_close(found, own + 2 * apart)


def test_a_divergence_of_near_networks_is_no_rounding_under_autocast() -> None:
    net, teacher = plain(), plain()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        found = classifier(net).distances(BATCH, teacher, toys.gen())
    assert found.dtype == torch.float32
    assert bool((found >= -1e-6).all())


def test_one_class_is_no_classification() -> None:
    with pytest.raises(ValueError, match="needs two classes or more; got 1"):
        Classifier(plain(), 1)


def test_per_sample_gradients_by_layers_are_those_of_a_loop() -> None:
    for architecture in (micro_classify.RESNET, micro_classify.VIT, micro_classify.CONVNEXT, micro_classify.SWIN):
        backend = classifier(micro_classify.model(architecture).net)
        batches = [backend.draw(BATCH, toys.gen())]
        fast, slow = (fisher_diagonal(backend, batches, generator=toys.gen(), chunk=chunk) for chunk in (4, 1))
        toys.close(fast.named, slow.named, rtol=1e-3, atol=1e-7)  # float32


# ------------------------------------------------------------ images


def test_shifts_are_shifts_and_black_comes_in() -> None:
    x = torch.randint(1, 256, (200, 1, 5, 6), generator=toys.gen(), dtype=torch.uint8)
    shifted = Augment(shift=2)(x, toys.gen())
    seen = set()
    for before, after in zip(x, shifted, strict=True):
        found = None
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                padded = F.pad(before, (2, 2, 2, 2))[:, 2 + dy : 7 + dy, 2 + dx : 8 + dx]
                if torch.equal(padded, after):
                    found = (dy, dx)
        assert found is not None
        seen.add(found)
    assert len(seen) == 25


def test_flips_are_of_every_second_image() -> None:
    x = BATCH["x"].repeat(100, 1, 1, 1)
    turned = Augment(flip=True)(x, toys.gen())
    flipped = [torch.equal(a.flip(-1), b) for a, b in zip(x, turned, strict=True)]
    assert all(torch.equal(a, b) for a, b, f in zip(x, turned, flipped, strict=True) if not f)
    assert 230 < sum(flipped) < 370  # of 600, five standard deviations
    assert torch.equal(Augment()(x, toys.gen()), x)


def test_pixels_are_prepared_as_the_librarys_processor_does(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The folder's own file, read by transformers; resizing differs by the rounding to bytes between its steps."""
    pixels = torch.randint(256, (2, 3, 10, 13), generator=toys.gen(), dtype=torch.uint8)
    step = 2.1 / 255 / 0.2
    for size, crop, mode, tolerance in (
        (None, None, "bilinear", 1e-6),
        (None, (4, 6), "bilinear", 1e-6),
        ((6, 6), None, "bilinear", step),
        ((6, 8), (5, 5), "bicubic", step),
        (7, None, "bicubic", step),
        (7, (4, 6), "bilinear", step),
    ):
        made = micro_classify.model({**micro_classify.VIT, "image_size": 8})
        prepare = Prepare((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), size, crop, mode)
        folder = tmp_path / f"{size} {crop} {mode}"
        models.save(models.Model(made.net, made.labels, prepare, 3), folder)
        assert models.open_model(folder).prepare == prepare
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
        theirs = np.asarray(processor(images=images, return_tensors="np")["pixel_values"])
        assert np.abs(prepare(pixels).numpy() - theirs).max() <= tolerance


def test_a_grey_image_is_repeated_for_a_network_that_takes_three() -> None:
    x = Prepare((0.5,) * 3, (0.5,) * 3)(BATCH["x"])
    assert x.shape == (6, 3, 8, 8)
    assert torch.equal(x[:, 0], x[:, 2])


# ------------------------------------------------------------ running statistics


def statistics(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in net.named_buffers()}


def test_statistics_are_kept_and_go_on_afterwards() -> None:
    net = micro_classify.model().net.train()
    x = Prepare()(BATCH["x"])
    before, free = statistics(net), logits(net, x)
    moved = statistics(net)
    assert not toys.same(before, moved)
    with keeping_statistics(net):
        torch.testing.assert_close(logits(net, x), free)  # normalised by the batch, as before
    with keeping_statistics(net, running=True):
        used = logits(net, x)
    assert toys.same(statistics(net), moved)
    torch.testing.assert_close(used, logits(net.eval(), x))
    assert not torch.allclose(used, free)
    net.train()
    with pytest.raises(InterruptedError), keeping_statistics(net):
        raise InterruptedError
    logits(net, x)
    assert not toys.same(statistics(net), moved)


@pytest.mark.parametrize("rule", ["adam", "joint"])
def test_the_forget_phase_leaves_statistics_alone(rule: str) -> None:
    """What they are after a run is what the remain batches alone made of them."""
    settings = {"slow_steps": 2} if rule == "adam" else {"ron": False}
    found = {}
    for name, method in (
        ("kept", without_statistics(sfron(fast_rate=0.0, **settings))),  # type: ignore[arg-type]
        ("moved", sfron(fast_rate=0.0, **settings)),  # type: ignore[arg-type]
        ("remain alone", without_statistics(finetune())),
    ):
        net = micro_classify.model().net.train()
        steps = 2 if name == "remain alone" and rule == "adam" else 1
        unlearn(
            classifier(net),
            method,
            [micro_classify.batch(seed=1)],
            [micro_classify.batch(seed=2)],
            steps=steps,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
            seed=0,
        )
        found[name] = statistics(net)
    assert toys.same(found["kept"], found["remain alone"])
    assert not toys.same(found["kept"], found["moved"])


def test_ascent_alone_moves_no_statistics() -> None:
    net = micro_classify.model().net.train()
    before = statistics(net)
    method = without_statistics(gradient_ascent(fast_rate=1e-3))
    unlearn(classifier(net), method, [BATCH], None, steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), seed=0)
    assert toys.same(statistics(net), before)


# ------------------------------------------------------------ several processes


def normalised(net: nn.Module, x: torch.Tensor, share: slice) -> dict[str, torch.Tensor]:
    """Logits of a share, the gradients of the whole batch's mean loss, and the statistics afterwards."""
    out = logits(net, x[share])
    (out.square().mean() * len(out) / len(x)).backward()
    grads = {name: distributed.total(p.grad) for name, p in net.named_parameters() if p.grad is not None}
    net.eval()
    with torch.no_grad():
        return {"logits": out.detach(), "later": logits(net, x), **grads, **dict(net.named_buffers())}


@pytest.mark.parametrize("how", ["plain", "kept", "cumulative", "copied"])
def test_batch_normalisation_is_by_the_whole_batch(how: str, tmp_path: Path) -> None:
    """In two processes each with half of it: outputs, gradients, running statistics, to rounding."""
    x = torch.randn(8, 1, 8, 8, generator=toys.gen())
    x[4:] += 3  # halves of other means

    def network() -> nn.Module:
        net = micro_classify.model().net.train()
        for module in net.modules():
            if how == "cumulative" and isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        return net

    def work() -> None:
        PartialState(cpu=True)
        net = together(network())
        net = copy.deepcopy(net) if how == "copied" else net
        half = slice(distributed.rank() * 4, distributed.rank() * 4 + 4)
        with keeping_statistics(net) if how == "kept" else nullcontext():
            found = normalised(net, x, half)
        write_safetensors(tmp_path / f"{distributed.rank()}.safetensors", found, {})

    assert launched.two(work, tmp_path / "log") == [0, 0], (tmp_path / "log.0").read_text()
    net = network()
    with keeping_statistics(net) if how == "kept" else nullcontext():
        expected = normalised(net, x, slice(None))
    parts = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    torch.testing.assert_close(torch.cat([part.pop("logits") for part in parts]), expected.pop("logits"))
    for part in parts:
        toys.close(part, expected, rtol=1e-4, atol=1e-5)  # float32


def test_alone_a_network_stays_as_it_is() -> None:
    net = micro_classify.model().net
    assert together(net) is net
    assert not any("forward" in vars(module) for module in net.modules())
