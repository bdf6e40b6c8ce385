"""Unlearn training images of a classifier: `erase run classify PRESET [key=value …] --out DIR`."""
