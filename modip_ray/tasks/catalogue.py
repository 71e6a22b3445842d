"""Official data files by name: where they come from, where they are kept here, and whether a file is the one it should be.

Downloads use urllib: nothing more is needed to resume one, and a download library would be one more dependency. Proxies of the environment are used.
"""
from __future__ import annotations

import csv
import difflib
import fcntl
import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from modip_ray.tasks.dataset import DataError

Progress = Callable[[int, int | None], None]        # bytes there so far, bytes in all where known

BLOCK = 1 << 20
TIMEOUT_S = 30.0                                    # without a byte from the server
WAIT_S = 1.0                                        # before a transfer that broke off is taken up again
POLL_S = 0.2                                        # while another process downloads the same file
HDF5_BEGINS = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class Entry:
    """One file of the catalogue. size (bytes) and sha256 are None where unknown; checksum: "confirmed", "third-party" or "none" (see catalogue.tsv)."""

    name: str
    address: str
    size: int | None
    sha256: str | None
    checksum: str

    def facts(self) -> str:
        """Address, bytes and checksum, for messages."""
        size = f"{self.size:,} bytes" if self.size is not None else "size unknown"
        return f"{self.address} ({size}, {f'sha256 {self.sha256}, {self.checksum}' if self.sha256 else 'unverified: no checksum known'})"


@cache
def catalogue() -> dict[str, Entry]:
    """All entries by name."""
    with open(Path(__file__).with_name("catalogue.tsv"), newline="", encoding="utf-8") as file:
        rows = csv.DictReader((line for line in file if not line.startswith("#")), delimiter="\t")
        return {r["name"]: Entry(r["name"], r["address"], int(r["bytes"]) if r["bytes"] else None, r["sha256"] or None, r["checksum"]) for r in rows}


def find(name: str) -> Entry:
    """The entry of that name; DataError names the nearest ones."""
    if name not in catalogue():
        raise DataError(f"{name!r}: {not_found(name)}")
    return catalogue()[name]


