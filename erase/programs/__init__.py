"""The programs behind `erase run`, `erase compare` and `erase attack`."""
