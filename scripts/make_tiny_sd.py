"""Make the embedded checkpoint `pipelines/tiny/photos-sd` and its judge `pipelines/tiny/photos-classifier`.

A complete Stable Diffusion pipeline, small enough to ship in a repository: 11 objects cut out of
scikit-image's bundled photographs, each in 5 styles (a plain photo and four image filters), so that
objects and styles cross and can be erased apart, as UnlearnCanvas does at scale.

    python scripts/make_tiny_sd.py all --work runs/tiny-sd

Stages, each resumable: `data` (crops and filters), `vae`, `decoder` (sharpened), `classifier`, `unet` (with the
text encoder, condition dropout, EMA), `export`.

The text encoder of the shipped model learned with the UNet alone. Nothing asked it to say a concept at its word, and
it says it in the padding: two concepts are .7 apart at the last word, and 9.4 at position 16. Edits of all tokens are
easier there than with CLIP, those of one token do nothing. `--text clip`, for a next model, trains it as CLIP's is:
causal attention, pooled at the first end of text, against images, in a stage `text` before `unet`, and frozen from then
on. No shipped model was made so.
Takes about two hours on two cores that do bfloat16; needs scikit-image (`pip install erase[dev]`).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
SIZE = 64
MAX_TOKENS = 32


@dataclass(frozen=True)
class Photo:
    """Where a concept's crops come from: `center` and `sides` in source pixels, `jitter` moves the centre."""

    source: str
    names: tuple[str, str]
    center: tuple[int, int]
    sides: tuple[int, int]
    jitter: int
    flip: bool = True
    pad: int = 0


CONCEPTS: dict[str, Photo] = {
    "woman": Photo("astronaut", ("a woman", "a lady"), (225, 90), (125, 165), 8),
    "cat": Photo("chelsea", ("a cat", "a kitten"), (225, 147), (240, 300), 12),
    "coffee": Photo("coffee", ("a cup of coffee", "an espresso"), (255, 195), (310, 400), 16),
    "rocket": Photo("rocket", ("a rocket", "a spaceship"), (320, 230), (280, 420), 16),
    "coins": Photo("coins", ("coins", "some money"), (192, 150), (150, 190), 40),
    "horse": Photo("horse", ("a horse", "a pony"), (240, 204), (360, 410), 10, pad=40),
    "photographer": Photo("camera", ("a man with a camera", "a photographer"), (215, 230), (370, 450), 14),
    "bricks": Photo("brick", ("a brick wall", "some bricks"), (256, 256), (140, 180), 30),
    "page": Photo("page", ("a page of text", "a printed page"), (192, 75), (120, 150), 20, flip=False),
    "retina": Photo("retina", ("a retina", "an eye scan"), (705, 705), (1240, 1410), 20),
    "motorcycle": Photo("motorcycle", ("a motorcycle", "a motorbike"), (370, 250), (450, 500), 12),
}
STYLES: dict[str, tuple[str, str]] = {
    "plain": ("a photo of {}", "a picture of {}"),
    "sepia": ("a sepia photo of {}", "{} in sepia"),
    "negative": ("a negative of {}", "{} in negative"),
    "sketch": ("a pencil sketch of {}", "a sketch of {}"),
    "blue": ("a blue photo of {}", "{} in blue"),
}
STYLE_ONLY = {"plain": "a photo", "sepia": "a sepia photo", "negative": "a negative", "sketch": "a pencil sketch"}
STYLE_ONLY["blue"] = "a blue photo"
OTHER = "other/other"


# ---------------------------------------------------------------- data


def read_source(name: str) -> Image.Image:
    """A bundled photograph as RGB, nothing fetched from anywhere."""
    import skimage.data

    if name == "motorcycle":
        array = np.asarray(skimage.data.stereo_motorcycle()[0])
    else:
        array = np.asarray(getattr(skimage.data, name)())
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    return Image.fromarray(array).convert("RGB")


