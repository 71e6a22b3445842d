"""Ray's errors in plain words."""

from __future__ import annotations

import re
from typing import NoReturn

from ray.exceptions import RayError, RayTaskError

from modip_ray.runfolder import RunError


def short(error: BaseException) -> str:
    """One plain line of what Ray says in many: of an actor whose constructor raised, what it raised."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return lines[-1] if "creation task" in lines[0] else lines[0]


def raise_cause(error: Exception, who: str) -> NoReturn:
    """What an actor's method raised: errors of environments and hooks as they are, Ray's own (another actor that is gone) as RunError."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RayError):
        raise RunError(f"{who}: {type(cause).__name__}: {short(cause)}; the same command resumes from the last checkpoint") from error
    raise cause from error
