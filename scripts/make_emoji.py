"""Make the emoji world's models: `emoji-sd`, `emoji-sd3` and their judges `emoji-judge` and `emoji-clip`.

    python -u scripts/make_emoji.py vae --source emoji --work runs/emoji --steps 3000

`emoji` is a folder with `emoji64.npz` and `concepts.json`: 1,084 concepts, each drawn in six styles, of which
`scripts/emoji_world.py` takes 400. Stages, in this order; each is resumed by the same command, and one without a
checkpoint in `--work` goes on from what was exported:

| stage | makes | of |
|---|---|---|
| `data` | names, a contact sheet | |
| `vae` | the VAE of both generators | training cells |
| `latents` | latents, `--steps` files of 5,000 scenes | training cells |
| `texts` | an image encoder | all cells |
| | against it, the text encoders of both generators | training cells |
| `clip` | the zero-shot judge | all cells |
| `judge` | the classifier of objects, style and background | all cells, a third as the VAE shows them |
| `unet`, `transformer` | by v-prediction, and by flow matching | latents; the text encoders learn too |
| `export` | the folders of all that is finished, fp16, in `--out` | |
| `check` | the judges' say on `--steps` generated images a cell | what was exported |

A text encoder is trained as CLIP's is, against images. Each object must be told from the row of its own last word, then
and while the generator learns: otherwise encoders hoard concepts in the padding, where methods that edit text find them
too easily.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import emoji_export
import emoji_generators as generators
import emoji_judges as judges
import emoji_models as nets
import emoji_world as data
import numpy as np
import torch
from emoji_training import Kit, sheet

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "data": 0,
    "vae": 3000,
    "latents": 20,
    "texts": 4000,
    "clip": 6000,
    "judge": 3000,
    "unet": 12000,
    "transformer": 12000,
    "export": 0,
    "check": 1,
}
"""In order, with the number of steps that each takes by default."""


def make_data(kit: Kit, steps: int) -> None:
    """Names, held-out cells, and a sheet of scenes with their captions."""
    rng = np.random.default_rng(0)
    scenes = kit.scenes(rng, 400, held=False)
    sheet(kit, "scenes", kit.pixels(scenes))
    told = [data.caption(scene, kit.world, rng)[0] for scene in scenes]
    held = [f"{kit.world.names[k]}/{list(data.STYLES)[s]}" for k, s in np.argwhere(kit.world.held)]
    text = json.dumps({"names": kit.world.names, "held": held, "captions": told}, indent=1, ensure_ascii=False)
    (kit.work / "world.json").write_text(text, encoding="utf-8")
    nets.tokenizer_of(kit.work, kit.world)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--source", type=Path, required=True, help="folder with emoji64.npz and concepts.json")
    parser.add_argument("--work", type=Path, default=Path("runs/emoji"), help="checkpoints and contact sheets")
    parser.add_argument("--out", type=Path, default=ROOT / "pipelines" / "tiny")
    parser.add_argument("--steps", type=int, help=f"by default {', '.join(f'{s} {n}' for s, n in STAGES.items() if n)}")
    parser.add_argument("--concepts", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["auto", "no", "bf16"], default="auto", help="auto measures five steps")
    parser.add_argument("--compile", action="store_true", help="compile the transformer: two minutes, then faster")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    world = data.read_world(args.source, args.concepts)
    kit = Kit(args.work, args.out, world, data.make_sprites(world.drawings), args.precision, args.compile)
    jobs = {
        "data": make_data,
        "vae": generators.train_vae,
        "latents": generators.save_latents,
        "texts": judges.train_texts,
        "clip": judges.train_clip,
        "judge": judges.train_judge,
        "unet": generators.train_unet,
        "transformer": generators.train_transformer,
        "export": emoji_export.export,
        "check": emoji_export.check,
    }
    jobs[args.stage](kit, STAGES[args.stage] if args.steps is None else args.steps)


if __name__ == "__main__":
    main()
