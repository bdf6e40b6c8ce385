r"""SPEED: words get another meaning in the null space of the prompts that stay, in closed form; nothing is trained.

Source: Li et al., "SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models", ICLR 2026,
arXiv 2503.07392.

    min over Δ of  ‖(W + Δ) C₁ - W C*‖² + λ ‖Δ‖²   with Δ P = Δ and Δ C₂ = 0

for every matrix W that reads text, over the tokens C₁ `[D, E]` of all forget prompts, those C* of their anchors, and
invariants C₂: the beginning of text and the empty prompt, which guidance has in every step (IEC). P projects on the
null space of the prompts that stay, the eigenvectors Û of the smallest eigenvalues of their tokens' correlation:

    R = mean over the tokens c that are left of c cᵀ = U S Uᵀ,   P = Û Ûᵀ,   Û = columns of U with S < threshold

Which tokens are left depends on W. With the edit that is bound by nothing, Δ̂ = W (C* - C₁) C₁ᵀ (C₁ C₁ᵀ + λ I)⁻¹, these
are the tokens with ‖Δ̂ c‖² of at least its mean (influence-based prior filtering), and N variations c + g v of each, g
normal and v the right singular vector of the smallest singular value of W, filtered likewise (directed prior
augmentation). The solution is

    Δ = W (C* - C₁) C₁ᵀ P Q M,   M = (C₁ C₁ᵀ P + λ I)⁻¹,   Q = I - M C₂ (C₂ᵀ P M C₂)⁻¹ C₂ᵀ P

and is computed as Δ = W (C* - C₁) Zᵀ (Z Zᵀ + λ I)⁻¹ Bᵀ with Z = Bᵀ C₁, where the columns of B are an orthonormal basis
of those combinations of Û that C₂ is orthogonal to: the same, without the inverse that may not exist. All is in
float64.

The defaults are the script's settings for up to three concepts; `lambd` is its `retain_scale`. For ten celebrities and
more it has `threshold: 1e-4`, `prior_filter: false` and a `lambd` of .05, for nudity `tokens: all`. It edits values
alone: `train.parameters: 'attn2\.to_v\.'`.

Deliberate differences: embeddings are divided by the root mean square of the tokens that stay, so that threshold, λ and
g mean the same for every text encoder (tokens of norm √D, as a layer normalisation leaves them, are as in the script);
the script takes means over forget prompts, and this sums, as the paper and `uce`; g takes the N quantiles of the normal
distribution in place of random draws, for every token, and the means are over all of a matrix's tokens; C₂ is the
beginning and the leading singular vectors of the empty prompt's other tokens, in place of k-means centres of them; the
constraint has no slack (the script's `lamb`, .5 for nudity); what of C₂ lies outside the null space needs no
constraint; a prompt that names the concept is kept out of `remain.prompts` by `forget.words` and the sets' labels.
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

ROUNDING = 1e-10
"""Singular values that are smaller count as none, and means are met to this share."""


@dataclass(frozen=True)
class Texts:
    """Text embeddings as the formulas have them, float64, with a root mean square of 1 in those that stay."""

    erased: Tensor
    """C₁, `[E, D]`."""
    change: Tensor
    """C* - C₁, `[E, D]`."""
    kept: Tensor
    """`[N, D]`, all tokens that stay, the empty prompt's left out."""
    kept_of: Tensor
    """`[N]`, the prompt that each is of."""
    fixed: Tensor
    """An orthonormal basis of C₂, `[F, D]`."""


