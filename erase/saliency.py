"""Another name of `erase.engine.saliency`."""

from erase.engine.saliency import Mask, fisher_ratio_mask, load_mask, magnitude_mask, save_mask

__all__ = ["Mask", "fisher_ratio_mask", "load_mask", "magnitude_mask", "save_mask"]
