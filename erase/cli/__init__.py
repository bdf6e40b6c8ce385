"""The `erase` command. Heavy imports happen inside the commands, so that `erase --help` is instant."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(
    help="Erase concepts from diffusion models, and measure that they are gone and the rest is not.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
evaluate = typer.Typer(help="Count what pictures show.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(evaluate, name="eval")

OutDir = Annotated[Path, typer.Option("--out", help="Folder to write; must be new or empty.")]


def _result_file(out: Path) -> Path:
    """Where a result may be written: at a new place, or over an earlier result.

    Raises:
        ValueError: for a folder, a place below a file, or a file that holds something else.
    """
    if out.is_dir():
        raise ValueError(f"{out} is a folder: --out names a file")
    if out.exists():
        with out.open("rb") as file:
            head = file.read(64)
        if not (head.lstrip().startswith(b"{") and b'"schema"' in head):
            raise ValueError(f"{out} is there and no result of erase: choose another --out")
    elif any(parent.is_file() for parent in out.parents):
        raise ValueError(f"{out} cannot be written: it is below a file")
    return out


OutFile = Annotated[Path, typer.Option("--out", help="File to write.", callback=_result_file)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what the folder holds.")]
Blur = Annotated[bool, typer.Option("--blur/--no-blur", help="Hide exposed body parts that NudeNet finds.")]


class Stopped(SystemExit):
    """A signal ended the command; `again` goes on with it."""

    def __init__(self, number: int, again: str) -> None:
        super().__init__(128 + number)
        self.name, self.again = signal.Signals(number).name, again


def _stoppable(again: str | None = None) -> None:
    """SIGTERM and SIGINT end a command that can be gone on with; its files are whole at any time.

    Args:
        again: the command that goes on; by default this one, with --resume.
    """
    said = again or command_line() + ("" if "--resume" in sys.argv else " --resume")

    def end(number: int, _: Any) -> None:
        raise Stopped(number, said)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def main() -> None:
    """Run the command; what a user can mend is one line on stderr and exit status 2, a full disk too.

    A signal's status is 143 (SIGTERM) or 130 (SIGINT).
    """
    try:
        app(standalone_mode=True)
    except Stopped as stopped:
        if _speaks():
            sys.stderr.write(f"erase: stopped by {stopped.name}; go on with: {stopped.again}\n")
        raise
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("ERASE_DEBUG"):
            raise
        _let_the_first_speak(error)
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        line = " ".join(text.split()) or type(error).__name__
        sys.stderr.write(f"erase: {line}\n")
        raise SystemExit(2) from None


def _speaks() -> bool:
    """Whether this is the first process of its launch."""
    return os.environ.get("RANK", "0") == "0"


def _let_the_first_speak(error: Exception) -> None:
    """Of the processes of a launch one says what is wrong; its launcher then ends the others.

    That is the first one, unless it only lost another: a process waits to be ended before it speaks for itself.
    """
    lost = isinstance(error, RuntimeError)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (lost or not _speaks()):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(60 if lost else 10)


def program(name: str) -> ModuleType:
    """The program of a pipeline, imported only when it is needed: its libraries take seconds."""
    from importlib import import_module

    return import_module(f"erase.programs.{name}")


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["erase", *sys.argv[1:]])


def _quiet() -> None:
    """Keep the libraries' notices about optional parts off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _no_loading_bars() -> None:
    """Ours tell of long work; theirs of loading small files. No variable of the environment switches them off."""
    from diffusers.utils.logging import disable_progress_bar as diffusers_bars
    from transformers.utils.logging import disable_progress_bar as transformers_bars

    diffusers_bars()
    transformers_bars()  # type: ignore[no-untyped-call]


def _run(
    pipeline: str,
    preset: str,
    settings: Sequence[str],
    out: Path,
    resume: bool,
    form: Literal["full", "delta"] = "full",
    dry_run: bool = False,
    again: str | None = None,
) -> None:
    _quiet()
    from erase import config, resources

    _stoppable(again)
    data = config.read_preset(resources.preset_path(preset))
    if data.get("pipeline") != pipeline:
        raise ValueError(f"preset {preset!r} is for erase run {data.get('pipeline')}, not for {pipeline}")
    # Checked here, before the program is loaded: its libraries take seconds.
    checked: Any = config.parse(config.override(data, settings), config.PIPELINES[pipeline])
    loaded = program(pipeline)
    _no_loading_bars()
    options: dict[str, Any] = {"resume": resume, "command": command_line(), "preset": preset, "form": form}
    loaded.main(checked, out, say=typer.echo, dry_run=dry_run, **options)


