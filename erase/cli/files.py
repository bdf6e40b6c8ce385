"""`erase convert` and `apply`: checkpoints in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from erase.cli import complete
from erase.cli.common import (
    Components,
    app,
    quiet,
)
from erase.programs.locating import locate_any


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="A diffusers folder, hub id, .safetensors or .ckpt; with --to, a run, a delta or an erased model.",
            autocompletion=complete.models,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file or the folder to write.")],
    *,
    components: Components = None,
    prediction: Annotated[
        Literal["epsilon", "v_prediction"] | None,
        typer.Option(help="What the model predicts, for a single file of SD 2.x or SDXL that does not say."),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read a .ckpt that holds more than weights: RUNS ITS CODE.")
    ] = False,
    to: Annotated[
        Literal["lora", "comfy-diff"] | None,
        typer.Option(help="Write only the change, to load onto the base model: a LoRA, or ComfyUI's exact comfy-diff."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of every layer of a LoRA. Default: each layer's own, by --energy.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="Smallest share of each layer's change that a LoRA keeps. Default: 0.99; for uce and speed, 1."
        ),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store a LoRA in 16 bits, rounded: half the size.")] = False,
    base: Annotated[
        str | None,
        typer.Option(help="The base model of IN. Default: the one that IN names.", autocompletion=complete.models),
    ] = None,
) -> None:
    """Write a model in another form, such as a LoRA.

    Makes a single file of a folder, a folder of a single file, or with --to a LoRA of an erasure. The weights of whole
    models do not change.

    Example: erase convert runs/demo/model erased.safetensors

    Example: erase convert runs/demo without-her.safetensors --to lora
    """
    quiet()
    if to is not None:
        _convert_change(source, out, to, rank, energy, half, base, components)
        return
    for name, value in (("--rank", rank), ("--energy", energy), ("--half", half or None), ("--base", base)):
        if value is not None:
            raise ValueError(f"{name} needs --to lora or --to comfy-diff: add one of them, or leave out {name}")
    from tqdm import tqdm

    from erase.diffusion.checkpoints import convert as converting
    from erase.diffusion.checkpoints.folders import Source
    from erase.diffusion.checkpoints.locate import locate

    found = locate(source, "text", components=components, prediction=prediction, trusted=allow_pickle)
    single = out.suffix == ".safetensors"
    if out.suffix == ".ckpt":
        raise ValueError(f"{out}: erase writes no pickles; give a name that ends in .safetensors")
    if isinstance(found, Source) and not single:
        raise ValueError(f"{source} is a folder already: give a file as OUT, such as {out.name}.safetensors")
    with tqdm(total=converting.count(found), desc="tensors", delay=1) as bar:
        if isinstance(found, Source):
            done = converting.to_file(found, out, bar.update)
        elif single:
            done = converting.to_safetensors(found, out, bar.update)
        else:
            done = converting.to_folder(found, out, bar.update)
    typer.echo(f"{done.tensors} tensors in {out}")
    for what, names in (
        ("kept in leftovers.safetensors, because no part of a pipeline has them", done.leftovers),
        ("left out, because the other form has no place for them", done.left_out),
    ):
        if names:
            typer.echo(f"{what}: {', '.join(names[:12])}{f' … ({len(names)})' if len(names) > 12 else ''}")


def _convert_change(
    source: str,
    out: Path,
    to: Literal["lora", "comfy-diff"],
    rank: int | None,
    energy: float | None,
    half: bool,
    base: str | None,
    components: str | None,
) -> None:
    """`erase convert --to`.

    Raises:
        ValueError: for options of the other form, or two that choose the rank.
    """
    if to == "comfy-diff" and (rank is not None or energy is not None or half):
        raise ValueError("--rank, --energy and --half are for --to lora, and comfy-diff is exact: leave them out")
    if rank is not None and energy is not None:
        raise ValueError("--rank and --energy both choose the rank: give one of them")
    import torch
    from tqdm import tqdm

    from erase.programs import lora

    lora.ranks_of(None, rank, energy)  # refuses values out of range before anything is read
    change = lora.find_change(Path(source), base, components)
    ranks = lora.ranks_of(change.meta.get("erase_method"), rank, energy)
    with tqdm(desc="tensors", delay=1) as bar:
        kept = lora.convert(change, out, to, ranks, torch.float16 if half else torch.float32, bar.update)
    typer.echo("\n".join([f"{out}: {out.stat().st_size / 1e6:.1f} MB", *kept.lines]))


@app.command()
def apply(
    base: Annotated[
        str,
        typer.Argument(metavar="BASE", help="The base model of the delta.", autocompletion=complete.models),
    ],
    delta: Annotated[
        Path, typer.Argument(metavar="DELTA", help="What erase run --save delta wrote: the file, or the run's folder.")
    ],
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder to write; a .safetensors file if BASE is a single file.")],
    undo: Annotated[bool, typer.Option("--undo", help="BASE is the erased model; write its base model.")] = False,
    components: Components = None,
) -> None:
    """Rebuild an erased model from its base and a delta.

    It is the same, bit for bit. --undo rebuilds the base.

    Example: erase apply photos-sd runs/cat --out cat-erased
    """
    quiet()
    from tqdm import tqdm

    from erase.programs import saving
    from erase.store import delta as deltas

    file = delta / saving.DELTA if delta.is_dir() else delta
    if delta.is_dir() and not file.exists():
        raise ValueError(f"{delta} has no {saving.DELTA}: give the folder of a run with --save delta")
    change = deltas.open_delta(file)
    source = locate_any(base, components=components)
    values = deltas.apply(change, saving.tensors(source), undo=undo)
    with tqdm(desc="tensors", delay=1) as bar:
        saving.write(source, values, out, change.base_meta if undo else change.meta, bar.update)
    typer.echo(str(out))