@dataclass(frozen=True)
class Projected:
    """The closed form, as an edit of a network."""

    concepts: Concepts | None
    lambd: float
    """λ"""
    threshold: float
    """Of eigenvalues."""
    prior_filter: bool
    """Whether tokens that stay are filtered; variations are in any case."""
    augment: int
    """N"""
    invariants: int
    """How many directions of the empty prompt C₂ has besides the beginning."""
    tokens: Tokens
    """Those that the concepts are of."""

    def __call__(self, net: nn.Module) -> Solved:
        """`W + Δ` for every matrix that reads text and learns, computed in float64 where the network is.

        The log's numbers are means over matrices: the dimensions of the null space (`null_space`; `null_space_least` is
        the least), kept prompts of which the filter left no token (`prompts_dropped`, of `prompts_kept`), and the share
        ‖(W + Δ) C₁ - W C*‖ / ‖W C₁ - W C*‖ that the erased tokens miss their anchors by (`residual`).

        Raises:
            ValueError: without concepts or prompts that stay, where no such matrix learns, and where there is no null
                space.
        """
        if self.concepts is None:
            raise ValueError("speed needs text embeddings: give concepts")
        found = trainable(net)
        names = edited_names(self.concepts.weights, found)
        texts = prepare(self.concepts, self.invariants, found[names[0]].device)
        weights, left, dims, missed = dict[str, Tensor](), list[float](), list[float](), list[float]()
        for name in names:
            W = found[name].detach().double()
            R, used = correlation(W, texts, self.lambd, self.augment, self.prior_filter)
            B = null_space(R, texts.fixed, self.threshold)
            if not B.shape[1]:
                raise ValueError(
                    f"method.threshold={self.threshold}: the remain prompts leave none of {W.shape[1]} dimensions free "
                    f"in {name}: raise method.threshold, or give fewer remain.prompts"
                )
            meant = W @ texts.change.T
            change = meant @ ridge(texts.erased @ B, self.lambd) @ B.T
            weights[name] = (W + change).to(found[name].dtype)
            left.append(len(set(texts.kept_of[used].tolist())))
            dims.append(B.shape[1])
            missed.append(float((change @ texts.erased.T - meant).norm() / meant.norm()))
        count = len(set(texts.kept_of.tolist()))
        return Solved(
            weights,
            {
                "null_space": sum(dims) / len(dims),
                "null_space_least": min(dims),
                "prompts_kept": count,
                "prompts_dropped": count - sum(left) / len(left),
                "residual": sum(missed) / len(missed),
            },
        )


def prepare(concepts: Concepts, invariants: int, device: torch.device) -> Texts:
    """Scale the embeddings, and find C₂.

    Raises:
        ValueError: without prompts that stay.
    """
    stay = concepts.kept_of > 0
    if not stay.any():
        raise ValueError(
            "method speed edits in the null space of the remain prompts, and there are none: set remain.prompts"
        )
    given = (concepts.erased, concepts.targets, concepts.kept[stay], concepts.begin, concepts.empty)
    unit = given[2].double().square().mean().sqrt()
    c, target, kept, begin, empty = ((x.double() / unit).to(device) for x in given)
    first = directions(begin)
    others = directions(empty - empty @ first.T @ first)[:invariants]
    return Texts(c, target - c, kept, concepts.kept_of[stay].to(device), torch.cat([first, others]))


def directions(x: Tensor) -> Tensor:
    """Right singular vectors of `[N, D]`, `[rank, D]`, those of the largest singular values first."""
    _, S, V = torch.linalg.svd(x, full_matrices=False)
    found: Tensor = V[S > ROUNDING]
    return found


def ridge(c: Tensor, lambd: float) -> Tensor:
    """`cᵀ (c cᵀ + λ I)⁻¹` in the formulas' columns: of tokens `[E, D]`, `[E, D]`."""
    eye = torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    found: Tensor = torch.linalg.solve(c.T @ c + lambd * eye, c, left=False)
    return found


