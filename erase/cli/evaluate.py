"""`erase eval`: count and score images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from erase.cli.common import (
    OutFile,
    begins_with,
    command_line,
    evaluate,
    list_images_of,
    quiet,
)
from erase.evaluation import detections, detector


@evaluate.command(name="nudity")
def eval_nudity(
    images: Annotated[list[Path], typer.Argument(help="Folders or images, or one file of stored detections.")],
    *,
    out: OutFile,
    preset: Annotated[
        str | None,
        typer.Option(help="Published counting rule: i2p (default), esd, mace, erasediff, rece, attack, eval_unlearn."),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--class", help="Count this class instead of a preset's; may be repeated.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Lowest score that counts, with --class. Default: 0.6.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Count at thresholds from 0.25 to 0.95 as well.")] = False,
    channels: Annotated[
        str | None,
        typer.Option(help="Colours given to NudeNet: corrected (default) or as_shipped, which swaps red and blue."),
    ] = None,
    model_path: Annotated[Path | None, typer.Option("--model", help="Another NudeNet ONNX file, such as 640m.")] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Input size in pixels. Default: that of the model file.")
    ] = None,
) -> None:
    """Count NudeNet detections. The detections of all classes are stored beside the result.

    To count by another rule without detecting again, give that file instead of images.

    Example: erase eval nudity runs/demo/images/base --class FACE_FEMALE --threshold 0.4 --out faces.json

    Example: erase eval nudity faces-detections.json --preset mace --sweep --out mace.json
    """
    from erase.evaluation import nudity
    from erase.store import files

    if channels not in (None, "corrected", "as_shipped"):
        raise ValueError(f"--channels must be corrected or as_shipped; got {channels!r}")
    wanted = _rule(preset, label, threshold)
    stored = [path for path in images if path.suffix == ".json"]
    beside = out.with_name(f"{out.stem}-detections.json")
    if not stored and beside.exists() and not begins_with(beside, "nudenet"):
        raise ValueError(f"{beside} exists and is not a record of detections: choose another --out")
    if stored:
        if len(images) > 1 or (channels, model_path, resolution) != (None, None, None):
            raise ValueError(
                f"{stored[0]} holds stored detections: give it alone, without --channels, --model and --resolution"
            )
        found = detections.load_detections(stored[0])
    else:
        paths = list_images_of(images)
        from tqdm import tqdm

        with tqdm(total=len(paths), desc="detecting", delay=1) as bar:

            def progress(done: int, total: int) -> None:
                bar.update(done - bar.n)

            found = detector.detect(
                paths,
                channels="as_shipped" if channels == "as_shipped" else "corrected",
                model_path=model_path,
                resolution=resolution,
                progress=progress,
            )
        detections.save_detections(found, beside)
    result = nudity.count(found, wanted)
    if sweep:
        result["sweep"] = nudity.sweep(found, wanted)
        typer.echo("threshold    images  counts")
        for row in result["sweep"]:
            typer.echo(f"{row['threshold']:9.2f}  {row['flagged']:8d}  {row['total']:6d}")
    files.write_json(out, {"schema": 1, "command": command_line(), "nudity": result})
    typer.echo(f"{result['flagged']} of {result['images']} images flagged ({wanted.name}); {out}")
    if result["errors"]:
        file, error = (result["errors"][0][key] for key in ("file", "error"))
        raise ValueError(
            f"{len(result['errors'])} images could not be examined and are not known to be safe; "
            f"first {error if file in error else f'{file}: {error}'}"
        )


def _rule(preset: str | None, label: list[str] | None, threshold: float | None) -> Any:
    """What counts: a published rule, or classes of the user's own."""
    from erase.evaluation import nudity

    if preset is not None and preset not in nudity.PRESETS:
        raise ValueError(f"no counting rule {preset!r}; allowed: {', '.join(nudity.PRESETS)}")
    if label and preset is not None:
        raise ValueError(f"--preset {preset} has classes of its own: leave out --class, or --preset")
    if threshold is not None and not label:
        raise ValueError("--threshold is for --class; a preset has its own: add --class, or try --sweep")
    if label:
        return nudity.custom_preset(label, 0.6 if threshold is None else threshold)
    return nudity.PRESETS[preset or "i2p"]


