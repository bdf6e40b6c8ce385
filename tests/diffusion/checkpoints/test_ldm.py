"""Names in a single file: against diffusers' own reader, for many shapes of network, and against what is known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from erase.diffusion.checkpoints import ldm, networks, released
from erase.diffusion.checkpoints.layout import Layout

CROSS, PLAIN = "CrossAttn", ""


def written(
    part: str, net: torch.nn.Module, config: dict[str, Any], layout: Layout = ldm.SD
) -> dict[str, torch.Tensor]:
    """A network's tensors as a single file has them."""
    state = net.state_dict()
    where = layout.places({part: state}, {part: config})
    assert sorted(n for place in where.values() for n in place.names) == sorted(state)  # all, each once
    return {name: place.to_file([state[n] for n in place.names]) for name, place in where.items()}


def same(found: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> bool:
    return found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)


@pytest.mark.parametrize(
    ("kinds", "layers", "linear"),
    [
        ([CROSS, CROSS, CROSS, PLAIN], 2, False),  # Stable Diffusion 1.x
        ([CROSS, CROSS, CROSS, PLAIN], 2, True),  # 2.x
        ([CROSS, CROSS], 1, False),  # the embedded model
        ([PLAIN, CROSS], 1, False),
        ([CROSS, PLAIN, CROSS], 3, True),
        ([CROSS], 1, False),
    ],
)
def test_a_unet_is_read_by_diffusers(kinds: list[str], layers: int, linear: bool) -> None:
    net = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=layers,
        block_out_channels=tuple(8 * (i + 1) for i in range(len(kinds))),
        norm_num_groups=4,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        cross_attention_dim=8,
        attention_head_dim=4,
        use_linear_projection=linear,
    )
    config = dict(net.config)
    found = convert_ldm_unet_checkpoint(written("unet", net, config), config)
    assert same(found, net.state_dict())


@pytest.mark.parametrize(("depth", "layers"), [(4, 2), (4, 1), (2, 1), (1, 3)])
def test_an_autoencoder_is_read_by_diffusers(depth: int, layers: int) -> None:
    net = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=tuple(4 * (i + 1) for i in range(depth)),
        layers_per_block=layers,
        norm_num_groups=4,
    )
    file = written("vae", net, dict(net.config))
    assert file["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (4 * depth, 4 * depth, 1, 1)
    assert same(convert_ldm_vae_checkpoint(file, dict(net.config)), net.state_dict())


def test_old_names_of_the_autoencoders_attention_mean_the_same() -> None:
    old = ("query", "key", "value", "proj_attn", "group_norm")
    new = ("to_q", "to_k", "to_v", "to_out.0", "group_norm")
    for a, b in zip(old, new, strict=True):
        names = [f"decoder.mid_block.attentions.0.{n}.weight" for n in (a, b)]
        assert len({next(iter(ldm.SD.places({"vae": [n]}, {"vae": {}}))) for n in names}) == 1


def text_encoder(**values: Any) -> Any:
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "projection_dim": 8}
    return CLIPTextModel(CLIPTextConfig(**{**sizes, "max_position_embeddings": 4, **values}))


def test_openclip_is_read_by_diffusers() -> None:
    net = text_encoder(hidden_act="gelu", num_hidden_layers=3)
    file = written("text_encoder", net, {"hidden_act": "gelu"})
    assert file["cond_stage_model.model.transformer.resblocks.2.attn.in_proj_weight"].shape == (24, 8)
    found = {n.removeprefix("text_model."): t for n, t in convert_open_clip_checkpoint(net, file).items()}
    assert same(found, {n.removeprefix("text_model."): t for n, t in net.state_dict().items()})


def test_clip_keeps_its_names() -> None:
    net = text_encoder(hidden_act="quick_gelu", num_hidden_layers=1)
    prefix = "cond_stage_model.transformer.text_model."
    file = written("text_encoder", net, {})
    assert {n.removeprefix(prefix) for n in file} == {n.removeprefix("text_model.") for n in net.state_dict()}