def correlation(W: Tensor, texts: Texts, lambd: float, augment: int, prior_filter: bool) -> tuple[Tensor, Tensor]:
    """R, `[D, D]`, of a matrix `[O, D]`, and which tokens the filter leaves, `[N]` bool.

    A variation c + g v has the influence ‖Δ̂ c‖² + 2 g (Δ̂ c · Δ̂ v) + g² ‖Δ̂ v‖² and the square
    c cᵀ + g (c vᵀ + v cᵀ) + g² v vᵀ, so that none of them is written out.
    """
    free = (W @ texts.change.T) @ ridge(texts.erased, lambd)
    moved = texts.kept @ free.T
    influence = moved.square().sum(1)
    used = at_least_mean(influence) if prior_filter else torch.ones_like(influence, dtype=torch.bool)
    c, moved, influence = texts.kept[used], moved[used], influence[used]
    if not augment:
        return c.T @ c / len(c), used
    v = torch.linalg.svd(W, full_matrices=False)[2][-1]
    g = torch.special.ndtri((torch.arange(augment, dtype=c.dtype, device=c.device) + 0.5) / augment)[:, None]
    there = free @ v
    varied = at_least_mean(influence + 2 * g * (moved @ there) + g.square() * there.square().sum())  # [N', tokens]
    cross = torch.outer(c.T @ (varied * g).sum(0), v)
    own = (varied * g.square()).sum() * torch.outer(v, v)
    total = c.T @ (c * (1 + varied.sum(0))[:, None]) + cross + cross.T + own
    return total / (len(c) + varied.sum()), used


def at_least_mean(x: Tensor) -> Tensor:
    """Which values are; all of them where they differ by rounding alone."""
    return x >= x.mean() * (1 - ROUNDING)


def null_space(R: Tensor, fixed: Tensor, threshold: float) -> Tensor:
    """B, `[D, b]`: an orthonormal basis of eigenvectors of small eigenvalues, as far as it is orthogonal to C₂."""
    values, vectors = torch.linalg.eigh(R)
    small: Tensor = vectors[:, values < threshold]
    if not small.shape[1]:
        return small
    _, S, V = torch.linalg.svd(fixed @ small, full_matrices=True)
    found: Tensor = small @ V[int((S > ROUNDING).sum()) :].T
    return found


def speed(
    *,
    lambd: float = 1.0,
    threshold: float = 0.1,
    prior_filter: bool = True,
    augment: int = 10,
    invariants: int = 3,
    tokens: Tokens = "last",
    fast_rate: float = 1.0,
    mask: Mask | None = None,
    concepts: Concepts | None = None,
) -> Method:
    """SPEED as a method: one step, whose end is computed.

    Args:
        lambd: λ > 0, weight of the size of the change. Embeddings are scaled: remain tokens have a mean norm of √D.
        threshold: the edit may use directions with an eigenvalue of the protected tokens' correlation below this (mean:
            1). Smaller values protect better, and leave less room for the edit.
        prior_filter: protect only the tokens that the edit would change most. Variations are always filtered.
        augment: N, number of variations of each protected token; 0 for none.
        invariants: number of directions of the empty prompt that stay exactly, besides the beginning of text.
        tokens: which tokens are edited and protected: `last` (the last token of the last word), `all` (edited from the
            first that differs from the anchor) or `padding` (with the end of text). See `uce`.
        fast_rate: share of the way to the solution; 1 is the paper's.
        mask: weights that may change; the others keep their values, which the solution does not know.
        concepts: text embeddings of forget prompts, anchors and prompts that stay.

    Raises:
        ValueError: for a λ or threshold that is not positive, negative numbers, or unknown tokens.
    """
    check_tokens(tokens)
    if not (lambd > 0 and threshold > 0):
        raise ValueError(f"needs lambd > 0 and threshold > 0; got {lambd} and {threshold}")
    if augment < 0 or invariants < 0:
        raise ValueError(f"needs augment ≥ 0 and invariants ≥ 0; got {augment} and {invariants}")
    edit = Projected(concepts, lambd, threshold, prior_filter, augment, invariants, tokens)
    return Method(name="speed", forget=None, remain=None, update=ClosedForm(edit, share=fast_rate), mask=mask)


METHOD = Entry(speed, needs=("mask", "concepts"))
