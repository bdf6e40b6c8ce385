"""LoRA files of every family: their names, what diffusers makes of them, and what they leave out."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import micro
import micro_flux
import micro_lumina2
import micro_pixart
import micro_sd3
import micro_sdxl
import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from erase.diffusion.families import FAMILIES, family
from erase.diffusion.lora.svd import Ranks, factor, product, rounded
from erase.diffusion.lora.write import Kept, difference, write_difference, write_lora
from erase.store.safetensors import open_safetensors

MICRO: dict[str, Any] = {
    "sd": micro.pipeline,
    "sdxl": micro_sdxl.pipeline,
    "sd3": micro_sd3.pipeline,
    "flux": micro_flux.pipeline,
    "pixart": micro_pixart.pipeline,
    "lumina2": micro_lumina2.pipeline,
}
RELEASED: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd": (UNet2DConditionModel, {"cross_attention_dim": 768}),
    "sdxl": (
        UNet2DConditionModel,
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "sd3": (SD3Transformer2DModel, {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}),
    "flux": (FluxTransformer2DModel, {"guidance_embeds": True}),
    "pixart": (PixArtTransformer2DModel, {"caption_channels": 4096, "use_additional_conditions": False}),
}


def expand(pattern: str) -> Iterator[str]:
    """`{a,b}` and `{0-3}` as in `layers.txt`."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)-(\d+)", found[1])
    options = [str(i) for i in range(int(numbers[1]), int(numbers[2]) + 1)] if numbers else found[1].split(",")
    for option in options:
        yield from expand(pattern[: found.start()] + option + pattern[found.end() :])


def listed(name: str) -> set[str]:
    text = (Path(__file__).parent / "layers.txt").read_text()
    section = text.split(f"[{name}]\n")[1].split("\n[")[0]
    return set(itertools.chain.from_iterable(expand(line) for line in section.splitlines() if line))


def changed(net: nn.Module, rank: int | None = 2) -> dict[str, Tensor]:
    """Every parameter, changed; matrices in low rank."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, p in net.named_parameters():
        shape = p.shape
        delta = torch.randn(shape, generator=generator)
        if rank is not None and len(shape) > 1:
            side = delta[0].numel()
            thin = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, side, generator=generator)
            delta = thin.reshape(shape)
        found[name] = p.detach() + 0.1 * delta
    return found


def write(name: str, net: Any, path: Path, erased: Mapping[str, Tensor], ranks: Ranks, **given: Any) -> Kept:
    layout = family(name).LORA
    assert layout is not None
    base = {key: t.detach().clone() for key, t in net.state_dict().items()}
    layers = layout.layers(base, net.config)
    return write_lora(difference(base, erased), layout, layers, path, {"erase": "0"}, ranks, **given)


def test_families_without_readers_have_no_layout() -> None:
    assert {name for name in FAMILIES if family(name).LORA is None} == {"ddpm", "dit"}
    assert MICRO.keys() == {name for name in FAMILIES if family(name).LORA is not None}


@pytest.mark.parametrize("name", RELEASED)
def test_released_layers_are_named_as_their_readers_name_them(name: str) -> None:
    kind, changes = RELEASED[name]
    layout = family(name).LORA
    assert layout is not None
    with torch.device("meta"):
        net = kind(**changes)
    tensors = dict(net.named_parameters())
    layers = layout.layers(tensors, net.config)
    found = [layers[key.removesuffix(".weight")] for key, t in tensors.items() if layout.carried(key, t.ndim)]
    assert len(found) == len(set(found))
    assert set(found) == listed(name)


def by_peft(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """As diffusers loads a transformer that it has no loader for; fused."""
    state = {key.removeprefix("transformer."): t for key, t in tensors.items()}
    ranks = {f"^{key.removesuffix('.lora_B.weight')}": t.shape[1] for key, t in state.items() if "lora_B" in key}
    targets = [key.removeprefix("^") for key in ranks]
    config = LoraConfig(r=1, lora_alpha=1, target_modules=targets, rank_pattern=ranks, alpha_pattern=ranks)
    inject_adapter_in_model(config, net, "default")
    assert not set_peft_model_state_dict(net, state, "default").unexpected_keys


@pytest.mark.parametrize("name", MICRO)
def test_diffusers_loads_what_was_erased(name: str, tmp_path: Path) -> None:
    """Weights of every layer are the base's and the change, to rounding; ranks differ from layer to layer."""
    pipe = MICRO[name](tmp_path / "parts")
    known = family(name)
    net: Any = getattr(pipe, known.TRAINED)
    erased = changed(net)
    assert known.LORA is not None
    carried = [key for key, t in erased.items() if t.ndim == 2 and known.LORA.carried(key, 2)]
    for key in carried[::3]:
        generator = torch.Generator().manual_seed(1)
        height, width = erased[key].shape
        erased[key] += 0.1 * torch.randn(height, 1, generator=generator) * torch.randn(1, width, generator=generator)
    base = {key: p.detach().clone() for key, p in net.named_parameters()}
    file = tmp_path / "lora.safetensors"
    kept = write(name, net, file, erased, Ranks(energy=1.0))
    assert {2, 3} <= set(kept.ranks)
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    else:
        by_peft(net, load_file(file))
        for module in list(net.modules()):
            if hasattr(module, "merge"):
                module.merge()
    found = {key.replace(".base_layer.", "."): p for key, p in net.named_parameters() if ".lora_" not in key}
    wanted = {key: base[key] if key in kept.left_out else erased[key] for key in base}
    assert sum(not torch.equal(wanted[key], base[key]) for key in base) == kept.layers
    for key, p in found.items():
        torch.testing.assert_close(p, wanted[key], rtol=0, atol=1e-5, msg=key)  # float32 of weights about 1


