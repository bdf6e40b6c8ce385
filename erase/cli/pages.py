"""`erase grid` and `report`: what a person looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erase.cli.common import (
    Blur,
    app,
    check_place,
)
from erase.evaluation import detections, detector


def new_image(out: Path) -> Path:
    """The path of an image, checked before any image is looked at.

    Raises:
        ValueError: for a folder, a place below a file, a form that is not written, or a file that exists.
    """
    from erase.evaluation.grid import form_of

    check_place(out)
    form_of(out)
    if out.exists():
        raise ValueError(f"{out} exists: choose another --out, or remove it")
    return out


@app.command(name="grid")
def grid_(
    folders: Annotated[list[Path], typer.Argument(help="Folders of images, one for each model.")],
    *,
    out: Annotated[Path, typer.Option("--out", help="Image to write: .png, .jpg, .jpeg or .webp.", callback=new_image)],
    names: Annotated[list[str] | None, typer.Option("--name", help="Label of a row; give one for each folder.")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Only prompts that contain these words; may be repeated.")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Only this seed; may be repeated.")] = None,
    columns: Annotated[int, typer.Option(help="Largest number of images in a row.")] = 12,
    max_prompts: Annotated[int, typer.Option("--max-prompts", help="Largest number of prompts.")] = 14,
    tile: Annotated[int | None, typer.Option(min=1, help="Side of each image in pixels.")] = None,
    title: Annotated[str | None, typer.Option(help="A title above the grid.")] = None,
    blur: Blur = True,
) -> None:
    """Show images of several models side by side.

    Each prompt has a block, each folder a row, each seed a column.

    Example: erase grid runs/demo/images/base runs/demo/images/erased --prompt woman --prompt cat --out grid.png
    """
    from erase.evaluation import grid
    from erase.evaluation.columns import match, pick

    common, rows = match(folders)
    chosen = pick(common, prompts or [], seeds or [])
    boxes = detections.exposed_boxes(detector.detect([row[i] for row in rows for i in chosen])) if blur else None
    image = grid.grid_from_folders(
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
    grid.save_image(image, out)
    typer.echo(str(out))


@app.command(name="report")
def report_(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    *,
    blur: Blur = True,
) -> None:
    """Write a run's report.html again, from the files in its folder.

    Example: erase report runs/demo --no-blur
    """
    from erase.evaluation import report

    paths = report.shown_images(folder)
    boxes = detections.exposed_boxes(detector.detect(paths)) if blur and paths else None
    typer.echo(str(report.write_html(folder, blur=boxes)))
