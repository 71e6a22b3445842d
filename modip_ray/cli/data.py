"""`modip data`: what official data there is, fetching and checking it, looking into files, and converting them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from modip_ray.cli.arguments import command, positive
from modip_ray.output_file import check_output
from modip_ray.progress import ProgressLine, size_text

MINARI = "minari:"


def add_parsers(commands) -> None:
    """Add `data` and its commands to the subparsers of the command line."""
    text = "official data sets and data files"
    data = commands.add_parser("data", help=text, description=text).add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    p = command(data, "list", run_list, "the catalogue: sizes, checksums, and what of it is here")
    p.add_argument("text", nargs="?", default="", metavar="TEXT", help="only names with this in them")

    p = command(data, "info", run_info, "episodes, returns and ranges of a data set (D4RL or robomimic file, catalogue name, minari:ID); downloads nothing")
    p.add_argument("source", metavar="FILE|NAME|minari:ID")
    add_limit(p)

    p = command(data, "download", run_download, "fetch data sets of the catalogue (or of Minari), going on where a download broke off, and verify them")
    p.add_argument("names", nargs="+", metavar="NAME|minari:ID")

    p = command(data, "verify", run_verify, "compare files with the catalogue's checksums, reading them again; exit status 2 where one is wrong")
    p.add_argument("sources", nargs="+", metavar="NAME|FILE")
    add_limit(p)

    p = command(data, "convert", run_convert, "read any data set and write it in D4RL's layout or as a Minari data set")
    p.add_argument("source", metavar="SRC", help="FILE, NAME or minari:ID")
    p.add_argument("target", metavar="DST", help="a file to write, or minari:ID")
    p.add_argument("--to", choices=("d4rl", "minari"), help="default: minari where DST begins with minari:, else d4rl")
    p.add_argument("--env", metavar="ID", help="for Minari, the gymnasium environment to record; default: the one that SRC names")
    add_limit(p)


def add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-episode-steps", type=positive, metavar="N",
                        help="the time limit of the environment; for files without `timeouts`, where no end of an episode by time is seen")


def run_list(args: argparse.Namespace) -> int:
    from modip_ray.tasks.catalogue import catalogue, data_dir, state
    from modip_ray.tasks.dataset import DataError
    shown = [e for e in catalogue().values() if args.text in e.name]
    if not shown:
        raise DataError(f"no name of the catalogue has {args.text!r} in it; leave it out to see all {len(catalogue())}")
    rows = [("name", "size", "checksum", "here"), *((e.name, size_text(e.size), e.checksum, state(e.name)) for e in shown)]
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    for name, size, checksum, here in rows:
        print(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {checksum:<{widths[2]}}  {here}")
    print(f"\nfiles are kept in {data_dir()} (MODIP_DATA_DIR sets another folder)")
    return 0


def run_info(args: argparse.Namespace) -> int:
    from modip_ray.tasks.catalogue import catalogue, local_path, state
    from modip_ray.tasks.dataset import describe
    from modip_ray.tasks.readers import read_any
    if args.source.startswith(MINARI):
        from modip_ray.tasks.minari_data import read_minari
        print(describe(read_minari(args.source.removeprefix(MINARI))))
        return 0
    if args.source in catalogue() and not local_path(args.source).is_file() and not Path(args.source).is_file():
        print(f"{args.source}: {state(args.source)}; 'modip data download {args.source}' fetches {catalogue()[args.source].facts()}")
        return 0
    print(describe(read_any(args.source, max_episode_steps=args.max_episode_steps)))
    return 0


def run_download(args: argparse.Namespace) -> int:
    from modip_ray.tasks.catalogue import fetch, state
    for name in args.names:
        if name.startswith(MINARI):
            from modip_ray.tasks.minari_data import read_minari
            print(f"{name}: {read_minari(name.removeprefix(MINARI), download=True).transitions:,} transitions")
            continue
        try:
            path = fetch(name, ProgressLine(name))
        except KeyboardInterrupt:
            print(f"\nmodip data download: stopped; the same command goes on with {name} from there", file=sys.stderr)
            return 130
        print(f"{path}  ({state(name)})")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from modip_ray.tasks.catalogue import catalogue, verify
    from modip_ray.tasks.dataset import DataError
    wrong = 0
    for source in args.sources:
        try:
            is_name = source in catalogue() and not Path(source).is_file()
            print(f"{source}: {verify(source, again=True) if is_name else verify_file(source, args.max_episode_steps)}")
        except DataError as error:
            print(f"modip data verify: {error}", file=sys.stderr)
            wrong += 1
    return 2 if wrong else 0


def verify_file(source: str, max_episode_steps: int | None = None) -> str:
    """Which official file this is; one that the catalogue does not know is read instead. DataError where it is damaged, or another than its name says."""
    from modip_ray.tasks.catalogue import catalogue, sha256_of
    from modip_ray.tasks.dataset import DataError
    from modip_ray.tasks.readers import read_any, source_path
    path = source_path(source)
    try:
        found = sha256_of(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    entries = [e for e in catalogue().values() if e.sha256]
    for entry in entries:
        if entry.sha256 == found:
            return f"is {entry.name} ({entry.checksum} checksum)"
    for entry in entries:
        official = entry.address.rsplit("/", 1)[-1]
        if path.name == official and sum(e.address.endswith(f"/{official}") for e in entries) == 1:
            raise DataError(f"{path}: is named like {entry.name} but differs from it: {path.stat().st_size:,} bytes, sha256 {found}; expected {entry.size:,}, "
                            f"{entry.sha256}")
    dataset = read_any(path, max_episode_steps=max_episode_steps)
    return f"not in the catalogue (sha256 {found}), can be read: {len(dataset.episodes):,} episodes, {dataset.transitions:,} transitions"


def run_convert(args: argparse.Namespace) -> int:
    from modip_ray.runfolder import AGAIN, disk_errors
    from modip_ray.tasks.d4rl_data import write_d4rl
    from modip_ray.tasks.dataset import DataError, describe
    from modip_ray.tasks.readers import read_any
    target = args.target.removeprefix(MINARI)
    to = args.to or ("minari" if args.target.startswith(MINARI) else "d4rl")
    if to == "d4rl" and args.target.startswith(MINARI):
        raise DataError(f"{args.target}: names a Minari data set, but --to is d4rl; give a file, or leave --to out")
    if to == "d4rl" and args.env:
        raise DataError(f"--env is {args.env!r}, but only a Minari data set records an environment so; leave it out")
    target = str(Path(target).expanduser()) if to == "d4rl" else target
    if to == "d4rl" and Path(target).exists():
        raise DataError(f"{target}: exists already; delete it, or choose another name")
    if to == "d4rl":
        check_output(Path(target))
    dataset = read_any(args.source, max_episode_steps=args.max_episode_steps, progress=ProgressLine(args.source))
    if to == "d4rl":
        about = {"converted_from": args.source} | ({"notes": "; ".join(dataset.notes)} if dataset.notes else {})
        with disk_errors(Path(target), AGAIN):
            write_d4rl(target, dataset.episodes, {**dataset.metadata, **about})
        print(describe(read_any(target)))
    else:
        from modip_ray.tasks.minari_data import read_minari, write_minari
        write_minari(target, dataset.episodes, args.env or registered(dataset.metadata.get("env")), f"converted from {args.source} by modip_ray")
        print(describe(read_minari(target)))
    return 0


def registered(env_id: object) -> str | None:
    """The id, if gymnasium knows such an environment."""
    import gymnasium
    return env_id if isinstance(env_id, str) and env_id in gymnasium.registry else None
