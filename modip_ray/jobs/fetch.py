"""Bringing a run folder back from the cluster: a small job on the head writes it to its log (send.py), here it is checked and unpacked."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import secrets
import shlex
import shutil
import tarfile
import tempfile
from pathlib import Path
from zipfile import ZipFile

from ray.job_submission import JobDetails

from modip_ray.jobs import send
from modip_ray.jobs.client import Client, JobError, follow, plain_errors
from modip_ray.jobs.send import END, FAILED, PREFIX
from modip_ray.runfolder import LOCK

MARK = "fetched.json"               # in a local copy: whose it is, which files came with it, and that it may be replaced
MADE_HERE = "export", "report"      # folders of what may have been made in a copy whose mark does not say which files came with it


def fetch(client: Client, run_dir: str, target: Path, python: str, checkpoints: bool = True) -> int:
    """Copy `run_dir` of the cluster to `target`, replacing an earlier copy at once when all of it is here; returns the bytes that came over the line.

    What was made in that copy stays, unless the run has a file of that name.
    """
    check_target(target)
    check_same_run(target, run_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        received = Receiver(Path(folder) / "run.tar.gz")
        job_id = f"fetch-{secrets.token_hex(4)}"
        try:
            info = start(client, job_id, run_dir, python, checkpoints, Path(folder), received)
        finally:
            end(client, job_id)
        received.check(info, run_dir)
        unpacked = Path(folder) / "run"
        unpack(received.path, unpacked)
        facts = {"address": client.get_address(), "run_dir": run_dir, "checkpoints": checkpoints, "files": files_in(unpacked)}
        (unpacked / MARK).write_text(json.dumps(facts))
        keep(made_here(target), target, unpacked)
        replace(unpacked, target)
        return received.size


def check_target(target: Path) -> None:
    """JobError where `target` is something else than an earlier copy, or one that was trained further here: a run of this machine is never overwritten."""
    if target.exists() and (not (target / MARK).is_file() or (target / LOCK).exists()):             # hidden files do not travel: a lock is of this machine
        what = "is a copy that was trained further here" if (target / MARK).is_file() else "exists here and is no copy fetched earlier"
        raise JobError(f"{target}: {what}; move it away, or name another place (jobs fetch: --to, submit: another run_dir)")


def check_same_run(target: Path, run_dir: str) -> None:
    """JobError where `target` is a copy of another run and something was made in it, which belongs to that one."""
    made, earlier = made_here(target), mark_of(target).get("run_dir")
    if made and earlier not in (None, run_dir):
        more = f" and {len(made) - 3} more" if len(made) > 3 else ""
        raise JobError(f"{target}: is a copy of {earlier}, not of {run_dir}, and holds what was made in it here ({', '.join(made[:3])}{more}); move it away, "
                       "or name another place (jobs fetch: --to, submit: another run_dir)")


def mark_of(target: Path) -> dict:
    try:
        found = json.loads((target / MARK).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def files_in(folder: Path) -> list[str]:
    """Paths of all files, relative to the folder; links are not followed."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def made_here(target: Path) -> list[str]:
    """Files of a copy that did not come with it: exports, reports, whatever else was put there since."""
    here, came = [name for name in files_in(target) if name != MARK], mark_of(target).get("files")
    if came is None:
        return [name for name in here if Path(name).parts[0] in MADE_HERE]
    return sorted(set(here) - set(came))


def keep(names: list[str], old: Path, new: Path) -> None:
    """Copy files of the old folder that the new one lacks into it."""
    for name in names:
        if not os.path.lexists(new / name):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(old / name, new / name, follow_symlinks=False)


def start(client: Client, job_id: str, run_dir: str, python: str, checkpoints: bool, folder: Path, received: Receiver) -> JobDetails:
    package = folder / "send.zip"
    with ZipFile(package, "w") as archive:
        archive.write(send.__file__, "send.py")
    words = [python, "send.py", run_dir, *([] if checkpoints else ["--without-checkpoints"])]
    with plain_errors(client.get_address()):
        client.submit_job(entrypoint=f"exec {shlex.join(words)}", submission_id=job_id, runtime_env={"working_dir": str(package)}, metadata={"modip": "fetch"})
    return follow(client, job_id, received.take)


def end(client: Client, job_id: str) -> None:
    """Stop the sending job, which then empties its log. Where the connection is gone it ends by itself after a while: nothing to tell the user."""
    try:
        with plain_errors(client.get_address()):
            client.stop_job(job_id)
    except JobError:
        return


class Receiver:
    """Takes pieces of the job's log, writes the file that is in them, and knows when it is complete."""

    def __init__(self, path: Path):
        self.path, self.file = path, open(path, "wb")
        self.line, self.size, self.digest = "", 0, hashlib.sha256()
        self.failed: str | None = None
        self.complete = False

    def take(self, text: str) -> bool:
        """True when there is nothing to wait for any more."""
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            if line.startswith(PREFIX):
                try:
                    piece = base64.b64decode(line.removeprefix(PREFIX), validate=True)
                except binascii.Error as error:
                    raise JobError(f"what came over the line is damaged ({error}); fetch again") from error
                self.file.write(piece)
                self.digest.update(piece)
                self.size += len(piece)
            elif line.startswith(FAILED):
                self.failed = line.removeprefix(FAILED)
            elif line.startswith(END):
                self.file.close()
                self.complete = line.removeprefix(END).split() == [self.digest.hexdigest(), str(self.size)]
                return True
        return self.failed is not None

    def check(self, job: JobDetails, run_dir: str) -> None:
        self.file.close()
        if self.failed is not None:
            raise JobError(self.failed)
        if not self.complete:
            last = next((line for line in reversed((job.message or "").splitlines()) if line.strip()), "its sha256 does not fit")
            raise JobError(f"{run_dir}: did not arrive whole ({self.size:,} bytes, job {job.status.value}): {last}; fetch again")


def unpack(archive: Path, folder: Path) -> None:
    """Plain files and folders only, none of them outside `folder` (tarfile's data filter)."""
    folder.mkdir()
    try:
        with tarfile.open(archive, "r:gz") as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise JobError(f"what came over the line cannot be unpacked ({error}); fetch again") from error


def replace(new: Path, target: Path) -> None:
    """The new folder in the place of the old one, which stays whole until then."""
    old = new.with_name("old")
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
