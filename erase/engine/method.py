"""A method is a frozen record: what to do on forget data, on remain data, where, and how to step."""

from __future__ import annotations

from dataclasses import dataclass

from erase.engine.losses import Objective
from erase.engine.saliency import Mask
from erase.engine.updates import SIDES, Edit, Update

__all__ = ["Edit", "Method", "Weights"]


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
    average: float = 0.0
    """Decay of the running mean of the weights that the run ends with; 0 ends with the last weights."""

    def __post_init__(self) -> None:
        """Check that the update rule has the objectives that it needs, and no others.

        Raises:
            ValueError: if not, and for an average outside [0, 1).
        """
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be in [0, 1); got {self.average}")
        rule = type(self.update).__name__
        for side in SIDES:
            there = getattr(self, side) is not None
            if side in self.update.NEEDS and not there:
                raise ValueError(f"method {self.name!r} has no {side} objective, which its update {rule} needs")
            if there and side not in self.update.TAKES:
                raise ValueError(f"method {self.name!r} has a {side} objective, which its update {rule} does not use")
