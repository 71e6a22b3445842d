"""Checkpoints once more at another address (log.mirror): any that pyarrow.fs or fsspec knows, s3://, gs://, a mounted disk.

Laid out as a run's folder: checkpoints/NAME/FILE, `done` last, beside config.yaml and metrics.jsonl. What an earlier checkpoint there has with the same
sum is copied there, not sent. The journal is not mirrored: who loses the run's own disk goes on from the last mirrored checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modip_ray.config import ConfigError
from modip_ray.learning.checkpoint import DONE, Checkpoint, CheckpointError, folders, order, verified, write_synced
from modip_ray.oneline import first_line

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

CHECKPOINTS, STAGED, PROBE = "checkpoints", ".mirrored", ".modip_probe"
BESIDE = ("config.yaml", "metrics.jsonl", "summary.json", "report/index.html")        # of the run's folder, sent with every checkpoint as they are then
SETTING = "log.mirror"


def file_system(address: str) -> tuple[FileSystem, str]:
    """The file system of an address, and the path in it. ConfigError where nobody knows its scheme, or the package for it is not installed."""
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem
    if "@" in address.partition("://")[2].partition("?")[0].partition("/")[0] or "secret_key" in address:
        raise ConfigError(f"{SETTING}: has credentials in it, which would be written into the run's folder; give them in the environment, as the storage's own "
                          "tools take them")
    try:
        if "://" not in address:
            return FileSystem.from_uri(Path(os.path.expanduser(address)).resolve().as_uri())
        return FileSystem.from_uri(address)
    except (ValueError, OSError) as error:
        import fsspec
        try:
            fs, path = fsspec.core.url_to_fs(address)
        except (ValueError, ImportError, OSError) as other:
            raise ConfigError(f"{SETTING}: got {address!r}, which neither pyarrow ({first_line(error)}) nor fsspec ({first_line(other)}) can open; give a "
                              "folder, or an address such as s3://BUCKET/PATH or gs://BUCKET/PATH") from other
        return PyFileSystem(FSSpecHandler(fs)), path


class Mirror:
    """One run's place at an address. Every method may raise OSError: of a network, or of rights that are missing there."""

    def __init__(self, address: str):
        self.address = address
        self.fs, root = file_system(address)
        self.root = root.rstrip("/")

    def check(self) -> None:
        """ConfigError where nothing can be written there."""
        try:
            self.write(PROBE, b"")
            self.fs.delete_file(f"{self.root}/{PROBE}")
        except (OSError, NotImplementedError) as error:
            raise ConfigError(f"{SETTING}: {self.address} cannot be written ({first_line(error)}); check the address, the rights and the credentials, which "
                              "come from the environment as the storage's own tools take them") from error

    def write(self, name: str, content: bytes) -> None:
        self.fs.create_dir(f"{self.root}/{name}".rpartition("/")[0], recursive=True)
        with self.fs.open_output_stream(f"{self.root}/{name}") as out:
            out.write(content)

    def read(self, name: str) -> bytes | None:
        """A file's content; None where it is not there."""
        from pyarrow.fs import FileType
        if self.fs.get_file_info(f"{self.root}/{name}").type != FileType.File:
            return None
        with self.fs.open_input_stream(f"{self.root}/{name}") as file:
            return file.read()

    def names(self) -> list[str]:
        """Checkpoints there, newest first, finished or not."""
        from pyarrow.fs import FileSelector, FileType
        found = self.fs.get_file_info(FileSelector(f"{self.root}/{CHECKPOINTS}", allow_not_found=True))
        return sorted((f.base_name for f in found if f.type == FileType.Directory and f.base_name.startswith("step_")), key=order, reverse=True)

    def sums(self, name: str) -> Mapping[str, str]:
        """File -> sha256 of a finished checkpoint; empty for one that is not."""
        return listed(self.read(f"{CHECKPOINTS}/{name}/{DONE}"))

    def push(self, folder: Path, beside: Path, keep: int) -> int:
        """Send a checkpoint's folder and the files beside it, then drop there all but the newest `keep`; returns the bytes sent."""
        target, there, sent = f"{CHECKPOINTS}/{folder.name}", {}, 0
        for name in reversed(self.names()):
            there |= {digest: f"{CHECKPOINTS}/{name}/{file}" for file, digest in self.sums(name).items()}
        self.push_beside(beside)
        for name, digest in json.loads((folder / DONE).read_text())["files"].items():
            if digest in there:
                self.fs.create_dir(f"{self.root}/{target}", recursive=True)
                if there[digest] != f"{target}/{name}":
                    self.fs.copy_file(f"{self.root}/{there[digest]}", f"{self.root}/{target}/{name}")
            else:
                self.write(f"{target}/{name}", (folder / name).read_bytes())
                sent += (folder / name).stat().st_size
        self.write(f"{target}/{DONE}", (folder / DONE).read_bytes())
        for old in self.names()[keep:]:
            self.fs.delete_dir(f"{self.root}/{CHECKPOINTS}/{old}")
        return sent

    def push_beside(self, run: Path) -> None:
        for name in BESIDE:
            if (run / name).is_file():
                self.write(name, (run / name).read_bytes())

    def pull(self, run: Path, writing: Callable[[Path], AbstractContextManager] = nullcontext) -> Checkpoint | None:
        """The newest sound checkpoint, and what is beside it, into a run's folder; None where there is none, or none that was sent
        whole. CheckpointError where all are damaged.

        writing : what is written here is written within writing(run), which tells its errors from those of the mirror
        """
        problems = []
        for name in self.names():
            marker = self.read(f"{CHECKPOINTS}/{name}/{DONE}")
            if marker is None:                                                      # its sending was cut short
                continue
            folder = run / CHECKPOINTS / f".{name}"
            with writing(run):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                (folder / DONE).write_bytes(marker)
            for file in listed(marker):
                content = self.read(f"{CHECKPOINTS}/{name}/{Path(file).name}")
                if content is not None:
                    with writing(run):
                        (folder / Path(file).name).write_bytes(content)
            try:
                verified(folder)
            except CheckpointError as error:
                problems.append(str(error))
                shutil.rmtree(folder)
                continue
            with writing(run):
                shutil.rmtree(final := folder.with_name(name), ignore_errors=True)  # of a restoring that was cut short
                os.replace(folder, final)
            for other in reversed(BESIDE):                                          # config.yaml last: with it all is there
                content = self.read(other)
                if content is not None:
                    with writing(run):
                        (run / other).parent.mkdir(exist_ok=True)
                        write_synced(run / other, content)
            return verified(final)
        if problems:
            raise CheckpointError(f"{self.address}: none of its checkpoints can be used ({'; '.join(problems)})")
        return None


