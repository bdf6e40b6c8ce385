"""`erase generate`: images of a text-to-image model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from erase.cli.common import (
    OutDir,
    Resume,
    app,
    no_loading_bars,
    quiet,
    speaks,
    stoppable,
)
from erase.evaluation import prompt_files


@app.command()
def generate(
    model: Annotated[
        str, typer.Argument(help="An embedded model's name, a diffusers folder, a single file or a hub id.")
    ],
    prompts: Annotated[
        str, typer.Argument(help="A prompt set's name, or a CSV or text file; of class names for a model of classes.")
    ],
    *,
    out: OutDir,
    images: Annotated[int, typer.Option(help="Images per prompt.")] = 1,
    steps: Annotated[int, typer.Option(help="Sampler steps.")] = 50,
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale of rows that name none. Default: 7.5, or the own one of a model of classes."),
    ] = None,
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
    quiet()
    from dataclasses import replace

    from erase import resources
    from erase.evaluation import generate as drawing
    from erase.store import files

    stoppable()
    file = resources.prompt_path(prompts)
    rows = prompt_files.read_prompts(file, default_seed=seed)
    if steps < 1 or images < 1 or batch_size < 1 or (guidance is not None and guidance < 0):
        raise ValueError(
            f"--steps, --images and --batch-size must be at least 1 and --guidance at least 0; "
            f"got {steps}, {images}, {batch_size}, {guidance}"
        )
    if speaks():
        drawing.begun(out, resume)  # before the model is loaded
    if alike:
        rows = [replace(row, guidance=None, width=None, height=None) for row in rows]
    import torch

    from erase.diffusion import class_conditional, text
    from erase.diffusion.checkpoints import folders
    from erase.diffusion.checkpoints.locate import locate
    from erase.diffusion.families import family
    from erase.diffusion.model import open_model
    from erase.engine import distributed
    from erase.engine.precision import Precision
    from erase.programs import runs

    no_loading_bars()
    device = runs.launch().device
    context = Precision(precision, device)
    source = locate(model)
    known = family(source.family)
    reads_text = known.CONDITION == "text"
    if reads_text:  # before the model is loaded
        for number, row in enumerate(rows, 1):
            text.check_size(row.width, row.height, f"{file}: row {number}", known.STRIDE)
    diffuser = open_model(source, device, precision)
    if not reads_text:
        for number, row in enumerate(rows, 1):
            class_conditional.check_row(diffuser, row.prompt, row.width, row.height, f"{file}: row {number}")
    cut = text.cut_prompts(diffuser, [row.prompt for row in rows]) if reads_text else []
    if guidance is None:
        guidance = 7.5 if reads_text else diffuser.guidance
    first = distributed.rank() == 0
    if cut and first:
        typer.echo(text.say_cut(diffuser, cut, len(rows)), err=True)
    diffuser.remember([*(row.prompt for row in rows), ""])
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
