"""The command line: train, eval, data, export, serve, submit, jobs, tune, study, status ... Errors that a user can mend: one line, exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from modip_ray import __version__
from modip_ray.cli import data, export, jobs, runs, serve, status, study, tune
from modip_ray.config import ConfigError


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done (or stopped in good order), 2 something to mend, said in one line, 130 interrupted."""
    if not (sys.argv[1:] if argv is None else argv):
        parser().print_help()
        sys.exit(2)
    args = parsed(argv)
    try:
        code = args.run(args)
    except mendable() as error:
        print(f"modip {args.command}: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:
        code = 0
    except KeyboardInterrupt:
        again = "; the same command resumes from the last checkpoint" if args.command == "train" else ""
        print(f"\nmodip {args.command}: interrupted{again}", file=sys.stderr)
        code = 130
    sys.exit(code or 0)


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of one command, of which settings (key=value) may stand before and behind its options; `rest`: those of bench."""
    args, rest = parser().parse_known_args(argv)
    if args.command in ("train", "tune", "study") and all("=" in word and not word.startswith("-") for word in rest):
        args.settings, rest = [*args.settings, *rest], []                           # argparse takes one group of them only
    if rest and args.command != "bench":
        parser().error(f"unknown argument(s) {' '.join(rest)}; settings are given as key=value, e.g. planner.horizon=3")
    args.rest = rest
    return args


def mendable() -> tuple[type[Exception], ...]:
    """Our own errors; those of packages that are not loaded yet cannot have been raised."""
    from modip_ray.learning.checkpoint import CheckpointError
    from modip_ray.runfolder import RunError
    from modip_ray.tasks.dataset import DataError
    from modip_ray.tasks.envs import EnvError
    return ConfigError, DataError, EnvError, CheckpointError, RunError, FloatingPointError, FileNotFoundError


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="modip", description="Fine-tune diffusion policies with a world model, planning and distillation.")
    top.add_argument("--version", action="version", version=f"modip_ray {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    runs.add_parsers(commands)
    data.add_parsers(commands)
    export.add_parser(commands)
    jobs.add_parsers(commands)
    serve.add_parsers(commands)
    status.add_parser(commands)
    tune.add_parsers(commands)
    study.add_parser(commands)
    commands.add_parser("bench", help="measure speeds on this machine", add_help=False).set_defaults(run=run_bench)      # its arguments: bench/run.py
    return top


def run_bench(args: argparse.Namespace) -> int:
    from modip_ray.bench.run import main as bench
    bench(args.rest)
    return 0