def test_ranks_by_number_and_by_energy(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(20, 4, generator=generator))[0] for _ in range(2))
    change = u @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5])) @ v.T
    for ranks, rank in ((Ranks(energy=1.0), 4), (Ranks(1), 1), (Ranks(9), 4), (Ranks(energy=0.9), 2), (Ranks(), 4)):
        found = factor(change, ranks)
        assert found.rank == rank
        lost = (change - product(found.up, found.down)).square().sum()
        assert found.lost == pytest.approx(float(lost), rel=1e-5, abs=1e-9)
    conv = change.reshape(20, 5, 2, 2)
    found = factor(conv, Ranks(energy=1.0))
    assert (found.up.shape, found.down.shape) == ((20, 4, 1, 1), (4, 5, 2, 2))
    torch.testing.assert_close(product(found.up, found.down), conv)


def test_a_whole_change_is_lossless_where_singular_values_fade() -> None:
    """As those of closed forms do, evenly over six orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 40, generator=generator).double())[0] for n in (300, 400))
    change = (u * torch.logspace(0, -6, 40) @ v.T).float()
    found = factor(change, Ranks(energy=1.0))
    assert found.rank < 40
    lost = product(found.up, found.down).double() - change.double()
    assert float(lost.norm() / change.double().norm()) <= 1e-5


def test_the_rounding_of_stored_weights_is_not_carried() -> None:
    """The difference of weights in 16 bits is of full rank; what was learned has rank 2."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(60, 50, generator=generator).half()
    learned = 0.1 * torch.randn(60, 2, generator=generator) @ torch.randn(2, 50, generator=generator)
    stored = (base.float() + learned).half()
    change = stored.float() - base.float()
    assert factor(change, Ranks(energy=1.0)).rank == 50
    found = factor(change, Ranks(energy=1.0), rounded(stored))
    assert found.rank == 2
    assert float((product(found.up, found.down) - change).norm()) <= rounded(stored)


def test_what_is_kept_is_what_the_file_holds(tmp_path: Path) -> None:
    net = micro.unet()
    erased = changed(net, rank=None)
    file = tmp_path / "lora.safetensors"
    kept = write("sd", net, file, erased, Ranks(3))
    tensors, header = load_file(file), open_safetensors(file)[1]
    whole = lost = 0.0
    layout = family("sd").LORA
    assert layout is not None
    layers = layout.layers(erased, net.config)
    for key, p in net.named_parameters():
        delta = erased[key] - p.detach()
        layer = layers[re.sub(r"\.(weight|bias)$", "", key)]
        if layout.carried(key, p.ndim):
            up, down, alpha = (tensors[layer + end] for end in layout.suffixes if end)
            rest = delta - alpha / len(down) * product(up, down)
        else:
            assert key in kept.left_out
            rest = delta
        whole += float(delta.double().square().sum())
        lost += float(rest.double().square().sum())
    assert kept.share == pytest.approx(1 - lost / whole, abs=1e-6)
    assert json.loads(header["erase_lora"])["kept"] == pytest.approx(kept.share, abs=1e-6)
    assert (header["erase"], header["ss_base_model_version"]) == ("0", "sd_v1")
    assert all(
        key.endswith(".bias") or "norm" in key or "blocks" not in key for key in kept.left_out if "mid" not in key
    )


def test_half_is_half(tmp_path: Path) -> None:
    net = micro.unet()
    erased = {key: t for key, t in changed(net).items() if "attn2" in key}
    for name, dtype in (("whole", torch.float32), ("half", torch.float16)):
        write("sd", net, tmp_path / f"{name}.safetensors", erased, Ranks(), dtype=dtype)
    whole, half = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "half"))
    assert all(t.dtype == torch.float16 for key, t in half.items() if not key.endswith("alpha"))
    assert all(torch.equal(half[key], t.half()) for key, t in whole.items() if not key.endswith("alpha"))


def test_differences_hold_all_that_comfyui_finds(tmp_path: Path) -> None:
    net = micro.unet()
    layout = family("sd").LORA
    assert layout is not None
    base, erased = dict(net.state_dict()), changed(net, rank=None)
    layers = layout.layers(base, net.config)
    kept = write_difference(difference(base, erased), layout, layers, tmp_path / "diff.safetensors", {})
    tensors = load_file(tmp_path / "diff.safetensors")
    assert (kept.share, kept.layers, dict(kept.left_out)) == (1.0, len(erased), {})
    torch.testing.assert_close(tensors["lora_unet_conv_in.diff_b"], erased["conv_in.bias"] - base["conv_in.bias"])
    sd3 = family("sd3").LORA
    assert sd3 is not None
    assert [sd3.as_difference(f"transformer_blocks.0.attn.{name}") for name in ("to_q.weight", "to_q.bias")] == [
        True,
        False,
    ]
    lumina = family("lumina2").LORA
    assert lumina is not None
    with pytest.raises(ValueError, match="--to lora"):
        write_difference(difference(base, erased), lumina, layers, tmp_path / "no.safetensors", {})


def test_nothing_to_carry_is_refused(tmp_path: Path) -> None:
    net = micro.unet()
    base = dict(net.state_dict())
    for erased in (base, {"conv_in.bias": base["conv_in.bias"] + 1}):
        with pytest.raises(ValueError, match="would be empty"):
            write("sd", net, tmp_path / "lora.safetensors", erased, Ranks())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rank", "energy"), [(0, 0.9), (None, 0.0), (None, 1.1)])
def test_impossible_ranks_are_refused(rank: int | None, energy: float) -> None:
    with pytest.raises(ValueError, match=r"--rank|--energy"):
        Ranks(rank, energy)
