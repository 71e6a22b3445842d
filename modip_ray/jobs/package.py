"""What a job takes along: the user's folder and this package in one zip file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from modip_ray.config import config_dir
from modip_ray.jobs.client import JobError
from modip_ray.progress import size_text

LEFT_OUT = ("runs", "results", "venv", "env", "wandb", "node_modules", "build", "dist")      # and everything hidden, caches, *.egg-info
FILE_BYTES = 50_000_000
PACKAGE_BYTES = 400_000_000         # Ray keeps a package in the head's memory and refuses 512 MiB

PACKAGE = Path(__file__).resolve().parents[1]


def write_package(folder: Path, target: Path) -> list[str]:
    """Zip of `folder` with modip_ray (and its configs inside) on top; returns the large files that were left out. JobError where it gets too large."""
    if not folder.is_dir():
        raise JobError(f"--working-dir: {folder} is no folder")
    large, total = [], 0
    with ZipFile(target, "w", ZIP_DEFLATED, strict_timestamps=False) as archive:
        for path in files_of(folder):
            size = path.stat().st_size
            if size > FILE_BYTES:
                large.append(f"{path.relative_to(folder)} ({size_text(size)})")
                continue
            total += size
            if total > 4 * PACKAGE_BYTES or target.stat().st_size > PACKAGE_BYTES:
                raise JobError(f"{folder}: holds more than a job can take along ({size_text(PACKAGE_BYTES)} packed); --working-dir names a smaller folder, "
                               f"and hidden folders and {', '.join(LEFT_OUT)} are left out")
            archive.write(path, path.relative_to(folder))
        for source, name in package_files():
            archive.write(source, name)
    return large


def takes_along(folder: Path, name: str | Path) -> bool:
    """The package of `folder` holds this file, named as it is from there."""
    return any(path == folder / name and path.stat().st_size <= FILE_BYTES for path in files_of(folder))


def files_of(folder: Path) -> Iterator[Path]:
    """Files of the user's folder that travel, in a fixed order; a modip_ray checkout's own package is added apart."""
    for base, folders, names in os.walk(folder):
        here = Path(base)
        folders[:] = sorted(name for name in folders if travels(name) and not is_own_package(here / name))
        yield from (here / name for name in sorted(names) if not name.startswith(".") and (here / name).is_file())


def travels(name: str) -> bool:
    return not name.startswith(".") and name not in (*LEFT_OUT, "__pycache__") and not name.endswith(".egg-info")


def is_own_package(folder: Path) -> bool:
    return folder.resolve() == PACKAGE


def package_files() -> Iterator[tuple[Path, str]]:
    """Files of modip_ray with their names in the archive: `configs` inside the package, as in a wheel, whatever the working directory holds."""
    for root, top in ((PACKAGE, "modip_ray"), (config_dir(), "modip_ray/configs")):
        for path in sorted(root.rglob("*")):
            parts = path.relative_to(root).parts
            if path.is_file() and all(map(travels, parts[:-1])) and not (top == "modip_ray" and parts[0] == "configs"):
                yield path, f"{top}/{'/'.join(parts)}"