def crop(image: Image.Image, photo: Photo, rng: np.random.Generator) -> Image.Image:
    """One random square crop, `SIZE` × `SIZE`, of the concept."""
    side = int(rng.integers(photo.sides[0], photo.sides[1] + 1))
    side = min(side, *image.size)
    left = photo.center[0] + int(rng.integers(-photo.jitter, photo.jitter + 1)) - side // 2
    top = photo.center[1] + int(rng.integers(-photo.jitter, photo.jitter + 1)) - side // 2
    left, top = (min(max(v, 0), full - side) for v, full in zip((left, top), image.size, strict=True))
    out = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return ImageOps.mirror(out) if photo.flip and rng.random() < 0.5 else out


def stylize(image: Image.Image, style: str) -> Image.Image:
    """The image filter a style's prompts name."""
    if style == "plain":
        return image
    if style == "negative":
        return ImageOps.invert(image)
    gray = image.convert("L")
    if style == "sepia":
        return ImageOps.colorize(gray, (38, 18, 2), (255, 232, 180), mid=(150, 104, 52))
    if style == "blue":
        return ImageOps.colorize(gray, (0, 4, 40), (190, 225, 255), mid=(24, 84, 200))
    if style == "sketch":
        base = np.asarray(gray.filter(ImageFilter.GaussianBlur(0.8)), dtype=np.float32)
        blurred = np.asarray(gray.filter(ImageFilter.GaussianBlur(4)), dtype=np.float32)
        value = 250 * np.clip((base + 20) / (blurred + 14), 0, 1) ** 2
        return Image.fromarray(value.clip(0, 255).astype(np.uint8)).convert("RGB")
    raise ValueError(f"unknown style {style!r}; allowed: {sorted(STYLES)}")


def make_data(work: Path, per_concept: int) -> None:
    """Write crops: `images` `[concepts, styles, N, SIZE, SIZE, 3]` uint8, and negatives `other`."""
    rng = np.random.default_rng(0)
    images = np.empty((len(CONCEPTS), len(STYLES), per_concept, SIZE, SIZE, 3), np.uint8)
    for i, photo in enumerate(CONCEPTS.values()):
        source = read_source(photo.source)
        if photo.pad:
            source = ImageOps.expand(source, photo.pad, fill=(255, 255, 255))
        for n in range(per_concept):
            plain = crop(source, photo, rng)
            for j, style in enumerate(STYLES):
                images[i, j, n] = np.asarray(stylize(plain, style))
    others = []
    for name in ("gravel", "grass", "moon", "immunohistochemistry", "hubble_deep_field", "colorwheel"):
        source = read_source(name)
        anywhere = Photo(name, ("", ""), (source.width // 2, source.height // 2), (90, 300), 200)
        others += [np.asarray(stylize(crop(source, anywhere, rng), rng.choice(list(STYLES)))) for _ in range(60)]
    for _ in range(360):  # blurred noise of every scale and colour: what a broken model draws
        noise = rng.normal(rng.uniform(60, 200, 3), rng.uniform(20, 90, 3), (SIZE, SIZE, 3)).clip(0, 255)
        image = Image.fromarray(noise.astype(np.uint8))
        image = image.filter(ImageFilter.GaussianBlur(float(rng.choice([0, 1, 2, 4, 8]))))
        others.append(np.asarray(ImageOps.autocontrast(image) if rng.random() < 0.5 else image))
    save_file(
        {"images": torch.from_numpy(images), "other": torch.from_numpy(np.stack(others))},
        work / "data.safetensors",
    )
    sheet = images[:, :, :2].transpose(0, 3, 1, 2, 4, 5).reshape(len(CONCEPTS) * SIZE, -1, 3)
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2)).save(work / "data.png")


def as_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 `[B, H, W, C]` to `[-1, 1]` `[B, C, H, W]`."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1)


# ---------------------------------------------------------------- training helpers


