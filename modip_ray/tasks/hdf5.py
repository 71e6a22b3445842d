"""Reading datasets out of HDF5 files that may be damaged: every failure is a DataError that names file, key, index and what was expected."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from modip_ray.tasks.dataset import DataError
from modip_ray.tasks.episode import first_non_finite

ACTION_TOLERANCE = 1e-4
DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError)  # what h5py has been seen to raise on flipped bytes


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """The file, open for reading; whatever h5py raises on a damaged one, here or later, becomes a DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except DataError:
        raise
    except DAMAGE as error:
        raise DataError(f"{path}: cannot be read as HDF5 ({error}); {path.stat().st_size:,} bytes: is it damaged, was the download cut short?") from error


def key_names(file: h5py.File) -> str:
    return ", ".join(sorted(str(name) for name in file)) or "no keys"


def dataset_of(path: Path, file: h5py.File, key: str, dims: int) -> h5py.Dataset:
    """The dataset `key`, existing, numeric and of `dims` dimensions."""
    item = file.get(key)
    if item is None:
        raise DataError(f"{path}: key '{key}' is missing; expected a dataset of {dims} dimension(s). The file has {key_names(file)}")
    if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "biuf":
        raise DataError(f"{path}: key '{key}' must be a dataset of numbers, got {item}")
    shape = item.shape
    if dims == 1 and len(shape) == 2 and shape[1] == 1:
        return item
    if len(shape) != dims or 0 in shape:
        raise DataError(f"{path}: key '{key}' has shape {shape}; expected {dims} non-empty dimension(s)")
    return item


def read_raw(path: Path, file: h5py.File, key: str, rows: int, dims: int) -> np.ndarray:
    item = dataset_of(path, file, key, dims)
    try:
        value = item[:rows]
    except DAMAGE as error:
        raise DataError(f"{path}: key '{key}' cannot be read ({error}); the file is damaged") from error
    return value.reshape(rows) if dims == 1 else value


def read_numbers(path: Path, file: h5py.File, key: str, rows: int, dims: int) -> np.ndarray:
    """The first `rows` of `key` as float32, all finite."""
    with np.errstate(over="ignore"):                                                # a float64 beyond float32 becomes inf, and is named below
        value = read_raw(path, file, key, rows, dims).astype(np.float32, copy=False)
    index = first_non_finite(value)
    if index is not None:
        raise DataError(f"{path}: {key}{list(index)} is {value[index]}; expected finite numbers only")
    return value


def read_flags(path: Path, file: h5py.File, key: str, rows: int) -> np.ndarray:
    value = read_raw(path, file, key, rows, 1)
    wrong = np.flatnonzero((value != 0) & (value != 1))
    if len(wrong):
        raise DataError(f"{path}: {key}[{wrong[0]}] is {value[wrong[0]]}; expected 0 or 1")
    return value.astype(bool)
