"""Make the embedded zero-shot judge `pipelines/tiny/photos-clip`: a small `CLIPModel` of what `photos-sd` shows.

It learns from the crops that `photos-classifier` learns from (scikit-image's photographs, `scripts/make_tiny_sd.py`),
as they are and as the VAE of `photos-sd` shows them, with the captions that `photos-sd` knows and a few for anything
else.
No image that a model generated is among them. Its tokenizer is that of `photos-sd`.

    python scripts/make_tiny_clip.py --work runs/tiny-clip

Resumable; takes minutes on one core; needs scikit-image (`pip install erase[dev]`).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from make_tiny_sd import CONCEPTS, MAX_TOKENS, ROOT, SIZE, STYLES, Training, as_input, make_data
from safetensors.torch import load_file, save_file

OTHERS = ("something else", "a photo of something else", "a picture of something else", "a photo of nothing at all")
TINY = ROOT / "pipelines" / "tiny"
SHARED = (0.15, 0.03)
"""How much of a match (1) an image and a caption are that share the object, or the style, alone."""


def captions(concept: int, style: int) -> list[str]:
    """All that an object in a style is called; the first is the main wording."""
    found = [t.format(name) for name in list(CONCEPTS.values())[concept].names for t in list(STYLES.values())[style]]
    return found + list(list(CONCEPTS.values())[concept].names) * (style == 0)


def everything() -> list[list[str]]:
    """Captions of each class: the objects in each style, then anything else."""
    return [captions(c, s) for c in range(len(CONCEPTS)) for s in range(len(STYLES))] + [list(OTHERS)]


def matches() -> torch.Tensor:
    """How well an image of a class is met by a caption of each class: `[K, K]`, rows sum to 1."""
    K, styles = len(everything()), len(STYLES)
    table = torch.eye(K)
    for a in range(K - 1):
        for b in range(K - 1):
            if a != b and a // styles == b // styles:
                table[a, b] = SHARED[0] / (styles - 1)
            elif a != b and a % styles == b % styles:
                table[a, b] = SHARED[1] / (len(CONCEPTS) - 1)
    return table / table.sum(1, keepdim=True)


def write_tokenizer(folder: Path) -> object:
    """The tokenizer of `photos-sd`, copied."""
    from transformers import CLIPTokenizer

    shutil.copytree(TINY / "photos-sd" / "tokenizer", folder, dirs_exist_ok=True)
    return CLIPTokenizer.from_pretrained(folder)


def new_clip(tokenizer: object) -> torch.nn.Module:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    text = {
        "vocab_size": len(tokenizer),  # type: ignore[arg-type]
        "max_position_embeddings": MAX_TOKENS,
        "num_hidden_layers": 2,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    }
    vision = {"image_size": SIZE, "patch_size": 8, "num_hidden_layers": 4}
    return CLIPModel(CLIPConfig(text_config={**sizes, **text}, vision_config={**sizes, **vision}, projection_dim=64))


@torch.no_grad()
def through_vae(work: Path, crops: int) -> None:
    """Some crops as the VAE shows them, noise on their latents, and what it shows of noise alone: `vae.safetensors`."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(TINY / "photos-sd" / "vae")
    images = load_file(work / "data.safetensors")["images"][:, :, :crops]
    g = torch.Generator().manual_seed(5)
    found = []
    for part in images.flatten(0, 2).split(64):
        z = vae.encode(as_input(part)).latent_dist.mean
        z = z + z.std() * 0.3 * torch.rand(len(z), 1, 1, 1, generator=g) * torch.randn(z.shape, generator=g)
        found.append(vae.decode(z).sample)
    soup = z.std() * torch.randn((256, *z.shape[1:]), generator=g) * 1.5 * torch.rand(256, 1, 1, 1, generator=g)
    soups = torch.cat([vae.decode(part).sample for part in soup.split(64)])
    shown = torch.cat(found).view(*images.shape[:3], 3, SIZE, SIZE)
    save_file({"shown": shown.half(), "soups": soups.half()}, work / "vae.safetensors")