@app.command()
def demo(out: OutDir = Path("runs/demo")) -> None:
    """Erase the woman from the embedded Stable Diffusion and show it: the whole path, minutes on a CPU.

    Example: erase demo --out runs/demo
    """
    again = shlex.join(["erase", "run", "sd", "sd_photos_sfron", "--out", str(out), "--resume"])
    _run("sd", "sd_photos_sfron", [], out, resume=False, again=again)


@app.command()
def run(
    pipeline: Annotated[str, typer.Argument(help="sd, ddpm or classify")],
    preset: Annotated[str, typer.Argument(help="A preset's name (erase ls presets) or a YAML file.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    *,
    out: OutDir,
    resume: Resume = False,
    save: Annotated[
        Literal["full", "delta"], typer.Option(help="Keep the whole model, or only what changed (see erase apply).")
    ] = "full",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would learn, be in memory and be done; write nothing.")
    ] = False,
) -> None:
    """Unlearn: measure, mask, erase, save, measure again, report.

    Example: erase run sd sd_photos_sfron forget.prompts='a photo of a cat' --out runs/cat
    """
    from erase import config

    if pipeline not in config.PIPELINES:
        raise ValueError(f"no pipeline {pipeline!r}; pipelines: {', '.join(config.PIPELINES)}")
    again = command_line() if dry_run else None
    _run(pipeline, preset, settings or [], out, resume, save, dry_run, again)


@app.command()
def attack(
    run: Annotated[Path, typer.Argument(help="Folder of a finished erase run sd.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    *,
    out: OutDir,
    resume: Resume = False,
) -> None:
    """Attack a run's model: paraphrases, a learned word, training on the concept again; all, or `eval.attacks`.

    Example: erase attack runs/demo eval.attacks=[inversion,relearn] attack.inversion.steps=100 --out runs/attacked
    """
    _quiet()
    _stoppable()
    loaded = program("attack")
    _no_loading_bars()
    loaded.attack_run(run, settings or [], out, resume=resume, command=command_line(), say=typer.echo)


@app.command()
def compare(
    spec: Annotated[str, typer.Argument(help="A comparison's name (erase ls comparisons) or a YAML file.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder to write; one of the same comparison is gone on with.")],
) -> None:
    """Run methods × targets × seeds, and write a table and a plot; finished runs are not done again.

    Example: erase compare photos-objects --out runs/objects
    """
    _quiet()
    from erase import config, resources

    _stoppable(command_line())
    comparing = program("compare")
    plan = comparing.read_spec(config.read_preset(resources.comparison_path(spec)), settings or [])
    loaded = program(plan.pipeline)
    _no_loading_bars()
    table = comparing.main(plan, out, loaded, command=command_line(), say=typer.echo)
    typer.echo(table.read_text(encoding="utf-8").rstrip())


@app.command(name="ls")
def list_(
    what: Annotated[str, typer.Argument(help="methods, presets, comparisons, prompts or models")] = "",
) -> None:
    """List what comes with erase.

    Example: erase ls presets
    """
    from erase import resources

    def methods() -> list[str]:
        from erase.methods import list_methods

        return list_methods()

    kinds = {
        "methods": methods,
        "presets": resources.list_presets,
        "comparisons": resources.list_comparisons,
        "prompts": resources.list_prompts,
        "models": resources.list_tiny,
    }
    if what and what not in kinds:
        raise ValueError(f"nothing to list under {what!r}; allowed: {', '.join(kinds)}")
    for kind in [what] if what else kinds:
        names = kinds[kind]()
        typer.echo("\n".join(names) if what else f"{kind}: {', '.join(names)}")


@app.command()
def show(preset: Annotated[str, typer.Argument(help="A preset's or a comparison's name or file.")]) -> None:
    """Print a preset or a comparison: every value, and where it comes from.

    Example: erase show sd_photos_sfron
    """
    from erase import config, resources

    compares = preset in resources.list_comparisons()
    path = resources.comparison_path(preset) if compares else resources.preset_path(preset)
    config.read_preset(path)  # says what is wrong with a file that is none
    typer.echo(path.read_text(encoding="utf-8").rstrip())


@app.command()
def generate(
    model: Annotated[
        str, typer.Argument(help="An embedded model's name, a diffusers folder, a single file or a hub id.")
    ],
    prompts: Annotated[str, typer.Argument(help="A prompt set's name, or a CSV or text file.")],
    *,
    out: OutDir,
    images: Annotated[int, typer.Option(help="Images per prompt.")] = 1,
    steps: Annotated[int, typer.Option(help="Sampler steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Guidance scale of rows that name none.")] = 7.5,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at once.")] = 8,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    seed: Annotated[int, typer.Option(help="First seed of rows that have none.")] = 0,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPU threads of a process; pixels depend on their number by rounding. Default: 1 for small models, "
            "else OMP_NUM_THREADS or all cores.",
        ),
    ] = None,
    alike: Annotated[
        bool, typer.Option("--alike", help="--guidance and the model's own size for every row, whatever it names.")
    ] = False,
    resume: Resume = False,
) -> None:
    """Draw pictures: each depends on its row's seed and settings alone, not on order, batch, processes or resume.

    A CSV's rows may have a seed, guidance, width and height (I2P's names are known). Several processes share the
    work: accelerate launch --multi_gpu --num_processes 2 -m erase.cli generate ...

    Example: erase generate photos-sd photos-plain --out runs/pictures --images 4 --steps 20 --guidance 3
    """
    _quiet()
    from dataclasses import replace

    from erase import resources
    from erase.evaluation import generate as drawing
    from erase.store import files

    _stoppable()
    file = resources.prompt_path(prompts)
    rows = drawing.read_prompts(file, default_seed=seed)
    if steps < 1 or images < 1 or batch_size < 1 or guidance < 0:
        raise ValueError(
            f"--steps, --images and --batch-size must be at least 1 and --guidance at least 0; "
            f"got {steps}, {images}, {batch_size}, {guidance}"
        )
    if _speaks():
        drawing.begun(out, resume)  # before the model is loaded
    if alike:
        rows = [replace(row, guidance=None, width=None, height=None) for row in rows]
    import torch

    from erase.diffusion import text
    from erase.diffusion.checkpoints import folders
    from erase.diffusion.checkpoints.locate import locate
    from erase.diffusion.model import open_model
    from erase.engine import distributed
    from erase.engine.precision import Precision
    from erase.programs import runs

    _no_loading_bars()
    device = runs.launch().device
    context = Precision(precision, device)
    source = locate(model, "text")
    diffuser = open_model(source, device)
    for number, row in enumerate(rows, 1):
        text.check_size(row.width, row.height, f"{file}: row {number}", diffuser.family.STRIDE)
    cut = text.cut_prompts(diffuser, [row.prompt for row in rows])
    first = distributed.rank() == 0
    if cut and first:
        typer.echo(text.say_cut(diffuser, cut, len(rows)), err=True)
    settings: dict[str, Any] = {
        "model": model,
        "weights": folders.fingerprint(source),
        "dtype": str(next(diffuser.net.parameters()).dtype).removeprefix("torch."),
        "precision": precision,
        "draw": {"steps": steps, "guidance": guidance},
        "scheduler": type(diffuser.pipe.scheduler).__name__,
        "scheduler_config": {k: v for k, v in diffuser.pipe.scheduler.config.items() if not k.startswith("_")},
        "prompt_file": {"name": file.name, "sha256": files.sha256(file)},
        "truncated_prompts": cut,
        "versions": {k: v for k, v in runs.versions().items() if k in ("erase", "torch", "diffusers", "transformers")},
    }
    if device.type == "cpu":
        # One for a small model: as fast, and the pixels are the same whatever a launcher gives each process.
        small = sum(p.numel() for p in diffuser.net.parameters()) < 50e6
        torch.set_num_threads(threads or (1 if small else torch.get_num_threads()))
        settings["threads"] = torch.get_num_threads()
    runs.draw_pictures(
        diffuser.sampler(steps=steps, guidance=guidance, autocast=context.drawing),
        rows,
        out,
        images=images,
        batch_size=batch_size,
        resume=resume,
        settings=settings,
    )
    if first:
        typer.echo(f"{len(rows) * images} pictures in {out}")


def _images(folders: Sequence[Path]) -> list[Path]:
    from erase.evaluation.generate import list_images

    return [path for folder in folders for path in (list_images(folder) if not folder.is_file() else [folder])]


@evaluate.command(name="nudity")
def eval_nudity(
    images: Annotated[list[Path], typer.Argument(help="Folders or images; or one file of stored detections.")],
    *,
    out: OutFile,
    preset: Annotated[str, typer.Option(help="Counting preset of the field.")] = "i2p",
    label: Annotated[list[str] | None, typer.Option("--class", help="Count this class instead (repeat).")] = None,
    threshold: Annotated[float, typer.Option(help="Least score, with --class.")] = 0.6,
    sweep: Annotated[bool, typer.Option("--sweep", help="Count at thresholds 0.25 to 0.95, too.")] = False,
    channels: Annotated[str | None, typer.Option(help="corrected (default) or as_shipped.")] = None,
    model_path: Annotated[Path | None, typer.Option("--model", help="Another NudeNet ONNX file (640m).")] = None,
    resolution: Annotated[int | None, typer.Option(help="Input size; default what the file is for.")] = None,
) -> None:
    """Count NudeNet detections; raw detections of all classes are kept beside the result.

    They can be counted again in another way, without detecting: give them in the place of the images.

    Example: erase eval nudity runs/demo/images/base --class FACE_FEMALE --threshold 0.4 --out faces.json

    Example: erase eval nudity faces-detections.json --preset mace --sweep --out mace.json
    """
    from erase.evaluation import nudity
    from erase.store import files

    if channels not in (None, "corrected", "as_shipped"):
        raise ValueError(f"--channels must be corrected or as_shipped; got {channels!r}")
    if label is None and preset not in nudity.PRESETS:
        raise ValueError(f"no counting preset {preset!r}; presets: {', '.join(nudity.PRESETS)}")
    wanted = nudity.custom_preset(label, threshold) if label else nudity.PRESETS[preset]
    stored = [path for path in images if path.suffix == ".json"]
    if stored:
        if len(images) > 1 or (channels, model_path, resolution) != (None, None, None):
            raise ValueError(
                f"{stored[0]} holds detections that are there already: give it alone, without --channels, --model and "
                "--resolution"
            )
        found = nudity.load_detections(stored[0])
    else:
        paths = _images(images)
        from tqdm import tqdm

        with tqdm(total=len(paths), desc="detecting") as bar:

            def progress(done: int, total: int) -> None:
                bar.update(done - bar.n)

            found = nudity.detect(
                paths,
                channels="as_shipped" if channels == "as_shipped" else "corrected",
                model_path=model_path,
                resolution=resolution,
                progress=progress,
            )
        nudity.save_detections(found, out.with_name(f"{out.stem}-detections.json"))
    result = nudity.count(found, wanted)
    if sweep:
        result["sweep"] = nudity.sweep(found, wanted)
        typer.echo("threshold  pictures  counts")
        for row in result["sweep"]:
            typer.echo(f"{row['threshold']:9.2f}  {row['flagged']:8d}  {row['total']:6d}")
    files.write_json(out, {"schema": 1, "command": command_line(), "nudity": result})
    typer.echo(f"{result['flagged']} of {result['images']} pictures flagged ({wanted.name}); {out}")
    if result["errors"]:
        first = result["errors"][0]
        raise ValueError(
            f"{len(result['errors'])} pictures could not be looked at, so they are not known to be safe; "
            f"first {first['file']}: {first['error']}"
        )


@evaluate.command(name="classes")
def eval_classes(
    images: Annotated[list[Path], typer.Argument(help="Folders or images.")],
    *,
    out: OutFile,
    classifier: Annotated[str, typer.Option(help="A transformers image classifier's folder, or an embedded name.")],
) -> None:
    """Name what pictures show: counts per label and folder, and every picture's label.

    Example: erase eval classes runs/demo/images/erased --classifier photos-classifier --out classes.json
    """
    _quiet()
    from collections import Counter

    from erase import resources
    from erase.evaluation import classes
    from erase.store import files

    paths = _images(images)
    guess = classes.classify(paths, resources.tiny_path(classifier))
    rows = [
        {"file": str(path), "label": label, "probability": float(p.max())}
        for path, label, p in zip(guess.files, guess.predicted, guess.probabilities, strict=True)
    ]
    counts = Counter(guess.predicted)
    by_label = {label: classes.named(guess, label) for label in sorted(counts)}
    files.write_json(
        out,
        {"schema": 1, "command": command_line(), "classes": {**guess.provenance, "named": by_label}, "pictures": rows},
    )
    typer.echo("\n".join(f"{n:6d}  {label}" for label, n in counts.most_common()) + f"\n{out}")


@evaluate.command(name="fidelity")
def eval_fidelity(
    real: Annotated[Path, typer.Argument(help="Folder of real pictures.")],
    fake: Annotated[Path, typer.Argument(help="Folder of drawn ones.")],
    *,
    out: OutFile,
    classifier: Annotated[
        str | None, typer.Option(help="A transformers image classifier's folder, or an embedded name.")
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(help="For FID and KID: the TorchScript file inception-2015-12-05.pt.")
    ] = None,
    neighbours: Annotated[int, typer.Option(help="k of precision, recall, density and coverage.")] = 5,
) -> None:
    """Compare drawn pictures with real ones in a network's features; compare numbers of equal counts only.

    Distances on a classifier's features go by their own names; FID and KID need Inception's weights.

    Example: erase eval fidelity photos runs/demo/images/erased --classifier photos-classifier --out fidelity.json
    """
    _quiet()
    from erase import resources
    from erase.evaluation import fidelity
    from erase.store import files

    if (classifier is None) == (inception is None):
        raise ValueError("give one of --classifier (distances under their own names) and --inception (FID and KID)")
    sides = [_images([pictures]) for pictures in (real, fake)]
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
    list[str] | None, typer.Option("--without", help="Leave pictures of this prompt out, as an erased one (repeat).")
]


