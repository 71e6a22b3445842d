"""The replay's journal: what it acknowledges is on disk first. An append-only log in a folder of its own, in parts that checkpoints divide.

A record is a header (magic, kind, payload length, crc32 of the payload, crc32 of the header before it) and the payload. A part that ends inside a
record was cut by a crash: that record was never acknowledged. Damage anywhere else is named and skipped; reading goes on at the next sound record.
Each process that opens the journal begins a new part, and nothing is ever appended to an older one.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from modip_ray.learning.checkpoint import CheckpointError, sync

MAGIC = b"\xabMJ1"
HEADER = struct.Struct("<4sIIII")
LOCK_S, LOCK_EVERY_S = 60.0, 0.1    # patience with a process that is still ending, and how often to look


class JournalError(CheckpointError):
    """A journal that cannot be written or opened; the message names the folder and what to do."""


class Record(NamedTuple):
    kind: int
    payload: bytes


def framed(record: Record) -> bytes:
    start = HEADER.pack(MAGIC, record.kind, len(record.payload), zlib.crc32(record.payload), 0)[:-4]
    return start + struct.pack("<I", zlib.crc32(start)) + record.payload


def sound_header(data: mmap.mmap, at: int) -> tuple[int, int, int] | None:
    """(kind, length, crc of the payload) of a header at a byte; None where there is no whole, sound one."""
    start = data[at:at + HEADER.size]
    if len(start) < HEADER.size or not start.startswith(MAGIC) or zlib.crc32(start[:-4]) != int.from_bytes(start[-4:], "little"):
        return None
    return HEADER.unpack(start)[1:4]


def record_at(data: mmap.mmap, at: int) -> Record | None:
    """The record at a byte; None where there is no sound one."""
    header = sound_header(data, at)
    if header is None:
        return None
    kind, length, crc = header
    payload = data[at + HEADER.size:at + HEADER.size + length]
    return Record(kind, payload) if len(payload) == length and zlib.crc32(payload) == crc else None


def records(data: mmap.mmap, damage: list[str]) -> Iterator[Record]:
    """All sound records; a sentence into `damage` for each stretch of bytes that holds none (a torn end is no damage)."""
    at = 0
    while at < len(data):
        record = record_at(data, at)
        if record is not None:
            yield record
            at += HEADER.size + len(record.payload)
            continue
        after = at + 1
        while (after := data.find(MAGIC, after)) >= 0 and record_at(data, after) is None:
            after += 1
        header, left = sound_header(data, at), len(data) - at
        torn = after < 0 and (left < HEADER.size or (header is not None and left < HEADER.size + header[1]))
        if not torn:
            damage.append(f"bytes {at} to {after if after >= 0 else len(data)} are no sound record and were skipped")
        at = after if after >= 0 else len(data)


class Journal:
    """Open in one process at a time: the lock goes with a process that dies. Not thread-safe, but for `sync`."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = self.locked()
        except OSError as error:
            raise JournalError(f"{folder}: cannot be opened as the replay's journal ({error.strerror}); make room or choose another run_dir") from error
        self.number = max(self.parts(), default=-1) + 1             # of the part that is written; its file appears with the first record
        self.file: int | None = None
        self.end = 0                                                # bytes of it that are whole records
        self.unsynced: list[int] = []                               # parts that are full, still to be flushed to the disk
        self.damage: list[str] = []                                 # what `read` had to skip, in words

    def locked(self) -> BinaryIO:
        """The lock file, locked. Whoever holds it may be a process that is still ending: it is waited for."""
        file, deadline = open(self.folder / ".lock", "a+b"), time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise JournalError(f"{self.folder}: another replay (process {file.read().decode() or 'unknown'}) has held the journal for {LOCK_S:g} s; "
                                       "stop that process, and the same command resumes") from None
                time.sleep(LOCK_EVERY_S)
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        file.flush()
        return file

    def path(self, number: int) -> Path:
        return self.folder / f"part_{number:06d}"

    def parts(self) -> list[int]:
        """Numbers of the parts that exist, oldest first."""
        return sorted(int(p.name.removeprefix("part_")) for p in self.folder.glob("part_*"))

    def read(self, first: int) -> Iterator[Record]:
        """The records of part `first` and all later ones, oldest first; `damage` says afterwards what was skipped. What is appended comes behind them."""
        self.number = max(self.number, first)
        for number in self.parts():
            if number < first or not self.path(number).stat().st_size:
                continue
            with open(self.path(number), "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                damage: list[str] = []
                yield from records(data, damage)
                self.damage += [f"{self.path(number)}: {words}" for words in damage]

    def append(self, added: Sequence[Record]) -> None:
        """Write records, all by one call; when this returns they outlive the process. JournalError when they could not be written: then none counts."""
        data = memoryview(b"".join(map(framed, added)))
        try:
            if self.file is None:
                self.file, self.end = os.open(self.path(self.number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644), 0
            left = data
            while left:
                left = left[os.write(self.file, left):]
        except OSError as error:
            if self.file is not None:
                with suppress(OSError):                             # a torn end is passed over when it is read, too
                    os.ftruncate(self.file, self.end)
            self.rotate()
            raise JournalError(f"{self.path(self.number).parent}: the replay's journal cannot be written ({error.strerror}), so nothing more can be "
                               "stored; make room there, and the same command resumes") from error
        self.end += len(data)

    def rotate(self) -> int:
        """Begin a new part; returns its number. What a checkpoint of this moment does not hold is in that part and those after it."""
        if self.file is not None:
            self.unsynced.append(self.file)
            self.file, self.number = None, self.number + 1
        return self.number

    def sync(self) -> None:
        """Have the parts before the present one on the disk itself. May be called beside `append`."""
        while self.unsynced:
            part = self.unsynced.pop()
            try:
                os.fsync(part)
            finally:
                os.close(part)
        sync(self.folder)

    def drop(self, *, before: int = 0, since: int | None = None) -> None:
        """Delete the parts before one number, or since another."""
        for number in self.parts():
            if number < before or (since is not None and number >= since):
                self.path(number).unlink(missing_ok=True)

    def close(self) -> None:
        self.rotate()
        self.sync()
        self.lock.close()
