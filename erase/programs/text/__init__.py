"""Erase concepts from a text-to-image model: `erase run sd PRESET [key=value …] --out DIR`."""
