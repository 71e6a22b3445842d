"""Rival methods, one file each, on the same parts: the same start, environments, evaluation and run folder."""
