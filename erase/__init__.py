"""Erase concepts from diffusion models.

Importing the package costs nothing: no torch before a module that needs it.
"""

from importlib.metadata import version

__version__ = version("erase")
