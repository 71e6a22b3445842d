"""What the commands' parsers share."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def command(commands, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    p = commands.add_parser(name, help=text, description=text)
    p.set_defaults(run=run)
    return p


def positive(text: str) -> int:
    return at_least(1, text)


def natural(text: str) -> int:
    return at_least(0, text)


def at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value
