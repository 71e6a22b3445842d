"""The command line's reference page, out of its own argparse parsers."""
import argparse
import os
from collections.abc import Iterator

from modip_ray import cli
from modip_ray.bench import run as bench


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), {})


def leaves(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that can be run, as ("modip data list", its parser)."""
    for child in subcommands(parser).values():
        if subcommands(child):
            yield from leaves(child)
        else:
            yield child.prog, bench.parser() if child.prog == "modip bench" else child


def page() -> str:
    """Markdown; the help texts are what `modip COMMAND --help` prints."""
    os.environ["COLUMNS"] = "88"
    lines = ["# Commands", "", "What `modip COMMAND --help` prints; `python -m modip_ray` is the same. Exit codes: 0 done, or stopped in good order;",
             "2 something to mend, said in one line; 130 interrupted.", ""]
    for name, parser in leaves(cli.parser()):
        lines += [f"## {name}", "", "```text", parser.format_help().rstrip(), "```", ""]
    return "\n".join(lines)
