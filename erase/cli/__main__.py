"""`python -m erase.cli`: what `python -m erase` was called in 0.2."""

from erase.cli import main

main()