def draw_images(
    data: dict[str, torch.Tensor], vae: dict[str, torch.Tensor], last: int, g: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch, `[B, 3, SIZE, SIZE]`, and its classes, `[B]`: crops, half of them through the VAE, and anything else."""
    styles, K = len(STYLES), len(CONCEPTS) * len(STYLES)
    target = torch.randint(0, K, (64,), generator=g)
    near = torch.randint(0, vae["shown"].shape[2], (32,), generator=g)
    far = torch.randint(0, last, (32,), generator=g)
    x = torch.cat(
        [
            vae["shown"][target[:32] // styles, target[:32] % styles, near].float(),
            as_input(data["images"][target[32:] // styles, target[32:] % styles, far]),
        ]
    )
    a, b = x[:6], x[32:38]  # two different things mixed are no concept
    mixed = 0.5 * (a + b)[(target[:6] // styles) != (target[32:38] // styles)]
    other = as_input(data["other"][torch.randint(0, len(data["other"]), (6,), generator=g)])
    soups = vae["soups"][torch.randint(0, len(vae["soups"]), (4,), generator=g)].float()
    x = torch.cat([x, mixed, other, soups])
    target = torch.cat([target, torch.full((len(x) - 64,), K)])
    x = x * (0.85 + 0.3 * torch.rand(len(x), 1, 1, 1, generator=g))
    x = x + 0.1 * torch.rand(len(x), 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)
    return x.clamp(-1, 1), target


def train(work: Path, steps: int) -> torch.nn.Module:
    """CLIP's symmetric contrastive loss, one caption a class in each step; those that share a part match a little."""
    torch.manual_seed(6)
    data, vae = load_file(work / "data.safetensors"), load_file(work / "vae.safetensors")
    tokenizer = write_tokenizer(work / "tokenizer")
    net, words, table = new_clip(tokenizer), everything(), matches()
    run = Training(work / "clip.pt", {"clip": net}, lr=1e-3, steps=steps, ema=0.99)
    run.save_every = 50
    held = data["images"].shape[2] // 8  # the last eighth of the crops is never trained on
    for step in run:
        rng, g = np.random.default_rng([6, step]), torch.Generator().manual_seed(step)
        x, target = draw_images(data, vae, data["images"].shape[2] - held, g)
        said = [some[int(rng.integers(len(some)))] for some in words]
        logits = net(**tokens(tokenizer, said), pixel_values=x).logits_per_image
        wanted = table[target]  # [B, K]
        by_caption = wanted.t() / wanted.t().sum(1, keepdim=True).clamp(min=1e-6)
        seen = wanted.sum(0) > 1e-2  # captions that the batch has something of
        loss = F.cross_entropy(logits, wanted) + F.cross_entropy(logits.t()[seen], by_caption[seen])
        loss.backward()
        if (step + 1) % 50 == 0:
            right = (logits.argmax(1) == target).float().mean().item()
            print(f"clip {step + 1} loss {loss.item():.3f} train {right:.3f}", flush=True)
    run.use_averages()
    return net.eval()


def tokens(tokenizer: object, words: list[str]) -> dict[str, torch.Tensor]:
    found = tokenizer(words, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")  # type: ignore[operator]
    return {"input_ids": found.input_ids, "attention_mask": found.attention_mask}


@torch.no_grad()
def check(work: Path, net: torch.nn.Module) -> None:
    """Zero-shot accuracy on held-out crops, with the main wordings and with any."""
    tokenizer, data = write_tokenizer(work / "tokenizer"), load_file(work / "data.safetensors")["images"]
    held = data.shape[2] // 8
    images = data[:, :, -held:].flatten(0, 1)  # [K - 1, held, SIZE, SIZE, 3]
    for what, pick in (("main", 0), ("last", -1)):
        said = [some[pick] for some in everything()]
        given = tokens(tokenizer, said)
        right = [
            (net(**given, pixel_values=as_input(crops)).logits_per_image.argmax(1) == k).float().mean().item()
            for k, crops in enumerate(images)
        ]
        worst = said[right.index(min(right))]
        print(f"held-out crops, {what} wordings: mean {np.mean(right):.4f}, worst {min(right):.4f} ({worst})")


def export(work: Path, net: torch.nn.Module, out: Path) -> None:
    """Write the folder as transformers would, weights in fp16."""
    net.half().save_pretrained(out)
    write_tokenizer(out)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    print(f"exported to {out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-clip"))
    parser.add_argument("--out", type=Path, default=TINY / "photos-clip")
    parser.add_argument("--crops", type=int, default=192, help="crops per concept")
    parser.add_argument("--shown", type=int, default=24, help="of them, crops that the VAE shows")
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "data.safetensors").exists():
        make_data(args.work, args.crops)
    if not (args.work / "vae.safetensors").exists():
        through_vae(args.work, args.shown)
    net = train(args.work, args.steps)
    check(args.work, net)
    export(args.work, net, args.out)


if __name__ == "__main__":
    main()
