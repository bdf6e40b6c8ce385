"""ESD: the erased prompt is trained toward the opposite of what it meant, with nothing but the prompt.

Source: Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023, arXiv 2303.07345.

    min over θ of  mean_i ‖ε_θ(z_t, c, t) - (ε0(z_t, ∅, t) - η (ε0(z_t, c, t) - ε0(z_t, ∅, t)))‖²

ε0 is the model at the start. η is the paper's: 0 makes the prompt mean nothing, and the target is the guided prediction
of scale -η. The authors' current scripts write `ε0(c) - n (ε0(c) - ε0(∅))`, which is this at η = n - 1: the default
`negative_guidance` 2 of that for Stable Diffusion is the paper's η 1; those for SDXL and Flux have 1, which is η 0.

An attribute a can be erased from a concept c that stays (`forget.prompts: a`, `forget.erase_from: c`), as by the
authors' current script:

    min over θ of  mean_i ‖ε_θ(z_t, c, t) - (ε0(z_t, c, t) - η (ε0(z_t, a, t) - ε0(z_t, ∅, t)))‖²

with z_t of images of c. Here η is the script's `negative_guidance` itself: at a = c this is ESD with η - 1.

ESD-x learns cross-attention (`train.parameters: xattn`), ESD-u the rest. Of that the current script learns weights and
biases of all Linear and Conv2d layers, time embedding and last layer too, and no normalisation: `esd_u`. That for SDXL
takes those of the blocks alone, without their embeddings of the time: `esd_u` of SDXL. The first script leaves out time
embedding and last layer, and has normalisations; `noxattn` has all of these.

Deliberate differences: z_t are noised images that the first model generated for the prompt; the paper samples them
anew in each step down to t, by the model as it is then (the first script) or by the first model (the current one). MSE
is the mean over C, H, W, as theirs.
"""

from __future__ import annotations

from erase.diffusion.denoiser import Denoiser
from erase.diffusion.losses import Negate, copies
from erase.engine.fast_step import FastRule
from erase.engine.losses import DESCENT, Objective
from erase.engine.method import Method
from erase.engine.updates import FastSlow
from erase.engine.weighting import Schedule
from erase.methods import Entry


def esd(
    *,
    fast_rate: float,
    eta: float = 1.0,
    fast_rule: FastRule = "adam",
    schedule: Schedule = "constant",
    clip_forget: float | None = None,
    denoiser: Denoiser | None = None,
) -> Method:
    """ESD as a method.

    Args:
        fast_rate: step size.
        eta: η of the paper: how far the prompt is led beyond the empty one; 0 makes it mean nothing. The authors'
            current script has `negative_guidance` = η + 1, or η with `forget.erase_from`.
        fast_rule: `adam` (the paper), `sgd` or `normalized`.
        schedule: schedule of the step size.
        clip_forget: gradient norm limit.
        denoiser: the model, at θ0.

    Raises:
        ValueError: for a negative η.
    """
    if eta < 0:
        raise ValueError(f"eta must be ≥ 0; got {eta}")
    update = FastSlow(fast_rate, fast_rule, schedule=schedule, clip_forget=clip_forget)
    forget = DESCENT if denoiser is None else Objective(Negate(copies(denoiser.net), eta), 1, "negate")
    return Method(name="esd", forget=forget, remain=None, update=update)


METHOD = Entry(esd, needs=("denoiser",), data=("forget",))
