"""Runs on the cluster's head, by itself (standard library only): a run folder to stdout, as a gzipped tar in base64 lines with its sha256 at the end.

    python send.py FOLDER [--without-checkpoints]

The log of a job is the one way back that the Jobs API has. When everything is written the job waits to be stopped, and then empties its log, so that
no second copy of the run stays on the head.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import os
import signal
import sys
import tarfile
import time
from pathlib import Path

PREFIX, END, FAILED = "modip-data ", "modip-end ", "modip-failed "
LINE_BYTES = 49_152                  # 65,536 characters: the log is passed on line by line, at most 4 MB at once
WAIT_S = 600.0
HELD = "checkpoints", "journal"      # opened before the first file is sent: the run may drop them meanwhile, and a checkpoint needs the journal after it


class Lines(io.RawIOBase):
    """Writes bytes as prefixed base64 lines."""

    def __init__(self, out):
        self.out, self.held, self.digest, self.size = out, bytearray(), hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.held += data
        while len(self.held) >= LINE_BYTES:
            self.line(LINE_BYTES)
        return len(data)

    def line(self, size: int) -> None:
        piece = bytes(self.held[:size])
        del self.held[:size]
        self.digest.update(piece)
        self.size += len(piece)
        self.out.write(f"{PREFIX}{base64.b64encode(piece).decode()}\n")

    def finish(self) -> None:
        if self.held:
            self.line(len(self.held))
        self.out.write(f"{END}{self.digest.hexdigest()} {self.size}\n")
        self.out.flush()


def files_of(folder: Path, checkpoints: bool) -> list[Path]:
    """Files of a run that may be at work; what is being written (hidden, or a checkpoint without its `done`) is no part of it."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_symlink() or not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        if parts[0] == "checkpoints" and not (checkpoints and (folder / "checkpoints" / parts[1] / "done").is_file()):
            continue
        if parts[0] == "offline" or (parts[0] == "journal" and not checkpoints):                     # made anew from the data; of no use alone
            continue
        found.append(path)
    return found


def send(folder: Path, checkpoints: bool, out) -> None:
    lines, files = Lines(out), files_of(folder, checkpoints)
    held = {path: file for path in files if path.parts[len(folder.parts)] in HELD and (file := opened(path)) is not None}
    with gzip.GzipFile(fileobj=lines, mode="wb", compresslevel=1) as packed, tarfile.open(fileobj=packed, mode="w|") as archive:
        for path in files:
            file = held.pop(path, None) or opened(path)
            if file is None:
                continue
            with file:                                                   # its size as of now: a log may grow meanwhile
                archive.addfile(archive.gettarinfo(arcname=str(path.relative_to(folder)), fileobj=file), file)
    lines.finish()


def opened(path: Path):
    """None for a file that was removed since it was listed."""
    try:
        return open(path, "rb")
    except FileNotFoundError:
        return None


def main() -> int:
    folder, checkpoints = Path(os.path.expanduser(sys.argv[1])), "--without-checkpoints" not in sys.argv[2:]
    if not folder.is_dir():
        print(f"{FAILED}{folder}: no such folder on the head; was the run started, and with the same --storage?", flush=True)
        return 2
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    send(folder, checkpoints, sys.stdout)
    deadline = time.monotonic() + WAIT_S
    while not stop and time.monotonic() < deadline:
        time.sleep(0.2)
    os.ftruncate(1, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
