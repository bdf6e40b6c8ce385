"""Another name of `erase.engine.fisher`."""

from erase.engine.fisher import Fisher, fisher_diagonal, mean_gradient

__all__ = ["Fisher", "fisher_diagonal", "mean_gradient"]
