"""Make a class-conditional model forget classes: `erase run ddpm PRESET [key=value …] --out DIR`."""
