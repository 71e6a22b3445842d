"""How a setting moves from its first to its last value."""

import math


def widened(start: float, end: float, progress: float) -> float:
    """Linear from start to end over progress 0..1."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from start to end over progress 0..1: slow at both ends."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