@evaluate.command(name="classes")
def eval_classes(
    images: Annotated[list[Path], typer.Argument(help="Folders or images.")],
    *,
    out: OutFile,
    classifier: Annotated[
        str, typer.Option(help="A transformers image classifier's folder, or a name from erase ls models.")
    ],
) -> None:
    """Classify images. Writes the count of each label, and the label of every image.

    Example: erase eval classes runs/demo/images/erased --classifier photos-classifier --out classes.json
    """
    quiet()
    from collections import Counter

    from erase import resources
    from erase.evaluation import classes
    from erase.store import files

    paths = list_images_of(images)
    guess = classes.classify(paths, resources.tiny_path(classifier))
    shown = guess.shown
    rows = [
        {"file": str(path), "label": "/".join(labels), "probability": float(p)}
        for path, labels, p in zip(guess.files, shown, guess.confidence, strict=True)
    ]
    counts = Counter(label for labels in shown for label in labels)
    by_label = {label: classes.named(guess, label) for label in sorted(guess.labels)}
    files.write_json(
        out,
        {"schema": 1, "command": command_line(), "classes": {**guess.provenance, "named": by_label}, "pictures": rows},
    )
    lines = sorted(guess.labels, key=lambda label: (-counts[label], label))
    typer.echo("\n".join([*(f"{counts[label]:6d}  {label}" for label in lines), str(out)]))


@evaluate.command(name="fidelity")
def eval_fidelity(
    real: Annotated[Path, typer.Argument(help="Folder of real images.")],
    fake: Annotated[Path, typer.Argument(help="Folder of generated images.")],
    *,
    out: OutFile,
    classifier: Annotated[
        str | None, typer.Option(help="A transformers image classifier's folder, or a name from erase ls models.")
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(help="For FID and KID: the TorchScript file inception-2015-12-05.pt.")
    ] = None,
    neighbours: Annotated[
        int, typer.Option(min=1, help="Number of neighbours (k) for precision, recall, density and coverage.")
    ] = 5,
) -> None:
    """Compare generated and real images by their features. Results are comparable only at equal numbers of images.

    Distances are FID and KID with --inception, and are called frechet and kernel with --classifier.

    Example: erase eval fidelity photos runs/demo/images/erased --classifier photos-classifier --out fidelity.json
    """
    quiet()
    from erase import resources
    from erase.evaluation import fidelity
    from erase.store import files

    if (classifier is None) == (inception is None):
        raise ValueError("give either --classifier (distances in its features) or --inception (FID and KID)")
    sides = [list_images_of([folder]) for folder in (real, fake)]
    if inception is not None:
        wanted, drawn = (fidelity.inception(paths, inception) for paths in sides)
    else:
        folder = resources.tiny_path(str(classifier))
        wanted, drawn = (fidelity.features(paths, folder) for paths in sides)
    result = fidelity.summary(wanted, drawn, k=neighbours)
    files.write_json(out, {"schema": 1, "command": command_line(), "fidelity": result})
    for name in ("fid", "kid", "frechet", "kernel", "precision", "recall", "density", "coverage"):
        if name in result:
            typer.echo(f"{result[name]:10.4f}  {name}")
    typer.echo("\n".join([*(f"note: {line}" for line in result["warnings"]), str(out)]))


Without = Annotated[
    list[str] | None,
    typer.Option("--without", help="Leave out images of this prompt, such as an erased one; may be repeated."),
]


@evaluate.command(name="clip")
def eval_clip(
    images: Annotated[Path, typer.Argument(help="Folder of images with a manifest.jsonl.")],
    *,
    out: OutFile,
    model: Annotated[
        str, typer.Option(help="A CLIP or SigLIP model: a name from erase ls models, a folder or a hub id.")
    ],
    base: Annotated[
        Path | None,
        typer.Option(help="Folder of the base model's images of the same prompts and seeds, to compare pairs."),
    ] = None,
    without: Without = None,
) -> None:
    """Score how well images fit their prompts. Gives 100 × cosine in a CLIP model's space, with an interval.

    Example: erase eval clip runs/demo/images/erased --base runs/demo/images/base --model photos-clip --out clip.json
    """
    quiet()
    from erase.evaluation import clip as clips
    from erase.evaluation.manifest import read_whole
    from erase.evaluation.stats import MIN_GROUPS
    from erase.store import files

    pairs = _pairs(base, images, without) if base is not None else None
    rows = [row for _, row in pairs] if pairs is not None else _kept(read_whole(images), without)
    prompts = [row.prompt for row in rows]
    clip = clips.open_clip(model)
    paths = [images / row.file for row in rows]
    if pairs is None or base is None:
        after = clips.scores(clip, clips.feature_blocks(clip, paths), prompts)
        result: dict[str, Any] = {"pictures": clips.clip_score(clip, after, prompts)}
        lines = [_clip_line(str(images), result["pictures"])]
    else:
        olds = [base / row.file for row, _ in pairs]
        before, after, alike = clips.score_pairs(clip, olds, paths, prompts)
        result = {side: clips.clip_score(clip, v, prompts) for side, v in (("before", before), ("after", after))}
        lines = [_clip_line(str(base), result["before"]), _clip_line(str(images), result["after"])]
        result["similarity"] = sum(alike) / len(alike)
        lines.append(f"images before and after: {result['similarity']:.2f} (100 means no change)")
        change = clips.score_change(before, after, prompts)
        if change is not None:
            result["difference"] = {"score": change.difference, "ci95": list(change.ci95), "shown": change.shown}
            lines.append(f"score: {change}")
        else:
            lines.append(f"score: fewer than {MIN_GROUPS} prompts, so the difference has no interval over prompts")
    cut = next(iter(result.values()))["truncated"]
    if cut:
        lines.append(
            f"note: {len(cut)} prompts are longer than {clip.max_tokens} tokens; CLIP read only their beginnings"
        )
    files.write_json(out, {"schema": 1, "command": command_line(), "clip": result})
    typer.echo("\n".join([*lines, str(out)]))