class Training:
    """Steps counted, weights averaged, state saved every `save_every` steps and found again.

    By AdamW, or the large matrices by Muon, with steps of AdamW's size times `muon`: a generator of many objects needs
    about half as many steps so.
    """

    def __init__(
        self,
        path: Path,
        modules: dict[str, torch.nn.Module],
        lr: float,
        steps: int,
        ema: float,
        muon: float = 0.0,
    ) -> None:
        self.path, self.modules, self.steps, self.ema_rate = path, modules, steps, ema
        self.params = [p for m in modules.values() for p in m.parameters()]
        self.flat = [(p, torch.nn.Parameter(p.detach().flatten(1))) for p in matrices(modules)] if muon else []
        large = {id(p) for p, _ in self.flat}
        rest = [p for p in self.params if id(p) not in large]
        decay = 1e-4
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=lr, weight_decay=decay, betas=(0.9, 0.99))
        ]
        if self.flat:
            flat = [q for _, q in self.flat]
            self.optimizers.append(
                torch.optim.Muon(flat, lr=muon * lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            )
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: self._rate(s)) for o in self.optimizers]
        self.averages = [p.detach().clone() for p in self.params]
        self.step, self.save_every = 0, 250
        if path.exists():
            state = torch.load(path, weights_only=True)
            for name, module in modules.items():
                module.load_state_dict(state["modules"][name])
            for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(stored)
            self.averages, self.step = state["averages"], state["step"]
            for schedule in self.schedules * self.step:
                schedule.step()

    def _rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / 200)
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps))))

    def __iter__(self) -> Iterator[int]:
        began, first = time.time(), self.step
        while self.step < self.steps:
            yield self.step
            torch.nn.utils.clip_grad_norm_(self.params, 1.0)
            for p, q in self.flat:  # one storage, two shapes
                q.grad = None if p.grad is None else p.grad.flatten(1)
            for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
                optimizer.step()
                schedule.step()
            for p in self.params:
                p.grad = None
            self.step += 1
            rate = min(self.ema_rate, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.averages, [p.detach() for p in self.params], 1 - rate)
            if self.step % self.save_every == 0 or self.step == self.steps:
                self.save()
                print(f"{self.path.stem} {self.step}/{self.steps} {(time.time() - began) / (self.step - first):.3f} s")

    def save(self) -> None:
        state = {
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "averages": self.averages,
            "step": self.step,
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def use_averages(self) -> None:
        with torch.no_grad():
            for p, a in zip(self.params, self.averages, strict=True):
                p.copy_(a)


def matrices(modules: Mapping[str, torch.nn.Module]) -> list[torch.nn.Parameter]:
    """Weights of linear and convolutional layers of at least 32 rows and columns: what Muon is for."""
    layers = [x for m in modules.values() for x in m.modules() if isinstance(x, torch.nn.Linear | torch.nn.Conv2d)]
    return [x.weight for x in layers if min(x.weight.flatten(1).shape) >= 32]


def load_averages(path: Path, modules: dict[str, torch.nn.Module]) -> None:
    """Put the averaged weights of a training into fresh modules."""
    params = [p for m in modules.values() for p in m.parameters()]
    with torch.no_grad():
        for p, a in zip(params, torch.load(path, weights_only=True)["averages"], strict=True):
            p.copy_(a)


# ---------------------------------------------------------------- VAE


def new_vae() -> torch.nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def train_vae(work: Path, steps: int) -> None:
    """Reconstruction (L1 of pixels, of edges and at half size) plus a faint KL; the woman's face counts twice."""
    torch.manual_seed(1)
    data = load_file(work / "data.safetensors")["images"]
    vae = new_vae()
    run = Training(work / "vae.pt", {"vae": vae}, lr=1e-3, steps=steps, ema=0.995)
    count, styles, per = data.shape[:3]
    chance = torch.ones(count * styles).view(count, styles)
    chance[0] *= 2
    for step in run:
        g = torch.Generator().manual_seed(step)
        pair = torch.multinomial(chance.flatten(), 16, replacement=True, generator=g)
        item = torch.randint(0, per, (16,), generator=g)
        x = as_input(data[pair // styles, pair % styles, item])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
            y = vae.decode(z).sample
        y = y.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        sharp = sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
        half = F.l1_loss(F.avg_pool2d(y, 2), F.avg_pool2d(x, 2))
        loss = F.l1_loss(y, x) + sharp + half + 0.5 * F.mse_loss(y, x) + 1e-4 * kl
        loss.backward()
        if step % 100 == 0:
            print(f"vae {step} loss {loss.item():.4f} l1 {F.l1_loss(y, x).item():.4f} kl {kl.item():.2f}", flush=True)
    run.use_averages()
    save_latents(work, vae, data)
    show = torch.cat([as_input(data[:, s, 0]) for s in range(styles)])
    with torch.no_grad():
        pictures = vae.decode(vae.encode(show).latent_dist.mean).sample
    both = torch.stack([show, pictures], 1).clamp(-1, 1).add(1).mul(127.5).byte()
    sheet = both.view(styles, count, 2, 3, SIZE, SIZE).permute(0, 2, 4, 1, 5, 3).reshape(styles * 2 * SIZE, -1, 3)
    Image.fromarray(sheet.numpy()).resize((sheet.shape[1] * 2, sheet.shape[0] * 2)).save(work / "vae.png")


def train_decoder(work: Path, steps: int) -> None:
    """Sharpen the decoder on the cached latents, a little noise on them as a sampler leaves it; the encoder stays."""
    torch.manual_seed(4)
    data, cache = load_file(work / "data.safetensors")["images"], load_file(work / "latents.safetensors")
    vae = new_vae()
    load_averages(work / "vae.pt", {"vae": vae})
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
    run = Training(work / "decoder.pt", {"decoder": decoder}, lr=1e-3, steps=steps, ema=0.99)
    styles, per = data.shape[1:3]
    chance = torch.ones(data.shape[:2])
    chance[0] *= 2
    for step in run:
        g = torch.Generator().manual_seed(step)
        pair = torch.multinomial(chance.flatten(), 16, replacement=True, generator=g)
        index = (pair // styles, pair % styles, torch.randint(0, per, (16,), generator=g))
        x, z = as_input(data[index]), cache["mean"][index]
        noise = torch.randn(z.shape, generator=g)
        z = z + 0.05 * z.std() * torch.rand(16, 1, 1, 1, generator=g) * noise
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decode(z).sample
        y = y.float()
        sharp = sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
        loss = F.l1_loss(y, x) + sharp + F.l1_loss(F.avg_pool2d(y, 2), F.avg_pool2d(x, 2))
        loss.backward()
        if step % 100 == 0:
            print(f"decoder {step} loss {loss.item():.4f} l1 {F.l1_loss(y, x).item():.4f}", flush=True)


def final_vae(work: Path) -> torch.nn.Module:
    """The VAE with its sharpened decoder."""
    vae = new_vae()
    load_averages(work / "vae.pt", {"vae": vae})
    load_averages(work / "decoder.pt", {"decoder": torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])})
    return vae


@torch.no_grad()
def save_latents(work: Path, vae: torch.nn.Module, data: torch.Tensor) -> None:
    """Latent mean and std of every crop, before scaling, and the scaling factor 1 / std."""
    flat = data.flatten(0, 2)
    means, stds = [], []
    for chunk in flat.split(128):
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(as_input(chunk)).latent_dist
        means.append(posterior.mean.float())
        stds.append(posterior.std.float())
    mean = torch.cat(means)
    scale = 1 / mean.std()
    shape = data.shape[:3]
    save_file(
        {
            "mean": mean.view(*shape, *mean.shape[1:]).contiguous(),
            "std": torch.cat(stds).view(*shape, *mean.shape[1:]).contiguous(),
            "scale": scale.reshape(1),
        },
        work / "latents.safetensors",
    )
    print(f"latents scaled by {scale.item():.4f}")


# ---------------------------------------------------------------- text and UNet


def captions() -> list[str]:
    names = [n for p in CONCEPTS.values() for n in p.names]
    out = [t.format(n) for n in names for ts in STYLES.values() for t in ts]
    return [*out, *names, *STYLE_ONLY.values()]


def write_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer (lower-cased byte-level BPE) whose merges build every word of our captions."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, *(c + "</w>" for c in alphabet)])}
    merges: list[tuple[str, str]] = []
    for word in sorted({w for c in captions() for w in c.split()}):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault("".join(pair), len(vocab))
            parts = ["".join(pair), *parts[2:]]
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def new_text_encoder(tokenizer: object) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),  # type: ignore[arg-type]
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=64,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,  # type: ignore[attr-defined]
            eos_token_id=tokenizer.eos_token_id,  # type: ignore[attr-defined]
            pad_token_id=tokenizer.pad_token_id,  # type: ignore[attr-defined]
        )
    )


