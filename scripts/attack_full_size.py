"""One iteration of every attack on a Stable Diffusion 1.x of full size, with random weights: seconds and peak memory.

    python scripts/attack_full_size.py --work runs/full            # 512 pixels, 10 GB of disk
    python scripts/attack_full_size.py --work runs/small --small   # the same with a small network

Nothing is recovered, as nothing was learned: it shows that the attacks run at this size, and what an iteration takes.
The model is made, one step of SFR-on erases "a cat" from it, and each attack then has a process of its own: one image
to learn from, one iteration, images in two steps. Prints a line of JSON for each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch

from erase.config import AttackName
from erase.diffusion.checkpoints import vocabulary

ONE: dict[AttackName, tuple[str, ...]] = {
    "paraphrases": ("images=1", "prompts=[a kitten]"),
    "inversion": ("steps=1", "images=1", "batch_size=1"),
    "soft_prompt": ("steps=1", "images=1", "batch_size=1"),
    "prompt_search": ("steps=1", "times=1", "images=1", "batch_size=1"),
    "p4d": ("steps=1", "times=1", "images=1", "batch_size=1"),
    "ring_a_bell": ("generations=1", "population=4", "searches=1", "images=1"),
    "half_noised": ("images=1",),
    "inpaint": ("images=1",),
    "latent_seed": ("images=1",),
    "relearn": ("at=[1]", "images=1", "batch_size=1"),
    "relearn_lora": ("at=[1]", "images=1", "batch_size=1"),
    "benign": ("at=[1]", "images=1", "batch_size=1"),
}
"""Settings of one iteration."""
RUN = (
    *("forget.prompts=[a cat]", "forget.anchors=[a dog]", "forget.count=1", "remain.total=1"),
    *("train.steps=1", "train.batch_size=1", "train.micro_batch=null", "saliency.count=1", "saliency.draws=1"),
    *("draw.steps=2", "draw.batch_size=1", "eval.prompts=[a dog]", "eval.images=1"),
    *("eval.classifier=photos-classifier", "eval.flag=[cat/plain]"),
)


def make(folder: Path, small: bool) -> None:
    """A model of random weights, in fp16."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = folder.with_name("words")
    for name, text in vocabulary.files().items():
        (words / name).parent.mkdir(parents=True, exist_ok=True)
        (words / name).write_text(text, encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(words / "tokenizer", model_max_length=77)
    width = 32 if small else 768
    sizes = (32, 32, 64, 64) if small else (128, 256, 512, 512)
    pipe = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=16 if small else 64,
            cross_attention_dim=width,
            attention_head_dim=8,
            **({"block_out_channels": sizes} if small else {}),
        ),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=sizes,
            layers_per_block=1 if small else 2,
            sample_size=128 if small else 512,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=2 if small else 12,
                num_attention_heads=4 if small else 12,
                bos_token_id=49406,
                eos_token_id=49407,
            )
        ),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(folder)


def timed(*words: str) -> tuple[float, float]:
    """Seconds and peak gigabytes of a command of erase, in a process of its own.

    Raises:
        SystemExit: with what the command said, if it failed.
    """
    code = (
        "import resource, sys; from erase.cli import app; "
        "app(standalone_mode=False); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr[-2000:]}")
    return time.perf_counter() - began, int(done.stdout.split()[-1]) * 1024 / 1e9


def main() -> None:
    """Make, erase, attack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the model and the runs; what is there is kept"
    )
    parser.add_argument("--small", action="store_true", help="a small network")
    parser.add_argument("--attacks", nargs="*", choices=get_args(AttackName), default=list(ONE), help="some of them")
    given = parser.parse_args()
    model, run = given.work / "model", given.work / "run"
    if not model.exists():
        make(model, given.small)

    def say(what: str, found: tuple[float, float]) -> None:
        line: dict[str, Any] = {"what": what, "seconds": round(found[0], 1), "peak_gb": round(found[1], 2)}
        print(json.dumps(line), flush=True)

    if not (run / "report.json").exists():
        words = ("run", "sd", "sd_concept_sfron", f"model={model}", *RUN, "--out", str(run))
        say("the run: one step of SFR-on", timed(*words))
    for name in given.attacks:
        words = (f"eval.attacks=[{name}]", "attack.count=1", *(f"attack.{name}.{word}" for word in ONE[name]))
        say(name, timed("attack", str(run), *words, "--out", str(given.work / name)))


if __name__ == "__main__":
    main()
