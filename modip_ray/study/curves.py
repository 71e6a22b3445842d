"""A study's learning curves: a picture a task, scores against environment steps and against wall time, a colour a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from modip_ray.report.parallel import GRID, INK, MUTED, SETTINGS
from modip_ray.report.svg import short_number
from modip_ray.study.kept import evaluations, outcome
from modip_ray.study.spec import Study

STYLES = {"mpc": "-", "policy": (0, (4, 2))}
NAMES = {"mpc": "MPC-acting", "policy": "DP-only"}

LATE = 1.05                                                     # evaluations lie a little behind their due step, so one seed's last may be behind another's

Curve = dict[int, tuple[float, float]]                          # by environment steps: wall seconds, mean score


def write_curves(study: Study) -> list[str]:
    """curves_TASK.png (and .svg) for every task with an evaluation; their names."""
    written, cells = [], study.cells()
    for task in study.tasks:
        curves = {(m, mode): found for m in study.methods for mode in STYLES
                  if (found := [c for cell in cells if (cell.task, cell.method) == (task, m) and (c := read_curve(outcome(cell) or cell.folder, mode))])}
        if curves:
            with matplotlib.rc_context(SETTINGS):
                figure = draw(task, list(study.methods), curves)
                for suffix in ("png", "svg"):
                    figure.savefig(study.folder / f"curves_{task}.{suffix}", dpi=150, facecolor="white", metadata={"Date": None} if suffix == "svg" else None)
            written.append(f"curves_{task}.png")
    return written


def read_curve(run: Path, mode: str) -> Curve:
    """Evaluations of one mode in a run's metrics; of two at the same step the later one counts."""
    return {r["env_steps"]: (r["wall_s"], r["mean"]) for r in evaluations(run) if r.get("mode") == mode}


def over_seeds(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """At the steps (n,) of the seed that was evaluated least often, as far as every seed is, the others interpolated between theirs:
    steps, mean wall seconds, mean score, and (n, 2) the least and the greatest seed."""
    reached = LATE * min(max(c) for c in curves)
    steps = np.array([s for s in sorted(min(curves, key=len)) if s <= reached], float)
    points = [np.array([(step, *values) for step, values in sorted(c.items())]).T for c in curves]         # each (3, its evaluations)
    at_steps = np.array([[np.interp(steps, own, values) for values in (wall, score)] for own, wall, score in points])       # (seeds, 2, n)
    (wall, score), (_, least), (_, greatest) = at_steps.mean(0), at_steps.min(0), at_steps.max(0)
    return steps, wall, score, np.stack([least, greatest], 1)


def draw(task: str, methods: Sequence[str], curves: dict[tuple[str, str], list[Curve]]) -> Figure:
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colors = {m: matplotlib.colormaps["tab10"](i % 10) for i, m in enumerate(methods)}
    for (method, mode), found in curves.items():
        steps, wall, score, band = over_seeds(found)
        for axes, x in ((left, steps), (right, wall / 60)):
            axes.fill_between(x, band[:, 0], band[:, 1], color=colors[method], alpha=0.12, linewidth=0)
            axes.plot(x, score, color=colors[method], linestyle=STYLES[mode], marker="o", markersize=3.5, linewidth=1.8, label=f"{method}, {NAMES[mode]}")
    for axes, title in ((left, "environment steps"), (right, "wall time, minutes")):
        axes.set_xlabel(title, color=MUTED)
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _, axes=axes: short_number(v, axes.get_xlim()[1])))
    left.set_title(task, loc="left", color=INK, fontweight="bold")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9, handlelength=3.5)
    return figure
