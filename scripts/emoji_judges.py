"""The emoji world's judges, and the text encoders that learn beside one of them (stages of `scripts/make_emoji.py`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import emoji_models as nets
import emoji_world as data
import numpy as np
import torch
import torch.nn.functional as F
from emoji_training import Kit, dice, restored, train
from emoji_world import Scene, World
from torch import Tensor

SCORED = 2400
"""Scenes that the judge is tried on; the zero-shot judge on half as many."""
SETTLED = 40
"""Batches of which the judge's statistics are."""


def train_texts(kit: Kit, steps: int, batch: int = 96) -> None:
    """CLIP's loss of one image encoder and three text encoders; the image encoder and words also name what is there."""
    torch.manual_seed(4)
    tokenizer = nets.tokenizer_of(kit.work, kit.world)
    modules: dict[str, Any] = text_modules(kit, tokenizer)
    clip, first, second, heads = modules.values()

    def loss_of(step: int) -> Tensor:
        rng, g = dice(4, step)
        scenes = kit.scenes(rng, batch, held=True)
        told = [data.tell(scene, kit.world, rng) for scene in scenes]
        ids = nets.tokens(tokenizer, [text for text, _ in told])
        x = disturb(kit.pixels(scenes), g)
        seen = clip.vision_model(pixel_values=x)
        images = clip.visual_projection(seen.pooler_output).float()
        loss = axes_loss(heads["image"](seen.pooler_output).float(), scenes, kit.world)
        own = clip.text_projection(clip.text_model(**ids).pooler_output).float()
        scale = clip.logit_scale.exp().clamp(max=100)
        loss = loss + contrast(images, own, scale)
        trained = torch.tensor([not any(kit.world.held[k, s.style] for k in s.objects) for s in scenes])
        for name, text in (("first", first), ("second", second)):
            out = text(**ids)
            said = heads[f"{name}_image"](out.text_embeds).float()
            loss = loss + contrast(images.detach()[trained], said[trained], scale.detach())
            rows, ends, which = word_rows(ids, [end for _, end in told], scenes)
            loss = loss + F.cross_entropy(heads[f"{name}_word"](out.last_hidden_state[rows, ends]).float(), which)
        return loss

    train(kit, "texts", modules, loss_of, steps=steps)


def train_clip(kit: Kit, steps: int, batch: int = 96) -> None:
    """The zero-shot judge is asked for names among all names.

    CLIP's loss alone tells an image's caption from 95 others, of which few are alike: too little for 400 objects.
    """
    torch.manual_seed(8)
    tokenizer = nets.tokenizer_of(kit.work, kit.world)
    modules: dict[str, Any] = clip_modules(kit, tokenizer)
    clip, head = modules.values()

    def loss_of(step: int) -> Tensor:
        rng, g = dice(8, step)
        scenes = kit.scenes(rng, batch, held=True)
        seen = clip.vision_model(pixel_values=disturb(kit.pixels(scenes), g)).pooler_output
        images = clip.visual_projection(seen).float()
        style = None if rng.random() < 0.25 else list(data.STYLES)[int(rng.integers(len(data.STYLES)))]
        told = [data.tell(scene, kit.world, rng)[0] for scene in scenes]
        told += [data.phrase([data.with_article(name)], style) for name in kit.world.names]
        ids = nets.tokens(tokenizer, told)
        texts = clip.text_projection(clip.text_model(**ids).pooler_output).float()
        scale = clip.logit_scale.exp().clamp(max=100)
        alone = [i for i, scene in enumerate(scenes) if len(scene.objects) == 1]
        names = scale * F.normalize(images[alone], dim=1) @ F.normalize(texts[batch:], dim=1).T
        loss = F.cross_entropy(names, torch.tensor([scenes[i].objects[0] for i in alone]))
        loss = loss + contrast(images, texts[:batch], scale)
        return loss + axes_loss(head(seen).float(), scenes, kit.world)

    train(kit, "clip", modules, loss_of, steps=steps, muon=0.5)
    print("zero-shot judge on held-out augmentations: " + zero_shot(kit, clip, tokenizer))


def clip_modules(kit: Kit, tokenizer: Any) -> dict[str, torch.nn.Module]:
    """What the stage `clip` trains; the head names what an image shows, and is needed there alone."""
    return {"clip": nets.new_clip(tokenizer), "head": image_head(kit)}


def image_head(kit: Kit) -> torch.nn.Module:
    """The judge's labels, of the image encoder's pooled output."""
    return torch.nn.Linear(nets.VISION, len(nets.labels_of(kit.world)))


def text_modules(kit: Kit, tokenizer: Any) -> dict[str, torch.nn.Module]:
    """What the stage `texts` trains."""
    first, second = nets.new_texts(tokenizer)
    return {"clip": nets.new_clip(tokenizer), "first": first, "second": second, "heads": text_heads(kit)}


