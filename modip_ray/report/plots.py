"""The report's charts, each from metrics rows to an inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modip_ray.report.scores import ROWS, metric_of
from modip_ray.report.svg import COLORS, chart, new_axes, number_axes, thin

FARTHEST = 4.0      # times BC
MAX_SNAPSHOTS = 5  # shades of the horizon chart
DASHES = {"solid": "-", "dashed": "--", "dotted": ":"}


@dataclass(frozen=True)
class Line:
    """One line of a chart: x and y (n,), gaps as None or nan; `band` (n, 2) is drawn behind it."""

    label: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "solid"
    band: np.ndarray | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Its entry in the legend."""
        return self.label, self.color, self.style


@chart
def lines(drawn: Sequence[Line], xlabel: str, level: float | None = None, top: float | None = None, span: tuple[float, float] | None = None,
          size: tuple[float, float] = (3.5, 2.1)) -> Figure:
    """Several lines, and thin ones across at `level` and `top`, which the axis reaches to; `span`: ends of the horizontal axis."""
    figure, axes = new_axes(*size)
    for across in (level, top):
        if across is not None:
            axes.axhline(across, color=COLORS["muted"], linewidth=0.8)
    if span is not None:
        axes.set_xlim(span[0] - 0.02 * (span[1] - span[0]), span[1] + 0.02 * (span[1] - span[0]))
    for line in drawn:
        x, y = thin(np.array(line.x, float), np.array(line.y, float))
        if line.band is not None:
            axes.fill_between(line.x, line.band[:, 0], line.band[:, 1], color=COLORS[line.color], alpha=0.15, linewidth=0)
        axes.plot(x, y, color=COLORS[line.color], linestyle=DASHES[line.style], linewidth=1.6, marker="o" if len(x) < 12 else None, markersize=3.5)
    axes.set_xlabel(xlabel)
    number_axes(axes, 5)
    return figure


