"""Timing trees and phase lengths as HTML tables with bars."""

from __future__ import annotations

import html
from collections.abc import Mapping

from modip_ray.report.scores import duration
from modip_ray.timing import build_tree, walk


def time_table(snapshot: Mapping[str, Mapping], total: float) -> str:
    """One role's timing tree; bars show shares of `total` seconds, waits are striped, untimed time is the last line."""
    roots = build_tree(snapshot)
    rows = []
    for depth, node in walk(roots):
        label = html.escape(node.name)
        each = f"{1e3 * node.seconds / node.count:,.2f}" if node.count else ""
        rows.append(_row(label, depth, node.seconds, total, f"{node.count:,}" if node.count else "", each, "wait" if node.is_wait else ""))
    rest = total - sum(node.seconds for node in roots)
    if rest > 0.005 * total:
        rows.append(_row("not timed", 0, rest, total, "", "", "rest"))
    head = '<tr><th></th><th></th><th>share</th><th>time</th><th class="narrow-hide">blocks</th><th class="narrow-hide">ms each</th></tr>'
    return f'<div class="scroll"><table class="time">{head}{"".join(rows)}</table></div>'


def phases_table(phases: Mapping[str, float]) -> str:
    """Wall time of each phase and their sum."""
    total = sum(phases.values())
    rows = [_row(html.escape(name), 0, seconds, total, "", "", "") for name, seconds in phases.items()]
    rows.append(_cells("<b>together</b>", "", "", f"<b>{duration(total)}</b>", "", ""))
    return f'<div class="scroll"><table class="time">{"".join(rows)}</table></div>'


def _row(label: str, depth: int, seconds: float, total: float, count: str, each: str, kind: str) -> str:
    share = 100 * seconds / total if total > 0 else 0.0
    spent = duration(seconds) if seconds >= 60 else f"{seconds:.1f} s"
    css = "waiting" if kind == "wait" else ""
    name = f'<span class="{css}" style="padding-left: {depth * 14}px">{label}</span>'
    bar = f'<div class="{kind}" style="width: {min(100.0, share):.1f}%"></div>'
    return _cells(name, bar, f"{share:.1f}%", spent, count, each)


def _cells(name: str, bar: str, share: str, spent: str, count: str, each: str) -> str:
    wide = f'<td class="narrow-hide">{count}</td><td class="narrow-hide">{each}</td>'
    return f'<tr><td>{name}</td><td class="bar">{bar}</td><td>{share}</td><td>{spent}</td>{wide}</tr>'