def text_heads(kit: Kit) -> torch.nn.ModuleDict:
    """Heads that only training needs."""
    width = nets.WIDTHS[0]
    heads = {"image": image_head(kit)}
    for name, own in zip(("first", "second"), nets.WIDTHS, strict=True):
        heads[f"{name}_image"] = torch.nn.Linear(own, width)
        heads[f"{name}_word"] = torch.nn.Linear(own, len(kit.world.concepts))
    return torch.nn.ModuleDict(heads)


def contrast(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric loss of N pairs, `[N, D]` each."""
    alike = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    target = torch.arange(len(alike))
    return (F.cross_entropy(alike, target) + F.cross_entropy(alike.T, target)) / 2


def word_rows(ids: Any, ends: list[list[int]], scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Which caption, which token and which concept: of the last word of each object that is named."""
    found = [
        (i, at, k)
        for i, (some, scene) in enumerate(zip(ends, scenes, strict=True))
        for end, k in zip(some, scene.objects, strict=False)
        if (at := ids.char_to_token(i, end - 1)) is not None
    ]
    rows, at, which = torch.tensor(found).T
    return rows, at, which


def disturb(x: Tensor, g: torch.Generator) -> Tensor:
    """Images with another contrast, brightness and sharpness, and noise: what no drawing has but a generator may."""
    n = (len(x), 1, 1, 1)
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
    x = torch.lerp(x, soft, 0.5 * torch.rand(n, generator=g))
    x = x * (0.85 + 0.3 * torch.rand(n, generator=g)) + 0.1 * torch.randn(n, generator=g)
    return (x + 0.12 * torch.rand(n, generator=g) * torch.randn(x.shape, generator=g)).clamp(-1, 1)


def axes_loss(logits: Tensor, scenes: list[Scene], world: World) -> Tensor:
    """Of labels as `emoji_models.labels_of`, one value: objects by a softmax with "none" and by a sigmoid each.

    A scene without objects counts for neither style nor background.
    """
    K, S = len(world.concepts), len(data.STYLES)
    things = torch.zeros(len(scenes), K)
    for i, scene in enumerate(scenes):
        things[i, list(scene.objects)] = 1
    none = (things.sum(1, keepdim=True) == 0).float()
    wanted = torch.cat([things, none], 1)
    wanted = wanted / wanted.sum(1, keepdim=True)
    objects = logits[:, :K]
    loss = F.cross_entropy(torch.cat([objects, torch.zeros(len(scenes), 1)], 1), wanted)
    loss = loss + 0.5 * F.binary_cross_entropy_with_logits(objects, things, reduction="none").sum(1).mean()
    real = torch.tensor([bool(scene.objects) for scene in scenes])
    style = torch.tensor([scene.style for scene in scenes])
    ground = torch.tensor([scene.background for scene in scenes])
    loss = loss + F.cross_entropy(logits[real, K : K + S], style[real])
    return loss + F.cross_entropy(logits[real, K + S :], ground[real])


def sides_loss(net: Any, seen: Tensor, scenes: list[Scene], world: World) -> Tensor:
    """Each side of the last layer's map `[B, C, H, W]` is asked for the object on that side.

    The logits of an image are the mean of those of its positions: who knows both sides knows both objects.
    """
    kept = [i for i, scene in enumerate(scenes) if scene.objects]
    sides = net.classifier(torch.cat([seen[kept][..., :1], seen[kept][..., -1:]]).mean((2, 3)))
    wanted = [scenes[i].objects[0] for i in kept] + [scenes[i].objects[-1] for i in kept]
    return F.cross_entropy(sides[:, : len(world.concepts)].float(), torch.tensor(wanted))


@torch.no_grad()
def zero_shot(kit: Kit, clip: Any, tokenizer: Any) -> str:
    """How many disturbed single objects, in drawings of all cells, are given their own name of all names."""
    (rng, g), count = dice(40, 0), SCORED // 2
    scenes = kit.scenes(rng, count, held=True, doubles=0.0)
    style = [list(data.STYLES)[s.style] for s in scenes]
    images = []
    for part in disturb(kit.pixels(scenes), g).split(200):
        images.append(clip.visual_projection(clip.vision_model(pixel_values=part).pooler_output))
    seen, right = F.normalize(torch.cat(images), dim=1), 0
    for name in data.STYLES:
        words = [data.phrase([data.with_article(n)], name) for n in kit.world.names]
        texts = clip.text_projection(clip.text_model(**nets.tokens(tokenizer, words)).pooler_output)
        own = [i for i, s in enumerate(style) if s == name]
        best = (seen[own] @ F.normalize(texts, dim=1).T).argmax(1).tolist()
        right += sum(b == scenes[i].objects[0] for b, i in zip(best, own, strict=True))
    return f"{100 * right / count:.1f} % of {count} objects"


def train_judge(kit: Kit, steps: int, batch: int = 128) -> None:
    """The classifier, on drawings, a third as the VAE shows them, and an eighth that shows nothing."""
    torch.manual_seed(5)
    net: Any = nets.new_judge(kit.world)
    vae: Any = restored(kit, "vae", {"vae": nets.new_vae()})["vae"]

    def loss_of(step: int) -> Tensor:
        net.train()
        rng, g = dice(5, step)
        x, scenes = judged(kit, vae, rng, g, batch)
        shown = F.interpolate(x, size=nets.SHOWN, mode="bilinear").contiguous(memory_format=torch.channels_last)
        seen = net.resnet(shown)  # in this layout a step takes two thirds of the time
        loss = axes_loss(net.classifier(seen.pooler_output).float(), scenes, kit.world)
        return loss + sides_loss(net, seen.last_hidden_state, scenes, kit.world)

    train(kit, "judge", {"judge": net}, loss_of, steps=steps, lr=2e-3, muon=0.5)
    settle(kit, net, vae)
    print("judge on held-out augmentations: " + judge_scores(kit, net, vae))


@torch.no_grad()
def judged(
    kit: Kit, vae: Any, rng: np.random.Generator, g: torch.Generator, batch: int, doubles: float = 0.5
) -> tuple[Tensor, list[Scene]]:
    """Images for the judge, at any place: a third through the VAE with noise on its latents, an eighth of nothing.

    A third of the objects that are alone are as small as one of two: those are learned sooner so.
    """
    scenes = kit.scenes(rng, batch, held=True, doubles=doubles, anywhere=True)
    small = [len(scene.objects) == 1 and rng.random() < 1 / 3 for scene in scenes]
    scenes = [
        replace(scene, boxes=data.place(1, rng, data.DOUBLE, anywhere=True)) if less else scene
        for scene, less in zip(scenes, small, strict=True)
    ]
    x = kit.pixels(scenes)
    shown, junk = batch // 3, batch // 8
    z = vae.encode(x[: shown + junk]).latent_dist.mean
    z[:shown] += 0.2 * z.std() * torch.rand(shown, 1, 1, 1, generator=g) * torch.randn(z[:shown].shape, generator=g)
    soup = 1.5 * z.std() * torch.rand(junk, 1, 1, 1, generator=g) * torch.randn(z[shown:].shape, generator=g)
    share = torch.rand(junk, 1, 1, 1, generator=g).round()  # half noise, half the mean of three scenes' latents
    z[shown:] = share * soup + (1 - share) * (z[shown:] + z[:junk] + z[shown : shown + junk].roll(1, 0)) / 3
    x[: shown + junk] = vae.decode(z).sample.clamp(-1, 1)
    for i in range(shown, shown + junk):
        scenes[i] = Scene((), scenes[i].style, scenes[i].background, ())
    return disturb(x, g), scenes


@torch.no_grad()
def settle(kit: Kit, net: Any, vae: Any) -> None:
    """Statistics of batch normalisation for the averaged weights."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean
    net.train()
    for step in range(SETTLED):
        x, _ = judged(kit, vae, *dice(50, step), 128)
        net(F.interpolate(x, size=nets.SHOWN, mode="bilinear"))
    net.eval()


@torch.no_grad()
def judge_scores(kit: Kit, net: Any, vae: Any) -> str:
    """Scenes by seeds that training has not: objects, both of two, style and background, in per cent."""
    K, S = len(kit.world.concepts), len(data.STYLES)
    hits: dict[str, list[bool]] = {}
    for step in range(SCORED // 120):
        x, scenes = judged(kit, vae, *dice(51, step), 120)
        logits = net(F.interpolate(x, size=nets.SHOWN, mode="bilinear")).logits
        for row, scene in zip(logits, scenes, strict=True):
            shown = (row[:K] > 0).nonzero().flatten().tolist()
            if len(scene.objects) == 1:
                hits.setdefault("object", []).append(int(row[:K].argmax()) == scene.objects[0])
            kind = ("nothing", "exactly the one", "exactly the two")[len(scene.objects)]
            hits.setdefault(kind, []).append(shown == sorted(scene.objects))
            if scene.objects:
                alone = "style" if len(scene.objects) == 1 else "style of two"
                hits.setdefault(alone, []).append(int(row[K : K + S].argmax()) == scene.style)
                hits.setdefault("background", []).append(int(row[K + S :].argmax()) == scene.background)
    return ", ".join(f"{name} {100 * np.mean(some):.1f} % of {len(some)}" for name, some in sorted(hits.items()))


def texts_of(kit: Kit) -> tuple[Any, Any, Any]:
    """Tokenizer and both text encoders, frozen."""
    tokenizer = nets.tokenizer_of(kit.work, kit.world)
    found = restored(kit, "texts", text_modules(kit, tokenizer))
    return tokenizer, found["first"], found["second"]
