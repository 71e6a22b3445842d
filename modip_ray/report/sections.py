"""The report page's sections, each from a run to HTML; a section without material says why."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from modip_ray.report import plots
from modip_ray.report.parts import esc, figure, folded, legend, missing, section, table
from modip_ray.report.published import NOTE, published_for
from modip_ray.report.rundata import RunData, role_times
from modip_ray.report.scores import MEANING, ROWS, also_measured, interval, metric_of, number, score_cells
from modip_ray.report.timing_html import phases_table, time_table

POLICY = ("policy/", "distill/", "ppo/")  # training numbers of the policy's own updates; loss/policy is another
EMBED_LIMIT = 4 * 1024 * 1024  # bytes of video kept inside the page


def tiles(run: RunData) -> str:
    """MPC, DP-only, BC and data as large numbers."""
    cells = {cell["name"]: cell for cell in score_cells(run.scores, run.task, run.env_id, run.method)}
    parts = []
    for name in ("mpc", "policy", "bc", "data"):
        cell = cells.get(name)
        if cell is None:
            continue
        mean, data = run.scores[name].get("mean"), run.scores.get("data", {}).get("mean")
        mood = "up" if cell["verdict"].startswith("above") else "down" if cell["verdict"].startswith("below") else ""
        if cell["verdict"]:
            below = f"{cell['ratio']} x BC, {cell['verdict'].split(', ')[-1]}"
        else:
            below = f"{mean / data:.2f} x data" if name == "bc" and mean is not None and data and data > 0 else f"{cell['episodes']} episodes"
        text = f'<span>{cell["label"]}</span><b>{cell["mean"]}</b><span class="{mood}">{esc(below)}</span>'
        parts.append(f'<div class="tile" style="--c: var(--{name})">{text}</div>')
    return f'<div class="tiles">{"".join(parts)}</div>' if parts else ""


def score_table(run: RunData) -> str:
    cells = score_cells(run.scores, run.task, run.env_id, run.method)
    if not cells:
        return section("Scores", missing("No scores yet: metrics.jsonl holds no row of kind 'data' or 'eval'. The first evaluation follows pre-training."))
    paper = published_for(run.task, run.env_id)
    others = also_measured(run.scores)
    head = ["", metric_of(run.scores), "x BC", "95 % interval", *others, "normalised", "episodes", *(["paper"] if paper else [])]
    body = []
    for cell in cells:
        first = f'<span class="key" style="--c: var(--{cell["name"]})"></span>{cell["label"]}<small class="narrow-hide">{esc(MEANING[cell["name"]])}</small>'
        numbers = [f"<b>{cell['mean']}</b>", cell["ratio"], cell["ci95"], *(cell[name] for name in others), cell["normalized"], cell["episodes"]]
        body.append([first, *numbers, *([esc(cell["paper"])] if paper else [])])
    notes = [] if run.finished else ["The run has not finished: these are the latest evaluations, which may use fewer episodes than the final ones."]
    sources = {str(row["source"]) for row in run.of_kind("data") if row.get("source")}
    if sources:
        notes.append(f"Offline data: {', '.join(sorted(sources))}.")
    if paper:
        notes.append("Others in the paper: " + ", ".join(f"{method} {score}" for method, score in paper.others) + f". {NOTE[0].upper()}{NOTE[1:]}.")
    return section("Scores", table(head, body), *(f'<p class="note">{esc(note)}</p>' for note in notes))


def learning(run: RunData) -> str:
    curves = {mode: plots.curve(run.rows, mode) for mode in ("policy", "mpc")}
    if not any(len(steps) for steps, _, _ in curves.values()):
        why = "No evaluations of DP-only or MPC yet: metrics.jsonl holds no row of kind 'eval' with these modes. They come with the online phase."
        return section("Learning curves", missing(why))
    svg = plots.learning_curves(run.rows, run.scores, label="Scores of DP-only and MPC against environment steps, data and BC as level lines")
    by_mode = {mode: {int(s): (m, b) for s, m, b in zip(*parts, strict=True)} for mode, parts in curves.items()}
    steps = sorted({step for points in by_mode.values() for step in points})
    body = []
    for step in steps:
        row = [f"{step:,}"]
        for mode in ("policy", "mpc"):
            point = by_mode[mode].get(step)
            row += ["-", "-"] if point is None else [number(point[0]), interval(point[1])]
        body.append(row)
    numbers = table(["steps", ROWS["policy"], "95 %", ROWS["mpc"], "95 %"], body)
    caption = "Mean score of the evaluation episodes; bands are 95 % intervals. BC and data do not change with steps."
    keys = legend([(ROWS[n], n, line) for n, line in (("mpc", "solid"), ("policy", "solid"), ("bc", "dashed"), ("data", "dotted")) if n in run.scores])
    return section("Learning curves", keys, f'<div class="charts">{figure(svg, caption)}{numbers}</div>')


def world_model(run: RunData) -> str:
    charts, keys = [], ""
    for key, title in (("latent_r2", "latent R²"), ("reward_r2", "reward R²")):
        snapshots = plots.horizon_snapshots(run.rows, key)
        if snapshots:
            keys = keys or legend(plots.horizon_legend(snapshots))
            charts.append(figure(plots.horizon_error(snapshots, key, title, label=f"{title} by horizon")))
    if not charts:
        why = "No diagnostics yet: metrics.jsonl holds no row of kind 'diagnostics' with latent_r2 or reward_r2."
        return section("World-model error by horizon", missing(why))
    note = "Open-loop prediction on replayed sequences, from the true first state with the actions taken: 1 is perfect, 0 no better than predicting the mean."
    return section("World-model error by horizon", f'<p class="note">{note}</p>{keys}<div class="charts">{"".join(charts)}</div>')


def value_calibration(run: RunData) -> str:
    last = {}
    for row in run.of_kind("diagnostics"):
        pairs = [(p, r) for p, r in zip(row.get("value_pred") or [], row.get("value_return") or [], strict=False) if p is not None and r is not None]
        if pairs:
            last["pre" if row.get("phase") == "pretrain" else "on"] = (row, pairs)
    if not last:
        return section("Value calibration", missing("No diagnostics yet: metrics.jsonl holds no row of kind 'diagnostics' with value_pred and value_return."))
    every = [v for _, pairs in last.values() for pair in pairs for v in pair]
    charts = []
    for name in (n for n in ("pre", "on") if n in last):
        row, pairs = last[name]
        title = "after pre-training" if name == "pre" else f"online, {int(row.get('env_steps') or 0):,} steps"
        corr = row.get("value_corr")
        bias = sum(p - r for p, r in pairs) / len(pairs)
        known = "unknown" if corr is None else f"{corr:.2f}"
        caption = f"Correlation {known}; predictions are {number(abs(bias))} too {'high' if bias > 0 else 'low'} on average; {len(pairs)} states."
        svg = plots.calibration(*zip(*pairs, strict=True), min(every), max(every), name, label=f"Predicted value against realised return, {title}")
        charts.append(f"<div><h3>{esc(title)}</h3>{figure(svg, caption)}</div>")
    keys = legend([("predicted = realised", "muted", "dashed")])
    note = (
        "What the critic said of a state against the discounted return that followed. "
        "Returns are those of the behaviour that acted, so a planner that improves on it may rightly be valued higher."
    )
    return section("Value calibration", f'<p class="note">{note}</p>{keys}<div class="charts">{"".join(charts)}</div>')


def losses(run: RunData) -> str:
    rows = run.of_kind("train")
    keys = sorted({k for row in rows for k, v in row.items() if "/" in k and isinstance(v, int | float)})
    mine = [k for k in keys if k.startswith("loss/")]
    if not mine:
        return section("Losses", missing("No training rows yet: metrics.jsonl holds no row of kind 'train' with loss/... numbers."))
    parts = [legend([("pre-training", "pre", "solid"), ("online", "on", "solid")]), _grid(rows, mine)]
    others = [k for k in keys if not k.startswith("loss/")]
    if others:
        parts.append(folded(f"other training numbers ({len(others)})", _grid(rows, others)))
    return section("Losses", *parts)


def _grid(rows: Sequence[Mapping], keys: Sequence[str]) -> str:
    """Each number over the updates of the network that it is of: world model with critic, or policy."""
    figures = []
    for key in keys:
        x = "policy_updates" if key == "loss/policy" or key.startswith(POLICY) else "updates"
        figures.append(figure(plots.series(rows, key, key, x, label=f"{key} over {x.replace('_', ' ')}")))
    return f'<div class="charts small">{"".join(figures)}</div>'


def timing(run: RunData) -> str:
    parts = []
    if run.summary.get("phase_s"):
        parts.append(f"<h3>Phases</h3>{phases_table(run.summary['phase_s'])}")
    for role in role_times(run.rows):
        many = f" ({role.workers} workers together)" if role.workers > 1 else ""
        parts.append(f"<h3>{esc(role.role)}{many}</h3>{time_table(role.snapshot, role.total)}")
    if not parts:
        why = "No timings yet: metrics.jsonl holds no row of kind 'timing'. Each role reports them now and then, and at its end."
        return section("Where the time went", missing(why))
    return section("Where the time went", '<p class="note">Striped bars are waits: time in which a role had nothing to do.</p>', *parts)


def configuration(run: RunData) -> str:
    summary = run.summary
    about = {"run folder": run.path.name, "task": run.task, "environment": run.env_id, "git": summary.get("git")}
    about["configuration hash"] = summary.get("config_hash")
    for group in ("machine", "versions"):
        values = summary.get(group)
        about.update(values if isinstance(values, Mapping) else {group: values})
    facts = table([], [[esc(k), f"<code>{esc(v)}</code>"] for k, v in about.items() if v not in (None, "")], "left")
    parts = [facts] if run.finished else [missing("Versions, machine and git commit are written with summary.json when the run ends."), facts]
    if run.config:
        settings = table([], [[f"<code>{esc(k)}</code>", f"<code>{esc(v)}</code>"] for k, v in run.config.items()], "left")
        parts.append(folded(f"all {len(run.config)} settings (config.yaml)", settings))
    else:
        parts.append(missing("No config.yaml in the run folder, so the settings cannot be shown."))
    return section("Configuration and versions", *parts)


def video(run: RunData) -> str:
    path = run.video
    if path is None:
        return section("Video", missing("No video: report/video.mp4 is absent. 'modip report RUN --video' makes one."))
    size = path.stat().st_size
    notes = ["All panels start from the same seed; returns count from the first step."]
    if size < EMBED_LIMIT:
        source = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    else:
        source = esc(Path(os.path.relpath(path, run.page_dir)).as_posix())
        notes.append(f'The video of {size / 2**20:.1f} MB lies beside the page: <a href="{source}">{path.name}</a>.')
    picture = path.with_suffix(".jpg")
    poster = f' poster="data:image/jpeg;base64,{base64.b64encode(picture.read_bytes()).decode()}"' if picture.exists() else ""
    player = f'<video controls muted loop playsinline preload="metadata"{poster} src="{source}"></video>'
    return section("Video", player, f'<p class="note">{" ".join(notes)}</p>')
