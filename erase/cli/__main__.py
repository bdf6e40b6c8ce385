"""`python -m erase.cli`, as launchers start it."""

from erase.cli import main

main()
