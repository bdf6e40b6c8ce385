"""How well images show what was asked for, and how far they moved, in the common space of a CLIP model.

Evaluator: any CLIP (Radford et al. 2021, arXiv 2103.00020) or SigLIP model (Zhai et al. 2023, arXiv 2303.15343) of
transformers, an embedded one's name, a folder or a hub id, in safetensors; fp32, eval mode, with its own tokenizer and
preprocessing (transformers' PIL backend). SigLIP's text is padded to its full length and its padding attended to, as it
was trained.

Scale: a score is **100 × cosine** of image and prompt, not clipped at 0. CLIPScore (Hessel et al. 2021, arXiv
2104.08718) is 2.5 × the cosine, clipped. Numbers compare at one model only: the weights' hash goes with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from erase import resources
from erase.evaluation.axes import Floats
from erase.evaluation.classifiers import weights_hash
from erase.evaluation.image_files import read_image
from erase.evaluation.stats import MIN_GROUPS, Difference, paired_bootstrap
from erase.store import hub

SCALE = "100 × cosine"
KINDS = ("clip", "siglip")
"""Values of `model_type` that can be loaded."""
AT_ONCE = 2048
"""Images whose features are in memory at a time; a multiple of the batch size, so that batches are the same."""


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP or SigLIP model, ready."""

    net: Any
    tokenizer: Any
    processor: Any
    name: str
    """As the user gave it."""
    model_sha256: str

    @property
    def siglip(self) -> bool:
        """Whether it is a SigLIP, whose towers end in the common space."""
        return bool(self.net.config.model_type == "siglip")

    @property
    def max_tokens(self) -> int:
        """The longest prompt that it reads whole, begin and end included."""
        return int(self.net.config.text_config.max_position_embeddings)

    @property
    def provenance(self) -> dict[str, str]:
        """What makes the numbers, and their scale."""
        return {"clip": self.name, "model_sha256": self.model_sha256, "scale": SCALE}

    def truncated(self, prompts: Sequence[str]) -> list[str]:
        """The prompts of which it reads the beginning only."""
        return [p for p in dict.fromkeys(prompts) if len(self.tokenizer(p).input_ids) > self.max_tokens]


def locate_clip(model: str | Path) -> str:
    """Where a CLIP model is loaded from: the folder of an embedded one, or what was given, a folder or a hub id.

    Raises:
        ValueError: a name that is none of these.
    """
    name = str(model)
    if name in resources.list_tiny() or ("/" not in name and not Path(name).exists()):
        return str(resources.tiny_path(name))
    return name


def open_clip(model: str | Path, device: str = "cpu") -> Clip:
    """Load a CLIP or SigLIP model: an embedded one's name, a folder, or a hub id (downloaded once).

    Raises:
        ValueError: it is not there, is no such model, or lacks weights.
    """
    import torch
    import transformers
    from safetensors import SafetensorError
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.clip.modeling_clip import CLIPModel
    from transformers.models.siglip.modeling_siglip import SiglipModel
    from transformers.utils.hub import cached_file

    name = locate_clip(model)
    processor_class: Any = AutoImageProcessor  # untyped upstream
    tokenizer_class: Any = transformers.AutoTokenizer
    if not Path(name).exists() and not hub.is_id(name):
        raise ValueError(f"no CLIP model {name!r}: not a folder, not a hub id (owner/name)")
    cached = not Path(name).exists() and not hub.reachable(name)
    local: Any = {"local_files_only": cached}
    try:
        found: Any = cached_file(name, "config.json", **local)
        kind = transformers.AutoConfig.from_pretrained(name, **local).model_type
        if kind not in KINDS:
            raise ValueError(f"it is a model of type {kind!r}, expected {' or '.join(map(repr, KINDS))}")
        reader: Any = CLIPModel if kind == "clip" else SiglipModel
        how: Any = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True, **local}
        net, info = reader.from_pretrained(name, **how)
        tokenizer = tokenizer_class.from_pretrained(name, **local)
        processor = processor_class.from_pretrained(name, backend="pil", **local)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if cached and isinstance(error, OSError):
            raise hub.refusal(name, error, cached) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            "a CLIP score or judge needs a CLIP or SigLIP model of transformers in safetensors, an embedded one's "
            f"name, a folder or a hub id; {model}: {reason}"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random weights
        raise ValueError(f"{model}: {len(missing)} weights are missing from the CLIP model, such as {missing[0]}")
    return Clip(net.eval().to(device), tokenizer, processor, str(model), weights_hash(Path(found).parent))


