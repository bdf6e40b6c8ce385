"""Single files: what is told of them, what is written again, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from erase.diffusion.checkpoints import convert, folders, ldm, networks, released, single_file
from erase.diffusion.checkpoints.header import NAMES, TEXTS
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.describe import describe
from erase.diffusion.model import open_model
from erase.store.safetensors import digest, open_safetensors

MOVED = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
LDM_MOVED = f"model.diffusion_model.{MOVED.replace('mid_block.attentions.0', 'middle_block.1')}"
QUANT = "first_stage_model.quant_conv.bias"


@pytest.fixture(scope="module")
def file(micro_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed by a test."""
    source = locate(micro_sd)
    assert isinstance(source, folders.Source)
    out = tmp_path_factory.mktemp("single") / "micro.safetensors"
    convert.to_file(source, out)
    return out


Edit = Callable[..., Path]


@pytest.fixture
def edit(file: Path, tmp_path: Path) -> Edit:
    """The file with other tensors or another header; `None` takes one out."""

    def edit(tensors: dict[str, Tensor | None] | None = None, **header: str | None) -> Path:
        old, meta = open_safetensors(file)
        whole = {n: t for n, t in {**old, **(tensors or {})}.items() if t is not None}
        out = tmp_path / "edited.safetensors"
        save_file(whole, out, metadata={k: v for k, v in {**meta, **header}.items() if v is not None})
        return out

    return edit


# --- what it is -----------------------------------------------------------------------------------


def test_a_file_is_told_of_like_its_folder(file: Path, micro_sd: Path) -> None:
    one, other = describe(locate(file)), describe(locate(micro_sd))
    assert one.pop("kind") == "Stable Diffusion single file"
    assert other.pop("kind") == "Stable Diffusion pipeline"
    assert one == other
    assert digest(folders.tensors(locate(file))) == digest(folders.tensors(locate(micro_sd)))
    assert folders.fingerprint(locate(file)).keys() == {"micro.safetensors"}


def pretend(monkeypatch: pytest.MonkeyPatch, width: int, header: dict[str, str], **changes: Any) -> None:
    """A released file, without values."""
    seen = {
        released.WIDTH: torch.empty(1, width, device="meta"),
        released.FIRST: torch.empty(1, 4, device="meta"),
    }
    texts = released.released(Path("x"), seen, {"modelspec.prediction_type": "v"}, None)
    shapes = networks.shapes(texts, ldm.SD.parts)
    tensors: dict[str, Tensor] = {}
    for name, place in ldm.SD.places(shapes, {p: json.loads(texts[f"{p}/config.json"]) for p in ldm.SD.parts}).items():
        tensors[name] = torch.empty(place.size(shapes), dtype=torch.float16, device="meta")
    monkeypatch.setattr(single_file, "read", lambda path, trusted: ({**tensors, **changes}, header, ()))


@pytest.mark.parametrize(
    ("width", "header", "prediction", "told"),
    [
        (768, {}, None, ("epsilon", 512, "CLIPTextModel")),
        (768, {}, "v_prediction", ("v_prediction", 512, "CLIPTextModel")),  # as diffusers has it
        (1024, {"modelspec.prediction_type": "v"}, None, ("v_prediction", 768, "CLIPTextModel")),
        *(
            pytest.param(1024, *said, ("epsilon", 512, "CLIPTextModel"), marks=pytest.mark.slow)
            for said in (({"modelspec.prediction_type": "epsilon"}, None), ({}, "epsilon"))
        ),
    ],
)
def test_files_of_others_are_known_by_their_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, header: Any, prediction: Any, told: Any
) -> None:
    pretend(monkeypatch, width, header)
    (tmp_path / "x.safetensors").touch()
    found = describe(locate(tmp_path / "x.safetensors", prediction=prediction))
    assert (found["prediction_type"], found["resolution"], found["index"]["text_encoder"][1]) == told
    assert found["text_width"] == width
    assert found["unet_weights"] in (859_520_964, 865_910_724)  # 1.x, 2.x