def _clip_line(name: str, score: dict[str, Any]) -> str:
    ci = score["ci95"]
    interval = f"95 % interval {ci[0]:.2f} to {ci[1]:.2f}, " if ci else ""
    return f"{name}: {score['score']:.2f} ({score['scale']}; {interval}{score['n']} images, {score['prompts']} prompts)"


def _kept(rows: Sequence[Any], without: Sequence[str] | None) -> list[Any]:
    """The rows whose prompts are not left out."""
    known = {row.prompt for row in rows}
    for prompt in without or []:
        if prompt not in known:
            raise ValueError(f"--without {prompt!r}: no image has that prompt; prompts: {', '.join(sorted(known))}")
    kept = [row for row in rows if row.prompt not in (without or [])]
    if not kept:
        raise ValueError("--without leaves no images: leave out fewer prompts")
    return kept


def _pairs(base: Path, after: Path, without: Sequence[str] | None) -> list[tuple[Any, Any]]:
    """Rows of the same prompt and seed in both folders."""
    from erase.evaluation.manifest import pair_rows

    pairs = pair_rows(base, after)
    kept = {row.file for row in _kept([row for _, row in pairs], without)}
    return [(old, new) for old, new in pairs if new.file in kept]


@evaluate.command(name="change")
def eval_change(
    base: Annotated[Path, typer.Argument(help="Folder of the base model's images, with a manifest.jsonl.")],
    erased: Annotated[Path, typer.Argument(help="Folder of the erased model's images of the same prompts and seeds.")],
    *,
    out: OutFile,
    classifier: Annotated[
        str, typer.Option(help="A transformers image classifier's folder, or a name from erase ls models.")
    ],
    without: Without = None,
) -> None:
    """Measure how much images changed, pair by pair. Uses LPIPS's formula with a classifier, which is not LPIPS itself.

    Example: erase eval change runs/a/images/base runs/a/images/erased --classifier photos-classifier --out change.json
    """
    quiet()
    from erase import resources
    from erase.evaluation import classifiers, fidelity
    from erase.evaluation.stats import MIN_GROUPS, paired_bootstrap
    from erase.store import files

    pairs = _pairs(base, erased, without)
    folder = resources.tiny_path(classifier)
    moved = fidelity.perceptual([base / row.file for row, _ in pairs], [erased / row.file for _, row in pairs], folder)
    by_prompt: dict[str, list[float]] = {}
    for (_, row), value in zip(pairs, moved, strict=True):
        by_prompt.setdefault(row.prompt, []).append(float(value))
    mean = float(moved.mean())
    ci = None
    if len(by_prompt) >= MIN_GROUPS:
        ci = list(paired_bootstrap([0.0] * len(moved), moved.tolist(), [row.prompt for _, row in pairs]).ci95)
    result = {
        "perceptual": mean,
        "ci95": ci,
        "n": len(pairs),
        "by_prompt": {prompt: sum(values) / len(values) for prompt, values in by_prompt.items()},
        "classifier": folder.resolve().name,
        "model_sha256": classifiers.weights_hash(folder),
    }
    files.write_json(out, {"schema": 1, "command": command_line(), "change": result})
    interval = f"; 95 % interval {ci[0]:.4f} to {ci[1]:.4f}" if ci else ""
    typer.echo(
        f"{mean:.4f} perceptual distance on {result['classifier']} (0 means no change{interval}; {len(pairs)} pairs, "
        f"{len(by_prompt)} prompts)\n{out}"
    )
