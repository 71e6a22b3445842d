"""Running a modip command on a Ray cluster through Ray's Jobs API: connect, submit, follow, cancel, list.

The client is Ray's JobSubmissionClient; what is added here are time-outs, errors in one line, a log that goes on after a broken connection, and
names for jobs. What travels is in package.py, how a run folder comes back in fetch.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from modip_ray.config import nearest
from modip_ray.report.scores import duration
from modip_ray.runfolder import RunError

ADDRESS = "RAY_API_SERVER_ADDRESS"
CONNECT_S, ANSWER_S, UPLOAD_S = 10.0, 60.0, 600.0
POLL_S = 0.5
GRACE_S = 120                       # between SIGTERM and SIGKILL of a cancelled job: it writes a checkpoint (Ray's default is 3)
QUIET_S = 30.0                      # without a log line before the cluster is asked whether the job still runs
RECONNECTS = 5
TOKEN_HELP = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE (or RAY_AUTH_TOKEN) to the cluster's token"


class JobError(RunError):
    """A job that cannot be submitted, found or fetched; the message says what to do."""


class Client(JobSubmissionClient):
    """Ray's client, with a time-out for every request."""

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=(CONNECT_S, UPLOAD_S if method == "PUT" else ANSWER_S), **kwargs)

    def _raise_error(self, r: requests.Response) -> None:
        last = next((line.strip() for line in reversed(r.text.splitlines()) if line.strip()), "no reason given")
        raise JobError(f"{self.get_address()}: refused ({r.status_code}): {last}")


def find_address(given: str | None) -> str:
    """http(s) address of the cluster's dashboard: the option, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS. JobError with the right form otherwise."""
    sources = {"--address": given, ADDRESS: os.environ.get(ADDRESS), "RAY_ADDRESS": os.environ.get("RAY_ADDRESS")}
    source, address = next(((name, value) for name, value in sources.items() if value), (None, None))
    if address is None:
        raise JobError(f"no cluster is named; give --address http://HEAD:8265, or set {ADDRESS}")
    parts = urlsplit(address if "://" in address else f"//{address}")
    host = parts.hostname or "HEAD"
    form = f"the Jobs API is served by the dashboard, e.g. http://{'HEAD' if host == 'auto' else host}:8265"
    if parts.scheme == "ray":
        raise JobError(f"{source}: {address!r} is an address of Ray Client; {form}")
    if parts.scheme not in ("http", "https"):
        raise JobError(f"{source}: got {address!r}, expected http://HOST:PORT; {form}")
    return address.rstrip("/")


def connect(address: str) -> Client:
    """A client of the cluster at this address, checked to be there and to accept our token."""
    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    before = os.environ.get(ADDRESS)
    os.environ[ADDRESS] = address                                       # Ray takes it over the argument and over RAY_ADDRESS
    try:
        with plain_errors(address):
            client = Client(address)
            client.list_jobs()                                          # the version is told without a token
            return client
    finally:
        if before is None:
            del os.environ[ADDRESS]
        else:
            os.environ[ADDRESS] = before


@contextmanager
def plain_errors(address: str) -> Iterator[None]:
    """Errors of Ray's client and of HTTP as one line that says what to do. The token is never part of it."""
    try:
        yield
    except AuthenticationError as error:
        wrong = "Authentication failed" in str(error)
        raise JobError(f"{address}: {'the token is not the one of this cluster' if wrong else 'asks for a token, none was sent'}; {TOKEN_HELP}") from error
    except (ConnectionError, requests.ConnectionError, TimeoutError, requests.Timeout) as error:
        hint = "is the cluster up, and is the port of its dashboard reachable (ssh -L, kubectl port-forward)?"
        raise JobError(f"{address}: no answer ({reason(error)}); {hint}") from error
    except (requests.RequestException, ValueError) as error:
        raise JobError(f"{address}: answers, but not as a Ray dashboard does ({reason(error)}); {ADDRESS} or --address names another service") from error
    except RuntimeError as error:
        if isinstance(error, RunError):
            raise
        raise JobError(f"{address}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    cause = error.__cause__ or error.__context__ or error
    text = str(cause)
    for known in ("Connection refused", "timed out", "Name or service not known", "No route to host", "certificate verify failed"):
        if known in text:
            return known.lower()
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---- what there is ---------------------------------------------------------------------------------------------------------------------------


def all_jobs(client: Client) -> list[JobDetails]:
    """Submitted jobs, oldest first; our own fetching jobs are left out."""
    with plain_errors(client.get_address()):
        jobs = [job for job in client.list_jobs() if job.type == JobType.SUBMISSION and (job.metadata or {}).get("modip") != "fetch"]
    return sorted(jobs, key=lambda job: job.start_time or 0)


def find_job(client: Client, wanted: str | None) -> JobDetails:
    """By id, or by name (the newest of that name); without either, the newest of all."""
    jobs = all_jobs(client)
    found = [job for job in jobs if wanted in (None, job.submission_id, name_of(job))]
    if not found:
        known = [str(job.submission_id) for job in jobs] + [name_of(job) for job in jobs]
        raise JobError(f"no job {wanted!r} at {client.get_address()}{nearest(str(wanted), known)}; 'modip jobs list' shows them" if jobs
                       else f"no job was ever submitted to {client.get_address()}")
    return found[-1]


def name_of(job: JobDetails) -> str:
    return (job.metadata or {}).get("name", "-")


def table(jobs: list[JobDetails]) -> str:
    rows = [("id", "name", "status", "started", "duration", "entrypoint")]
    for job in jobs:
        begun = (job.start_time or 0) / 1000
        ended = (job.end_time / 1000) if job.end_time else time.time()
        entrypoint = job.entrypoint.removeprefix("exec ")
        rows.append((str(job.submission_id), name_of(job), str(job.status.value), time.strftime("%m-%d %H:%M:%S", time.localtime(begun)),
                     duration(max(0.0, ended - begun)), entrypoint if len(entrypoint) <= 80 else entrypoint[:77] + "..."))
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    return "\n".join("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[5]]) for row in rows)


# ---- submit, follow, cancel ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
    """What is submitted. `run_dir`: the run folder on the cluster; None where the command has none."""

    id: str
    name: str
    entrypoint: str
    package: Path
    run_dir: str | None
    local_dir: str | None
    python: str


def submit(client: Client, job: Submission) -> None:
    metadata = {"modip": "run", "name": job.name, "python": job.python} | ({"run_dir": job.run_dir, "local_dir": job.local_dir} if job.run_dir else {})
    environment = {"working_dir": str(job.package), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S)}}
    with plain_errors(client.get_address()):
        client.submit_job(entrypoint=job.entrypoint, submission_id=job.id, runtime_env=environment, metadata=metadata)


