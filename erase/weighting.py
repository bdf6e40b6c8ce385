"""Another name of `erase.engine.weighting`."""

from erase.engine.weighting import adaptive_weights, schedule_scale

__all__ = ["adaptive_weights", "schedule_scale"]
