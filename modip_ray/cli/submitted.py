"""A command line as it must read on the cluster that it is submitted to."""

from __future__ import annotations

import argparse
import re
import secrets
import shlex
import time
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from modip_ray.config import ConfigError, load
from modip_ray.jobs.client import JobError, Submission

STORAGE = "~/modip_ray_runs"
RUN_ARGUMENTS = ("run_folder", "runs", "json_file", "out", "policy")       # of the other commands: paths that live with the runs


@dataclass(frozen=True)
class Command:
    """A command line for the cluster, the run folder it works on there, and where that is to come back to here."""

    arguments: list[str]
    label: str
    run_dir: str | None = None
    local_dir: str | None = None


def prepare(arguments: Sequence[str], name: str | None, storage: str, folder: Path) -> Command:
    """Check the command as if it were to run here in `folder`, and turn its run folder into one under `storage`."""
    from modip_ray.cli import parser
    if not arguments:
        raise JobError("nothing to run: give a command behind --, e.g. modip submit -- train task=hopper-medium run_dir=runs/hopper")
    args, _ = parser().parse_known_args(list(arguments))
    if args.command in ("submit", "jobs"):
        raise JobError(f"'{args.command}' itself cannot be submitted; give train, eval, report, ... behind --")
    if args.command == "train":
        with chdir(folder):
            cfg = load(args.config, args.settings)
        label = name or (PurePosixPath(cfg.run_dir).name if cfg.run_dir else f"{cfg.task.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        moved = with_path(arguments, "pretrain.start", cfg.pretrain.start, storage)
        return writing(moved, "run_dir", cfg.run_dir or f"runs/{label}", label, storage, {"resources.ray_address": cfg.resources.ray_address})
    if args.command == "tune":
        from modip_ray.search.spec import load_search
        with chdir(folder):
            search = load_search(args.search_file, args.settings)
        moved = with_path(arguments, "start", search.start, storage)
        return writing(moved, "out", search.out, name or PurePosixPath(search.out).name, storage, {"ray_address": search.ray_address})
    if args.command == "study":
        from modip_ray.study.spec import load_study
        with chdir(folder):
            study = load_study(args.study_file, args.settings)
        return writing(list(arguments), "out", str(study.out), name or study.folder.name, storage, {})
    return other(list(arguments), args, name, storage)


def with_path(arguments: Sequence[str], key: str, value: str | None, storage: str) -> list[str]:
    """The arguments with a setting that names a run folder, from wherever it came, as a path under `storage`: runs do not travel."""
    others = [a for a in arguments if not a.startswith(f"{key}=")]
    return list(arguments) if value is None else [*others, f"{key}={on_cluster(value, storage)}"]


def writing(arguments: list[str], key: str, run_dir: str, label: str, storage: str, address: dict[str, str]) -> Command:
    """train, tune and study: the folder that the setting `key` names, under `storage`, and the cluster's address unless the user gave one."""
    there = on_cluster(run_dir, storage)
    joined = [f"{name}=auto" for name, value in address.items() if value == "local" and not any(a.startswith(f"{name}=") for a in arguments)]
    return Command([a for a in arguments if not a.startswith(f"{key}=")] + [f"{key}={there}", *joined], label, there, here_for(run_dir))


def other(arguments: list[str], args: argparse.Namespace, name: str | None, storage: str) -> Command:
    """eval, report, collect, ...: relative paths that name runs (or what is written) become paths under `storage`."""
    values = [getattr(args, name, None) for name in RUN_ARGUMENTS]
    paths = {str(Path(v)) for value in values if value is not None for v in (value if isinstance(value, list) else [value]) if str(v) != "demonstrator"}
    moved = [on_cluster(a, storage) if str(Path(a)) in paths else a for a in arguments]
    runs = [args.run_folder] if hasattr(args, "run_folder") else getattr(args, "runs", [])
    if len(runs) != 1:
        return Command(moved, name or args.command)
    return Command(moved, name or f"{args.command}-{runs[0].name}", on_cluster(str(runs[0]), storage), here_for(str(runs[0])))


def on_cluster(path: str, storage: str) -> str:
    return path if path.startswith(("/", "~")) else f"{storage.rstrip('/')}/{PurePosixPath(path)}"


def here_for(run_dir: str) -> str:
    """A relative run folder comes back to the same place; another one into runs/."""
    return run_dir if not run_dir.startswith(("/", "~")) else f"runs/{PurePosixPath(run_dir).name}"


def submission(command: Command, python: str, package: Path) -> Submission:
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", command.label).strip("-") or "job"
    words = [python, "-m", "modip_ray", *command.arguments]
    return Submission(f"{label}-{secrets.token_hex(3)}", command.label, "exec " + " ".join(map(shell_word, words)), package, command.run_dir,
                      command.local_dir, python)


def shell_word(word: str) -> str:
    """Quoted for the shell that runs a job's entrypoint; a ~ at the beginning of a path is the home there, not here."""
    key, sep, value = word.partition("=")
    if sep and value.startswith("~/"):
        return f'{shlex.quote(key)}="$HOME"{shlex.quote(value[1:])}'
    return f'"$HOME"{shlex.quote(word[1:])}' if word.startswith("~/") else shlex.quote(word)


def check_name(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"--name: got {name!r}, expected letters, digits and . _ - only")
    return name