def not_found(name: str) -> str:
    """What to say of a name that the catalogue lacks."""
    plain = {_plain(n): n for n in catalogue()}
    near = [repr(plain[n]) for n in difflib.get_close_matches(_plain(name), plain, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"'modip data list' shows all {len(plain)} names"
    return f"not in the catalogue ({hint})"


def _plain(name: str) -> str:
    """Letters and digits of the last part of a name: what is compared to find a mistyped one."""
    return "".join(c for c in name.lower().rsplit("/", 1)[-1] if c.isalnum())


def data_dir() -> Path:
    """Where catalogue files are kept: $MODIP_DATA_DIR, else modip_ray/data in the user's cache folder."""
    chosen = os.environ.get("MODIP_DATA_DIR")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "modip_ray" / "data"


def local_path(name: str) -> Path:
    """Where the file of that name is, or would be."""
    return data_dir() / f"{find(name).name}.hdf5"


def state(name: str) -> str:
    """What is known about the local file without reading it: one of "absent", "partly downloaded", "wrong size", "not checked", "no checksum known",
    "verified" or "verified (third-party checksum)"."""
    entry, path = find(name), local_path(name)
    if not path.is_file():
        return "partly downloaded" if _part(path).is_file() else "absent"
    if entry.size is not None and path.stat().st_size != entry.size:
        return "wrong size"
    if entry.sha256 is None:
        return "no checksum known"
    if not _remembered(path, entry):
        return "not checked"
    return "verified" if entry.checksum == "confirmed" else f"verified ({entry.checksum} checksum)"


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Path of the whole and verified file, downloaded (resuming what there is) if it is not there yet.

    DataError says what went wrong and where to put the file by hand. Two processes may ask for the same file: one downloads, the other waits.
    """
    entry, path = find(name), local_path(name)
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path, entry, progress):
                if not path.is_file():
                    _download(entry, path, progress)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error}); set MODIP_DATA_DIR to another folder, or make room") from error
    verify(name)
    return path


def verify(name: str, again: bool = False) -> str:
    """The state of the local file after checking it, which is remembered until it changes; `again`: read it in any case.

    DataError where it is missing or not the official one. A file that was put there by hand is never deleted.
    """
    entry, path = find(name), local_path(name)
    if not path.is_file():
        raise DataError(f"{path}: no such file; 'modip data download {name}' fetches it. {_by_hand(entry, path)}")
    if again or not _remembered(path, entry):
        try:
            reason = _mismatch(entry, path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        if reason:
            raise DataError(f"{path}: is not the official {name}: {reason}; move it away, and 'modip data download {name}' fetches the right one. "
                            "To use this file all the same give its path, from another folder, in place of the name")
        _remember(path, entry)
    return state(name)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- is it the right file? -------------------------------------------------------------------------------------------------------------------

def _mismatch(entry: Entry, path: Path) -> str | None:
    """How the file differs from what the catalogue says, None where it does not."""
    size = path.stat().st_size
    if entry.size is not None and size != entry.size:
        return f"{size:,} bytes, expected {entry.size:,}"
    with open(path, "rb") as file:
        begin = file.read(len(HDF5_BEGINS))
    if begin != HDF5_BEGINS:
        return f"it begins with {begin!r} and is no HDF5 file (a page of a proxy or portal?)"
    if entry.sha256 is not None:
        found = sha256_of(path)
        if found != entry.sha256:
            doubt = "" if entry.checksum == "confirmed" else " (a third-party checksum, which may be wrong: download the file by hand to use it all the same)"
            return f"sha256 {found}, expected {entry.sha256}{doubt}"
    return None


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _identity(path: Path, entry: Entry) -> dict:
    found = path.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": entry.sha256}


def _remembered(path: Path, entry: Entry) -> bool:
    try:
        return json.loads(_beside(path, "verified").read_text()) == _identity(path, entry)
    except (OSError, ValueError):
        return False


def _remember(path: Path, entry: Entry) -> None:
    """Note that the file is right. In a folder that cannot be written nothing is noted, and the file is read each time."""
    record = _beside(path, "verified")
    temporary = record.with_name(f"{record.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(_identity(path, entry)))
        os.replace(temporary, record)
    except OSError:
        return


# ---- downloading -----------------------------------------------------------------------------------------------------------------------------

class _BrokenOffError(Exception):
    """The transfer failed; what has come so far is kept."""


def _by_hand(entry: Entry, path: Path) -> str:
    return f"To place it by hand, save {entry.facts()} as {path}"


@contextmanager
def _locked(path: Path, entry: Entry, progress: Progress | None) -> Iterator[None]:
    """Only one process at a time; the others wait, and tell its progress. The lock ends with its process, whatever happens to it."""
    with open(_beside(path, "lock"), "w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if progress is not None:
                    progress(_size(_part(path)), entry.size)
                time.sleep(POLL_S)
        yield


def _download(entry: Entry, path: Path, progress: Progress | None) -> None:
    """`path` complete and verified, or DataError. A transfer that breaks off is taken up again as long as each one brings something."""
    part = _part(path)
    missing = None if entry.size is None else entry.size - _size(part)
    free = shutil.disk_usage(path.parent).free
    if missing is not None and missing > free:
        raise DataError(f"{path}: {missing:,} bytes are still to come and the disk has {free:,} free; make room, or set MODIP_DATA_DIR to another folder")
    while True:
        before = _size(part)
        try:
            _transfer(entry, part, progress)
            break
        except _BrokenOffError as error:
            after = _size(part)
            if after <= before:
                kept = f" {after:,} bytes are kept in {part}, and the same command goes on from there." if after else ""
                raise DataError(f"{entry.name}: cannot be downloaded: {error}.{kept} {_by_hand(entry, path)}") from error
            time.sleep(WAIT_S)
    reason = _mismatch(entry, part)
    if reason:
        part.unlink()
        raise DataError(f"{entry.name}: what {entry.address} gave is not the expected file: {reason}. It was deleted; try again, and if that fails too: "
                        f"{_by_hand(entry, path)}")
    os.replace(part, path)
    _remember(path, entry)


def _transfer(entry: Entry, part: Path, progress: Progress | None) -> None:
    """Bring `part` to its full size, from where it ends; _BrokenOffError where the server or the network does not go along."""
    have = _size(part)
    if entry.size is not None and have >= entry.size:
        if have == entry.size:
            return
        part.unlink()                                                               # longer than the file: not a part of it
        have = 0
    headers = {"User-Agent": "modip_ray", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(entry.address, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:                                              # nothing follows after `have`: start anew
            part.unlink()
            return _transfer(entry, part, progress)
        raise _BrokenOffError(f"{entry.address} answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOffError(f"{entry.address} cannot be reached ({_reason(error)}{_proxy(entry.address)})") from error
    with response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            if response.status == 206:
                raise _BrokenOffError(f"{entry.address} was asked for bytes from {have} and sends {response.headers.get('Content-Range')!r}")
            have = 0                                                                # the server sends all of it again
        length = response.headers.get("Content-Length")
        total = entry.size if length is None else have + int(length)
        if entry.size is not None and total != entry.size:
            raise _BrokenOffError(f"{entry.address} offers {total:,} bytes, expected {entry.size:,}: the file has changed, or a proxy or portal answers")
        with open(part, "ab" if have else "wb") as file:
            while block := _block(response, entry):
                file.write(block)
                have += len(block)
                if progress is not None:
                    progress(have, total)
    if total is not None and have < total:
        raise _BrokenOffError(f"{entry.address} ended after {have:,} of {total:,} bytes")


def _block(response: http.client.HTTPResponse, entry: Entry) -> bytes:
    try:
        return response.read1(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOffError(f"the connection to {entry.address} broke off ({_reason(error)})") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error or type(error).__name__)


def _proxy(address: str) -> str:
    """ " through the proxy ..." where one of the environment applies (credentials left out)."""
    parts = urllib.parse.urlsplit(address)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return ""
    return f" through the proxy {proxy.rsplit('@', 1)[-1]}"
