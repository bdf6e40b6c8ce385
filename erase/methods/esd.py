"""ESD: the erased prompt is trained toward the opposite of what it meant, with nothing but the prompt.

Source: Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023, arXiv 2303.07345.

    min over θ of  mean_i ‖ε_θ(z_t, c, t) - (ε0(z_t, ∅, t) - η (ε0(z_t, c, t) - ε0(z_t, ∅, t)))‖²

ε0 is the model at the start. ESD-x learns cross-attention (`train.parameters: xattn`), ESD-u the rest (`noxattn`).
Deliberate differences: z_t are pictures that the first model drew of the prompt, noised; the paper's are drawn anew
in each step, by the model as it is then, down to t. MSE is the mean over C, H, W. `noxattn` has all weights but
cross-attention's; the published script leaves out those of the time embedding and the last layer too.
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
        eta: η, how far beyond the empty prompt; 0 makes the prompt mean nothing.
        fast_rule: `adam` (the paper), `sgd` or `normalized`.
        schedule: of the step size.
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