@pytest.mark.parametrize(
    ("part", "name", "known"),
    [
        ("unet", "time_embedding.linear_2.bias", "model.diffusion_model.time_embed.2.bias"),
        (
            "unet",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
        ),
        ("unet", "down_blocks.2.downsamplers.0.conv.weight", "model.diffusion_model.input_blocks.9.0.op.weight"),
        ("unet", "mid_block.resnets.1.conv2.bias", "model.diffusion_model.middle_block.2.out_layers.3.bias"),
        ("unet", "up_blocks.0.upsamplers.0.conv.weight", "model.diffusion_model.output_blocks.2.1.conv.weight"),
        ("unet", "up_blocks.1.upsamplers.0.conv.weight", "model.diffusion_model.output_blocks.5.2.conv.weight"),
        (
            "unet",
            "up_blocks.3.resnets.2.conv_shortcut.weight",
            "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
        ),
        (
            "vae",
            "encoder.down_blocks.0.downsamplers.0.conv.bias",
            "first_stage_model.encoder.down.0.downsample.conv.bias",
        ),
        ("vae", "decoder.up_blocks.0.resnets.2.norm1.bias", "first_stage_model.decoder.up.3.block.2.norm1.bias"),
        ("vae", "quant_conv.weight", "first_stage_model.quant_conv.weight"),
    ],
)
def test_names_of_the_released_models(known_places: dict[str, Any], part: str, name: str, known: str) -> None:
    assert [ldm_name for ldm_name, place in known_places.items() if (place.part, place.names[0]) == (part, name)] == [
        known
    ]


@pytest.fixture(scope="module")
def known_places() -> dict[str, Any]:
    return released_places(768, "")


def released_texts(width: int, prediction: str) -> dict[str, str]:
    seen = {
        released.WIDTH: torch.empty(1, width, device="meta"),
        released.FIRST: torch.empty(1, 4, device="meta"),
    }
    return released.released(Path("x"), seen, {"modelspec.prediction_type": prediction}, None)


def released_places(width: int, prediction: str) -> dict[str, Any]:
    texts = released_texts(width, prediction)
    configs = {part: json.loads(texts[f"{part}/config.json"]) for part in ldm.SD.parts}
    return ldm.SD.places(networks.shapes(texts, ldm.SD.parts), configs)


@pytest.mark.parametrize(("width", "prediction"), [(768, ""), (1024, "v")])
def test_diffusers_reads_the_released_models_by_our_configuration(width: int, prediction: str) -> None:
    texts = released_texts(width, prediction)
    needed = networks.shapes(texts, ldm.SD.parts)
    where = released_places(width, prediction)
    for part, reader in (("unet", convert_ldm_unet_checkpoint), ("vae", convert_ldm_vae_checkpoint)):
        file = {name: torch.empty(1, device="meta") for name, place in where.items() if place.part == part}
        assert reader(file, json.loads(texts[f"{part}/config.json"])).keys() == needed[part].keys()


@pytest.mark.parametrize(("width", "prediction", "text"), [(768, "", 196), (1024, "v", 23 * 12 + 4)])
def test_the_released_models_are_complete(width: int, prediction: str, text: int) -> None:
    """Counts of the published files, buffers and OpenCLIP's unused last layer left out."""
    parts = [place.part for place in released_places(width, prediction).values()]
    assert {part: parts.count(part) for part in ldm.SD.parts} == {"unet": 686, "vae": 248, "text_encoder": text}


@pytest.mark.parametrize(
    ("part", "names", "config", "said"),
    [
        ("unet", ["class_embedding.weight"], {}, "the unet's tensor class_embedding.weight has no place"),
        ("unet", ["down_blocks.0.motion_modules.0.norm.weight"], {}, "has no place in a single file"),
        ("unet", ["down_blocks.0.resnets.0.odd.weight"], {}, "has no place in a single file"),
        ("unet", [], {"layers_per_block": [1, 2]}, r"layers_per_block is \[1, 2\]"),
        ("vae", ["temporal.weight"], {}, "the vae's tensor temporal.weight has no place"),
        ("text_encoder", [], {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("text_encoder", ["text_projection.weight"], {"hidden_act": "gelu"}, "has no place in a single file"),
        ("text_encoder", ["encoder.layers.0.self_attn.q_proj.bias"], {"hidden_act": "gelu"}, "lacks tensors"),
    ],
)
def test_what_has_no_place_is_refused(part: str, names: list[str], config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ldm.SD.places({part: names}, {part: config})
