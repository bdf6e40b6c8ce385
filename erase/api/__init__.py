"""What `import erase` offers: a model in memory, the user's own, forgets something, in place.

    result = erase.forget(pipe, "a photo of a cat", anchor="a photo of a dog")
    result.show().save("before-and-after.png")
    result.save("pipe-without-cats")

The same functions as behind `erase run` do it, without a run's folder: the settings are those of a preset, by the same
names.
"""

from erase.api.forgetting import forget
from erase.api.images import count, grid
from erase.api.opening import load
from erase.api.result import Result

__all__ = ["Result", "count", "forget", "grid", "load"]
