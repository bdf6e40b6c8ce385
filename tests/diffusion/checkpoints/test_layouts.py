"""Names of released models, against diffusers' own readers: every tensor, with all its rows but not its columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from torch import Tensor

from erase.diffusion.checkpoints import ldm, mmdit, networks, single_file
from erase.diffusion.checkpoints.layout import Layout, Place
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.checkpoints.released import FIRST, released_xl, rest_of_sd3, written
from erase.diffusion.describe import describe

SD3_SIZES: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}
XL = {name: json.loads(text) for name, text in released_xl(Path("x"), {}, {}, None).items()}


@dataclass(frozen=True)
class Row:
    """A network as it was released."""

    layout: Layout
    part: str
    config: dict[str, Any]
    tensors: int
    """Of the released file, buffers left out."""
    read: Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]
    """Diffusers' reader."""


def sd3(**given: Any) -> dict[str, Any]:
    depth = given.pop("depth")
    return {
        **SD3_SIZES,
        "num_layers": depth,
        "num_attention_heads": depth,
        "caption_projection_dim": 64 * depth,
        **given,
    }


def read_openclip(file: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    with torch.device("meta"):
        net = networks.network(networks.kind_of(ldm.SDXL.parts["text_encoder_2"]), config)
    return convert_open_clip_checkpoint(net, file, prefix=ldm.SECOND + "model.")


def read_sd3(file: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    # The reader takes the width from a tensor that has all its rows here too.
    return convert_sd3_transformer_checkpoint_to_diffusers(file)


def read_flux(file: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    return convert_flux_transformer_checkpoint_to_diffusers(file)


QK = {"qk_norm": "rms_norm"}
ROWS = {
    "xl-unet": Row(ldm.SDXL, "unet", XL["unet/config.json"], 1680, convert_ldm_unet_checkpoint),
    "xl-vae": Row(ldm.SDXL, "vae", XL["vae/config.json"], 248, convert_ldm_vae_checkpoint),
    "xl-openclip": Row(ldm.SDXL, "text_encoder_2", XL["text_encoder_2/config.json"], 389, read_openclip),
    "sd3-medium": Row(mmdit.SD3, "transformer", sd3(depth=24, pos_embed_max_size=192), 491, read_sd3),
    "sd3.5-medium": Row(
        mmdit.SD3,
        "transformer",
        sd3(depth=24, pos_embed_max_size=48, dual_attention_layers=list(range(13)), **QK),  # 384: a GB to make
        665,
        read_sd3,
    ),
    "sd3.5-large": Row(mmdit.SD3, "transformer", sd3(depth=38, pos_embed_max_size=192, **QK), 923, read_sd3),
    "flux-dev": Row(mmdit.FLUX, "transformer", {"guidance_embeds": True}, 780, read_flux),
    "flux-schnell": Row(mmdit.FLUX, "transformer", {"guidance_embeds": False}, 776, read_flux),
}


@dataclass(frozen=True)
class Case:
    row: Row
    shapes: dict[str, torch.Size]
    places: dict[str, Place]


@pytest.fixture(scope="module", params=ROWS)
def case(request: pytest.FixtureRequest) -> Case:
    row = ROWS[request.param]
    texts, parts = {f"{row.part}/config.json": json.dumps(row.config)}, {row.part: row.layout.parts[row.part]}
    shapes = dict(networks.shapes(texts, parts)[row.part])
    return Case(row, shapes, row.layout.places({row.part: shapes}, {row.part: row.config}))


def test_every_tensor_has_its_place(case: Case) -> None:
    assert len(case.places) == case.row.tensors
    assert sorted(n for place in case.places.values() for n in place.names) == sorted(case.shapes)


def test_diffusers_reads_what_we_write(case: Case) -> None:
    g = torch.Generator().manual_seed(0)
    square = ("text_projection",)  # what is transposed keeps both sides

    def thin(name: str, size: torch.Size) -> Tensor:
        """The rows, which are what a file stacks and swaps; all else is carried as it is."""
        sizes = size if name.startswith(square) else (size[0], *[1] * (len(size) - 1))
        return torch.rand(sizes, generator=g)

    state = {name: thin(name, size) for name, size in case.shapes.items()}
    file = {key: place.to_file([state[n] for n in place.names]) for key, place in case.places.items()}
    back = {n: t for key, p in case.places.items() for n, t in zip(p.names, p.to_diffusers(file[key]), strict=True)}
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    read = case.row.read(dict(file), case.row.config)
    assert read.keys() == state.keys()
    assert [name for name in state if not torch.equal(read[name], state[name])] == []


@pytest.mark.parametrize("begin", ["", mmdit.NETWORK])
@pytest.mark.parametrize("case", [name for name, row in ROWS.items() if row.part == "transformer"], indirect=True)
def test_a_configuration_follows_from_a_file_of_others(case: Case, begin: str) -> None:
    row = case.row
    prefix, shapes = row.layout.parts[row.part].prefix, {row.part: case.shapes}
    tensors = {
        begin + key.removeprefix(prefix): torch.empty(place.size(shapes), device="meta")
        for key, place in case.places.items()
    }
    texts = row.layout.released(Path("x"), tensors, {}, None)
    assert networks.shapes(texts, {row.part: row.layout.parts[row.part]})[row.part] == case.shapes
    found = json.loads(texts["transformer/config.json"])
    assert {key: found[key] for key in row.config if key in found} == {
        k: v for k, v in row.config.items() if k in found
    }


@pytest.mark.parametrize(
    ("layout", "name", "known"),
    [
        (mmdit.SD3, "norm_out.linear.weight", "final_layer.adaLN_modulation.1.weight"),
        (mmdit.SD3, "transformer_blocks.0.ff_context.net.2.bias", "joint_blocks.0.context_block.mlp.fc2.bias"),
        (mmdit.FLUX, "transformer_blocks.3.attn.norm_added_k.weight", "double_blocks.3.txt_attn.norm.key_norm.scale"),
        (mmdit.FLUX, "single_transformer_blocks.3.proj_out.bias", "single_blocks.3.linear2.bias"),
        (mmdit.FLUX, "time_text_embed.guidance_embedder.linear_1.bias", "guidance_in.in_layer.bias"),
    ],
)
def test_known_names(layout: Layout, name: str, known: str) -> None:
    found = layout.places({"transformer": [name]}, {"transformer": {}})
    assert [key.removeprefix(mmdit.NETWORK) for key in found] == [known]


@pytest.mark.parametrize(
    ("layout", "part", "names", "said"),
    [
        (mmdit.SD3, "transformer", ["transformer_blocks.0.odd.weight"], "the transformer's tensor .* has no place"),
        (mmdit.SD3, "transformer", ["transformer_blocks.0.attn.to_q.weight"], "lacks tensors"),
        (mmdit.FLUX, "transformer", ["single_transformer_blocks.0.attn.add_q_proj.weight"], "has no place"),
        (mmdit.FLUX, "transformer", ["single_transformer_blocks.0.proj_mlp.bias"], "lacks tensors"),
        (ldm.SDXL, "text_encoder_2", ["odd.weight"], "the text_encoder_2's hidden_act is 'quick_gelu'"),
    ],
)
def test_what_has_no_place_is_refused(layout: Layout, part: str, names: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        layout.places({part: names}, {part: {}})


def pretend(
    monkeypatch: pytest.MonkeyPatch, path: Path, layout: Layout, texts: dict[str, str], *more: str
) -> dict[str, Tensor]:
    """A file of others with all networks that the texts configure, without values."""
    parts = {name: part for name, part in layout.parts.items() if f"{name}/config.json" in texts}
    shapes = networks.shapes(texts, parts)
    where = layout.places(shapes, {name: networks.config_of(texts, name) for name in parts})
    tensors = {key: torch.empty(place.size(shapes), dtype=torch.float16, device="meta") for key, place in where.items()}
    whole = tensors | {name: torch.empty(0, device="meta") for name in more}
    path.touch()
    monkeypatch.setattr(single_file, "read", lambda path, trusted: (whole, {}, ()))
    return whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "predicts"),
    [((), "epsilon"), (("v_pred", "ztsnr"), "v_prediction")],
)
def test_a_whole_xl_of_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: tuple[str, ...], predicts: str
) -> None:
    path, texts = tmp_path / "x.safetensors", {name: json.dumps(config) for name, config in XL.items()}
    tensors = pretend(monkeypatch, path, ldm.SDXL, texts, *more)
    source = locate(path)
    found = describe(source)
    assert (found["kind"], found["resolution"], found["tokens"]) == ("Stable Diffusion XL single file", 1024, 77)
    assert (found["prediction_type"], found["unet_weights"], found["text_width"]) == (predicts, 2_567_463_684, 2048)
    scheduler = json.loads(source.texts["scheduler/scheduler_config.json"])  # type: ignore[union-attr]
    assert scheduler.get("rescale_betas_zero_snr", False) is bool(more)
    tensors[FIRST] = torch.empty(320, 9, 3, 3, device="meta")
    with pytest.raises(ValueError, match="9 input channels: inpainting models are not supported"):
        locate(path)


@pytest.mark.slow
def test_a_whole_sd3_of_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without T5 nothing is missing; its tokenizer is in no file."""
    path, net = tmp_path / "x.safetensors", ROWS["sd3-medium"].config
    texts = written({**rest_of_sd3(False), "transformer/config.json": net})
    tensors = pretend(monkeypatch, path, mmdit.SD3, texts)
    found = describe(locate(path))
    assert (found["kind"], found["resolution"], found["tokens"]) == ("Stable Diffusion 3 single file", 1024, 77 + 1)
    tensors["text_encoders.t5xxl.transformer.shared.weight"] = torch.empty(1, 1, device="meta")
    with pytest.raises(ValueError, match=r"components=DIR .*with the rest \(tokenizer_3\)"):
        locate(path)