def job_info(client: Client, job_id: str) -> JobDetails:
    with plain_errors(client.get_address()):
        return client.get_job_info(job_id)


def wait_until(client: Client, job_id: str, ready: Callable[[JobStatus], bool], seconds: float, what: str) -> JobDetails:
    deadline = time.monotonic() + seconds
    while True:
        info = job_info(client, job_id)
        if ready(info.status):
            return info
        if time.monotonic() > deadline:
            raise JobError(f"job {job_id}: is {info.status.value} and did not {what} within {seconds:g} s; 'modip jobs list' shows it")
        time.sleep(POLL_S)


def follow(client: Client, job_id: str, write: Callable[[str], bool | None]) -> JobDetails:
    """Pass the job's log to `write`, from its beginning, until the job has ended or `write` returns True; its details then."""
    with plain_errors(client.get_address()):
        ended = asyncio.run(follow_log(client, job_id, write))
    return wait_until(client, job_id, lambda status: status.is_terminal(), ANSWER_S, "end") if ended else job_info(client, job_id)


async def follow_log(client: Client, job_id: str, write: Callable[[str], bool | None]) -> bool:
    """True: the log has ended; False: `write` had enough. After a broken connection the log is read again, without what was passed on already."""
    passed, failures = 0, 0
    while True:
        position = 0
        try:
            async with aclosing(watched(client, job_id)) as log:
                async for text in log:
                    new, position = text[max(0, passed - position):], position + len(text)
                    passed, failures = max(passed, position), 0
                    if new and write(new):
                        return False
        except (RuntimeError, OSError) as error:
            failures += 1
            if failures > RECONNECTS or isinstance(error, RunError):
                raise
            await asyncio.sleep(2.0 * failures)
            continue
        if (await asyncio.to_thread(job_info, client, job_id)).status.is_terminal():
            return True
        await asyncio.sleep(POLL_S)


async def watched(client: Client, job_id: str) -> AsyncIterator[str]:
    """Pieces of the log as they come; when none comes for a while the cluster is asked, so that a dead one is noticed."""
    async with aclosing(client.tail_job_logs(job_id)) as stream:
        while True:
            piece = asyncio.ensure_future(anext(stream, None))
            try:
                while not (await asyncio.wait({piece}, timeout=QUIET_S))[0]:
                    await asyncio.to_thread(job_info, client, job_id)
            except BaseException:
                piece.cancel()
                await asyncio.wait({piece})
                raise
            text = piece.result()
            if text is None:
                return
            yield text


def cancel(client: Client, job: JobDetails) -> str:
    """Stop the job, wait until it has, and say what it saved."""
    job_id = str(job.submission_id)
    if job.status.is_terminal():
        return f"{job_id}: is {job.status.value} already"
    with plain_errors(client.get_address()):
        client.stop_job(job_id)
    ended = wait_until(client, job_id, lambda status: status.is_terminal(), GRACE_S + ANSWER_S, "stop")
    saved = re.findall(r"^.*stopped at .* environment steps.*$", log_of(client, job_id), re.MULTILINE)
    where = (job.metadata or {}).get("run_dir")
    told = f"{saved[-1].partition(';')[0].strip()}, with a checkpoint" if saved else "no new checkpoint: it had not begun to train, or had to be killed"
    return f"{job_id}: {ended.status.value}; {told}" + (f"; submitting the same command again resumes {where}" if where else "")


def log_of(client: Client, job_id: str) -> str:
    with plain_errors(client.get_address()):
        return client.get_job_logs(job_id)


def exit_code(job: JobDetails) -> int:
    """0 done or stopped, 2 where the command itself ended so (something to mend, said in its log), 1 failed otherwise."""
    if job.status in (JobStatus.SUCCEEDED, JobStatus.STOPPED):
        return 0
    return 2 if job.driver_exit_code == 2 else 1
