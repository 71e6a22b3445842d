"""`modip submit` and `modip jobs`: commands on a Ray cluster, through its Jobs API."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from modip_ray.cli.arguments import command
from modip_ray.progress import size_text

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from modip_ray.jobs.client import Client

DETACHED = 130


def add_parsers(commands) -> None:
    """Add `submit` and `jobs` to the subparsers of the command line."""
    text = "run a command on a Ray cluster: packages this folder, follows the log, brings the run folder back"
    p = command(commands, "submit", run_submit, text)
    add_address(p)
    p.add_argument("--name", help="of the job, and of its run folder where the command names none; default: from run_dir or the task")
    p.add_argument("--no-wait", action="store_true", help="return once it is submitted")
    p.add_argument("--python", default="python", metavar="CMD", help="the interpreter of the cluster's head (default python)")
    p.add_argument("--storage", metavar="DIR", help="folder of the cluster that relative run folders live in (default ~/modip_ray_runs)")
    p.add_argument("--working-dir", type=Path, default=Path(), metavar="DIR", help="folder to package (default: this one)")
    p.add_argument("--without-checkpoints", action="store_true", help="bring the run folder back without its checkpoints")
    p.add_argument("job_command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="any modip command, e.g. -- train --config demo run_dir=runs/demo")

    text = "list, follow, cancel jobs of a Ray cluster, fetch their run folders"
    jobs = commands.add_parser("jobs", help=text, description=text).add_subparsers(dest="jobs_command", required=True, metavar="COMMAND")
    add_address(command(jobs, "list", run_list, "all submitted jobs"))
    for name, run, what in (("follow", run_follow, "show a job's log as it grows, from its beginning"),
                            ("cancel", run_cancel, "stop a job in good order: a training run writes a checkpoint"),
                            ("fetch", run_fetch, "bring a job's run folder here, also while it runs")):
        p = command(jobs, name, run, what)
        add_address(p)
        p.add_argument("job", nargs="?" if name != "cancel" else None, metavar="JOB", help="id or name" + ("" if name == "cancel" else "; default: the newest"))
        if name == "fetch":
            p.add_argument("--without-checkpoints", action="store_true", help="only the small part")
            p.add_argument("--to", type=Path, metavar="DIR", help="default: where the run folder of that name would be here")


def add_address(p: argparse.ArgumentParser) -> None:
    p.add_argument("--address", metavar="URL", help="of the cluster's dashboard, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS")


def run_submit(args: argparse.Namespace) -> int:
    from modip_ray.cli.submitted import STORAGE, check_name, prepare, submission
    from modip_ray.jobs.client import connect, find_address, submit
    from modip_ray.jobs.fetch import check_target
    from modip_ray.jobs.package import write_package
    words = args.job_command[1:] if args.job_command[:1] == ["--"] else args.job_command
    folder = args.working_dir.resolve()
    asked = prepare(words, check_name(args.name), args.storage or STORAGE, folder)
    if asked.local_dir and not args.no_wait:
        check_target(Path(asked.local_dir))
    client = connect(find_address(args.address))
    with tempfile.TemporaryDirectory(prefix="modip_submit_") as temporary:
        package = Path(temporary) / "package.zip"
        for large in write_package(folder, package):
            say(f"left out, over 50 MB: {large}; what the job needs of it must be on the cluster")
        job = submission(asked, args.python, package)
        submit(client, job)
        say(f"{job.id} submitted to {client.get_address()} with {size_text(package.stat().st_size)} of {folder}")
    if job.run_dir:
        say(f"run folder on the cluster: {job.run_dir}")
    if args.no_wait:
        say(f"'modip jobs follow {job.id}' shows its log, 'modip jobs fetch {job.id}' brings the run folder, 'modip jobs cancel {job.id}' stops it")
        return 0
    return watch(client, job.id, job.run_dir, job.local_dir, args.python, not args.without_checkpoints)


def watch(client: Client, job_id: str, run_dir: str | None = None, local_dir: str | None = None, python: str = "python", checkpoints: bool = True) -> int:
    """The job's log on our stdout until it ends; then its run folder, if there is one. Ctrl-C leaves the job alone."""
    from modip_ray.jobs.client import JobError, exit_code, follow
    try:
        job = follow(client, job_id, show)
    except KeyboardInterrupt:
        say(f"\n{job_id} goes on; 'modip jobs follow {job_id}' shows it again, 'modip jobs cancel {job_id}' stops it")
        return DETACHED
    code = exit_code(job)
    say(f"{job_id}: {job.status.value}" + ending(job))
    if run_dir and local_dir and not (code and job.driver_exit_code == 2):
        try:
            bring(client, run_dir, Path(local_dir), python, checkpoints)
        except JobError as error:
            if not code:
                raise
            say(f"no run folder: {error}")
    return code


def ending(job: JobDetails) -> str:
    """Why a job failed, where its own log does not tell it: it never began."""
    if job.driver_exit_code is not None:
        return f" (exit code {job.driver_exit_code})" if job.driver_exit_code else ""
    lines = [line for line in (job.message or "").splitlines() if line.strip()]
    return f": {' | '.join(lines[-3:])}" if job.status.value == "FAILED" and lines else ""


def bring(client: Client, run_dir: str, target: Path, python: str, checkpoints: bool) -> None:
    from modip_ray.jobs.fetch import fetch
    size = fetch(client, run_dir, target, python, checkpoints)
    say(f"{run_dir} is in {target} ({size_text(size)}{'' if checkpoints else ', without checkpoints'})")


def run_list(args: argparse.Namespace) -> int:
    from modip_ray.jobs.client import all_jobs, connect, find_address, table
    print(table(all_jobs(connect(find_address(args.address)))))
    return 0


def run_follow(args: argparse.Namespace) -> int:
    from modip_ray.jobs.client import connect, find_address, find_job
    client = connect(find_address(args.address))
    return watch(client, str(find_job(client, args.job).submission_id))


def run_cancel(args: argparse.Namespace) -> int:
    from modip_ray.jobs.client import cancel, connect, find_address, find_job
    client = connect(find_address(args.address))
    print(cancel(client, find_job(client, args.job)))
    return 0


def run_fetch(args: argparse.Namespace) -> int:
    from modip_ray.jobs.client import JobError, connect, find_address, find_job
    client = connect(find_address(args.address))
    job = find_job(client, args.job)
    facts = job.metadata or {}
    if "run_dir" not in facts:
        raise JobError(f"{job.submission_id}: has no run folder (it was not submitted by 'modip submit', or its command writes none)")
    bring(client, facts["run_dir"], args.to or Path(facts["local_dir"]), facts["python"], not args.without_checkpoints)
    return 0


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def say(text: str) -> None:
    print(f"modip: {text}" if not text.startswith("\n") else f"\nmodip: {text.lstrip()}", file=sys.stderr, flush=True)