def test_files_of_others_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.touch()
    inpainting = {released.FIRST: torch.empty(320, 9, 3, 3, device="meta")}
    wide = {released.WIDTH: torch.empty(320, 2048, device="meta")}
    for width, changes, said in (
        (1024, {}, "does not say what it predicts: make it a folder with erase convert --prediction epsilon"),
        (768, inpainting, "9 input channels: inpainting and depth models are not supported"),
        (768, wide, "cross-attention is 2048 wide; 1.x has 768 and 2.x has 1024"),
        (768, {QUANT: torch.empty(9, device="meta")}, r"quant_conv\.bias must have the shape \[8\]; got \[9\]"),
    ):
        pretend(monkeypatch, width, {}, **changes)
        with pytest.raises(ValueError, match=said) as caught:
            locate(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("conditioner.embedders.0.model.x", "the refiner of Stable Diffusion XL"),
        ("lora_unet_down_blocks_0.lora_up.weight", "a LoRA"),
        ("down_blocks.0.resnets.0.norm1.weight", "a diffusers UNet's weights"),
        ("first_stage_model.encoder.mid.block_1.norm1.weight", "an autoencoder's weights"),
        ("text_model.encoder.layers.0.x", "a text encoder's weights"),
        ("double_blocks.0.x", "a diffusion transformer"),
        ("emb_params", "a textual inversion"),
        ("distilled_guidance_layer.in_proj.bias", "Chroma"),
        ("edm_mean", "Playground 2.5"),
        ("edm_vpred.sigma_max", "CosXL"),
        ("embedder.model.visual.x", "a model that is conditioned on images"),
        ("w", "something else"),
    ],
)
def test_other_files_are_named(tmp_path: Path, name: str, kind: str) -> None:
    save_file({name: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"not a single file of a model that erase opens: it is {kind}"):
        locate(tmp_path / "x.safetensors")


# --- writing it again -----------------------------------------------------------------------------


def test_only_the_trained_weights_change(edit: Edit, tmp_path: Path) -> None:
    extra = {
        "alphas_cumprod": torch.rand(5),
        "model_ema.decay": torch.rand(()),
        "model_ema.diffusion_modelmiddle_block1normweight": torch.rand(3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
    }
    path = edit(dict(extra), erase="0", erase_method="old", ss_author="somebody")
    before, header = open_safetensors(path)
    change = {MOVED: before[LDM_MOVED].float() + 0.25}
    folders.save(locate(path), change, tmp_path / "out", {"erase": "1"})
    after, meta = open_safetensors(tmp_path / "out" / folders.SINGLE)
    averages = {n for n in before if n.startswith("model_ema.")}
    assert after.keys() == before.keys() - averages  # they would still hold the concept
    for name in after:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], change[MOVED].half() if name == LDM_MOVED else before[name]), name
    del header["erase_method"]
    assert meta == {**header, "erase": "1"}
    assert torch.equal(open_model(locate(tmp_path / "out")).net.get_parameter(MOVED), change[MOVED].half().float())


def test_a_file_can_be_written_as_a_file(file: Path, micro_sd: Path, tmp_path: Path) -> None:
    folders.save(locate(file), {}, tmp_path / "same.safetensors", {})
    assert (tmp_path / "same.safetensors").read_bytes() == file.read_bytes()
    with pytest.raises(ValueError, match=r"is the name of a single file, but .* is a folder"):
        folders.save(locate(micro_sd), {}, tmp_path / "x.safetensors", {})


