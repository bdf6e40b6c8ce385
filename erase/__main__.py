"""`python -m erase`, as launchers start it."""

from erase.cli import main

main()
