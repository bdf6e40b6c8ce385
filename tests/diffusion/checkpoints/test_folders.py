"""Lone UNets, and what holds of every kind of checkpoint. Pipelines: `test_stable_diffusion.py`."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import micro_ddpm
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from erase.diffusion import class_conditional
from erase.diffusion.checkpoints import folders
from erase.store.files import sha256

FILE = "diffusion_pytorch_model.safetensors"
MOVED = "class_embedding.weight"


@pytest.fixture(scope="module")
def net() -> Any:
    return micro_ddpm.model().unet


@pytest.fixture
def lone(net: Any, tmp_path: Path) -> Path:
    """A UNet's own folder, as diffusers writes it."""
    net.save_pretrained(tmp_path / "lone")
    return tmp_path / "lone"


def find(folder: Path) -> folders.Source:
    return folders.check(str(folder), folder, (), (".",), "ddpm")


def tree(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def change(net: Any) -> dict[str, Tensor]:
    return {name: p.detach() + 0.25 for name, p in net.named_parameters() if "class_embedding" in name}


def expected(net: Any) -> dict[str, Tensor]:
    return {**net.state_dict(), **change(net)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def test_a_lone_unet_is_found(lone: Path) -> None:
    source = find(lone)
    assert (source.folder, source.trained, source.variant) == (lone, ".", None)
    assert source.weights == [lone / FILE]
    assert folders.fingerprint(source) == {FILE: sha256(lone / FILE)}


def test_a_lone_unet_is_written_as_it_came(lone: Path, net: Any, tmp_path: Path) -> None:
    source = find(lone)
    folders.save(source, {}, tmp_path / "unchanged", {})
    assert tree(tmp_path / "unchanged") == tree(lone) == {"config.json", FILE}
    assert same(load_file(tmp_path / "unchanged" / FILE), net.state_dict())
    folders.save(source, change(net), tmp_path / "deep/changed", {"erase": "x"})
    out = tmp_path / "deep/changed"
    assert (out / "config.json").read_bytes() == (lone / "config.json").read_bytes()
    assert same(load_file(out / FILE), expected(net))
    with safe_open(out / FILE, framework="pt") as f:
        assert f.metadata() == {"format": "pt", "erase": "x"}
    assert same(UNet2DModel.from_pretrained(out).state_dict(), expected(net))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["changed"]
    assert same(load_file(lone / FILE), net.state_dict())  # the original stays


def test_what_is_written_of_a_read_only_folder_can_be_written_to(lone: Path, net: Any, tmp_path: Path) -> None:
    lone.chmod(0o555)
    folders.save(find(lone), change(net), tmp_path / "out", {})
    lone.chmod(0o755)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_half_precision_stays_half(net: Any, tmp_path: Path) -> None:
    half = {name: t.half() for name, t in net.state_dict().items()}
    (tmp_path / "half").mkdir()
    net.save_config(tmp_path / "half")
    save_file(half, tmp_path / "half" / FILE, metadata={"format": "pt"})
    folders.save(find(tmp_path / "half"), change(net), tmp_path / "out", {})
    moved = {name: t.half() for name, t in change(net).items()}
    assert same(load_file(tmp_path / "out" / FILE), {**half, **moved})


def test_other_weights_and_folders_beside_a_lone_unet_are_left_out(lone: Path, net: Any, tmp_path: Path) -> None:
    """They could still hold what was forgotten."""
    weights = (lone / FILE).read_bytes()
    for name in (
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.non_ema.safetensors",
        "diffusion_pytorch_model.bin",
        "model.ckpt",
        "unet/diffusion_pytorch_model.safetensors",
        "unet_ema/diffusion_pytorch_model.safetensors",
        "checkpoint-500/model.safetensors",
        ".git/objects/pack",
    ):
        (lone / name).parent.mkdir(parents=True, exist_ok=True)
        (lone / name).write_bytes(weights)
    (lone / "README.md").write_text("kept")
    folders.save(find(lone), change(net), tmp_path / "out", {})
    assert tree(tmp_path / "out") == {"config.json", FILE, "README.md"}
    assert same(load_file(tmp_path / "out" / FILE), expected(net))


def shard(net: Any, folder: Path, variant: str | None = None) -> None:
    net.save_pretrained(folder, max_shard_size="60KB", variant=variant)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_of_a_lone_unet_stay_shards(net: Any, tmp_path: Path, variant: str | None) -> None:
    lone = tmp_path / "lone"
    shard(net, lone, variant)
    source = find(lone)
    assert source.variant == variant
    assert len(source.weights) > 1
    assert set(folders.fingerprint(source)) == {p.name for p in source.weights}
    folders.save(source, change(net), tmp_path / "out", {})
    assert tree(tmp_path / "out") == tree(lone)
    assert (tmp_path / "out" / source.index.name).read_bytes() == source.index.read_bytes()
    found = {k: v for p in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(p).items()}
    assert same(found, expected(net))
    assert same(UNet2DModel.from_pretrained(tmp_path / "out", variant=variant).state_dict(), expected(net))


def test_the_list_of_shards_that_are_left_out_is_left_out(net: Any, tmp_path: Path) -> None:
    lone = tmp_path / "lone"
    shard(net, lone, "fp16")
    net.save_pretrained(lone)
    assert find(lone).variant is None
    folders.save(find(lone), change(net), tmp_path / "out", {})
    assert tree(tmp_path / "out") == {"config.json", FILE}


def test_a_missing_shard_is_named(net: Any, tmp_path: Path) -> None:
    shard(net, tmp_path / "lone")
    gone = find(tmp_path / "lone").weights[1]
    gone.unlink()
    with pytest.raises(ValueError, match=rf"lone is incomplete: {gone.name} is missing"):
        find(tmp_path / "lone")


def test_pickled_weights_are_written_as_safetensors(lone: Path, net: Any, tmp_path: Path) -> None:
    torch.save(load_file(lone / FILE), lone / "diffusion_pytorch_model.bin")
    (lone / FILE).unlink()
    source = find(lone)
    assert source.weights == [lone / "diffusion_pytorch_model.bin"]
    folders.save(source, change(net), tmp_path / "out", {})
    assert tree(tmp_path / "out") == {"config.json", FILE}
    assert same(load_file(tmp_path / "out" / FILE), expected(net))
    (lone / "diffusion_pytorch_model.bin").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin is not a checkpoint, but text"):
        folders.save(source, change(net), tmp_path / "other", {})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("file", "data", "said"),
    [
        (FILE, b"", f"{FILE} is cut short or not a safetensors file"),
        (FILE, b"\xff" * 64, f"{FILE} is cut short or not a safetensors file"),
        ("config.json", b'{"_class', r"config\.json: not JSON, or cut short"),
        (FILE, None, r"has no weights \(diffusion_pytorch_model\.safetensors\)"),
    ],
)
def test_damaged_lone_unets_are_refused_in_one_line(lone: Path, file: str, data: bytes | None, said: str) -> None:
    if data is None:
        (lone / file).unlink()
    else:
        (lone / file).write_bytes(data)
    with pytest.raises(ValueError, match=said) as caught:
        find(lone)
    assert "\n" not in str(caught.value)


def test_weights_cut_short_are_refused(lone: Path) -> None:
    data = (lone / FILE).read_bytes()
    for keep in (4, 100, len(data) - 1):
        (lone / FILE).write_bytes(data[:keep])
        with pytest.raises(ValueError, match=f"{FILE} is cut short"):
            find(lone)


def test_saving_a_lone_unet_refuses(lone: Path, tmp_path: Path) -> None:
    source = find(lone)
    (tmp_path / "there").mkdir()
    for tensors, out, said in (
        ({}, "there", "there exists: choose another folder"),
        ({"qqqq": torch.zeros(1)}, "out", "lone has no tensor named 'qqqq'"),
        ({MOVED: torch.zeros(1)}, "out", r"class_embedding\.weight has shape \[4, 32\], got \[1\]"),
        (
            {MOVED: torch.full((4, 32), float("nan"))},
            "out",
            r"class_embedding\.weight holds values beyond the range of float32",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            folders.save(source, tensors, tmp_path / out, {})
    assert {p.name for p in tmp_path.iterdir()} == {"lone", "there"}
    assert not list((tmp_path / "there").iterdir())


def test_two_saves_are_the_same_bytes(lone: Path, net: Any, tmp_path: Path) -> None:
    meta = {str(i): str(i) for i in range(10)}
    for name in ("a", "b"):
        folders.save(find(lone), change(net), tmp_path / name, meta)
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


# ------------------------------------------------------------ finding, without a hub


def test_there_is_no_hub_without_a_downloader(lone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folders.find(lone) == lone
    for name in ("nobody/nothing", "none", str(lone / "none")):
        with pytest.raises(ValueError, match=rf"no model '{name}': .*one of: ") as caught:
            folders.find(name)
        assert "hub id" not in str(caught.value)
    with pytest.raises(ValueError, match=r"config\.json is a file, and no model .*; give a diffusers folder or one of"):
        folders.find(lone / "config.json")
    monkeypatch.chdir(lone.parent)
    assert folders.find("lone") == Path("lone")


def test_a_repository_that_holds_16_bits_alone_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, local_files_only: bool, variant: str | None = None) -> str:
        asked.append(variant)
        (tmp_path / "unet").mkdir(exist_ok=True)
        if variant == "fp16":
            raise ValueError("no such modeling files are available")
        if variant == "bf16":
            (tmp_path / "unet/diffusion_pytorch_model.bf16.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(folders.hub_client, "reachable", lambda name: True)
    for expected in ([None, "fp16", "bf16"], [None]):  # the second time it is there
        asked.clear()
        assert folders.find("somebody/model", SimpleNamespace(download=download)) == tmp_path
        assert asked == expected


def test_a_folder_without_an_index_is_no_pipeline(tmp_path: Path) -> None:
    for text in (None, "[]", "null"):
        if text is not None:
            (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match=r"is not a diffusers pipeline: it has no model_index\.json"):
            folders.read_index(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "b"]}))
    assert folders.read_index(tmp_path) == {"_class_name": None, "unet": ["diffusers", "b"]}


def test_what_is_no_component_is_not_looked_at(tmp_path: Path) -> None:
    class_conditional.save_new(micro_ddpm.model(), tmp_path / "mine")
    (tmp_path / "mine/notes").mkdir()
    (tmp_path / "mine/notes/old.safetensors").write_bytes(b"cut short")
    folders.check("mine", tmp_path / "mine", ("unet", "scheduler"), ("unet",), "ddpm")
    (tmp_path / "mine/scheduler/old.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"old\.safetensors"):
        folders.check("mine", tmp_path / "mine", ("unet", "scheduler"), ("unet",), "ddpm")


def test_a_part_that_is_missing_is_named(lone: Path, tmp_path: Path) -> None:
    shutil.copytree(lone, tmp_path / "pipe/unet")
    (tmp_path / "pipe/model_index.json").write_text("{}")
    whole: Any = ("pipe", tmp_path / "pipe", ("unet", "scheduler"), ("unet_ema", "unet"), "ddpm")
    with pytest.raises(ValueError, match="pipe is incomplete: the subfolder scheduler is missing"):
        folders.check(*whole)
    (tmp_path / "pipe/scheduler").mkdir()
    assert folders.check(*whole).weights == [tmp_path / "pipe/unet" / FILE]