def test_saving_a_file_refuses(file: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for tensors, out, said in (
        ({}, "there", "there exists: choose another folder"),
        ({"qqqq": torch.zeros(1)}, "out", "has no tensor named 'qqqq' in its unet"),
        ({MOVED: torch.zeros(1)}, "out", r"has shape \[16, 16\], got \[1\]"),
        ({MOVED: torch.full((16, 16), 1e6)}, "out", f"{MOVED} holds values beyond the range of float16"),
    ):
        with pytest.raises(ValueError, match=said):
            folders.save(locate(file), tensors, tmp_path / out, {})
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({QUANT: None}, "is incomplete: it lacks first_stage_model.quant_conv.bias"),
        ({QUANT: torch.zeros(3).half()}, r"quant_conv.bias must have the shape \[8\]; got \[3\]"),
        ({QUANT: torch.zeros(8, dtype=torch.int32)}, "quant_conv.bias is of I32; weights are F16, BF16, F32 or F64"),
        ({LDM_MOVED: torch.zeros(16, 16, dtype=torch.float8_e4m3fn)}, r"is fp8 \(float8_e4m3fn\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(edit: Edit, tensors: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        locate(edit(tensors))


def texts_with(file: Path, **changes: Any) -> str:
    texts = json.loads(open_safetensors(file)[1][TEXTS])
    for name, text in changes.items():
        texts[name] = text
    return json.dumps({n: t for n, t in texts.items() if t is not None})


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"../evil.json": "{}"}, r"its header names '\.\./evil\.json'"),
        ({"/tmp/evil.json": "{}"}, "its header names '/tmp/evil.json'"),
        ({"unet/../../evil.json": "{}"}, "its header names 'unet/"),
        ({"unet/evil.py": "print()"}, "its header names 'unet/evil.py'"),
        ({"unet/\u202ejson.config": "{}"}, "its header names"),
        ({"scheduler/\uff0e\uff0e/a.json": "{}"}, "its header names"),
        ({"unet/config.json": "{"}, r"unet/config\.json in its header is not JSON"),
        ({"unet/config.json": "[]"}, "the configurations in its header must be JSON objects"),
        ({"unet/config.json": None}, "its header lacks unet/config.json"),
        ({"unet/config.json": '{"block_out_channels": [7]}'}, "the configuration does not make a network"),
        ({"unet/config.json": '{"layers_per_block": 1000000000}'}, "layers_per_block is 1000000000; at most 1000"),
        ({"model_index.json": None}, r"its header lacks model_index\.json"),
        ({"model_index.json": '{"unet": ["os", "system"]}'}, "takes unet from 'os'; allowed: diffusers, transformers"),
        ({"unet/config.json": 5}, "its header names 'unet/config.json'"),
    ],
)
def test_a_header_that_lies_is_refused(edit: Edit, file: Path, tmp_path: Path, texts: Any, said: str) -> None:
    path = edit({}, **{TEXTS: texts_with(file, **texts)})
    with pytest.raises(ValueError, match=said) as caught:
        locate(path)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["edited.safetensors"]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({TEXTS: "{"}, "diffusers_folder in its header is not JSON"),
        ({TEXTS: "[]"}, "diffusers_folder in its header must be a JSON object; got a list"),
        ({NAMES: '{"odd": []}'}, "must hold names of tensors of unet, vae, text_encoder"),
        ({NAMES: '{"vae": [5]}'}, "must hold names of tensors of unet, vae, text_encoder"),
        ({NAMES: '{"vae": ["quant_conv.bias"]}'}, "do not fit its tensors, such as first_stage_model"),
        ({NAMES: '{"vae": ["../x"]}'}, "has no place in a single file"),
    ],
)
def test_a_broken_header_is_refused(edit: Edit, header: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        locate(edit({}, **header))


def test_a_file_beside_a_configuration_is_what_a_text_model_is_asked_for(
    file: Path, micro_sd: Path, tmp_path: Path
) -> None:
    shutil.copy(file, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert locate(tmp_path, "text").place == tmp_path / file.name
    with pytest.raises(ValueError, match="it is a text encoder's weights"):
        locate(micro_sd / "text_encoder", "text")


def test_what_is_no_model_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "x.bin").touch()
    with pytest.raises(ValueError, match=r"x\.bin is not a model: a single file is \.safetensors or \.ckpt"):
        locate(tmp_path / "x.bin")
    for name in ("a", "b"):
        shutil.copy(file, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"name one of them \(a\.safetensors, b\.safetensors\)"):
        locate(tmp_path)  # which of the two?
