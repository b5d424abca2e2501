"""Readable PyTorch, fp64-clean, no tricks: the specification everything else is held against."""
