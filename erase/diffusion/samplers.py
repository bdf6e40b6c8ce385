"""Samplers by name: schedulers of diffusers with the noise schedule of a model.

A sampler is made from the configuration of the model's own scheduler, as diffusers documents it. The noise schedule and
the kind of prediction are always kept, and so is everything else that the configuration names (`timestep_spacing`,
`steps_offset`, `use_karras_sigmas`, …). What it does not name is the sampler's own default.

- `ddim`: DDIM with η = 0, deterministic (Song et al., arXiv 2010.02502).
- `ddpm`: ancestral sampling (Ho et al., arXiv 2006.11239).
- `dpm`: DPM-Solver++ 2M, deterministic (Lu et al., arXiv 2211.01095).
- `euler`, `euler_a`: Euler without and with fresh noise in each step (Karras et al., arXiv 2206.00364).
- `lms`: linear multistep, after k-diffusion; diffusers needs scipy for it.
- `pndm`: pseudo linear multistep (Liu et al., arXiv 2202.09778) without Runge-Kutta steps, as Stable Diffusion has it.
- `unipc`: predictor and corrector (Zhao et al., arXiv 2302.04867).
- `flow_euler`: Euler along the velocity of a flow (Esser et al., arXiv 2403.03206).

No sampler carries anything from one call to the next, and the fresh noise of an image is of its own generator, so that
an image does not depend on the others.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from erase.diffusion.process import Discrete, Process, schedule

SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "lms": LMSDiscreteScheduler,
    "pndm": PNDMScheduler,
    "unipc": UniPCMultistepScheduler,
    "flow_euler": FlowMatchEulerDiscreteScheduler,
}
FIXED: dict[str, dict[str, Any]] = {
    "dpm": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "pndm": {"skip_prk_steps": True},
}
"""What makes a sampler the one of its name, whatever the model's own scheduler is set to."""
LABEL_SAMPLERS: tuple[str, ...] = ("ddim", "ddpm", "dpm")
"""Those of class-conditional models."""
NO_SAMPLE: tuple[str, ...] = ("euler_a", "pndm")
"""Samplers that diffusers has not written for networks that predict the image itself, …"""
NO_RESCALING: tuple[str, ...] = ("lms", "pndm")
"""… and for betas that are rescaled to zero terminal SNR."""


def scheduler(config: Mapping[str, Any], name: str, *, latent: bool = False) -> Any:
    """A sampler with the noise schedule of another scheduler's configuration.

    Args:
        config: of the model's own scheduler.
        name: of `SCHEDULERS`.
        latent: whether the model generates latents, which are clipped only where the configuration says so; DDIM's
            default is for pixels.

    Raises:
        ValueError: for a sampler whose package is missing.
    """
    if name == "lms" and importlib.util.find_spec("scipy") is None:
        raise ValueError("the sampler lms needs scipy, which is not installed: pip install scipy, or choose another")
    kept = schedule(config)
    if latent and ("clip_sample" not in config or "clip_sample" in config.get("_use_default_values", ())):
        kept["clip_sample"] = False
    return SCHEDULERS[name].from_config(config, **kept, **FIXED.get(name, {}))


def label_sampler(config: Mapping[str, Any], name: str, *, latent: bool = False) -> Any:
    """The sampler of a class-conditional model.

    Args:
        config: of the model's own scheduler.
        name: of `LABEL_SAMPLERS`.
        latent: whether it generates latents (DiT).

    Raises:
        ValueError: for a sampler that such a model is not sampled with.
    """
    if name not in LABEL_SAMPLERS:
        raise ValueError(_refused(name, "generates images of classes", LABEL_SAMPLERS))
    return scheduler(config, name, latent=latent)


def text_sampler(config: Mapping[str, Any], process: Process, name: str) -> Any:
    """The sampler of a text-to-image model.

    Args:
        config: of the model's own scheduler.
        process: the noising process that the network was trained on.
        name: of `SCHEDULERS`.

    Raises:
        ValueError: for a sampler of another kind of process, or one that cannot follow the noise schedule.
    """
    discrete = isinstance(process, Discrete)
    allowed = tuple(other for other in SCHEDULERS if (other == "flow_euler") != discrete and other != "ddpm")
    if name not in allowed:
        raise ValueError(_refused(name, "predicts noise" if discrete else "is a flow", allowed))
    found = scheduler(config, name, latent=True)
    if isinstance(process, Discrete):
        if process.prediction == "sample" and name in NO_SAMPLE:
            raise ValueError(_refused(name, "predicts the image", [o for o in allowed if o not in NO_SAMPLE]))
        if not torch.allclose(found.alphas_cumprod.float(), process.alphas_cumprod.cpu(), rtol=0, atol=1e-6):
            raise ValueError(_refused(name, "has rescaled betas", [o for o in allowed if o not in NO_RESCALING]))
    return found


def _refused(name: str, why: str, allowed: Sequence[str]) -> str:
    return (
        f"draw.sampler (--sampler) is {name}, but this model {why}: choose {', '.join(allowed)}, or leave it out for "
        "the model's own"
    )


@contextmanager
def sampling(pipe: Any, found: Any) -> Iterator[None]:
    """Have a pipeline generate with a scheduler, and give it back its own."""
    own = pipe.scheduler
    pipe.scheduler = found
    try:
        yield
    finally:
        pipe.scheduler = own
