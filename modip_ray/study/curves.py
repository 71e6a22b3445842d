"""A study's learning curves: a picture a task, scores against environment steps and against the online phase's time, a colour a method, a style a mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from modip_ray.config import Config
from modip_ray.report.parallel import GRID, INK, MUTED, SETTINGS
from modip_ray.report.svg import short_number
from modip_ray.runfolder import read_summary
from modip_ray.study.kept import evaluations, outcome
from modip_ray.study.spec import Cell, Study

STYLES = {"mpc": "-", "policy": (0, (4, 2))}
NAMES = {"mpc": "MPC-acting", "policy": "DP-only"}

Curve = dict[int, tuple[float, float]]                          # by the step that an evaluation was due at: environment steps, mean score


@dataclass(frozen=True)
class Drawn:
    """One way of acting of one method: a curve a training seed, and the online seconds of an environment step (None: of no finished run)."""

    seeds: list[Curve]
    step_s: float | None
    metric: str


def write_curves(study: Study) -> list[str]:
    """curves_TASK.png (and .svg) for every task with an evaluation; their names."""
    written, cells = [], study.cells()
    for task in study.tasks:
        drawn = {(m, mode): found for m in study.methods for mode in STYLES
                 if (found := read_curves([c for c in cells if (c.task, c.method) == (task, m)], mode)) is not None}
        if drawn:
            with matplotlib.rc_context(SETTINGS):
                figure = draw(task, list(study.methods), drawn)
                for suffix in ("png", "svg"):
                    figure.savefig(study.folder / f"curves_{task}.{suffix}", dpi=150, facecolor="white", metadata={"Date": None} if suffix == "svg" else None)
            written.append(f"curves_{task}.png")
    return written


def read_curves(cells: Sequence[Cell], mode: str) -> Drawn | None:
    """Of one task and method; None where no run was evaluated in this mode."""
    folders = [(cell, outcome(cell)) for cell in cells]
    rows = [rows for cell, folder in folders if (rows := evaluation_rows(cell, folder or cell.folder, mode))]
    if not rows:
        return None
    done = [summary for _, folder in folders if folder is not None and (summary := read_summary(folder)) is not None]
    step_s = [s["phase_s"]["online"] / s["env_steps"] for s in done if s["env_steps"]]
    return Drawn([{due(r["env_steps"], cells[0].cfg): (r["env_steps"], r["mean"]) for r in own} for own in rows],
                 float(np.mean(step_s)) if step_s else None, rows[0][0].get("metric", "score"))


def evaluation_rows(cell: Cell, folder: Path, mode: str) -> list[dict[str, Any]]:
    """Those of a mode, on the seeds that the settings say: a run may have been looked at on others, too."""
    return [r for r in evaluations(folder) if r.get("mode") == mode and r.get("seeds", [cell.cfg.eval.seed])[:1] == [cell.cfg.eval.seed]]


def due(step: int, cfg: Config) -> int:
    """The step that an evaluation was due at; they lie a little behind it, each seed's elsewhere."""
    end, every = cfg.online.env_steps, cfg.eval.every_steps
    return end if step >= end else step // every * every if every else 0


def over_seeds(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where every seed was evaluated (n may be 0): mean environment steps (n,), mean score (n,), and (n, 2) the least and the greatest seed."""
    shared = sorted(set.intersection(*map(set, curves)))
    steps, score = np.array([[c[at] for at in shared] for c in curves]).reshape(len(curves), len(shared), 2).transpose(2, 0, 1)            # (seeds, n) each
    return steps.mean(0), score.mean(0), np.stack([score.min(0), score.max(0)], 1)


def draw(task: str, methods: Sequence[str], drawn: Mapping[tuple[str, str], Drawn]) -> Figure:
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    strong_then_light = [*range(0, 20, 2), *range(1, 20, 2)]                        # tab20 has them by turns
    colors = {m: matplotlib.colormaps["tab20"](strong_then_light[i % 20]) for i, m in enumerate(methods)}
    for (method, mode), found in drawn.items():
        steps, score, band = over_seeds(found.seeds)
        for axes, x in ((left, steps), *(((right, steps * found.step_s / 60),) if found.step_s is not None else ())):
            axes.fill_between(x, band[:, 0], band[:, 1], color=colors[method], alpha=0.12, linewidth=0)
            axes.plot(x, score, color=colors[method], linestyle=STYLES[mode], marker="o", markersize=3.5, linewidth=1.8)
    for axes, title in ((left, "environment steps"), (right, "minutes of the online phase")):
        axes.set_xlabel(title, color=MUTED)
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _, axes=axes: short_number(v, axes.get_xlim()[1])))
    left.set_ylabel(next(iter(drawn.values())).metric, color=MUTED)
    left.set_title(task, loc="left", color=INK, fontweight="bold")
    shown, modes = map(set, zip(*drawn, strict=True))
    lines = [Line2D([], [], color=INK, linestyle=STYLES[mode], label=NAMES[mode]) for mode in STYLES if mode in modes]
    lines += [Line2D([], [], color=colors[method], linewidth=3.0, label=method) for method in methods if method in shown]
    figure.legend(handles=lines, loc="outside right upper", frameon=False, fontsize=9, handlelength=3.0)
    return figure
