"""`modip tune`: search hyper-parameters with Ray Tune."""

from __future__ import annotations

import argparse

from modip_ray.cli.arguments import command


def add_parsers(commands) -> None:
    """Add `tune` to the subparsers of the command line."""
    text = "search settings with Ray Tune, or go on with the search in its folder"
    p = command(commands, "tune", run_tune, text)
    p.add_argument("search_file", metavar="SEARCH", help="a YAML file, or the name of one in configs/tune")
    p.add_argument("settings", nargs="*", metavar="key=value", help="over the file's fields, e.g. num_samples=4 settings.critic.gamma=0.98")


def run_tune(args: argparse.Namespace) -> int:
    from modip_ray.search.spec import load_search
    search = load_search(args.search_file, args.settings)
    from modip_ray.search.run import run_search
    run_search(search)
    return 0
