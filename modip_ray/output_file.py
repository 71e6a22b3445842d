"""Files that commands write at their end: looked at before the work begins."""

from __future__ import annotations

import os
from pathlib import Path

from modip_ray.config import ConfigError


def check_output(path: Path | None, new: bool = False, mend: str = "give another name") -> None:
    """Make the folder of a file that will be written; ConfigError where that cannot be, or, if it is to be `new`, where it is there already.

    mend : what to do, where the name is not the user's
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{path}: cannot be written, {error.filename} is no folder; {mend}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}: {error.filename}); {mend}") from error
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give the name of a file")
    if new and path.exists():
        raise ConfigError(f"{path}: is there already; give another name, or remove it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path}: cannot be written, the rights are missing; {mend}")