@evaluate.command(name="clip")
def eval_clip(
    pictures: Annotated[Path, typer.Argument(help="Folder of pictures with a manifest.")],
    *,
    out: OutFile,
    model: Annotated[str, typer.Option(help="A CLIP model of transformers: a folder or a hub id.")],
    base: Annotated[
        Path | None, typer.Option(help="Folder of the same prompts and seeds by the model before: compare pairs.")
    ] = None,
    without: Without = None,
) -> None:
    """Score how well pictures show their prompts: 100 × cosine in a CLIP model's space, with an interval.

    Example: erase eval clip runs/demo/images/erased --base runs/demo/images/base --model CLIP --out clip.json
    """
    _quiet()
    from erase.evaluation import clip as clips
    from erase.evaluation.generate import read_whole
    from erase.evaluation.stats import MIN_GROUPS, paired_bootstrap
    from erase.store import files

    pairs = _pairs(base, pictures, without) if base is not None else None
    rows = [row for _, row in pairs] if pairs is not None else _kept(read_whole(pictures), without)
    prompts = [row.prompt for row in rows]
    clip = clips.open_clip(model)
    seen = clips.image_features(clip, [pictures / row.file for row in rows])
    result: dict[str, Any] = {"after" if pairs is not None else "pictures": clips.clip_score(clip, seen, prompts)}
    lines = [_clip_line(str(pictures), next(iter(result.values())))]
    if pairs is not None and base is not None:
        old = clips.image_features(clip, [base / row.file for row, _ in pairs])
        result = {"before": clips.clip_score(clip, old, prompts), **result}
        lines.insert(0, _clip_line(str(base), result["before"]))
        alike = clips.similarities(old, seen)
        result["similarity"] = sum(alike) / len(alike)
        lines.append(f"pictures before and after: {result['similarity']:.2f} (100 is no change)")
        if len(set(prompts)) >= MIN_GROUPS:
            change = paired_bootstrap(clips.scores(clip, old, prompts), clips.scores(clip, seen, prompts), prompts)
            result["difference"] = {"score": change.difference, "ci95": list(change.ci95), "shown": change.shown}
            lines.append(f"score: {change}")
        else:
            lines.append(f"score: fewer than {MIN_GROUPS} prompts, so the difference has no interval over prompts")
    cut = next(iter(result.values()))["truncated"]
    if cut:
        lines.append(f"note: {len(cut)} prompts are longer than {clip.max_tokens} tokens; CLIP read their beginnings")
    files.write_json(out, {"schema": 1, "command": command_line(), "clip": result})
    typer.echo("\n".join([*lines, str(out)]))


