"""The `*_published` presets, read and run for some steps on small models in float64, against the published loops.

The loops are written from formulas and published settings, as plainly as can be: they know nothing of the presets, and
share no code with the engine but the order of the data and the seeds of what is random. Words change sizes and places.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import micro_classify
import micro_ddpm
import pytest
import torch
import toys
from jobs import Runner
from torch import Tensor, nn

from erase import resources
from erase.classification import models
from erase.config import read_preset
from erase.diffusion import class_conditional
from erase.engine.backend import map_batch, seeded
from erase.engine.batches import Batches, some
from erase.engine.saliency import load_mask
from erase.programs import run
from erase.programs.run import Lesson

Batch = dict[str, Any]
NAMES = [name for name in resources.list_presets() if name.endswith("_published")]


class Learning:
    """A job whose lesson is in float64: it is made as ever, and then widened."""

    def __init__(self, job: Any) -> None:
        self.made: Lesson = job.lesson()
        self.lesson = lambda: self.made


def wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def widened(lesson: Lesson) -> Lesson:
    lesson.backend.net.double()
    sides: dict[str, Any] = {}
    for name in ("forget", "remain"):
        side: Any = getattr(lesson, name)
        if hasattr(side, "mean"):  # of diffusion; images stay bytes
            side = replace(side, mean=side.mean.double(), table=map_batch(wide, side.table))
        sides[name] = side
    backends: dict[str, Any] = {}
    for name in ("backend", "measured"):
        found: Any = getattr(lesson, name)
        if hasattr(found, "null"):
            found = replace(found, null=map_batch(wide, found.null))
        elif found is not None:
            found = replace(found, prepare=lambda pixels, prepare=found.prepare: prepare(pixels).double())
        backends[name] = found
    return replace(lesson, **sides, **backends)


def learn(setting: run.Setting, before: Callable[[Any], None] = lambda job: None) -> tuple[Lesson, toys.Weights]:
    """What the program makes of a preset: the lesson, and the weights and statistics before."""
    job = run.job_of(setting.config.pipeline)(setting)
    setting.out.mkdir()
    before(job)
    learning = Learning(job)
    learning.made = widened(learning.made)
    start = {name: x.clone() for name, x in learning.made.backend.net.state_dict().items()}
    run.learn(setting, learning)  # type: ignore[arg-type]
    return learning.made, start


def sides(setting: run.Setting, lesson: Lesson) -> dict[str, Any]:
    """The data in the order in which they are learned from, and for the mask."""
    config = setting.config
    train, wanted = config.train, config.saliency
    found: dict[str, Any] = {}
    for number, name in enumerate(("forget", "remain")):
        data: Any = getattr(lesson, name)
        found[name] = list(islice(Batches(data, train.batch_size, config.seed + number), train.steps))
        found[f"{name}_once"] = some(data, wanted.count, wanted.batch_size, config.seed, shuffled=True)
    return found


def net_at(lesson: Lesson, start: toys.Weights) -> nn.Module:
    """A second network, with the weights of the start."""
    net = copy.deepcopy(lesson.backend.net)
    net.load_state_dict(start)
    return net


def agree(lesson: Lesson, net: nn.Module, start: toys.Weights, rtol: float = 1e-12) -> None:
    """Relative to how far the weights of a tensor have moved; of one without gradients Adam makes noise of 1e-14."""
    ours, theirs = lesson.backend.net.state_dict(), net.state_dict()
    moved = 0
    for name, x in theirs.items():
        if x.is_floating_point():
            far = float((x - start[name]).abs().max())
            moved += far > 0
            torch.testing.assert_close(
                ours[name], x, rtol=0, atol=rtol * far + 1e-14, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert moved > 10


def cosine(t: int, T: int) -> float:
    return (1 + math.cos(math.pi * t / T)) / 2


def squares(net: nn.Module, losses: Iterator[Tensor], count: int, clip: float | None = None) -> toys.Weights:
    """Mean over batches of squared gradients of the batch's loss."""
    sums = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for loss in losses:
        net.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        for name, p in net.named_parameters():
            sums[name] += 0 if p.grad is None else p.grad**2 / count
    net.zero_grad()
    return sums


