"""Other libraries' errors in a line of ours."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type's name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