def _clip_line(name: str, score: dict[str, Any]) -> str:
    ci = score["ci95"]
    interval = f"95 % interval {ci[0]:.2f} to {ci[1]:.2f}, " if ci else ""
    return (
        f"{name}: {score['score']:.2f} ({score['scale']}; {interval}{score['n']} pictures, {score['prompts']} prompts)"
    )


def _kept(rows: Sequence[Any], without: Sequence[str] | None) -> list[Any]:
    """The rows whose prompts are not left out."""
    known = {row.prompt for row in rows}
    for prompt in without or []:
        if prompt not in known:
            raise ValueError(f"--without {prompt!r}: no picture has that prompt; prompts: {', '.join(sorted(known))}")
    kept = [row for row in rows if row.prompt not in (without or [])]
    if not kept:
        raise ValueError("--without leaves no picture")
    return kept


def _pairs(base: Path, after: Path, without: Sequence[str] | None) -> list[tuple[Any, Any]]:
    """Rows of the same prompt and seed in both folders."""
    from erase.evaluation.generate import pair_rows

    pairs = pair_rows(base, after)
    kept = {row.file for row in _kept([row for _, row in pairs], without)}
    return [(old, new) for old, new in pairs if new.file in kept]


@evaluate.command(name="change")
def eval_change(
    base: Annotated[Path, typer.Argument(help="Folder of pictures with a manifest, by the model before.")],
    erased: Annotated[Path, typer.Argument(help="Folder of the same prompts and seeds, by the model after.")],
    *,
    out: OutFile,
    classifier: Annotated[str, typer.Option(help="A transformers image classifier's folder, or an embedded name.")],
    without: Without = None,
) -> None:
    """Measure how far pictures moved, pair by pair: LPIPS's formula on a classifier's stages, not LPIPS itself.

    Example: erase eval change runs/a/images/base runs/a/images/erased --classifier photos-classifier --out change.json
    """
    _quiet()
    from erase import resources
    from erase.evaluation import classes, fidelity
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
        "model_sha256": classes.weights_hash(folder),
    }
    files.write_json(out, {"schema": 1, "command": command_line(), "change": result})
    interval = f"; 95 % interval {ci[0]:.4f} to {ci[1]:.4f}" if ci else ""
    typer.echo(
        f"{mean:.4f} perceptual distance on {result['classifier']} (0 is no change{interval}; {len(pairs)} pairs, "
        f"{len(by_prompt)} prompts)\n{out}"
    )


