"""Malicious and broken checkpoints: one clear line, no code run, nothing written but where it was asked for."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import micro_ddpm
import pytest
import torch
from safetensors.torch import load_file, save_file

from erase import cli
from erase.diffusion.checkpoints import convert, folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.model import open_model

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(micro_sd: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(micro_sd, tmp_path / "in/copy"))


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Run a command; its one line. Whatever it was given, nothing but `in/` may be there afterwards."""

    def refused(*words: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["erase", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("erase: ")]
        assert end.value.code == 2
        assert len(lines) == 1
        return lines[0]

    monkeypatch.chdir(tmp_path)
    yield refused
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


# --- pickles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "zip"])
def test_a_pickle_with_code_runs_none(refused: Callable[..., str], tmp_path: Path, form: str) -> None:
    path = tmp_path / "in/model.ckpt"
    path.parent.mkdir()
    what = {"state_dict": {"w": torch.zeros(1), "x": Trap(tmp_path / "trapped")}}
    if form == "plain":
        path.write_bytes(pickle.dumps(what, protocol=2))
    else:
        torch.save(what, path)
    for words in (
        ("convert", path, tmp_path / "out"),
        ("convert", path, tmp_path / "out.safetensors"),
        ("inspect", path),
        ("generate", path, "photos-plain", "--out", tmp_path / "out"),
        ("run", "sd", "sd_photos_sfron", f"model={path}", "--out", tmp_path / "out"),
        ("apply", path, path, "--out", tmp_path / "out"),
    ):
        assert ("not a safetensors file" if words[0] == "apply" else "holds more than weights") in refused(*words)
    met = (
        "torch.storage._load_from_bytes" if form == "plain" else f"{os.mkdir.__module__}.mkdir"
    )  # the first that it is
    said = refused("convert", path, tmp_path / "out")
    assert said.startswith(f"erase: {path} holds more than weights ({met})")
    assert "--allow-pickle" in said


def test_a_pickle_runs_code_only_when_that_is_allowed(tmp_path: Path) -> None:
    torch.save({"state_dict": {"x": Trap(tmp_path / "trapped")}}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="it is something else"):
        locate(tmp_path / "model.ckpt", trusted=True)
    assert (tmp_path / "trapped").is_dir()


@pytest.mark.parametrize("what", [[1, 2], {"state_dict": [1]}, None])
def test_a_pickle_of_something_else(tmp_path: Path, what: Any) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(what, path)
    with pytest.raises(ValueError, match=r"model\.ckpt: its state_dict is a list|model\.ckpt holds a (list|NoneType)"):
        locate(path)


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kept", [0.001, 0.01, 0.5, 0.99])
def test_a_pickle_cut_short(tmp_path: Path, zipped: bool, kept: float, trusted: bool) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"w": torch.randn(5000)}}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=r"model\.ckpt is cut short: get it again$"):
        locate(path, trusted=trusted)


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "empty"),
        (bytes(range(1, 256)) * 20, "data of unknown kind"),
        (b"version https://git-lfs.github.com/spec/v1\n", "text"),
        (b"<html></html>", "a page or XML"),
    ],
)
def test_what_is_no_pickle_is_not_to_be_trusted(tmp_path: Path, data: bytes, what: str, trusted: bool) -> None:
    (tmp_path / "model.ckpt").write_bytes(data)
    with pytest.raises(ValueError, match=rf"model\.ckpt is not a checkpoint, but {what}$"):
        locate(tmp_path / "model.ckpt", trusted=trusted)


def test_a_zip_archive_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.ckpt", "w") as archive:
        archive.writestr("notes.txt", "abc")
    with pytest.raises(ValueError, match=r"model\.ckpt is damaged, or not a checkpoint of torch \(RuntimeError\)"):
        locate(tmp_path / "model.ckpt")


