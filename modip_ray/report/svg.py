"""Charts as inline SVG that follow the page's light or dark theme.

Charts are drawn by matplotlib with stand-in colours, which are then replaced by the page's CSS variables.
"""

from __future__ import annotations

import functools
import html
import io
import itertools
import re
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

RUNS = tuple(f"run{i}" for i in range(1, 9))  # of lines that stand for runs, roles or reasons
NAMES = ("ink", "muted", "grid", "card", "mpc", "policy", "bc", "data", "pre", "on", "seq1", "seq2", "seq3", "seq4", "seq5", *RUNS)
COLORS = {name: f"#0a{index:02x}fe" for index, name in enumerate(NAMES, start=16)}  # stand-ins, unlike any colour of matplotlib's own
MAX_POINTS = 240

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "modip",
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "axes.titlesize": 10.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "text.color": COLORS["ink"],
    "axes.labelcolor": COLORS["muted"],
    "axes.titlecolor": COLORS["ink"],
    "axes.edgecolor": COLORS["grid"],
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
}


def chart(draw: Callable[..., Figure]) -> Callable[..., str]:
    """Decorator: a function that draws a Figure becomes one that returns an inline `<svg>`; its keyword `label` is read to the blind."""

    @functools.wraps(draw)
    def drawn(*args: object, label: str = "chart", **kwargs: object) -> str:
        with matplotlib.rc_context(_STYLE):
            buffer = io.StringIO()
            draw(*args, **kwargs).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        return _inline(buffer.getvalue(), label)

    return drawn


def new_axes(width: float = 4.6, height: float = 3.0) -> tuple[Figure, Axes]:
    """A figure of that many inches with one axes; to be called inside a `chart` function."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    axes.tick_params(length=0)
    return figure, axes


def thin(x: Sequence[float], y: Sequence[float], points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` values: means over equal runs of neighbours; values that are not finite are left out."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    good = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[good], ys[good]
    if len(xs) <= points:
        return xs, ys
    parts = np.array_split(np.arange(len(xs)), points)
    return np.array([xs[p].mean() for p in parts]), np.array([ys[p].mean() for p in parts])


def number_axes(axes: Axes, ticks: int = 6) -> None:
    """Plain labels on both axes: 40k rather than 4e4, one unit for a whole axis, at most about so many ticks."""
    for axis in (axes.xaxis, axes.yaxis):
        logarithmic = axis.get_scale() == "log"
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=ticks) if logarithmic else MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _, axis=axis: short_number(value, max(map(abs, axis.get_view_interval())))))


def short_number(value: float, largest: float) -> str:
    """A tick's label on an axis that reaches to `largest`: 1.5M, 40k, 7,000, 0.25."""
    scale, unit = (1e6, "M") if largest >= 1.5e6 else (1e3, "k") if largest >= 1.5e4 else (1.0, "")
    text = f"{value / scale:,.6g}" + (unit if value else "")
    return text.replace("-", "\u2212")


def with_unique_ids(page: str) -> str:
    """The page with its charts' ids numbered, since charts with equal parts come with equal ids."""
    numbers = itertools.count(1)

    def numbered(match: re.Match) -> str:
        tag = f"c{next(numbers)}-"
        return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{tag}", match[0])

    return re.sub(r"<svg .*?</svg>", numbered, page, flags=re.S)


def _inline(svg: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{html.escape(label, quote=True)}">', svg, count=1)
    return svg.strip()