def step(
    net: nn.Module, loss: Tensor, optimizer: Any, keep: toys.Weights | None = None, clip: float | None = None
) -> None:
    """Gradients, mask, clip, step."""
    optimizer.zero_grad()
    loss.backward()
    for name, p in net.named_parameters() if keep is not None else ():
        if p.grad is not None:
            p.grad *= keep[name]  # type: ignore[index]
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()


def masked(setting: run.Setting, forget: toys.Weights, remain: toys.Weights, gamma: float = 1.0) -> toys.Weights:
    """Their mask, which the program's is.

    But for weights that move neither loss (a bias of attention's keys): 0/0 is kept by theirs, in float64 it is noise.
    """
    mask, keep = load_mask(setting.out / "saliency.safetensors"), {}
    for name, f in forget.items():
        r = remain[name]
        dead = torch.maximum(f, r) < 1e-30
        keep[name] = torch.where(dead, mask[name], (f + 1e-15) / (r + 1e-15) >= gamma)
        assert torch.equal(mask[name], keep[name]), name
    assert 0.01 < mask.density < 0.99
    return keep


def setting_of(name: str, work: Path, *words: str) -> run.Setting:
    return Runner(resources.preset_path(name), work).setting(*words, out=work / "out")


# ------------------------------------------------------------ Stable Diffusion

SD_WORDS = (
    "forget.prompts=[a photo of a cat]",
    "concept=null",
    "forget.anchors=[a photo of a dog]",
    "remain.prompts=[a photo of a dog]",
    "eval.prompts=[a photo of a dog]",
    "eval.images=0",
    "train.steps=3",
    "forget.count=5",
    "remain.count=5",
    "saliency.count=5",
    "draw.steps=2",
)


