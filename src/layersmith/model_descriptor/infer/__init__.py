"""Inference of a descriptor by experiment: build a small model, change one thing, compare."""
