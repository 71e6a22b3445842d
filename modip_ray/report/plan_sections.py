"""Where planning helps or harms: the section of a run, and the same numbers for runs that are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from modip_ray.report import plots
from modip_ray.report.parts import chart_of, figure, legend, missing, section
from modip_ray.report.plots import Line
from modip_ray.report.rundata import RunData
from modip_ray.report.scores import number
from modip_ray.tasks.scores import paired_difference

STEPS = "environment steps"
GAIN = "realised gain: score of MPC less that of DP-only, same seeds"
MEASURED = (                        # title, highest value, (key of the diagnostics rows, label, colour) of each line; 0 is drawn in all
    ("correlation of predicted and realised return", 1.0, (("plan_corr", "of plans", "mpc"), ("value_corr", "of V on replayed data", "on"))),
    ("predicted less realised return of plans", None, (("plan_bias", "mean", "mpc"),)),
    ("predicted gain of plans over the DP's proposals", None, (("plan_gain_mean", "mean, less the penalty", "mpc"),)),
    ("disagreement of the value ensemble", None, (
        ("plan_spread", "about the chosen plan", "mpc"), ("plan_spread_rejected", "about rejected candidates", "policy"),
        ("plan_candidates_std", "for scale: how far the candidates' gains are apart", "bc"))),
    ("share of plans", 1.0, (("plan_share_accepted", "acted on", "mpc"), ("plan_share_distilled", "imitated, of those acted on", "policy"))),
    ("distance from the DP's proposals, actions in \u22121..1", None, (
        ("plan_distance", "plan to the nearest proposal", "mpc"), ("proposal_distance", "for scale: proposal to the nearest other", "bc"))),
)
STYLES = ("solid", "dashed", "dotted")      # of a chart's lines, so that one may lie on another
NOTE = (
    "Measured in the planner's evaluation episodes, gains and shares on the newest training data. Returns are discounted. A prediction that runs ahead of what "
    "follows, or gains of candidates no further apart than the ensemble disagrees about them, mean that the planner chooses among errors. "
    "docs/report.md says how to read each figure."
)


def planner(run: RunData) -> str:
    """Predicted against realised return of plans at the start and the end, and the plan statistics over environment steps."""
    title, rows = "Planner and distillation", run.of_kind("diagnostics")
    charts = [chart_of([Line(label, color, *points, STYLES[i]) for i, (key, label, color) in enumerate(keys) if len((points := measured(rows, key))[0])], name,
                       STEPS, len(keys) > 1, level=0.0, top=top) for name, top, keys in MEASURED]
    gain = realised_gain(run.rows)
    charts.insert(3, chart_of([gain] if gain else [], GAIN, STEPS, level=0.0))
    if not any(charts):
        return section(title, missing("No diagnostics yet: metrics.jsonl holds no row of kind 'diagnostics' with plan_... numbers."))
    return section(title, f'<p class="note">{NOTE}</p>', returns_of_plans(rows), f'<div class="charts small">{"".join(charts)}</div>')


def returns_of_plans(rows: Sequence[Mapping]) -> str:
    """Scatter plots of the first and the last evaluation with plans."""
    have = [row for row in rows if pairs_of(row)]
    if not have:
        return missing("Predicted against realised return of plans was not recorded: no row of kind 'diagnostics' has plan_pred and plan_return. "
                       "Evaluations in mpc mode write them; runs of earlier versions have none.")
    shown = [have[0], have[-1]] if len(have) > 1 else have
    every = [v for row in shown for pair in pairs_of(row) for v in pair]
    low, high = np.percentile(every, [0.5, 99.5]).tolist()
    charts = []
    for row in shown:
        steps = int(row.get("env_steps") or 0)
        when = f"after {steps:,} online steps" if steps else "after pre-training"
        pairs, corr, bias = pairs_of(row), row.get("plan_corr"), row.get("plan_bias")
        facts = [f"Correlation {'unknown' if corr is None else f'{corr:.2f}'}"]
        facts += [f"predictions are {number(abs(bias))} too {'high' if bias > 0 else 'low'} on average"] if bias is not None else []
        acted = [a for _, _, a in decisions_of(row)]
        svg = plots.calibration(*zip(*pairs, strict=True), low, high, "mpc", marked=acted, label=f"Predicted against realised return of plans, {when}",
                                xlabel="predicted return of the plan")
        charts.append(f"<div><h3>Plans {when}</h3>{figure(svg, '; '.join([*facts, f'{len(pairs)} decisions, {sum(acted)} acted on a plan.']))}</div>")
    keys = [("acted on a plan", "mpc", "solid"), ("the policy's own proposal", "bc", "solid"), ("predicted = realised", "muted", "dashed")]
    return f'{legend(keys)}<div class="charts">{"".join(charts)}</div>'


def decisions_of(row: Mapping) -> list[tuple[float, float, bool]]:
    """Predicted and realised return of each decision where both are numbers, and whether it executed a plan that the guard let through (rows of earlier
    versions do not say: all did)."""
    predicted = row.get("plan_pred") or []
    acted = row.get("plan_acted") or [True] * len(predicted)
    return [(p, r, bool(a)) for p, r, a in zip(predicted, row.get("plan_return") or [], acted, strict=False) if p is not None and r is not None]


def pairs_of(row: Mapping) -> list[tuple[float, float]]:
    return [(p, r) for p, r, _ in decisions_of(row)]


def measured(rows: Sequence[Mapping], key: str) -> tuple[list[float], list[float]]:
    """Environment steps and values of a number of the diagnostics rows; of two at the same step the later one counts."""
    points = {int(row.get("env_steps") or 0): float(row[key]) for row in rows if row.get(key) is not None}
    return sorted(points), [points[step] for step in sorted(points)]


def realised_gain(rows: Sequence[Mapping], label: str = "mean and 95 % interval", color: str = "mpc", style: str = "solid") -> Line | None:
    """MPC-acting less DP-only over the seeds that both were evaluated on, at the steps where both were; None where there is no such step."""
    by_mode = {mode: {int(r.get("env_steps") or 0): dict(zip(r.get("seeds") or [], r.get("values") or [], strict=False))
                      for r in rows if r.get("kind") == "eval" and r.get("mode") == mode} for mode in ("mpc", "policy")}
    found = {}
    for step in sorted(by_mode["mpc"].keys() & by_mode["policy"].keys()):
        mpc, policy = by_mode["mpc"][step], by_mode["policy"][step]
        seeds = sorted(mpc.keys() & policy.keys())
        if seeds:
            found[step] = paired_difference([mpc[s] for s in seeds], [policy[s] for s in seeds])
    if not found:
        return None
    return Line(label, color, list(found), [d["mean"] for d in found.values()], style, np.array([d["ci95"] for d in found.values()]))