def listed(marker: bytes | None) -> Mapping[str, str]:
    """File -> sha256 of a finished checkpoint's marker; empty where it is none."""
    try:
        return json.loads(marker)["files"] if marker is not None else {}
    except (ValueError, KeyError, TypeError):
        return {}


class Mirroring:
    """Sends checkpoints one after another beside the training; what it takes is never waited for but at the end."""

    def __init__(self, address: str, run: Path, keep: int):
        self.mirror, self.run, self.keep = Mirror(address), run, keep
        self.staged = run / CHECKPOINTS / STAGED
        self.thread, self.sending = ThreadPoolExecutor(1, "mirror"), Future()
        self.sending.set_result(0)
        self.last, self.sent_bytes = "", 0                                          # last: the name of the newest one there

    def offer(self, checkpoint: Path) -> None:
        """Send it, unless an earlier one is still on its way: then a later one will be."""
        if self.sending.done() and checkpoint.name != self.last:
            shutil.rmtree(self.staged, ignore_errors=True)
            (folder := self.staged / checkpoint.name).mkdir(parents=True)
            for path in checkpoint.iterdir():                                       # links: the checkpoint itself may be dropped meanwhile
                try:
                    os.link(path, folder / path.name)
                except OSError:
                    shutil.copyfile(path, folder / path.name)
            self.sending = self.thread.submit(self.send, folder)

    def send(self, folder: Path) -> None:
        self.sent_bytes += self.mirror.push(folder, self.run, self.keep)
        self.last = folder.name
        shutil.rmtree(self.staged, ignore_errors=True)

    def problem(self) -> str | None:
        """What went wrong with the last one, once; the next checkpoint is another try."""
        if not self.sending.done() or (error := self.sending.exception()) is None:
            return None
        self.sending = Future()
        self.sending.set_result(0)
        return f"a checkpoint could not be sent to {self.mirror.address} ({first_line(error)}); the next one will be tried"

    def finish(self) -> str | None:
        """Wait for what is on its way, and send the newest checkpoint and what is beside it now; what went wrong, if anything did."""
        self.sending.exception()
        for checkpoint in folders(self.run / CHECKPOINTS)[:1]:
            self.offer(checkpoint)
        self.sending.exception()
        if (problem := self.problem()) is None:
            self.sending = self.thread.submit(self.mirror.push_beside, self.run)
            problem = self.problem() if self.sending.exception() else None
        self.thread.shutdown()
        return problem

    def gauges(self) -> dict[str, Any]:
        return {"mirror/sent_mb": self.sent_bytes / 2**20}