@app.command(name="grid")
def grid_(
    folders: Annotated[list[Path], typer.Argument(help="Folders of pictures with a manifest, one a model.")],
    *,
    out: OutFile,
    names: Annotated[list[str] | None, typer.Option("--name", help="A row's label (repeat, one a folder).")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Only prompts that hold these words (repeat).")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Only this seed (repeat).")] = None,
    columns: Annotated[int, typer.Option(help="Most pictures in a row.")] = 12,
    max_prompts: Annotated[int, typer.Option("--max-prompts", help="Most prompts.")] = 14,
    tile: Annotated[int | None, typer.Option(help="Side of a picture in pixels.")] = None,
    title: Annotated[str | None, typer.Option(help="A line above.")] = None,
    blur: Blur = True,
) -> None:
    """Put models side by side: a block a prompt, in it a row a folder, the same seed in each column.

    Example: erase grid runs/demo/images/base runs/demo/images/erased --prompt woman --prompt cat --out grid.png
    """
    from erase.evaluation import grid, nudity

    common, rows = grid.match(folders)
    chosen = grid.pick(common, prompts or [], seeds or [])
    boxes = nudity.exposed_boxes(nudity.detect([row[i] for row in rows for i in chosen])) if blur else None
    picture = grid.grid_from_folders(
        folders,
        names=names,
        prompts=prompts or [],
        seeds=seeds or [],
        max_columns=columns,
        max_prompts=max_prompts,
        tile=tile,
        title=title,
        blur=boxes,
    )
    grid.save_image(picture, out)
    typer.echo(str(out))


