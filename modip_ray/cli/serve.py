"""`modip serve RUN`: a run's policy or planner behind HTTP; `modip serve-bench RUN`: how fast that is on this machine."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from modip_ray.cli.arguments import command
from modip_ray.config import ConfigError, parse_override
from modip_ray.output_file import check_output

LOCAL = ("127.0.0.1", "localhost", "::1")


def add_parsers(commands) -> None:
    p = command(commands, "serve", run_serve, "answer observations with action chunks over HTTP, from the run's newest checkpoint (docs/serve.md)")
    p.add_argument("run_folder", type=Path, metavar="RUN")
    p.add_argument("--mode", choices=("policy", "mpc", "bc"), default="policy",
                   help="the diffusion policy alone (default) or the planner, of which a request may ask for the other; or the policy before fine-tuning")
    p.add_argument("--host", default=LOCAL[0], help="default 127.0.0.1, this machine alone; there is no authentication, so open it to a trusted network only")
    p.add_argument("--port", type=int, default=8000, help="default 8000; 0: any free one")
    p.add_argument("--seed", type=int, default=0, help="of the noise that chunks are denoised from")
    p.add_argument("--follow", type=float, default=10.0, metavar="SECONDS", help="how often to look for a newer checkpoint (default 10); 0: never")
    p.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE",
                   help="act with another setting than the run's, e.g. --set policy.n_action_steps=4 --set planner.max_wait_ms=2")

    p = command(commands, "serve-bench", run_bench, "speed of a served run beside a bare batched PyTorch call, and 1,000 requests that must be refused")
    p.add_argument("run_folder", type=Path, metavar="RUN")
    p.add_argument("--clients", type=int, default=64, help="concurrent ones (default 64)")
    p.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default 5)")
    p.add_argument("--bad", type=int, default=1000, help="requests that must be refused (default 1000)")
    p.add_argument("--json", type=Path, dest="json_file", metavar="FILE", help="write the rows there, with machine, git commit and versions")


def run_serve(args: argparse.Namespace) -> int:
    from modip_ray.serve.start import served, wait
    signal.signal(signal.SIGTERM, signal.default_int_handler)                       # as Ctrl-C
    if args.follow < 0 or args.seed < 0:
        raise ConfigError(f"--follow and --seed must not be negative, got {args.follow:g} and {args.seed}")
    overrides = dict(parse_override(item) for item in args.settings)
    print(f"starting Ray Serve for {args.run_folder}; that takes some seconds", flush=True)
    if args.host not in LOCAL:
        print(f"--host {args.host}: there is no authentication and no encryption; whoever reaches this address can use it", flush=True)
    with served(args.run_folder, args.mode, args.host, args.port, overrides, args.seed, args.follow) as url:
        print(f"serving {args.run_folder} ({args.mode}) at {url}   GET / tells about it, POST /act takes observations; Ctrl-C stops it", flush=True)
        wait()
    print("stopped")
    return 0


def run_bench(args: argparse.Namespace) -> int:
    from modip_ray.bench.history import earlier, regressions
    from modip_ray.bench.run import save, table
    from modip_ray.bench.serve import measure
    if min(args.clients, args.bad) < 1 or not 0 < args.seconds <= 3600:
        raise ConfigError(f"--clients and --bad must be at least 1, --seconds above 0: got {args.clients}, {args.bad}, {args.seconds:g}")
    check_output(args.json_file)
    before = earlier()
    rows, wrong = measure(args.run_folder, args.clients, args.seconds, args.bad)
    print("\n".join([table(rows, before), *regressions(rows, before), *wrong]))
    if args.json_file is not None:
        save(rows, args.json_file)
    return 1 if wrong else 0
