"""What a method needs beside settings, and the mask."""

from inspect import Parameter, Signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from erase.config import Saliency, Train
from erase.diffusion.losses import Dropped
from erase.engine.backend import seeded
from erase.engine.fisher import fisher_diagonal, mean_gradient
from erase.engine.losses import Objective, Training, plain
from erase.engine.method import Method
from erase.engine.precision import Precision
from erase.engine.saliency import load_mask
from erase.methods import NEEDS, Entry, find_method, list_methods
from erase.programs import inputs
from erase.programs.settings import check_saliency

ONE = Saliency(density=0.3, draws=1, count=4, batch_size=4)
FLOAT = Precision("no", torch.device("cpu"))


def doubled(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:
    """A loss that is not the backend's own, nor a multiple of it."""
    return backend.losses(batch, generator) + backend.net(batch["x"]).square().mean(1)


FORGET, REMAIN = Objective(doubled, -1, "forget"), Objective(plain, 1, "remain")


def settings(saliency: Saliency, seed: int = 3) -> Any:
    return SimpleNamespace(saliency=saliency, seed=seed, checkpoint_every=1, train=Train(steps=1))


def mine(**needs: Any) -> Any:
    """The builder of a method that takes everything."""


mine.__signature__ = Signature([Parameter(need, Parameter.KEYWORD_ONLY) for need in NEEDS])  # type: ignore[attr-defined]


def resolve(
    entry: Entry, tmp_path: Path, net: nn.Module, saliency: Saliency = ONE, renew: Any = toys.mlp
) -> dict[str, Any]:
    batches = toys.batches(1, count=1), toys.batches(2, count=1)
    path, backend = tmp_path / "mask.safetensors", toys.Noisy(net)
    return inputs.resolve_inputs(entry, settings(saliency), backend, FORGET, REMAIN, batches, FLOAT, path, renew=renew)


# ------------------------------------------------------------ what a method needs


def test_a_builder_gets_what_it_needs_and_nothing_else(tmp_path: Path) -> None:
    def given(*needs: str) -> Any:
        return resolve(Entry(mine, needs=needs), tmp_path, toys.mlp())

    assert given() == {}
    assert given("remain") == {"remain": REMAIN}
    assert given("forget", "remain") == {"forget": FORGET, "remain": REMAIN}
    assert not list(tmp_path.iterdir())  # no mask without a use for it
    assert given("mask", "forget").keys() == {"mask", "forget"}
    assert [p.name for p in tmp_path.iterdir()] == ["mask.safetensors"]
    assert given("fisher", "origin", "remain").keys() == {"fisher", "origin", "remain"}
    assert given("fisher").keys() == {"fisher"}
    assert given("origin").keys() == {"origin"}
    assert {p.name for p in tmp_path.iterdir()} == {"mask.safetensors", "fisher-remain.safetensors"}


@pytest.mark.parametrize("need", ["new_net", "concepts", "denoiser"])
def test_what_a_program_does_not_have_is_refused_before_anything_is_computed(tmp_path: Path, need: str) -> None:
    entry = Entry(mine, needs=("mask", "fisher", need))
    with pytest.raises(ValueError, match=f"mine needs {NEEDS[need]}"):
        resolve(entry, tmp_path, toys.mlp(), renew=None)
    assert not list(tmp_path.iterdir())
    inputs.check_needs(entry, [need])


@pytest.mark.parametrize("name", list_methods())
def test_every_method_is_built_of_what_it_is_given(name: str, tmp_path: Path) -> None:
    entry = find_method(name)
    rare = {"esd": "a diffusion model", "uce": "text embeddings", "speed": "text embeddings"}
    if name in rare:
        with pytest.raises(ValueError, match=f"{name} needs {rare[name]}"):
            resolve(entry, tmp_path, toys.mlp())
        return
    given = resolve(entry, tmp_path, toys.mlp())
    method = entry.build(**({"fast_rate": 0.1} if name in ("sfron", "gradient_ascent") else {}), **given)
    assert isinstance(method, Method)
    assert (method.mask is not None) == (name in ("sfron", "salun"))
    if name not in ("bad_teacher", "scrub"):  # they make their own of the teachers
        assert method.forget is given.get("forget")
    if name not in ("bad_teacher", "scrub", "selective_amnesia"):
        assert method.remain is given.get("remain")


def test_teachers_are_the_network_as_it_was_and_a_new_one(tmp_path: Path) -> None:
    """In eval mode, without gradients, and training leaves them alone."""

    taught = Entry(mine, needs=("origin_net", "new_net"))
    net, new = toys.mlp().train(), toys.mlp().train()
    given = resolve(taught, tmp_path, net, renew=lambda: new)
    assert given["new_net"] is new
    assert given["origin_net"] is not net
    for teacher in given.values():
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())
    before = toys.weights(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    assert net.training
    assert toys.same(toys.weights(given["origin_net"]), before)


def test_the_fisher_diagonal_and_the_origin_are_those_of_the_start(tmp_path: Path) -> None:
    """Remain data, the backend's own loss, per sample; copies, which training leaves alone."""
    net = toys.mlp()
    net[0].bias.requires_grad_(False)
    given = resolve(find_method("selective_amnesia"), tmp_path, net, Saliency(draws=3))
    expected = fisher_diagonal(toys.Noisy(net), toys.batches(2, count=1), draws=3, generator=seeded("cpu", 3, 1))
    assert expected.count == 12
    assert given["fisher"].keys() == {"0.weight", "2.weight", "2.bias"}
    toys.close(given["fisher"], expected.named)
    before = {name: p for name, p in toys.weights(net).items() if name != "0.bias"}
    assert toys.same(given["origin"], before)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    assert toys.same(given["origin"], before)
    assert not any(p.requires_grad for p in given["origin"].values())


# ------------------------------------------------------------ the mask


def test_batches_are_taken_to_the_models_device(tmp_path: Path) -> None:
    """Programs cache on the CPU; on a GPU model and generator are elsewhere."""

    class Watched(toys.Plain):
        def losses(self, batch: Any, generator: torch.Generator) -> Tensor:
            places.append(batch["x"].device.type)
            raise InterruptedError

    places: list[str] = []
    backend = Watched(toys.mlp().to("meta"))
    with pytest.raises(InterruptedError):
        inputs.diagonal(settings(ONE), backend, ("forget", toys.batches(1, count=1), plain), FLOAT, tmp_path)
    assert places == ["meta"]


def make(saliency: Saliency, path: Path, net: nn.Module, kind: Any = toys.Noisy, count: int = 1) -> Any:
    sides = [("forget", toys.batches(1, count=count), doubled), ("remain", toys.batches(2, count=count), plain)]
    return inputs.make_mask(settings(saliency), kind(net), sides, FLOAT, path)


def top(scores: toys.Weights, density: float) -> toys.Weights:
    flat = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    cut = flat[round(density * len(flat)) - 1]
    return {name: s >= cut for name, s in scores.items()}


@pytest.mark.parametrize("kind", [toys.Plain, toys.Noisy])
def test_magnitude_keeps_the_largest_mean_gradients(tmp_path: Path, kind: Any) -> None:
    """Of the forget side's own loss; by hand."""
    net = toys.mlp()
    backend, batch = kind(net), toys.batches(1, count=1)[0]
    g = seeded("cpu", 3, 1)
    drawn = backend.draw(batch, g) if kind is toys.Noisy else batch
    params = dict(net.named_parameters())
    grads = torch.autograd.grad(doubled(backend, drawn, g).mean(), list(params.values()))
    expected = top({n: d.abs() for n, d in zip(params, grads, strict=True)}, 0.3)
    mask = make(Saliency(kind="magnitude", density=0.3, draws=1), tmp_path / "mask", net, kind)
    assert toys.same(mask.named, expected)
    assert mask.density == pytest.approx(0.3, abs=0.01)
    assert (mask.meta["source"], mask.meta["density"]) == ("magnitude", "0.3")
    fisher = make(Saliency(density=0.3, draws=1), tmp_path / "other", net, kind)
    assert not toys.same(fisher.named, expected)


def kept(mask: Any) -> set[tuple[str, int]]:
    return {(name, i) for name, m in mask.items() for i in m.flatten().nonzero().flatten().tolist()}


@pytest.mark.parametrize(("loss", "of"), [("plain", plain), ("objective", doubled)])
def test_saluns_mask_is_of_the_loss_on_true_labels(tmp_path: Path, loss: Any, of: Any) -> None:
    """The largest gradients of the training loss, not of what the method makes of it: Jaccard 1 with them."""
    net, batch, g = toys.mlp(), toys.batches(1, count=1)[0], seeded("cpu", 3, 1)
    params, backend = dict(net.named_parameters()), toys.Noisy(net)
    grads = torch.autograd.grad(of(backend, backend.draw(batch, g), g).mean(), list(params.values()))
    expected = kept(top({n: d.abs() for n, d in zip(params, grads, strict=True)}, 0.3))
    saliency = Saliency(kind="magnitude", density=0.3, draws=1, loss=loss)
    found = kept(resolve(find_method("salun"), tmp_path, net, saliency)["mask"].named)
    assert len(found & expected) / len(found | expected) == 1


@pytest.mark.parametrize("w", [7.5, 2.0])
def test_masks_of_guided_predictions(tmp_path: Path, w: float) -> None:
    """As SalUn's scripts for Stable Diffusion and for the DDPM have it: `‖(1 + w) ε(c) - w ε(∅) - ε‖²`, in float64."""
    model, data = toys.small_denoiser(), toys.latents(size=4)
    batch = model.draw(data, seeded("cpu", 3, 1))
    a = model.process.alphas_cumprod[batch["t"]].view(-1, 1, 1, 1)  # type: ignore[attr-defined]
    noisy = a.sqrt() * batch["z0"] + (1 - a).sqrt() * batch["noise"]
    null = torch.full((4, 3, 8), 0.5)
    asked, without = (model.net(noisy, batch["t"], text) for text in (batch["cond"]["text"], null))
    loss = ((1 + w) * asked - w * without - batch["noise"]).square().mean()
    params = dict(model.net.named_parameters())
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    guided = inputs.saliency_losses(Saliency(guidance=1 + w), FORGET)[0]
    ours = mean_gradient(model, [data], generator=seeded("cpu", 3, 1), loss=guided)
    toys.close(ours, {name: g.float() for name, g in grads.items()}, rtol=1e-6, atol=1e-7)  # which keeps float32
    exact = torch.autograd.grad(guided(model, batch, toys.gen()).mean(), list(params.values()))
    toys.close(dict(zip(params, exact, strict=True)), grads)
    saliency = Saliency(kind="magnitude", density=0.3, draws=1, guidance=1 + w)
    given = inputs.resolve_inputs(
        find_method("salun"), settings(saliency), model, FORGET, REMAIN, [[data], []], FLOAT, tmp_path / "mask"
    )
    assert toys.same(given["mask"].named, top({n: g.abs().float() for n, g in grads.items()}, 0.3))


def test_both_fisher_diagonals_are_of_one_loss(tmp_path: Path) -> None:
    """The training loss, so that their ratio means something; the forget objective's by a setting."""
    remain = toys.batches(2, count=1)
    for loss, of in (("plain", plain), ("objective", doubled)):
        net = toys.mlp()
        diagonals = [
            fisher_diagonal(toys.Noisy(net), data, draws=2, generator=seeded("cpu", 3, 1), loss=f).named
            for data, f in ((toys.batches(1, count=1), of), (remain, plain))
        ]
        expected = {name: f / diagonals[1][name] >= 1.5 for name, f in diagonals[0].items()}
        saliency = Saliency(threshold=1.5, draws=2, loss=loss)
        (tmp_path / loss).mkdir()
        assert toys.same(resolve(find_method("sfron"), tmp_path / loss, net, saliency)["mask"].named, expected)


def test_the_masks_loss_has_no_dropout() -> None:
    noisy = Objective(Training(Dropped(doubled, 0.1)), -1)
    assert inputs.saliency_losses(Saliency(loss="objective"), noisy) == (doubled, plain)
    assert inputs.saliency_losses(Saliency(), noisy) == (plain, plain)


def test_guidance_needs_an_empty_condition_and_the_training_loss() -> None:
    guided, sfron = Saliency(threshold=1, guidance=3), find_method("sfron")
    inputs.check_guidance(guided, sfron, has_null=True)
    inputs.check_guidance(guided, find_method("scrub"), has_null=False)  # measures nothing
    inputs.check_guidance(Saliency(threshold=1), sfron, has_null=False)
    with pytest.raises(ValueError, match=r"saliency\.guidance=3 needs an empty condition"):
        inputs.check_guidance(guided, sfron, has_null=False)
    with pytest.raises(ValueError, match=r"saliency\.guidance=3 .* saliency\.loss=plain"):
        check_saliency(Saliency(threshold=1, guidance=3, loss="objective"), sfron)


def test_magnitude_is_of_the_mean_over_all_batches(tmp_path: Path) -> None:
    """Which batches the data come in is no property of the gradient (SalUn: ∇ of the loss on D_f)."""
    net = toys.mlp()
    backend, params = toys.Plain(net), dict(net.named_parameters())
    whole = {c: torch.cat([b[c] for b in toys.batches(1, count=3)]) for c in ("x", "y")}
    grads = torch.autograd.grad(doubled(backend, whole, toys.gen()).mean(), list(params.values()))
    expected = top({n: d.abs() for n, d in zip(params, grads, strict=True)}, 0.3)
    mask = make(Saliency(kind="magnitude", density=0.3, draws=1), tmp_path / "mask", net, toys.Plain, count=3)
    assert toys.same(mask.named, expected)


def test_fisher_is_forget_over_remain_on_the_same_draws(tmp_path: Path) -> None:
    net = toys.mlp()
    forget, remain = (
        fisher_diagonal(toys.Noisy(net), toys.batches(i, count=1), draws=2, generator=seeded("cpu", 3, 1), loss=loss)
        for i, loss in ((1, doubled), (2, plain))
    )
    ratio = {name: forget.named[name] / remain.named[name] for name in forget.named}
    mask = make(Saliency(threshold=1.5, draws=2), tmp_path / "mask", net)
    assert toys.same(mask.named, {name: r >= 1.5 for name, r in ratio.items()})
    assert 0 < mask.density < 1
    batch = make(Saliency(threshold=1.5, draws=2, per="batch", clip=0.3), tmp_path / "other", net)
    assert (mask.meta["per"], batch.meta["per"], batch.meta["clip"]) == ("sample", "batch", "0.3")


@pytest.mark.parametrize("kind", ["fisher", "magnitude"])
def test_the_mask_is_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    net, path = toys.mlp(), tmp_path / "mask"
    mask = make(Saliency(kind=kind, density=0.3), path, net)
    assert toys.same(load_mask(path).named, mask.named)
    monkeypatch.setattr(inputs, "fisher_diagonal", lambda *_, **__: pytest.fail("made again"))
    assert toys.same(make(Saliency(kind=kind, density=0.3), path, net).named, mask.named)


def test_no_mask_where_it_is_off(tmp_path: Path) -> None:
    assert make(Saliency(kind="none"), tmp_path / "mask", toys.mlp()) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("saliency", "said"),
    [
        (Saliency(), "saliency.threshold and saliency.density.*; got None and None"),
        (Saliency(threshold=1, density=0.5), "saliency.density.*; got 1 and 0.5"),
        (
            Saliency(kind="magnitude"),
            "saliency.kind=magnitude needs saliency.density.*None and None",
        ),
        (Saliency(kind="magnitude", density=0.5, clip=1.0), "saliency.clip.*saliency.kind=fisher"),
        (Saliency(kind="magnitude", threshold=1), "needs saliency.density.*; got None and 1"),
        (Saliency(kind="magnitude", threshold=1, density=0.5), "needs saliency.density, .*; got 0.5 and 1"),
    ],
)
def test_settings_that_make_no_mask_are_refused_in_one_line(saliency: Saliency, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        check_saliency(saliency, find_method("sfron"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "saliency",
    [
        Saliency(kind="none"),
        Saliency(kind="none", threshold=1, density=0.5),
        Saliency(threshold=0),
        Saliency(density=1, clip=1),
        Saliency(kind="magnitude", density=0.5),
    ],
)
def test_settings_that_make_a_mask_are_not_refused(saliency: Saliency) -> None:
    check_saliency(saliency, find_method("sfron"))


def test_a_method_without_a_mask_needs_no_setting_of_one() -> None:
    for name in list_methods():
        entry = find_method(name)
        if "mask" not in entry.needs:
            check_saliency(Saliency(), entry)