@app.command(name="report")
def report_(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that has finished.")],
    *,
    blur: Blur = True,
) -> None:
    """Write a run's report.html again, from what its folder holds.

    Example: erase report runs/demo --no-blur
    """
    from erase.evaluation import nudity, report

    paths = report.pictures(folder)
    boxes = nudity.exposed_boxes(nudity.detect(paths)) if blur and paths else None
    typer.echo(str(report.write_html(folder, blur=boxes)))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A diffusers folder, hub id, .safetensors or .ckpt.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .safetensors file to write, or else a folder.")],
    *,
    prediction: Annotated[
        Literal["epsilon", "v_prediction"] | None, typer.Option(help="Of a 2.x file, which does not say.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read a .ckpt that holds more than weights: RUNS ITS CODE.")
    ] = False,
) -> None:
    """Write a Stable Diffusion folder as a single file, or the other way round; weights stay bit for bit.

    Example: erase convert runs/demo/model erased.safetensors
    """
    _quiet()
    from tqdm import tqdm

    from erase.diffusion.checkpoints import convert as converting
    from erase.diffusion.checkpoints.folders import Source
    from erase.diffusion.checkpoints.locate import locate

    found = locate(source, "text", prediction=prediction, trusted=allow_pickle)
    single = out.suffix == ".safetensors"
    if out.suffix == ".ckpt":
        raise ValueError(f"{out}: pickles are not written; a single file is .safetensors")
    if isinstance(found, Source) and not single:
        raise ValueError(f"{source} is a folder already: name a file to write, such as {out.name}.safetensors")
    with tqdm(total=converting.count(found), desc="tensors") as bar:
        if isinstance(found, Source):
            done = converting.to_file(found, out, bar.update)
        elif single:
            done = converting.to_safetensors(found, out, bar.update)
        else:
            done = converting.to_folder(found, out, bar.update)
    typer.echo(f"{done.tensors} tensors in {out}")
    for what, names in (
        ("kept in leftovers.safetensors, as no part of a pipeline has them", done.leftovers),
        ("left out, as they have no place there", done.left_out),
    ):
        if names:
            typer.echo(f"{what}: {', '.join(names[:12])}{f' … ({len(names)})' if len(names) > 12 else ''}")


