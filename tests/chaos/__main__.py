"""python -m tests.chaos [--fast] [--only NAME ...] [--json results/chaos.json]: run the chaos tests one after another, print a table, keep the figures.

Each test's entry in the JSON file is replaced when the test runs again, with its own commit and time, so the suite can be run piece by piece.
Exit status 0: all passed. Ctrl-C ends at once, and nothing that was started stays. `--fast` without `--only` runs two lanes of tests side by side.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from modip_ray.learning.checkpoint import write_synced
from modip_ray.report.scores import duration
from modip_ray.runfolder import command_line, git_commit, machine
from tests.chaos.harness import Trial, kill_marked, mark
from tests.chaos.suite import FAST_ONLY, LANES, TESTS, TOGETHER

ALL = TESTS | FAST_ONLY
SHOWN = 12                          # figures of a test in the table


def main() -> None:
    args = parser().parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)                    # a shell that started us in the background has it ignored
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begun = time.monotonic()
    entries = run_lanes(args) if args.fast and not args.only else run_tests(args)
    failed = [entry["name"] for entry in entries if not entry["passed"]]
    took = duration(time.monotonic() - begun)
    print(f"{len(entries) - len(failed)} of {len(entries)} passed in {took}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(bool(failed))


def run_lanes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each lane is a process of its own: what it started is told apart by it."""
    with tempfile.TemporaryDirectory(prefix="lanes_") as scratch:
        files = [Path(scratch) / f"{i}.json" for i in range(len(LANES))]
        common = [sys.executable, "-m", "tests.chaos", "--fast", "--seed", str(args.seed), *(["--keep", args.keep] if args.keep else [])]
        lanes = [subprocess.Popen([*common, "--json", str(file), "--only", *names]) for names, file in zip(LANES, files, strict=True)]
        try:
            for lane in lanes:
                lane.wait()
        finally:
            for lane in lanes:
                if lane.poll() is None:
                    lane.terminate()
                    lane.wait()
        found = {e["name"]: e for file in files if file.exists() for e in json.loads(file.read_text())["tests"]}
    entries = [found.get(name, {"name": name, "passed": False, "figures": {}, "missed": ["its lane ended before it"], "seconds": 0.0})
               for names in LANES for name in names]
    for entry in entries:
        if args.json is not None and entry["seconds"]:
            keep(args.json, entry)
    return entries


def run_tests(args: argparse.Namespace) -> list[dict[str, Any]]:
    mark()
    work = Path(args.keep) if args.keep else Path(tempfile.mkdtemp(prefix="chaos_", dir="/tmp"))      # sockets need a short path
    entries = []
    try:
        for name in dict.fromkeys("together" if args.fast and name in TOGETHER else name for name in args.only or TESTS):
            entries.append(run_test(name, work, args.fast, args.seed))
            print_entry(entries[-1])
            if args.json is not None:
                keep(args.json, entries[-1])
    finally:
        kill_marked()
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)
    return entries


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    top.add_argument("--fast", action="store_true", help="each test short: all of them within five minutes")
    top.add_argument("--only", nargs="+", choices=ALL, metavar="NAME", help=f"of {', '.join(ALL)}")
    top.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of every random choice; default: a new one, which is printed")
    top.add_argument("--json", type=Path, help="keep the figures there")
    top.add_argument("--keep", metavar="FOLDER", help="work in this folder and leave it")
    return top


def run_test(name: str, work: Path, fast: bool, seed: int) -> dict[str, Any]:
    """The test's entry. Whatever goes wrong in it is a failure of that test alone."""
    trial, begun = Trial(work / name, fast, seed), time.monotonic()
    shutil.rmtree(trial.folder, ignore_errors=True)                             # of an earlier time, with --keep
    print(f"{name} (seed {seed}) ...", flush=True)
    try:
        ALL[name](trial)
    except Exception as error:                                                  # noqa: BLE001 - named in the entry, and the test has failed
        trial.missed.append(f"{type(error).__name__}: {error}")
    finally:
        left = kill_marked()
    trial.demand(not left, f"{left} process(es) were left behind")
    return {"name": name, "passed": not trial.missed, "figures": trial.figures, "missed": trial.missed, "fast": fast, "seed": seed,
            "seconds": round(time.monotonic() - begun, 1), "git": git_commit(), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def print_entry(entry: dict[str, Any]) -> None:
    plain = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry["figures"].items() if isinstance(v, bool | int | float | str)]
    print(f"{'passed' if entry['passed'] else 'FAILED':<7} {entry['name']:<13} {entry['seconds']:>7.1f} s  {', '.join(plain[:SHOWN])}", flush=True)
    for missed in entry["missed"]:
        print(f"        {missed}", flush=True)


def keep(path: Path, entry: dict[str, Any]) -> None:
    """The entry into the file, in place of an earlier one of that name."""
    earlier = json.loads(path.read_text())["tests"] if path.exists() else []
    tests = {e["name"]: e for e in [*earlier, entry]}
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"tests": [tests[name] for name in ALL if name in tests], "git": git_commit(), "machine": machine(),
             "command": command_line().replace("-m modip_ray", "-m tests.chaos"), "seeds": {e["name"]: e["seed"] for e in tests.values()}}
    write_synced(path, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