@pytest.mark.parametrize("kind", [pytest.param("none", marks=pytest.mark.slow), "fisher"])
def test_stable_diffusion(micro_sd: Path, tmp_path: Path, kind: str) -> None:
    """As it is run; and with its mask applied."""
    setting = setting_of("sd_nudity_sfron_published", tmp_path, f"model={micro_sd}", f"saliency.kind={kind}", *SD_WORDS)
    lesson, start = learn(setting)
    data, net, null = sides(setting, lesson), net_at(lesson, start), lesson.backend.null["text"]  # type: ignore[attr-defined]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = (1 - betas).cumprod(0)

    def noised(batch: Batch, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        z = batch["mean"]
        t = torch.randint(0, 1000, (len(z),), generator=g)
        noise = torch.randn(z.shape, generator=g)
        a = alphas[t].view(-1, 1, 1, 1)
        torch.rand(len(z), generator=g)  # condition dropout: there is none
        return a.sqrt() * z + (1 - a).sqrt() * noise, t, noise

    def predicted(noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
        found: Tensor = net(noisy, t, encoder_hidden_states=text).sample
        return found

    def guided(batches: Sequence[Batch]) -> Iterator[Tensor]:
        g = seeded("cpu", 0, 1)
        for batch in batches:
            noisy, t, noise = noised(batch, g)
            asked = predicted(noisy, t, batch["cond"]["text"])
            without = predicted(noisy, t, null.expand(len(t), -1, -1))
            yield -nn.MSELoss()(noise.double(), (1 + 7.5) * asked - 7.5 * without)

    keep = None
    if kind == "fisher":
        net.eval()
        parts = [data["forget_once"], data["remain_once"]]
        keep = masked(setting, *(squares(net, guided(part), len(part)) for part in parts))
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-5)
    for i in range(3):
        batch = data["forget"][i]
        assert len(batch["mean"]) == 2
        noisy, t, _ = noised(batch, seeded("cpu", 0, i, 0, 0))
        target = predicted(noisy, t, batch["anchor"]["text"]).detach()
        step(net, 1.0 * nn.MSELoss()(predicted(noisy, t, batch["cond"]["text"]), target), optimizer, keep)
        batch = data["remain"][i]
        noisy, t, noise = noised(batch, seeded("cpu", 0, i, 1, 0))
        step(net, nn.MSELoss()(predicted(noisy, t, batch["cond"]["text"]), noise.double()), optimizer)
    agree(lesson, net, start)


# ------------------------------------------------------------ DDPM


@pytest.mark.parametrize(
    ("guard", "rtol"),
    [
        pytest.param(0.0, 1e-12, marks=pytest.mark.slow),
        (1e-8, 2e-9),  # beside √ℓ of about 10: weights of samples differ by 1e-9
    ],
)
def test_ddpm(tmp_path: Path, guard: float, rtol: float) -> None:
    """The loop to rounding; and with what theirs adds to ℓ^λ, where ours has a floor."""
    class_conditional.save_new(micro_ddpm.model(shape=(3, 8, 8), schedule="linear", dropout=0.1), tmp_path / "base")
    micro_ddpm.write_images(tmp_path / "data/train", mode="RGB")
    setting = setting_of(
        "ddpm_cifar10_sfron_published",
        tmp_path,
        "model={work}/base",
        "data.source={work}/data",
        "forget.labels=[bee]",
        "eval.images=0",
        "train.steps=3",
        "train.batch_size=5",
        "saliency.batch_size=5",
        "checkpoint_every=50",
    )
    if guard == 0:  # in a dry run nothing has values
        assert "memory for the mask" in "\n".join(run.job_of("ddpm")(replace(setting, dry_run=True)).rehearse())
    lesson, start = learn(setting)
    assert len(lesson.forget or []) == 8  # all there are
    assert len(lesson.remain or []) == 16
    data, net = sides(setting, lesson), net_at(lesson, start)
    alphas = (1 - torch.linspace(0.0001, 0.02, 1000)).cumprod(0)

    def noised(batch: Batch, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        x, c = batch["mean"], batch["cond"]["label"]
        n = len(x)
        t = torch.randint(0, 1000, (n // 2 + 1,), generator=g)
        t = torch.cat([t, 1000 - t - 1])[:n]
        e = torch.randn(x.shape, generator=g)
        a = alphas[t].view(-1, 1, 1, 1)
        dropped = torch.where(torch.rand(n, generator=g) < 0.1, 3, c)  # the null class
        return x * a.sqrt() + e * (1 - a).sqrt(), t, e, c, dropped

    def predicted(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        found: Tensor = net(x, t, class_labels=c).sample
        return found

    def guided(batches: Sequence[Batch]) -> Iterator[Tensor]:
        g = seeded("cpu", 0, 1)
        for batch in batches:
            x, t, e, c, _ = noised(batch, g)
            out = (1 + 2.0) * predicted(x, t, c) - 2.0 * predicted(x, t, torch.full_like(c, 3))
            yield (e - out).square().sum((1, 2, 3)).mean()

    def losses(batch: Batch, i: int, number: int) -> Tensor:
        g = seeded("cpu", 0, i, number, 0)
        x, t, e, _, dropped = noised(batch, g)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=g)))
            return (e - predicted(x, t, dropped)).square().sum((1, 2, 3))

    net.eval()
    assert [len(batch["mean"]) for batch in data["forget_once"]] == [5, 3]
    assert [len(batch["mean"]) for batch in data["remain_once"]] == [5, 5, 5, 1]
    parts = [data["forget_once"], data["remain_once"]]
    keep = masked(setting, *(squares(net, guided(part), len(part), clip=1.0) for part in parts))
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
    for i in range(3):
        ours = losses(data["forget"][i], i, 0)
        coef = 1 / (ours.detach() ** 0.5 + guard)
        adaptive = (coef / coef.sum() * ours * len(ours)).mean()
        step(net, 10.0 * cosine(i, 3) * -adaptive, optimizer, keep, clip=1.0)
        step(net, losses(data["remain"][i], i, 1).mean(), optimizer, clip=1.0)
    agree(lesson, net, start, rtol)


# ------------------------------------------------------------ classifiers


@pytest.mark.parametrize(
    ("name", "architecture", "published"),
    [
        (
            "classify_cifar10_sfron_published",
            micro_classify.RESNET,
            {"alpha": 25.0, "lambd": 0.5, "every": 5, "optimizer": "sgd", "steps": 6},
        ),
        (
            "classify_tinyimagenet_sfron_published",
            micro_classify.SWIN,
            {"alpha": 500.0, "lambd": 0.6, "every": 1, "optimizer": "adamw", "steps": 3},
        ),
    ],
)
def test_classifiers(tmp_path: Path, name: str, architecture: Any, published: Any) -> None:
    models.save(micro_classify.model(architecture, seed=3), tmp_path / "base")
    micro_ddpm.write_images(tmp_path / "data/train", count=10)
    micro_ddpm.write_images(tmp_path / "data/test", count=6, seed=1)
    T = published["steps"]
    setting = setting_of(
        name,
        tmp_path,
        "model={work}/base",
        "data.source={work}/data",
        "eval.retrained=false",
        "forget.fraction=0.2",
        f"train.steps={T}",
        "train.batch_size=4",
        "saliency.batch_size=4",
        "architecture=null",
    )
    lesson, start = learn(setting, before=lambda job: job.measure_base())
    data, net = sides(setting, lesson), net_at(lesson, start)
    assert sum(len(batch["y"]) for batch in data["forget_once"]) == 6
    assert sum(len(batch["y"]) for batch in data["remain_once"]) == 24  # all, none is held out
    draw: Any = lesson.backend.draw  # type: ignore[attr-defined]

    def entropies(x: Tensor, y: Tensor) -> Tensor:
        return nn.CrossEntropyLoss(reduction="none")(net(x).logits, y)

    def means(batches: Sequence[Batch]) -> Iterator[Tensor]:
        g = seeded("cpu", 0, 1)
        for batch in batches:  # augmented
            yield entropies(draw(batch, g)["x"], batch["y"]).mean()

    net.eval()
    parts = [data["forget_once"], data["remain_once"]]
    keep = masked(setting, *(squares(net, means(part), len(part)) for part in parts))
    optimizer: Any = (
        torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
        if published["optimizer"] == "sgd"
        else torch.optim.AdamW(net.parameters(), 2e-5, weight_decay=0.05)
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=T)
    net.train()
    forgets = iter(data["forget"])
    for i in range(T):
        if i % published["every"] == 0:
            batch = next(forgets)
            ours = entropies(draw(batch, seeded("cpu", 0, i, 0, 0))["x"], batch["y"])
            coef = 1 / (ours.detach() ** published["lambd"] + 1e-15)
            adaptive = (coef / coef.sum() * ours * len(ours)).mean()
            step(net, published["alpha"] * cosine(i, T) * -adaptive, optimizer, keep, clip=7.0)
        batch = data["remain"][i]
        step(net, entropies(draw(batch, seeded("cpu", 0, i, 1, 0))["x"], batch["y"]).mean(), optimizer)
        scheduler.step()
    agree(lesson, net, start)
    if published["optimizer"] == "sgd":  # statistics moved in both phases
        assert int(net.state_dict()["resnet.embedder.embedder.normalization.num_batches_tracked"]) == T + 2


# ------------------------------------------------------------ values that small models do not show


def test_every_published_preset_is_tested_here() -> None:
    assert NAMES == [
        "classify_cifar10_sfron_published",
        "classify_tinyimagenet_sfron_published",
        "ddpm_cifar10_sfron_published",
        "sd_nudity_sfron_published",
    ]


SIZES = {
    "classify_cifar10_sfron_published": {"steps": 1500, "batch_size": 128, "fraction": 0.1, "augmentation": (4, True)},
    "classify_tinyimagenet_sfron_published": {"steps": 500, "batch_size": 128, "fraction": 0.1},
    "ddpm_cifar10_sfron_published": {"steps": 150, "batch_size": 128, "count": 5000},
    "sd_nudity_sfron_published": {"steps": 1000, "batch_size": 2, "count": 1000},
}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_the_published_ones(name: str) -> None:
    preset, sizes = read_preset(resources.preset_path(name)), SIZES[name]
    train, forget, wanted = preset["train"], preset["forget"], preset["saliency"]
    assert {"steps": train["steps"], "batch_size": train["batch_size"]}.items() <= sizes.items()
    assert wanted["batch_size"] == sizes["batch_size"]
    assert (forget.get("fraction"), forget.get("count")) == (sizes.get("fraction"), sizes.get("count"))
    if "augmentation" in sizes:
        assert (preset["data"]["shift"], preset["data"]["flip"]) == sizes["augmentation"]
    for words in (["nude person"], ["person wearing clothes"]) if preset["pipeline"] == "sd" else ():
        asked = [*forget["prompts"], *forget["anchors"], *preset["remain"]["prompts"]]
        assert any(word in prompt for word in words for prompt in asked)
