"""Runs side by side: scores, the settings that differ, overlaid curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modip_ray.report import plots
from modip_ray.report.parts import chart_of, esc, figure, legend, missing, section, table
from modip_ray.report.plan_sections import GAIN, MEASURED, STEPS, measured, realised_gain
from modip_ray.report.plots import DASHES, Line
from modip_ray.report.rundata import RunData
from modip_ray.report.scores import MEANING, ROWS, duration, interval, metric_of, number, ratio
from modip_ray.report.svg import RUNS
from modip_ray.report.system_sections import MINUTES

OWN = ("run_dir", "data.cache", "log.", "resources.ray_address")       # settings of a run's place, not of what it does


def names_of(runs: Sequence[RunData]) -> list[str]:
    """The folder's name, with as many of those above it as tell the runs apart; a run that is given twice is numbered."""
    depth, parts = 1, [run.path.parts for run in runs]
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    names = ["/".join(p[-depth:]) for p in parts]
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def look(i: int) -> tuple[str, str]:
    """Colour and line style of the i-th run."""
    return RUNS[i % len(RUNS)], tuple(DASHES)[i // len(RUNS) % len(DASHES)]


def comparison(runs: Sequence[RunData]) -> str:
    named = list(zip(names_of(runs), runs, strict=True))
    keys = legend([(name, *look(i)) for i, (name, _) in enumerate(named)])
    return "".join((scores(named), settings(named), learning(named, keys), plans(named, keys)))


def scores(named: Sequence[tuple[str, RunData]]) -> str:
    """A row for each run, and each score over the run's own BC."""
    metrics = {metric_of(run.scores) for _, run in named}
    head = ["", *ROWS.values(), "DP-only / BC", "MPC / BC", "steps", "updates", "wall time", ""]
    body = []
    for i, (name, run) in enumerate(named):
        found = run.scores
        cells = []
        for mode in ROWS:
            score = found.get(mode, {})
            band = interval(score.get("ci95")).replace(".. ", "..\u00a0")              # breaks once at most, on a phone
            cells.append(f"<b>{number(score.get('mean'))}</b><small>{band}</small>" if score.get("mean") is not None else "-")
        ratios = ["-" if (r := ratio(found, mode)) is None else f"{r:.2f}" for mode in ("policy", "mpc")]
        counts = (run.summary.get(key, run.latest(key)) for key in ("env_steps", "updates"))
        body.append([key_of(i, name, run.task), *cells, *ratios, *("-" if n is None else f"{int(n):,}" for n in counts),
                     duration(run.summary.get("wall_s", run.latest("wall_s"))), "" if run.finished else "unfinished"])
    kinds = "; ".join(f"{label}: {MEANING[mode]}" for mode, label in ROWS.items())
    note = f"Mean {' or '.join(sorted(metrics))} of the evaluation episodes with its 95 % interval. {kinds}."
    parts = [f'<p class="note">{esc(note)}</p>', table(head, body, "runs")]
    pairs = [(name, run.scores) for name, run in named]
    if any((found.get("bc", {}).get("mean") or 0) > 0 for _, found in pairs):
        svg = plots.ratio_to_bc(pairs, label="Scores of each run over its own BC, with 95 % intervals")
        parts += [legend([(label, mode, "solid") for mode, label in ROWS.items()]), figure(svg, "Each score over the mean of the run's own BC.")]
    else:
        parts.append(missing("No run has a BC score above 0 yet, so there is nothing to compare by."))
    return section("Comparison", *parts)


def key_of(i: int, name: str, below: str) -> str:
    return f'<span class="key" style="--c: var(--{look(i)[0]})"></span>{esc(name)}<small class="narrow-hide">{esc(below)}</small>'


def settings(named: Sequence[tuple[str, RunData]]) -> str:
    """The settings that are not the same in all runs."""
    title, configs = "Settings that differ", [run.config for _, run in named]
    unread = [name for (name, _), config in zip(named, configs, strict=True) if not config]
    if unread:
        return section(title, missing(f"No config.yaml in {', '.join(unread)}, so the settings cannot be compared."))
    differing = [key for key in dict.fromkeys(k for config in configs for k in config)
                 if not key.startswith(OWN) and any(config.get(key) != configs[0].get(key) for config in configs)]
    if not differing:
        return section(title, '<p class="note">None: the runs have the same settings, their folders apart.</p>')
    body = [[f"<code>{esc(key)}</code>", *(f"<code>{esc(config[key])}</code>" if key in config else "-" for config in configs)] for key in differing]
    return section(title, table(["", *(name for name, _ in named)], body, "left differ"))


def learning(named: Sequence[tuple[str, RunData]], keys: str) -> str:
    """Curves of MPC and DP-only by environment steps, of MPC by wall time."""
    charts = []
    for mode, by_wall, title in (("mpc", False, "MPC"), ("policy", False, "DP-only"), ("mpc", True, "MPC by wall time")):
        drawn = [Line(name, look(i)[0], x, means, look(i)[1], bands) for i, (name, run) in enumerate(named)
                 for steps, means, bands in [plots.curve(run.rows, mode)] if len(x := minutes(run.rows, mode, steps) if by_wall else steps)]
        charts.append(chart_of(drawn, f"{title}: {metric_of(named[0][1].scores)}", MINUTES if by_wall else STEPS, keys=False, size=(4.4, 2.8)))
    if not any(charts):
        return section("Learning curves of all runs", missing("No evaluations of DP-only or MPC yet in any of the runs."))
    return section("Learning curves of all runs", keys, f'<div class="charts">{"".join(charts)}</div>')


def minutes(rows: Sequence[Mapping], mode: str, steps: Sequence[int]) -> list[float]:
    """Wall minutes of the evaluations of `plots.curve`."""
    walls = {int(r.get("env_steps") or 0): float(r.get("wall_s") or 0.0) / 60 for r in rows if r.get("kind") == "eval" and r.get("mode") == mode}
    return [walls[int(step)] for step in steps]


def plans(named: Sequence[tuple[str, RunData]], keys: str) -> str:
    """The plan statistics of all runs, a number a chart."""
    charts = []
    gains = [realised_gain(run.rows, name, *look(i)) for i, (name, run) in enumerate(named)]
    charts.append(chart_of([gain for gain in gains if gain is not None], GAIN, STEPS, keys=False, level=0.0))
    for title, top, numbers in MEASURED:
        for key, label, _ in numbers:
            drawn = [Line(name, look(i)[0], *points, look(i)[1]) for i, (name, run) in enumerate(named)
                     if len((points := measured(run.of_kind("diagnostics"), key))[0])]
            name = f"{title}: {label.removeprefix('for scale: ')}" if len(numbers) > 1 else title
            charts.append(chart_of(drawn, name, STEPS, keys=False, level=0.0, top=top))
    if not any(charts):
        return section("Plans of all runs", missing("No diagnostics yet in any of the runs."))
    return section("Plans of all runs", keys, f'<div class="charts small">{"".join(charts)}</div>')