@app.command()
def apply(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that the delta was made from.")],
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="What erase run --save delta left.")],
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder to write; a .safetensors file if BASE is a single file.")],
    undo: Annotated[bool, typer.Option("--undo", help="BASE is the erased model: write its base again.")] = False,
) -> None:
    """Rebuild an erased model of its base and a delta, bit for bit; or the base of the erased model.

    Example: erase apply photos-sd runs/cat/delta.safetensors --out cat-erased
    """
    _quiet()
    from tqdm import tqdm

    from erase.programs import saving
    from erase.store import delta as deltas

    change = deltas.open_delta(delta)
    source = _locate(base)
    values = deltas.apply(change, saving.tensors(source), undo=undo)
    with tqdm(desc="tensors", delay=1) as bar:  # not before a refusal
        saving.write(source, values, out, change.base_meta if undo else change.meta, bar.update)
    typer.echo(str(out))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A model (folder or file), mask, delta, run folder or any other file.")],
) -> None:
    """Say what a file or folder is, and how it was made if erase made it.

    Example: erase inspect runs/demo/saliency.safetensors
    """
    _quiet()
    import json

    typer.echo(json.dumps(_describe(path), indent=2, default=str))


def _mapping(path: Path, *keys: str) -> dict[str, Any]:
    from erase.store import files

    value = files.read_json(path)
    if not isinstance(value, dict) or not value.keys() >= set(keys):
        raise ValueError(f"{path}: not a mapping{' with ' if keys else ''}{' and '.join(keys)}")
    return value


def _locate(model: str) -> Any:
    """A checkpoint of any pipeline."""
    from erase import resources

    folder = resources.tiny_path(model) if model in resources.list_tiny() else Path(model)
    index, config = folder / "model_index.json", folder / "config.json"
    lone = not index.exists() and config.exists()
    if lone and _is_classifier(_mapping(config)):
        from erase.classification import folders as classifiers

        return classifiers.locate(model)
    from erase.diffusion.checkpoints.locate import locate

    return locate(model)


def _is_classifier(config: dict[str, Any]) -> bool:
    """Whether a folder's configuration is that of an image classifier of `transformers`."""
    names = config.get("architectures")
    return isinstance(names, list) and any(str(name).endswith("ForImageClassification") for name in names)


