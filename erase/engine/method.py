"""A method is a frozen record: what to do on forget data, on remain data, where, how much, and how to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from erase.engine.losses import Objective
from erase.engine.saliency import Mask
from erase.engine.updates import Update

Edit = Callable[[nn.Module], Mapping[str, Tensor]]
"""A closed form: new values of some trainable weights of a network, by name."""


@dataclass(frozen=True)
class Weights:
    """F: the adaptive weights of a forget batch (`erase.engine.weighting.adaptive_weights`)."""

    lambd: float = 0.5
    floor: float = 1e-6
    per_bin: bool = True
    """Divide losses by the running mean of their timestep bin first, where the backend has bins."""

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: for a negative λ or a floor that is not positive.
        """
        if self.lambd < 0 or self.floor <= 0:
            raise ValueError(f"needs lambd ≥ 0 and floor > 0; got {self.lambd} and {self.floor}")


@dataclass(frozen=True)
class Method:
    """All that the loop needs to know of a method."""

    name: str
    forget: Objective | None
    remain: Objective | None
    update: Update
    weights: Weights | None = None
    mask: Mask | None = None
    edit: Edit | None = None
    """In the place of a forget objective: a fast step whose end is computed, `θ ← θ + β_t m ⊙ (edit(θ) - θ)`."""
    average: float = 0.0
    """Decay of the running mean of the weights that the run ends with; 0: the last weights."""
    fresh: bool = False
    """Starts from new weights instead of the model's: training and retraining."""

    def __post_init__(self) -> None:
        """Check that there is something to do.

        Raises:
            ValueError: for a method with nothing to do or two fast steps, and an average outside [0, 1).
        """
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be in [0, 1); got {self.average}")
        if self.forget is None and self.remain is None and self.edit is None:
            raise ValueError(f"method {self.name!r} has neither a forget nor a remain objective, nor an edit")
        if self.edit is not None and self.forget is not None:
            raise ValueError(
                f"method {self.name!r} has an edit and a forget objective: one fast step takes one of them"
            )
