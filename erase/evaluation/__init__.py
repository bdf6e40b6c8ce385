"""Judging a model by its images: drawing them, detecting, classifying, counting with intervals, showing.

Import the module that is needed; this file imports nothing, so that `erase --help` stays fast.
"""