def _describe(path: Path) -> dict[str, Any]:
    if not path.exists():
        from erase import resources

        if str(path) not in resources.list_tiny():
            raise ValueError(f"no such file or folder: {path}")
        path = resources.tiny_path(str(path))
    return _describe_folder(path) if path.is_dir() else _describe_file(path)


def _describe_folder(path: Path) -> dict[str, Any]:
    alone = list(path.glob("*.safetensors")) if not (path / "config.json").exists() else []
    if (path / "model_index.json").exists():
        return _describe_model(path)
    if (path / "run.json").exists():
        return {"kind": "run of erase", **_describe_run(path)}
    if len(alone) == 1:
        return _describe_file(alone[0])
    if (path / "config.json").exists():
        config = _mapping(path / "config.json")
        if config.get("_class_name") == "UNet2DModel" or _is_classifier(config):
            return _describe_model(path)
        return {"kind": "transformers model", "architectures": config.get("architectures")}
    raise ValueError(f"{path} is a folder that erase does not know: no model_index.json, config.json or run.json")


def _describe_run(folder: Path) -> dict[str, Any]:
    """A run by its settings, and what it printed of its results if it finished."""
    run = _mapping(folder / "run.json", "command", "base")
    found = {"finished": (folder / "report.json").exists(), "command": run["command"], "base": run["base"]}
    if not found["finished"]:
        return found
    from erase.evaluation import report

    result = _mapping(folder / "report.json")
    if run.get("config", {}).get("pipeline") == "classify":
        lines = program("classify").table(result)
    else:
        lines = [*report.verdict(result), *report.robustness_lines(result.get("robustness", {}))]
    return {**found, "results": lines}


def _told(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    """A header, with what was forgotten as a list."""
    from erase.diffusion.checkpoints import folders

    if folders.FORGOTTEN not in header:
        return dict(header)
    return {**header, folders.FORGOTTEN: folders.forgotten_in(header, path)}


def _describe_model(path: Path) -> dict[str, Any]:
    from erase.classification import folders as classifiers
    from erase.programs import saving
    from erase.store import weights

    source = _locate(str(path))
    if isinstance(source, classifiers.Source):
        what, hashes = classifiers.describe(source), classifiers.fingerprint(source)
    else:
        from erase.diffusion.checkpoints import folders
        from erase.diffusion.describe import describe

        what, hashes = describe(source), folders.fingerprint(source)
    return {**what, **_told(weights.provenance(saving.header(source)), path), "sha256": hashes}


def _describe_file(path: Path) -> dict[str, Any]:
    from erase.store import files

    if path.suffix == ".safetensors":
        from erase.diffusion.checkpoints import single_file
        from erase.store.safetensors import open_safetensors

        tensors, meta = open_safetensors(path)
        if meta.get("format") == "erase-mask-1":
            from erase.engine.saliency import load_mask

            mask = load_mask(path)
            return {"kind": "saliency mask", **mask.meta, "kept": mask.density, "per_layer": mask.per_layer()}
        if meta.get("format") == "erase-delta-1":
            names = [name.removeprefix("xor/") for name in tensors if name.startswith("xor/")]
            return {"kind": "delta of erase", **_told(meta, path), "tensors": len(names), "sha256": files.sha256(path)}
        if all(
            any(name.startswith(part) for name in tensors) for part in ("model.diffusion_model.", "cond_stage_model.")
        ):
            return _describe_model(path)
        state = meta.get("format") == "erase-state-1"
        return {
            "kind": "run state of erase" if state else "safetensors file",
            **({} if state else {"holds": single_file.kind_of(tensors)}),
            "tensors": len(tensors),
            "first": list(tensors)[:5],
            "metadata": _told({k: v for k, v in meta.items() if k not in ("tree", "shapes")}, path),
            "sha256": files.sha256(path),
        }
    if path.suffix == ".ckpt":
        return _describe_model(path)
    if path.name == "run.json":
        return {"kind": "settings of a run of erase", "run": str(path.parent), **_describe_run(path.parent)}
    what = files.guess_kind(path)
    return {
        "kind": f"a file that erase does not know: {what}",
        "bytes": path.stat().st_size,
        "sha256": files.sha256(path),
    }
