import json
import sys
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from accelerate.utils import DistributedType
from torch import Tensor, nn

from erase.config import Saliency, Train
from erase.engine.backend import seeded
from erase.engine.fisher import fisher_diagonal
from erase.engine.losses import Objective, plain
from erase.engine.method import Method
from erase.engine.precision import Precision
from erase.engine.saliency import load_mask
from erase.methods import NEEDS, Entry, find_method, list_methods
from erase.programs import folder, inputs, launching, training

ONE = Saliency(density=0.3, draws=1, count=4, batch_size=4)
FLOAT = Precision("no", torch.device("cpu"))


def doubled(backend: Any, batch: Any, generator: torch.Generator) -> Tensor:
    """A loss that is not the backend's own, nor a multiple of it."""
    return backend.losses(batch, generator) + backend.net(batch["x"]).square().mean(1)


FORGET, REMAIN = Objective(doubled, -1, "forget"), Objective(plain, 1, "remain")


def settings(saliency: Saliency, seed: int = 3) -> Any:
    return SimpleNamespace(saliency=saliency, seed=seed, checkpoint_every=1)


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
    rare = {"esd": "a diffusion model", "uce": "text embeddings"}
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
    batch = make(Saliency(threshold=1.5, draws=2, per="batch"), tmp_path / "other", net)
    assert (mask.meta["per"], batch.meta["per"]) == ("sample", "batch")


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
        (Saliency(), "the mask needs saliency.threshold or saliency.density, not both .*; got None and None"),
        (Saliency(threshold=1, density=0.5), "not both .*; got 1 and 0.5"),
        (
            Saliency(kind="magnitude"),
            "saliency.kind=magnitude needs saliency.density, and no threshold .*None and None",
        ),
        (Saliency(kind="magnitude", threshold=1), "needs saliency.density, and no threshold .*; got None and 1"),
        (Saliency(kind="magnitude", threshold=1, density=0.5), "needs saliency.density, .*; got 0.5 and 1"),
    ],
)
def test_settings_that_make_no_mask_are_refused_in_one_line(saliency: Saliency, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        inputs.check_saliency(saliency, find_method("sfron"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "saliency",
    [
        Saliency(kind="none"),
        Saliency(kind="none", threshold=1, density=0.5),
        Saliency(threshold=0),
        Saliency(density=1),
        Saliency(kind="magnitude", density=0.5),
    ],
)
def test_settings_that_make_a_mask_are_not_refused(saliency: Saliency) -> None:
    inputs.check_saliency(saliency, find_method("sfron"))


# ------------------------------------------------------------ the folder


@dataclass(frozen=True)
class Config:
    seed: int = 0
    steps: int = 5
    places: list[Path] = field(default_factory=list)


RECORD: dict[str, Any] = {"plan": {"forget": [1]}, "base": {"weights": {"a": "0"}}}


def tree(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_run_json_holds_what_makes_the_run(tmp_path: Path) -> None:
    for out in (tmp_path / "deep/new", tmp_path / "empty"):
        if out.name == "empty":
            out.mkdir()
        folder.open_folder(Config(seed=4, places=[Path("x")]), out, RECORD, "erase run", resume=False)
        run = json.loads((out / "run.json").read_text())
        assert run.items() >= {**RECORD, "schema": 1, "command": "erase run", "seed": 4}.items()
        assert run["config"] == {"seed": 4, "steps": 5, "places": ["x"]}
        assert run["versions"].keys() == set(folder.PACKAGES)
        assert [p.name for p in out.iterdir()] == ["run.json"]


def test_a_run_is_gone_on_with_where_it_is_the_same(tmp_path: Path) -> None:
    folder.open_folder(Config(), tmp_path / "out", RECORD, "first", resume=True)  # nothing there yet
    before = tree(tmp_path)
    folder.open_folder(Config(), tmp_path / "out", RECORD, "second", resume=True)
    assert tree(tmp_path) == before
    assert json.loads((tmp_path / "out/run.json").read_text())["command"] == "first"


@pytest.mark.parametrize(
    ("config", "record", "key"),
    [
        (Config(steps=6), RECORD, "config"),
        (Config(seed=1), RECORD, "config"),
        (Config(), {**RECORD, "plan": {"forget": [2]}}, "plan"),
        (Config(), {**RECORD, "base": {}}, "base"),
        (Config(), {**RECORD, "data": {"sha256": "1"}}, "data"),
    ],
)
def test_another_run_is_not_gone_on_with(tmp_path: Path, config: Config, record: dict[str, Any], key: str) -> None:
    out = tmp_path / "out"
    folder.open_folder(Config(), out, RECORD, "", resume=False)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=f"out holds a run with another {key} \\(.+, now .+\\): resume with the same"):
        folder.open_folder(config, out, record, "", resume=True)
    with pytest.raises(ValueError, match="out is not empty: choose another --out, or --resume the run that is there"):
        folder.open_folder(Config(), out, RECORD, "", resume=False)
    assert tree(tmp_path) == before


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    before = tree(tmp_path)
    for resume, said in (
        (False, "is not empty: choose another --out"),
        (True, "holds no run to go on with: choose an"),
    ):
        with pytest.raises(ValueError, match="file is a file: --out names a folder"):
            folder.open_folder(Config(), tmp_path / "file", RECORD, "", resume)
        with pytest.raises(ValueError, match=f"mine {said}"):
            folder.open_folder(Config(), tmp_path / "mine", RECORD, "", resume)
    assert tree(tmp_path) == before


def test_a_broken_run_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"config": ')
    with pytest.raises(ValueError, match=r"run\.json: not JSON, or cut short") as caught:
        folder.open_folder(Config(), tmp_path, RECORD, "", resume=True)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------ the rest


@dataclass(frozen=True)
class Launched:
    precision: str
    tracker: str = "jsonl"
    train: Train = field(default_factory=lambda: Train(steps=1, batch_size=4))


def test_a_start_resolves_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    resolved, accelerator, precision, say = launching.start(Launched("auto"), said.append)  # type: ignore[type-var]
    assert resolved.precision == accelerator.mixed_precision == precision.name != "auto"
    say("heard")
    assert said == ["heard"]


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_weights_spread_over_processes_are_refused_before_work(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(launching.Accelerator, "distributed_type", DistributedType(kind))
    with pytest.raises(ValueError, match=f"{kind} is not supported: masks need whole weights"):
        launching.start(Launched("no"), lambda line: None)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_optimizers(name: Any, kind: Any) -> None:
    train = Train(steps=1, lr=0.02, optimizer=name, weight_decay=0.1, momentum=0.7)
    made = training.make_optimizer(train, list(toys.mlp().parameters()))
    assert type(made) is kind
    group = made.param_groups[0]
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.02, 0.1, 4)
    assert group.get("momentum") == (0.7 if name == "sgd" else None)


def test_one_process_makes_runs_of_several_precisions() -> None:
    for name in ("no", "fp16", "bf16", "no"):  # as a comparison does
        config, accelerator, precision, _ = launching.start(Launched(name), lambda line: None)  # type: ignore[type-var]
        assert (config.precision, precision.name) == (name, name)
        assert accelerator.mixed_precision == name


def test_eight_bits_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Launched("no", train=Train(steps=1, optimizer="adam8bit"))
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"adam8bit needs bitsandbytes: pip install 'erase\[adam8bit\]', or use adam"):
        launching.start(config, lambda line: None)  # type: ignore[type-var]
    made: list[Any] = []
    optim = SimpleNamespace(Adam8bit=lambda params, **settings: made.append(settings))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=optim))
    training.make_optimizer(Train(steps=1, optimizer="adam8bit", lr=0.1), [])
    assert made == [{"lr": 0.1, "weight_decay": 0.0}]