def test_a_trusted_pickle_may_need_code_that_is_not_here(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02cno_such_module\nThing\n.")
    with pytest.raises(ValueError, match=r"holds more than weights .no_such_module.Thing., so it is not read"):
        locate(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"needs code that is not here .No module named 'no_such_module'"):
        locate(tmp_path / "model.ckpt", trusted=True)


# --- safetensors ----------------------------------------------------------------------------------


def raw(header: Any, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: int, end: int, shape: Any = (16,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BROKEN = {
    "empty": b"",
    "seven bytes": b"\x10" + b"\0" * 6,
    "header longer than the file": raw({"w": tensor(0, 64)}, length=10_000),
    "header shorter than it is": raw({"w": tensor(0, 64)}, length=20),
    "header of 2 GB": raw({"w": tensor(0, 64)}, length=2 * 1024**3),
    "header of all the world": raw({"w": tensor(0, 64)}, length=2**64 - 1),
    "negative offsets": raw({"w": tensor(-64, 0)}),
    "offsets that overlap": raw({"v": tensor(0, 64), "w": tensor(32, 96)}, b"\0" * 96),
    "offsets with a hole": raw({"v": tensor(0, 64), "w": tensor(128, 192)}, b"\0" * 192),
    "offsets past the end": raw({"w": tensor(0, 64)}, b"\0" * 32),
    "offsets that turn back": raw({"w": tensor(64, 0)}),
    "data that nothing names": raw({"w": tensor(0, 64)}, b"\0" * 128),
    "shape that does not fit": raw({"w": tensor(0, 64, (3,))}),
    "shape beyond all numbers": raw({"w": tensor(0, 64, (2**62, 2**62))}),
    "unknown dtype": raw({"w": tensor(0, 64, dtype="F31")}),
    "no JSON": raw(b"{" * 40),
    "not UTF-8": raw(b"\xff\xfe" * 20),
    "no mapping": raw([1, 2, 3]),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_broken_safetensors_are_refused_everywhere(
    refused: Callable[..., str], copy: Path, tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / "in/model.safetensors"
    path.write_bytes(data)
    said = "is cut short or not a safetensors file"
    assert said in refused("inspect", path)
    assert said in refused("convert", path, tmp_path / "out")
    assert said in refused("apply", copy, path, "--out", tmp_path / "out")
    for name in (UNET, VAE):
        old = (copy / name).read_bytes()
        (copy / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} {said}"):
            locate(copy)
        (copy / name).write_bytes(old)


@pytest.mark.parametrize("name", [UNET, VAE, "text_encoder/model.safetensors"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(0, dtype=torch.int8), "is of I8; weights are F16, BF16, F32 or F64"),
        (torch.tensor(float("nan")), "holds NaN or infinite values: the file is broken"),
        (torch.tensor(float("inf")), "holds NaN or infinite values: the file is broken"),
    ],
    ids=["integers", "NaN", "infinite"],
)
def test_what_is_no_weight_is_refused(copy: Path, tmp_path: Path, name: str, value: Any, said: str) -> None:
    weights = load_file(copy / name)
    first = next(iter(weights))
    weights[first] = weights[first].to(value.dtype) if not value.numel() else torch.full_like(weights[first], value)
    save_file(weights, copy / name, metadata={"format": "pt"})

    def use() -> None:
        open_model(locate(copy))

    def turn() -> None:
        source: Any = locate(copy)
        convert.to_file(source, tmp_path / "out.safetensors")

    for act in (use, turn):
        with pytest.raises(ValueError, match=said) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_ddpm_of_nan_is_refused(tmp_path: Path) -> None:
    micro_ddpm.model().save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / UNET)
    weights["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, tmp_path / "model" / UNET, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"conv_in\.weight holds NaN or infinite values"):
        open_model(locate(tmp_path / "model", "label"))


# --- folders --------------------------------------------------------------------------------------

NAMES = (
    *("../unet/x.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b", ".hidden", "a\nb", "a\0b"),
    *("m\u00f6del.safetensors", "\u202etsafetensors", "\uff0e\uff0e", 5, None),
)


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_in_a_list_of_shards(copy: Path, name: Any) -> None:
    index = copy / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name, "v": UNET.split("/")[1]}}))
    with pytest.raises(ValueError, match=r"index\.json names .*: a name may only have letters, digits") as caught:
        locate(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": 5}'])
def test_a_list_of_no_shards(copy: Path, text: str) -> None:
    (copy / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json lists no shards"):
        locate(copy)


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(n, str)], ids=repr)
def test_names_in_a_list_of_components(copy: Path, tmp_path: Path, name: str) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(ValueError, match=r"model_index\.json names .*: a name may only have letters, digits"):
        locate(copy)


@pytest.mark.parametrize("library", ["os", "my_code", "../evil", "diffusers.evil"])
def test_code_of_other_libraries_is_refused(copy: Path, library: str) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "scheduler": [library, "system"]}))
    with pytest.raises(ValueError, match=f"takes scheduler from '{library}'; allowed: diffusers, transformers"):
        locate(copy)


def test_a_missing_shard_is_named(refused: Callable[..., str], copy: Path, tmp_path: Path) -> None:
    index = copy / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "one.safetensors", "v": "two.safetensors"}}))
    (copy / "unet/one.safetensors").write_bytes((copy / UNET).read_bytes())
    assert "is incomplete: unet/two.safetensors is missing" in refused("convert", copy, tmp_path / "out.safetensors")


@pytest.mark.parametrize("kind", ["file", "folder", "relative", "dangling"])
def test_a_link_out_of_the_folder_is_refused(copy: Path, tmp_path: Path, kind: str) -> None:
    """What it leads to would end up in a model that is given away."""
    secret = tmp_path / "in/secret"
    secret.mkdir()
    (secret / "key.json").write_text("{}")
    place = copy / "tokenizer/link.json"
    target = {"file": secret / "key.json", "folder": secret, "relative": Path("../../secret/key.json")}
    place.symlink_to(target.get(kind, tmp_path / "nowhere"))
    for act in (lambda: locate(copy), lambda: folders.check("x", copy, ("unet",), ("unet",), "sd")):
        with pytest.raises(ValueError, match=r"tokenizer/link\.json is a link out of the folder, to "):
            act()


def test_a_link_within_the_folder_is_fine(copy: Path) -> None:
    (copy / UNET).rename(copy / "weights")
    (copy / UNET).symlink_to("../weights")
    assert locate(copy)
