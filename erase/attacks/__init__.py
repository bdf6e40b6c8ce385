"""Attacks on an erased model."""