def test_eight_bits_are_tried_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cardless:
        def __init__(self, params: list[torch.nn.Parameter], **settings: float) -> None: ...

        def step(self) -> None:
            raise NotImplementedError("no CPU kernel")

    monkeypatch.setattr(launching, "find_spec", lambda name: object())
    monkeypatch.setattr(training, "version", lambda name: "0.43.0")
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(Adam8bit=Cardless)))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    config = Launched("no", train=Train(steps=1, optimizer="adam8bit"))
    with pytest.raises(ValueError, match=r"bitsandbytes 0\.43\.0 does not run on cpu \(no CPU kernel\): update it, or"):
        launching.start(config, lambda line: None)  # type: ignore[type-var]


def test_eight_bits_run_and_resume() -> None:
    pytest.importorskip("bitsandbytes")
    training.check_adam8bit(torch.device("cpu"))
    train = Train(steps=1, lr=0.1, optimizer="adam8bit")
    first, second = (torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2))
    whole, stopped = training.make_optimizer(train, [first]), training.make_optimizer(train, [second])
    for step in range(4):
        if step == 2:
            state, stopped = stopped.state_dict(), training.make_optimizer(train, [second])
            stopped.load_state_dict(state)
        for weight, optimizer in ((first, whole), (second, stopped)):
            weight.grad = weight.detach() + step
            optimizer.step()
    assert {value.dtype for value in whole.state[first].values() if isinstance(value, torch.Tensor)} >= {torch.uint8}
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.ones(64, 64))


def test_steps_that_were_timed_speak_for_those_that_were_not() -> None:
    assert training.Steps(10, 0.5).timing == {"erase_s": 5.0, "steps": 10, "step_s": 0.5}
    assert training.Steps(10, None).timing == {"erase_s": None, "steps": 10, "step_s": None}