def image_features(
    clip: Clip,
    paths: Sequence[Path],
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Floats:
    """`[N, D]`, of unit length.

    Raises:
        ValueError: no images, or one that cannot be decoded.
    """
    import torch

    if not paths:
        raise ValueError("got no images, expected at least 1")
    parts = []
    for start in range(0, len(paths), batch_size):
        batch = [read_image(path) for path in paths[start : start + batch_size]]
        pixels = clip.processor(images=batch, return_tensors="pt")["pixel_values"].to(clip.net.device, torch.float32)
        with torch.inference_mode():
            pooled = clip.net.vision_model(pixel_values=pixels).pooler_output
            parts.append(_unit(pooled if clip.siglip else clip.net.visual_projection(pooled)))
        if progress:
            progress(min(start + batch_size, len(paths)), len(paths))
    return np.concatenate(parts)


def feature_blocks(clip: Clip, paths: Sequence[Path]) -> Iterator[Floats]:
    """`image_features` in blocks `[n, D]` of at most `AT_ONCE` images; of a million at once they would take 4 GB."""
    for start in range(0, len(paths), AT_ONCE):
        yield image_features(clip, paths[start : start + AT_ONCE])


def text_features(clip: Clip, prompts: Sequence[str], *, batch_size: int = 32) -> Floats:
    """`[N, D]`, of unit length; longer prompts than the model takes are cut: see `Clip.truncated`."""
    import torch

    distinct, index = numbered(prompts)
    parts = []
    for start in range(0, len(distinct), batch_size):
        tokens = clip.tokenizer(
            distinct[start : start + batch_size],
            padding="max_length",
            truncation=True,
            max_length=clip.max_tokens,
            return_tensors="pt",
        ).to(clip.net.device)
        with torch.inference_mode():
            mask = None if clip.siglip else tokens.attention_mask
            pooled = clip.net.text_model(input_ids=tokens.input_ids, attention_mask=mask).pooler_output
            parts.append(_unit(pooled if clip.siglip else clip.net.text_projection(pooled)))
    found = np.concatenate(parts)
    return found if len(found) == len(index) else found[index]


def numbered(prompts: Sequence[str]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """The distinct ones of N prompts in order of first appearance, and of each prompt its number among them, `[N]`."""
    place = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return list(place), np.array([place[prompt] for prompt in prompts], np.int64)


def _unit(features: Any) -> Floats:
    values = np.asarray(features.double().cpu().numpy(), np.float64)
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True), np.float64)


def clip_score(clip: Clip, values: Sequence[float], prompts: Sequence[str]) -> dict[str, Any]:
    """The mean score of images and their prompts, with its interval over prompts.

    Args:
        clip: the model.
        values: `[N]`, of `scores`.
        prompts: `[N]`

    Returns:
        ``n, prompts, score, ci95`` (bootstrap over prompts; None for fewer than `MIN_GROUPS`), ``truncated`` (prompts
        that were cut), and what made the numbers.
    """
    count = len(set(prompts))
    ci = paired_bootstrap([0.0] * len(values), values, prompts).ci95 if count >= MIN_GROUPS else None
    return {
        "n": len(values),
        "prompts": count,
        "score": float(np.mean(values)),
        "ci95": None if ci is None else list(ci),
        "truncated": clip.truncated(prompts),
        **clip.provenance,
    }


def scores(clip: Clip, images: Iterable[Floats], prompts: Sequence[str]) -> list[float]:
    """`[N]`, 100 × cosine of each image and its prompt.

    Args:
        clip: the model.
        images: blocks `[n, D]` of `feature_blocks`, N images in all.
        prompts: `[N]`

    Raises:
        ValueError: another number of prompts than images.
    """
    distinct, index = numbered(prompts)
    texts = text_features(clip, distinct)
    return [float(v) for block, own in beside(images, index) for v in 100 * cosines(block, texts[own])]


def score_pairs(
    clip: Clip, before: Sequence[Path], after: Sequence[Path], prompts: Sequence[str]
) -> tuple[list[float], list[float], list[float]]:
    """`[N]` each: `scores` of the images before and after, and 100 × cosine of the images of each pair.

    Args:
        clip: the model.
        before: `[N]`
        after: `[N]`, of the same prompts and seeds.
        prompts: `[N]`
    """
    distinct, index = numbered(prompts)
    texts, found = text_features(clip, distinct), np.empty((3, len(index)))
    for start in range(0, len(index), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        old, new, own = image_features(clip, before[some]), image_features(clip, after[some]), texts[index[some]]
        found[:, some] = 100 * np.stack([cosines(old, own), cosines(new, own), cosines(old, new)])
    return found[0].tolist(), found[1].tolist(), found[2].tolist()


def cosines(a: Floats, b: Floats) -> Floats:
    """`[N]`, of features `[N, D]` row by row."""
    return np.asarray((a * b).sum(axis=1), np.float64)


def beside(images: Iterable[Floats], index: npt.NDArray[np.int64]) -> Iterator[tuple[Floats, npt.NDArray[np.int64]]]:
    """Blocks `[n, D]` of images, each with its part `[n]` of what is known of all, `[N]`.

    Raises:
        ValueError: unless there are N images in all.
    """
    end = 0
    for block in images:
        some = index[end : end + len(block)]
        end += len(block)
        if len(some) < len(block):
            break
        yield block, some
    if end != len(index):
        raise ValueError(f"got {end} images and {len(index)} prompts, expected one prompt for each image")


def score_change(before: Sequence[float], after: Sequence[float], prompts: Sequence[str]) -> Difference | None:
    """How much `scores` of paired images differ, after - before; None for fewer than `MIN_GROUPS` prompts.

    Args:
        before: `[N]`
        after: `[N]`, of the same prompts and seeds.
        prompts: `[N]`
    """
    return paired_bootstrap(before, after, prompts) if len(set(prompts)) >= MIN_GROUPS else None
