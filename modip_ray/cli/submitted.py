"""A command line as it must read on the cluster that it is submitted to."""

from __future__ import annotations

import argparse
import re
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from modip_ray.config import ConfigError, load
from modip_ray.jobs.client import JobError, Submission
from modip_ray.jobs.package import takes_along

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
    from modip_ray.cli import parsed
    if not arguments:
        raise JobError("nothing to run: give a command behind --, e.g. modip submit -- train task=hopper-medium run_dir=runs/hopper")
    args = parsed(list(arguments))
    if args.command in ("submit", "jobs"):
        raise JobError(f"'{args.command}' itself cannot be submitted; give train, eval, report, ... behind --")
    if args.command == "train":
        with chdir(folder):
            cfg = load(args.config, args.settings)
        label = name or (PurePosixPath(cfg.run_dir).name if cfg.run_dir else f"{cfg.task.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        moved = {"pretrain.start": cfg.pretrain.start, "run_dir": cfg.run_dir or f"runs/{label}"}
        return writing(arguments, args.settings, "train", moved, label, storage, {"resources.ray_address": cfg.resources.ray_address})
    if args.command == "tune":
        from modip_ray.search.spec import load_search
        with chdir(folder):
            search = load_search(args.search_file, args.settings)
        moved = {"start": search.start, "out": search.out}
        return writing(arguments, args.settings, str(args.search_file), moved, name or PurePosixPath(search.out).name, storage,
                       {"ray_address": search.ray_address})
    if args.command == "study":
        from modip_ray.study.spec import load_study
        with chdir(folder):
            study = load_study(args.study_file, args.settings)
        return writing(arguments, args.settings, str(args.study_file), {"out": str(study.out)}, name or study.folder.name, storage, {})
    return other(list(arguments), args, name, storage, folder)


def writing(arguments: Sequence[str], settings: Sequence[str], before: str, moved: Mapping[str, str | None], label: str, storage: str,
            address: Mapping[str, str]) -> Command:
    """train, tune and study: the settings `moved`, which name run folders, wherever they came from, under `storage`, as runs do not travel (None: not given;
    the last one is the folder that is written), and the cluster's address unless the user gave one.

    They stand behind the last of the user's own settings, or behind the argument `before`.
    """
    given = {item.partition("=")[0] for item in settings}
    there = {key: on_cluster(value, storage) for key, value in moved.items() if value is not None}
    own = there | {key: "auto" for key, value in address.items() if value == "local" and key not in given}
    end = len(arguments) - list(reversed(arguments)).index(settings[-1] if settings else before)
    kept = [a for a in arguments[:end] if a.partition("=")[0] not in there]
    folder = list(moved)[-1]
    return Command([*kept, *(f"{key}={value}" for key, value in own.items()), *arguments[end:]], label, there[folder], here_for(str(moved[folder])))


def other(arguments: list[str], args: argparse.Namespace, name: str | None, storage: str, folder: Path) -> Command:
    """eval, report, collect, ...: relative paths that name runs (or what is written) become paths under `storage`; a policy's file travels as it is named."""
    values = {name: getattr(args, name, None) for name in RUN_ARGUMENTS}
    if values["policy"] == "demonstrator" or (values["policy"] is not None and takes_along(folder, values["policy"])):
        del values["policy"]
    paths = {str(Path(v)) for value in values.values() if value is not None for v in (value if isinstance(value, list) else [value])}

    def there(argument: str) -> str:
        option, sep, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        return f"{option}{sep}{on_cluster(value, storage)}" if value and str(Path(value)) in paths else argument
    moved = [there(a) for a in arguments]
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
