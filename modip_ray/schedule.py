"""How a setting moves from its first to its last value."""


def widened(start: float, end: float, progress: float) -> float:
    """Linear from start to end over progress 0..1."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)