def curve(rows: Sequence[Mapping], mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Evaluations of one mode by environment steps: steps (n,), means (n,), intervals (n, 2); of two at the same step the later one counts."""
    by_step = {int(r.get("env_steps") or 0): r for r in rows if r.get("kind") == "eval" and r.get("mode") == mode and r.get("mean") is not None}
    steps = sorted(by_step)
    means = [float(by_step[s]["mean"]) for s in steps]
    bands = [[float(m if v is None else v) for v in (by_step[s].get("ci95") or (m, m))] for s, m in zip(steps, means, strict=True)]
    return np.array(steps), np.array(means), np.array(bands).reshape(-1, 2)


@chart
def learning_curves(rows: Sequence[Mapping], scores: Mapping[str, Mapping]) -> Figure:
    """DP-only and MPC against environment steps with 95 % bands; data and BC as level lines with theirs."""
    figure, axes = new_axes(4.4, 3.2)
    curves = {mode: curve(rows, mode) for mode in ("policy", "mpc")}
    for name, style in (("data", ":"), ("bc", "--")):
        score = scores.get(name)
        if score is None or score.get("mean") is None:
            continue
        if score.get("ci95") and None not in score["ci95"]:
            axes.axhspan(*score["ci95"], color=COLORS[name], alpha=0.13, linewidth=0)
        axes.axhline(score["mean"], color=COLORS[name], linestyle=style, linewidth=1.6)
    for mode, (steps, means, bands) in curves.items():
        if len(steps):
            axes.fill_between(steps, bands[:, 0], bands[:, 1], color=COLORS[mode], alpha=0.18, linewidth=0)
            axes.plot(steps, means, color=COLORS[mode], marker="o", markersize=4)
    last = max([1, *(int(steps[-1]) for steps, _, _ in curves.values() if len(steps))])
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.set_xlabel("environment steps")
    axes.set_ylabel(metric_of(scores))
    number_axes(axes)
    return figure


@chart
def horizon_error(snapshots: Sequence[Mapping], key: str, title: str) -> Figure:
    """R² of the world model's open-loop prediction by horizon (1 is perfect, 0 no better than the mean), one line per snapshot."""
    figure, axes = new_axes(4.4, 3.0)
    lowest = 1.0
    for snapshot, (_, color, line) in zip(snapshots, horizon_legend(snapshots), strict=True):
        values = np.array([np.nan if v is None else v for v in snapshot[key]], dtype=float)
        steps = np.asarray(snapshot.get("horizon") or range(1, len(values) + 1))
        axes.plot(steps, values, color=COLORS[color], linestyle="--" if line == "dashed" else "-", marker="o", markersize=3.5)
        lowest = min([lowest, *values[np.isfinite(values)]])
    axes.axhline(1.0, color=COLORS["muted"], linewidth=0.8)
    axes.set_ylim(max(-1.0, lowest - 0.05), 1.02)
    axes.set_xlabel("horizon (steps ahead)")
    axes.set_ylabel(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def horizon_snapshots(rows: Sequence[Mapping], key: str) -> list[Mapping]:
    """The last snapshot of the pre-training and up to five of the online phase, evenly spread, the last included; of two at one step the later one."""
    have = [r for r in rows if r.get("kind") == "diagnostics" and r.get(key)]
    before = [r for r in have if r.get("phase") == "pretrain"][-1:]
    online = list({r.get("env_steps"): r for r in have if r.get("phase") != "pretrain"}.values())
    if len(online) > MAX_SNAPSHOTS:
        online = [online[i] for i in np.unique(np.linspace(0, len(online) - 1, MAX_SNAPSHOTS).round().astype(int))]
    return [*before, *online]


def horizon_legend(snapshots: Sequence[Mapping]) -> list[tuple[str, str, str]]:
    """(label, colour name, line style) of each snapshot; online ones are darker (lighter in dark mode) the later they were taken."""
    shade = MAX_SNAPSHOTS - sum(s.get("phase") != "pretrain" for s in snapshots)
    legend = []
    for snapshot in snapshots:
        if snapshot.get("phase") == "pretrain":
            legend.append(("pre-training", "pre", "dashed"))
        else:
            shade += 1
            legend.append((f"online, {int(snapshot.get('env_steps') or 0):,} steps", f"seq{shade}", "solid"))
    return legend


@chart
def calibration(predicted: Sequence[float], realised: Sequence[float], low: float, high: float, color: str, xlabel: str = "predicted value",
                marked: Sequence[bool] | None = None) -> Figure:
    """Prediction against the realised discounted return, both from low to high; the line is perfect calibration. Points not `marked` have BC's colour."""
    figure, axes = new_axes(4.0, 3.8)
    axes.plot([low, high], [low, high], color=COLORS["muted"], linewidth=1.1, linestyle="--")
    for shown, of_these in ((color, True), ("bc", False)):
        points = [pair for pair, own in zip(zip(predicted, realised, strict=True), marked or [True] * len(predicted), strict=True) if own is of_these]
        axes.scatter([p for p, _ in points], [r for _, r in points], s=11, color=COLORS[shown], alpha=0.5, linewidths=0)
    pad = 0.04 * (high - low or 1.0)
    axes.set_xlim(low - pad, high + pad)
    axes.set_ylim(low - pad, high + pad)
    axes.set_box_aspect(1)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("realised return")
    number_axes(axes)
    return figure


@chart
def series(rows: Sequence[Mapping], key: str, title: str, x_key: str) -> Figure:
    """One number of the rows over `x_key` ('updates' or 'env_steps'), by phase; on a log scale where it is positive and spans more than a factor of 20."""
    figure, axes = new_axes(3.5, 2.2)
    seen = []
    for phase, color in (("pretrain", "pre"), ("online", "on")):
        points = [(r[x_key], r[key]) for r in rows if r.get("phase") == phase and r.get(key) is not None and r.get(x_key) is not None]
        if points:
            x, y = thin(*zip(*points, strict=True))
            axes.plot(x, y, color=COLORS[color], linewidth=1.5, marker="o" if len(x) < 12 else None, markersize=3.5)
            seen.append(y)
    values = np.concatenate(seen) if seen else np.array([])
    if len(values) and values.min() > 0 and values.max() / values.min() > 20:
        axes.set_yscale("log")
    axes.set_title(title, loc="left")
    axes.set_xlabel("environment steps" if x_key == "env_steps" else "updates")
    number_axes(axes, 4)
    return figure


@chart
def ratio_to_bc(runs: Sequence[tuple[str, Mapping[str, Mapping]]]) -> Figure:
    """Several runs: each one's data, BC, DP-only and MPC over its own BC, with 95 % intervals; what is beyond FARTHEST as an arrow with its number."""
    figure, axes = new_axes(4.8, 0.8 + 0.55 * len(runs))
    for index, (_, scores) in enumerate(runs):
        base = scores.get("bc", {}).get("mean")
        if base is None or base <= 0:
            continue
        for offset, name in zip((-0.24, -0.08, 0.08, 0.24), ROWS, strict=True):
            score = scores.get(name)
            if score is None or score.get("mean") is None:
                continue
            y = index + offset
            if score.get("ci95") and None not in score["ci95"]:
                axes.plot(np.minimum(np.array(score["ci95"]) / base, FARTHEST), [y, y], color=COLORS[name], linewidth=2)
            beyond = score["mean"] / base > FARTHEST
            axes.plot([min(score["mean"] / base, FARTHEST)], [y], color=COLORS[name], marker=">" if beyond else "o", linestyle="none")
            if beyond:
                axes.annotate(f"{score['mean'] / base:.1f}", (FARTHEST, y), (5, 0), textcoords="offset points", va="center", color=COLORS[name], fontsize=8)
    axes.axvline(1.0, color=COLORS["bc"], linewidth=1, linestyle="--")
    axes.set_yticks(range(len(runs)), [name for name, _ in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("score over the run's own BC")
    return figure
