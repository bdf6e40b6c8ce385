"""Checkpoints on disk: diffusers folders, single files, and one as the other."""
