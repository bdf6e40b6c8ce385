"""UCE: keys and values of cross-attention that read one prompt as another, in closed form; nothing is trained.

Source: Gandikota et al., "Unified Concept Editing in Diffusion Models", WACV 2024, arXiv 2308.14761.

    min over W of  Σ_E ‖W c_i - W0 c*_i‖² + p Σ_P ‖W c_j - W0 c_j‖² + λ ‖W - W0‖²

for every key and value matrix W of cross-attention, over tokens c_i of all forget prompts at once, those c*_i of
their anchors, and those c_j of prompts that stay. The normal equations give the same change for all of them:

    W = W0 M,   M = (Σ_E c*_i c_iᵀ + p Σ_P c_j c_jᵀ + λ I) (Σ_E c_i c_iᵀ + p Σ_P c_j c_jᵀ + λ I)⁻¹

Which tokens: the authors' first scripts edit those of whole prompts, with λ .1 (`tokens: all`, `lambd: 0.1`, the
defaults); their current one edits the last token of the last word alone, with λ .5 (`tokens: last`, `lambd: 0.5`).
`tokens: padding` is ours: the end of text and the padding after it, where a text encoder without CLIP's habits may keep
a concept. The encoder of the embedded model does, for it was trained with its UNet alone: two concepts are .7 apart at
the last word, and 9.4 at position 16. There `last` erases nothing, and `all` looks better than it is with CLIP.

Deliberate differences: with `all`, tokens are paired from the first that differs, with the last words on each other,
and a beginning that a prompt that stays has too is left to it; the empty prompt stays, for guidance has it in every
step (with `last` that is the token of the beginning); of Flux the map of T5's embeddings alone is edited, where the
authors' script edits that of CLIP's pooled embedding, too; sums are in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erase.diffusion.text import Concepts, Tokens, check_tokens, edited_names
from erase.engine.backend import trainable
from erase.engine.method import Method
from erase.engine.saliency import Mask
from erase.engine.updates import ClosedForm, Solved
from erase.methods import Entry


@dataclass(frozen=True)
class Reading:
    """The closed form, as an edit of a network."""

    concepts: Concepts | None
    preserve: float
    """p"""
    lambd: float
    """λ"""
    tokens: Tokens = "all"
    """Those that the concepts are of."""

    def __call__(self, net: nn.Module) -> Solved:
        """`W0 M` for every key and value matrix that learns, computed in float64.

        Raises:
            ValueError: without concepts, or where no such matrix learns.
        """
        if self.concepts is None:
            raise ValueError("uce needs text embeddings: give concepts")
        found = trainable(net)
        names = edited_names(self.concepts.weights, found)
        change = solve(self.concepts, self.preserve, self.lambd)
        old = ((name, found[name].detach()) for name in names)
        return Solved({name: (W.double() @ change.to(W.device)).to(W.dtype) for name, W in old})


def solve(concepts: Concepts, preserve: float, lambd: float) -> Tensor:
    """M, `[D, D]`, float64, on the CPU: sums over tokens, not means."""
    c, target, kept = (x.double().cpu() for x in (concepts.erased, concepts.targets, concepts.kept))
    both = preserve * kept.T @ kept + lambd * torch.eye(c.shape[1], dtype=c.dtype)
    found: Tensor = torch.linalg.solve(c.T @ c + both, target.T @ c + both, left=False)
    return found


def uce(
    *,
    preserve: float = 1.0,
    lambd: float = 0.1,
    tokens: Tokens = "all",
    fast_rate: float = 1.0,
    mask: Mask | None = None,
    concepts: Concepts | None = None,
) -> Method:
    """UCE as a method: one step, whose end is computed.

    Args:
        preserve: p, weight of remain tokens relative to forget tokens.
        lambd: λ > 0, weight of the distance to the old weights.
        tokens: which tokens are edited: `all` (from the first that differs from its anchor), `last` (the last token of
            the last word), or `padding` (with the end of text). `photos-sd` keeps concepts in the padding: `last`
            erases nothing there, and results of `all` on it do not carry over to CLIP's text encoder.
        fast_rate: share of the way to the solution; 1 is the paper's.
        mask: weights that may change; the others keep their values, which the solution does not know.
        concepts: text embeddings of forget prompts, anchors and prompts that stay.

    Raises:
        ValueError: for a negative p, a λ that is not positive, or unknown tokens.
    """
    check_tokens(tokens)
    if preserve < 0 or lambd <= 0:
        raise ValueError(f"needs preserve ≥ 0 and lambd > 0; got {preserve} and {lambd}")
    update = ClosedForm(Reading(concepts, preserve, lambd, tokens), share=fast_rate)
    return Method(name="uce", forget=None, remain=None, update=update, mask=mask)


METHOD = Entry(uce, needs=("mask", "concepts"))