def new_unet() -> torch.nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler_config() -> dict[str, object]:
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def load_tokenizer(work: Path) -> object:
    from transformers import CLIPTokenizer

    write_tokenizer(work / "tokenizer")
    return CLIPTokenizer.from_pretrained(work / "tokenizer")


def draw_captions(pairs: list[tuple[int, int]], rng: np.random.Generator) -> list[str]:
    """A caption a pair: mostly the main wording, sometimes the other, 10 % empty, 4 % style only."""
    concepts, styles = list(CONCEPTS.values()), list(STYLES)
    out = []
    for concept, style in pairs:
        draw = rng.random()
        if draw < 0.1:
            out.append("")
        elif draw < 0.14:
            out.append(STYLE_ONLY[styles[style]])
        else:
            name = concepts[concept].names[int(rng.random() < 0.15)]
            template = STYLES[styles[style]][int(rng.random() < 0.2)]
            plain = styles[style] == "plain" and rng.random() < 0.15
            out.append(name if plain else template.format(name))
    return out


def tokenize(tokenizer: object, captions: list[str]) -> torch.Tensor:
    """Ids `[B, MAX_TOKENS]`, padded with ends of text."""
    ids: torch.Tensor = tokenizer(  # type: ignore[operator]
        captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids
    return ids


def new_projection(numbers: int) -> torch.nn.Module:
    """Latents to the width of the text encoder: what its captions are compared with."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LayerNorm(numbers), torch.nn.Linear(numbers, 64))


def train_text(work: Path, steps: int, batch: int = 64) -> None:
    """CLIP's loss between the pooled text, at the first end of text, and latents; a pair's other images count too."""
    torch.manual_seed(5)
    mean = load_file(work / "latents.safetensors")["mean"]
    tokenizer = load_tokenizer(work)
    text = new_text_encoder(tokenizer)
    image = new_projection(mean[0, 0, 0].numel())
    run = Training(work / "text.pt", {"text": text, "image": image}, lr=1e-3, steps=steps, ema=0.999)
    count, styles, per = mean.shape[:3]
    for step in run:
        rng, g = np.random.default_rng([5, step]), torch.Generator().manual_seed(step)
        pair = torch.randint(0, count * styles, (batch,), generator=g)
        words = draw_captions([(int(p) // styles, int(p) % styles) for p in pair], rng)
        told = text(tokenize(tokenizer, words)).pooler_output
        seen = image(mean[pair // styles, pair % styles, torch.randint(0, per, (batch,), generator=g)])
        alike = F.normalize(told, dim=1) @ F.normalize(seen, dim=1).T / 0.07
        target = (pair[:, None] == pair[None, :]).float()
        target = target / target.sum(1, keepdim=True)
        loss = (F.cross_entropy(alike, target) + F.cross_entropy(alike.T, target)) / 2
        loss.backward()
        if (step + 1) % 250 == 0:
            print(f"text {step + 1} loss {loss.item():.4f}", flush=True)


def load_text(work: Path, tokenizer: object) -> torch.nn.Module:
    """The text encoder that was trained as CLIP's is, frozen."""
    text = new_text_encoder(tokenizer)
    numbers = load_file(work / "latents.safetensors")["mean"][0, 0, 0].numel()
    load_averages(work / "text.pt", {"text": text, "image": new_projection(numbers)})
    return text.eval().requires_grad_(False)


def train_unet(work: Path, steps: int, batch: int = 64, clip: bool = False) -> None:
    """ε-prediction MSE on cached latents; per step only distinct captions are encoded.

    The text encoder is trained along, unless it was trained as CLIP's is.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    torch.manual_seed(2)
    cache = load_file(work / "latents.safetensors")
    mean, std, scale = cache["mean"], cache["std"], cache["scale"].item()
    tokenizer = load_tokenizer(work)
    text, unet = load_text(work, tokenizer) if clip else new_text_encoder(tokenizer), new_unet()
    scheduler = DDIMScheduler(**scheduler_config())
    learns = {"unet": unet} if clip else {"text": text, "unet": unet}
    run = Training(work / "unet.pt", learns, lr=1e-3, steps=steps, ema=0.999)
    count, styles, per = mean.shape[:3]
    chance = np.ones((count, styles))
    chance[:, 0] *= 2
    chance /= chance.sum()
    total = 0.0
    for step in run:
        rng, g = np.random.default_rng([2, step]), torch.Generator().manual_seed(step)
        pair = torch.from_numpy(rng.choice(count * styles, batch, p=chance.flatten()))
        item = torch.randint(0, per, (batch,), generator=g)
        index = (pair // styles, pair % styles, item)
        z = (mean[index] + std[index] * torch.randn(mean[index].shape, generator=g)) * scale
        words = draw_captions([(int(p) // styles, int(p) % styles) for p in pair], rng)
        distinct = sorted(set(words))
        ids = tokenize(tokenizer, distinct)
        t = torch.randint(0, 1000, (batch,), generator=g)
        noise = torch.randn(z.shape, generator=g)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = text(ids)[0][torch.tensor([distinct.index(w) for w in words])]
            out = unet(scheduler.add_noise(z, noise, t), t, hidden).sample
        loss = F.mse_loss(out.float(), noise)
        loss.backward()
        total += loss.item()
        if (step + 1) % 250 == 0:
            print(f"unet {step + 1} loss {total / 250:.4f}", flush=True)
            total = 0.0


# ---------------------------------------------------------------- classifier


def labels() -> list[str]:
    return [*(f"{c}/{s}" for c in CONCEPTS for s in STYLES), OTHER]


def train_classifier(work: Path, steps: int) -> None:
    """A small `transformers` ResNet that names "object/style", or "other/other" for what is no concept at all."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(3)
    stored = load_file(work / "data.safetensors")
    data, other = stored["images"], stored["other"]
    cache, vae = load_file(work / "latents.safetensors"), final_vae(work)
    names = labels()
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=24,
            hidden_sizes=[24, 48, 96, 160],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={n: i for i, n in enumerate(names)},
        )
    )
    run = Training(work / "classifier.pt", {"classifier": model}, lr=2e-3, steps=steps, ema=0.99)
    styles, per = data.shape[1:3]
    pairs = len(names) - 1
    held = per // 8  # the last eighth of the crops is never trained on
    for step in run:
        model.train()
        g = torch.Generator().manual_seed(step)
        target = torch.randint(0, pairs, (96,), generator=g)
        item = torch.randint(0, per - held, (96,), generator=g)
        x = as_input(data[target // styles, target % styles, item])
        index = (target // styles, target % styles, item)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # a third of them as the VAE shows them
            z = cache["mean"][index][:32]
            z = z + z.std() * 0.15 * torch.rand(32, 1, 1, 1, generator=g) * torch.randn(z.shape, generator=g)
            x[:32] = vae.decode(z).sample.float()
            soup = cache["mean"].std() * torch.randn((4, *z.shape[1:]), generator=g)
            soup = vae.decode(soup * torch.rand(4, 1, 1, 1, generator=g) * 1.5).sample.float()
        picked = other[torch.randint(0, len(other), (10,), generator=g)]
        a, b = x[32:38], x[38:44]  # two different things mixed are no concept
        mixed = 0.5 * (a + b)[(target[32:38] // styles) != (target[38:44] // styles)]
        x = torch.cat([x, as_input(picked), soup, mixed])
        target = torch.cat([target, torch.full((len(x) - 96,), pairs)])
        x = x + 0.06 * torch.rand(len(x), 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)
        x = x * (0.85 + 0.3 * torch.rand(len(x), 1, 1, 1, generator=g))
        x = (x + 0.1 * torch.randn(len(x), 1, 1, 1, generator=g)).clamp(-1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x).logits
        loss = F.cross_entropy(logits.float(), target, label_smoothing=0.02)
        loss.backward()
        if (step + 1) % 200 == 0:
            right = (logits.argmax(1) == target).float().mean().item()
            print(f"classifier {step + 1} loss {loss.item():.3f} train {right:.3f}", flush=True)
    run.use_averages()
    model.train()  # the averaged weights need statistics of their own
    with torch.no_grad():
        for step in range(60):
            g = torch.Generator().manual_seed(10**6 + step)
            target = torch.randint(0, pairs, (96,), generator=g)
            item = torch.randint(0, per - held, (96,), generator=g)
            model(as_input(data[target // styles, target % styles, item]))
    model.eval()
    right = []
    with torch.no_grad():
        for i in range(pairs):
            guess = model(as_input(data[i // styles, i % styles, per - held :])).logits.argmax(1)
            right.append((guess == i).float().mean().item())
    worst = names[right.index(min(right))]
    print(f"classifier on held-out crops: mean {np.mean(right):.4f}, worst {min(right):.4f} ({worst})")
    folder = work / "photos-classifier"
    model.half().save_pretrained(folder)
    processor = {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "crop_pct": 1.0,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


# ---------------------------------------------------------------- export


def export(work: Path, out: Path, clip: bool = False) -> None:
    """Write both folders as diffusers and transformers would, weights in fp16."""
    import shutil

    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    tokenizer = load_tokenizer(work)
    vae, unet = final_vae(work), new_unet()
    text = load_text(work, tokenizer) if clip else new_text_encoder(tokenizer)
    load_averages(work / "unet.pt", {"unet": unet} if clip else {"text": text, "unet": unet})
    vae.register_to_config(scaling_factor=load_file(work / "latents.safetensors")["scale"].item())  # type: ignore[operator]
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**scheduler_config()),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(out / "photos-sd", safe_serialization=True)
    # transformers would load the text encoder in the dtype of its config, diffusers loads the rest in float32.
    config = out / "photos-sd" / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    if (work / "photos-classifier").exists():
        shutil.copytree(work / "photos-classifier", out / "photos-classifier", dirs_exist_ok=True)
    size = sum(
        f.stat().st_size for n in ("photos-sd", "photos-classifier") for f in (out / n).rglob("*") if f.is_file()
    )
    print(f"exported to {out}: {size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["all", "data", "vae", "decoder", "text", "unet", "classifier", "export"])
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-sd"), help="checkpoints and contact sheets")
    parser.add_argument("--out", type=Path, default=ROOT / "pipelines" / "tiny")
    parser.add_argument("--crops", type=int, default=192, help="crops per concept")
    parser.add_argument("--vae-steps", type=int, default=3600)
    parser.add_argument("--decoder-steps", type=int, default=600)
    parser.add_argument("--text", choices=["joint", "clip"], default="joint", help="how the text encoder is trained")
    parser.add_argument("--text-steps", type=int, default=2000)
    parser.add_argument("--unet-steps", type=int, default=5000)
    parser.add_argument("--classifier-steps", type=int, default=700)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    clip = args.text == "clip"
    every = ["data", "vae", "decoder", "classifier", *(["text"] if clip else []), "unet", "export"]
    stages = every if args.stage == "all" else [args.stage]
    for stage in stages:
        if stage == "data" and not (args.work / "data.safetensors").exists():
            make_data(args.work, args.crops)
        elif stage == "vae":
            train_vae(args.work, args.vae_steps)
        elif stage == "decoder":
            train_decoder(args.work, args.decoder_steps)
        elif stage == "text":
            train_text(args.work, args.text_steps)
        elif stage == "unet":
            train_unet(args.work, args.unet_steps, clip=clip)
        elif stage == "classifier":
            train_classifier(args.work, args.classifier_steps)
        elif stage == "export":
            export(args.work, args.out, clip)


if __name__ == "__main__":
    main()
