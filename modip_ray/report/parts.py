"""Pieces of HTML that the page's sections are made of."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from modip_ray.report import plots


def esc(text: object) -> str:
    return html.escape(str(text), quote=True)


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{esc(title)}</h2>{''.join(parts)}</section>"


def missing(why: str) -> str:
    return f'<p class="missing">{esc(why)}</p>'


def figure(svg: str, caption: str = "") -> str:
    return f"<figure>{svg}{f'<figcaption>{esc(caption)}</figcaption>' if caption else ''}</figure>"


def legend(entries: Sequence[tuple[str, str, str]]) -> str:
    """(label, colour name, line style) of each line of the charts below."""
    keys = (f'<span><i class="line" style="border-top: 3px {line} var(--{color})"></i>{esc(label)}</span>' for label, color, line in entries)
    return f'<p class="legend">{"".join(keys)}</p>'


def table(head: Sequence[str], body: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of ready HTML cells under plain-text headings."""
    header = f"<tr>{''.join(f'<th>{esc(h)}</th>' for h in head)}</tr>" if head else ""
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    return f'<div class="scroll"><table class="{kind}">{header}{rows}</table></div>'


def folded(title: str, *parts: str) -> str:
    return f"<details><summary>{esc(title)}</summary>{''.join(parts)}</details>"


def chart_of(drawn: Sequence[plots.Line], title: str, xlabel: str, keys: bool = True, **how: Any) -> str:
    """A chart (`how`: see `plots.lines`) below its title and, unless keys=False, above its legend; '' where there is no line to draw."""
    if not drawn:
        return ""
    svg = plots.lines(drawn, xlabel, label=f"{title} by {xlabel}: {', '.join(line.label for line in drawn)}", **how)
    return f"<div><h4>{esc(title)}</h4>{figure(svg)}{legend([line.key for line in drawn]) if keys else ''}</div>"
