"""`erase generate`: images of a text-to-image model."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from erase.cli import complete
from erase.cli.common import (
    Components,
    OutDir,
    Resume,
    app,
    check_out,
    no_loading_bars,
    quiet,
    speaks,
    stoppable,
)
from erase.evaluation import prompt_files


@app.command()
def generate(
    model: Annotated[
        str,
        typer.Argument(
            help="A name from erase ls models, a diffusers folder, a single file or a hub id.",
            autocompletion=complete.models,
        ),
    ],
    prompts: Annotated[
        list[str],
        typer.Argument(
            help="Prompts, each in quotes; or the name of a prompt set, a CSV or text file, or class names.",
            autocompletion=complete.prompts,
        ),
    ],
    *,
    out: OutDir,
    images: Annotated[int, typer.Option(help="Images per prompt.")] = 1,
    steps: Annotated[int, typer.Option(help="Sampler steps.")] = 50,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale of prompts without one. Default: 7.5; for a class-conditional model, the model's own."
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="ddim, dpm (DPM-Solver++), euler, euler_a, lms, pndm or unipc; flow_euler for flow models; ddim, ddpm "
            "or dpm for class-conditional models. Default: the model's own."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images generated at once.")] = 8,
    precision: Annotated[Literal["no", "bf16", "fp16"], typer.Option(help="Precision of the forward passes.")] = "no",
    seed: Annotated[int, typer.Option(help="Seed. Rows of a file without one get this plus their row number.")] = 0,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPU threads of each process. The number changes images slightly. Default: 1 for small models, else "
            "OMP_NUM_THREADS or all cores.",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="N|NAME,…",
            help="For a class-conditional model without class names: the number of classes, or their names. If it has "
            "one more class embedding, the last is the null class.",
        ),
    ] = None,
    components: Components = None,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="FILE[:SCALE]", help="A LoRA to merge into the model first; may be repeated."),
    ] = None,
    alike: Annotated[
        bool,
        typer.Option(
            "--alike", help="Use --guidance and the model's own size for all rows, whatever their columns say."
        ),
    ] = False,
    resume: Resume = False,
) -> None:
    """Generate images. An image depends only on its prompt, seed and settings, not on order or number of processes.

    A CSV file may have the columns seed, guidance, width and height (or I2P's names for them). Several processes can
    share the work: accelerate launch --multi_gpu --num_processes 2 -m erase generate ...

    Example: erase generate photos-sd 'a photo of a cat' --out runs/cats --images 4 --steps 20 --guidance 3

    Example: erase generate photos-sd 'a photo of a cat' 'a sketch of a cat' --out runs/two

    Example: erase generate photos-sd photos-plain --out runs/images --images 4 --steps 20 --guidance 3
    """
    quiet()
    from dataclasses import replace

    stoppable(out)
    check_out(out, resume, "settings.json")
    found = {text: _file(text, out) for text in prompts}
    file = found[prompts[0]]
    if len(prompts) > 1 and (files := [text for text, path in found.items() if path is not None]):
        raise ValueError(f"PROMPTS has {files[0]}, a prompt set or a file, beside other prompts: give it alone")
    rows = _rows(prompts, seed) if file is None else prompt_files.read_prompts(file, default_seed=seed)
    if steps < 1 or images < 1 or batch_size < 1 or (guidance is not None and not 0 <= guidance < math.inf):
        raise ValueError(
            f"--steps, --images and --batch-size must be at least 1 and --guidance at least 0; "
            f"got {steps}, {images}, {batch_size}, {guidance}"
        )
    if alike:
        rows = [replace(row, guidance=None, width=None, height=None) for row in rows]
    from erase.programs import generating
    from erase.store.class_names import class_names

    no_loading_bars()
    named = () if labels is None else class_names(int(labels) if labels.isdecimal() else labels.split(","))
    used = tuple(lora or ())
    wanted = generating.Wanted(
        images, steps, guidance, batch_size, precision, sampler, threads, named, components, used
    )
    generating.generate(model, file, rows, out, wanted, resume=resume, say=partial(typer.echo, err=True))
    if speaks():
        typer.echo(f"{len(rows) * images} images in {out}")


def _file(text: str, out: Path) -> Path | None:
    """The file that PROMPTS names, by itself or as a set; `None` where it is a prompt.

    `out`, the folder to write, may have a prompt's name; another folder is taken for a file, and refused.

    Raises:
        ValueError: for what is likely a set's name with a slip.
    """
    from erase import resources

    is_file = text not in resources.list_prompts() and os.path.exists(text) and Path(text).resolve() != out.resolve()
    return Path(text) if is_file else prompt_files.find_set(text)


def _rows(prompts: list[str], seed: int) -> list[prompt_files.PromptRow]:
    """Prompts that are typed instead of a file.

    Raises:
        ValueError: for an empty one, or a seed out of range.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("PROMPTS is empty: give a prompt, the name of a prompt set, or a file")
    if not 0 <= seed <= prompt_files.MAX_SEED:
        raise ValueError(f"--seed must be from 0 to {prompt_files.MAX_SEED}; got {seed}")
    return [prompt_files.PromptRow(prompt, seed) for prompt in dict.fromkeys(prompts)]
