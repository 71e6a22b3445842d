"""Parallel coordinates: an upright axis for each searched setting and one for the score, a line for each trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, MUTED, GRID = "#1b1f24", "#5b6470", "#dfe3e8"
SETTINGS = {"font.size": 9.5, "svg.fonttype": "none", "svg.hashsalt": "modip", "text.color": INK}


FEW = 6                             # different numbers of so many trials are taken for a list of choices


@dataclass(frozen=True)
class Scale:
    """An axis: ticks as (position 0..1, label), and where values lie on it (n,), nan where a trial has none."""

    name: str
    ticks: list[tuple[float, str]]
    places: np.ndarray


def scale(name: str, values: Sequence[Any], log: bool = False) -> Scale:
    """Few different values, or such that are no numbers, are evenly spaced; numbers otherwise by size (or logarithm)."""
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values if v is not None)
    known = [v for v in values if v is not None]
    distinct = sorted(set(known)) if numeric else sorted(set(map(str, known)))
    if not numeric or len(distinct) <= min(FEW, len(known) - 1) or len(distinct) == 1:
        at = {v: (i / (len(distinct) - 1) if len(distinct) > 1 else 0.5) for i, v in enumerate(distinct)}
        return Scale(name, [(p, label(k)) for k, p in at.items()], np.array([at.get(v if numeric else str(v), math.nan) for v in values]))
    log = log and distinct[0] > 0
    x = np.array([math.nan if v is None else math.log10(v) if log else float(v) for v in values])
    low, high = np.nanmin(x), np.nanmax(x)
    ticks = [t for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    if log:
        ticks = [math.log10(m * 10.0 ** e) for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
        ticks = [t for t in ticks if low <= t <= high]
    ends = [t for t in (low, high) if all(abs(t - u) > 0.08 * (high - low) for u in ticks)]
    return Scale(name, [((t - low) / (high - low), label(10 ** t if log else t)) for t in [*ticks, *ends]], (x - low) / (high - low))


def label(value: Any) -> str:
    """2,950, 0.0241, mean."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_parallel(path: Path, settings: Sequence[tuple[str, bool]], trials: Sequence[Mapping[str, Any]], metric: str, mode: str) -> list[Path]:
    """Write `path`.png and `path`.svg.

    settings : (name, whether its axis is logarithmic), left to right
    trials   : rows of results.json, best first: "params", `metric`, "status"; those without a score are left out (ValueError if none has one)
    """
    shown = [t for t in trials if t.get(metric) is not None]
    if not shown:
        raise ValueError(f"{path}: none of {len(trials)} trials has a {metric}, there is nothing to draw")
    scales = [scale(name, [t["params"].get(name) for t in shown], log) for name, log in settings]
    scales.append(scale(metric, [float(t[metric]) for t in shown]))
    with matplotlib.rc_context(SETTINGS):
        figure = draw(scales, shown, metric, mode)
        files = [path.with_suffix(".png"), path.with_suffix(".svg")]
        figure.savefig(files[0], dpi=150, facecolor="white")
        figure.savefig(files[1], facecolor="white", metadata={"Date": None})
    return files


def draw(scales: Sequence[Scale], trials: Sequence[Mapping[str, Any]], metric: str, mode: str) -> Figure:
    figure = Figure(figsize=(max(6.0, 1.55 * len(scales) + 1.0), 4.4), layout="constrained")
    axes = figure.add_subplot()
    scores = np.array([float(t[metric]) for t in trials])
    colors = ScalarMappable(Normalize(scores.min(), scores.max()), matplotlib.colormaps["viridis_r" if mode == "max" else "viridis"])     # the best are dark
    x = np.arange(len(scales))
    for k in reversed(range(len(trials))):                                          # the best one on top
        y = np.array([s.places[k] for s in scales])
        whole = trials[k]["status"] == "finished"
        axes.plot(x, y, color=colors.to_rgba(scores[k]), linewidth=3.0 if k == 0 else 1.6 if whole else 1.2, linestyle="-" if whole else (0, (4, 2)),
                  alpha=1.0 if k == 0 else 0.8, marker="o", markersize=5 if k == 0 else 3, zorder=3 if k == 0 else 2, solid_joinstyle="round")
    for i, s in enumerate(scales):
        axes.plot([i, i], [0, 1], color=MUTED, linewidth=0.9, zorder=1)
        side = 1 if i == len(scales) - 1 else -1                                    # the score's labels stand free of the lines, at the right
        for place, text in s.ticks:
            axes.plot([i, i + 0.025 * side], [place, place], color=MUTED, linewidth=0.9, zorder=1)
            axes.annotate(text, (i + 0.04 * side, place), ha="left" if side > 0 else "right", va="center", color=MUTED, fontsize=8.5, zorder=4,
                          bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8})
        group, dot, name = s.name.rpartition(".")
        axes.text(i, 1.05, f"{group}{dot}\n{name}" if dot else s.name, ha="center", va="bottom", color=INK, fontweight="bold" if i == len(scales) - 1 else None)
    axes.set_xlim(-0.45, len(scales) - 0.55)
    axes.set_ylim(-0.04, 1.04)
    axes.axis("off")
    early = sum(t["status"] != "finished" for t in trials)
    note = f"{len(trials)} trials, one line each, coloured by {metric}; the thick line is the best"
    note += f"; dashed: {early} that did not run to the end" if early else ""
    figure.text(0.01, 0.01, note, color=MUTED, fontsize=8.5, va="bottom")
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
    return figure
