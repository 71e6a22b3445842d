"""Writes modip.json beside this file, the Grafana dashboard of ray_modip_* (docs/observe.md): python cluster/grafana/dashboard.py

Ray adds labels of its own (process, node, session), so every query says which ones it keeps. Times by role come with checkpoints, every two minutes
by default, so their rates are taken over ten.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("modip.json")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RUN = 'run=~"$run"'
COLUMNS, STAT, CHART = 24, (6, 4), (12, 8)              # Grafana's grid, and (width, height) on it

STATS = [                                               # title, unit, query
    ("Environment steps", "short", f"max by (run) (ray_modip_env_steps_total{{{RUN}}})"),
    ("Score, planner acting", "none", f'max by (run) (ray_modip_score_mean{{{RUN}, mode="mpc"}})'),
    ("Rollout workers", "none", f"max by (run) (ray_modip_rollout_workers{{{RUN}}})"),
    ("Incidents", "none", f"max by (run) (ray_modip_run_incidents{{{RUN}}})"),
]
CHARTS = [                                              # title, unit, what it says, [(query, legend), ...]
    ("Scores by mode", "none", "Evaluations on fixed seeds: bc before fine-tuning, policy alone, mpc: the planner acting. With 95 % intervals.",
     [(f"max by (run, mode) (ray_modip_score_mean{{{RUN}}})", "{{run}} {{mode}}"),
      (f"max by (run, mode) (ray_modip_score_ci95_low{{{RUN}}})", "{{run}} {{mode}} low"),
      (f"max by (run, mode) (ray_modip_score_ci95_high{{{RUN}}})", "{{run}} {{mode}} high")]),
    ("Losses", "none", "Means since the row before.", [(f"max by (run, name) (ray_modip_loss{{{RUN}}})", "{{run}} {{name}}")]),
    ("Environment steps a second", "none", "Steps stored in replay.", [(f"sum by (run) (rate(ray_modip_env_steps_total{{{RUN}}}[$window]))", "{{run}}")]),
    ("Updates a second", "none", "",
     [(f"sum by (run) (rate(ray_modip_updates_total{{{RUN}}}[$window]))", "{{run}} model"),
      (f"sum by (run) (rate(ray_modip_policy_updates_total{{{RUN}}}[$window]))", "{{run}} policy")]),
    ("Utilisation by role", "percentunit", "Share of a role's time that went into work.",
     [(f'sum by (run, role) (rate(ray_modip_role_seconds_total{{{RUN}, name!~"wait/.*"}}[10m])) / max by (run, role) (ray_modip_role_processes{{{RUN}}})',
       "{{run}} {{role}}")]),
    ("Largest waits", "percentunit", "Share of a role's time with nothing to do, by what it waits for.",
     [(f'topk(8, sum by (run, role, name) (rate(ray_modip_role_seconds_total{{{RUN}, name=~"wait/.*"}}[10m]))'
       f" / on (run, role) group_left () max by (run, role) (ray_modip_role_processes{{{RUN}}}))", "{{run}} {{role}} {{name}}")]),
    ("Workers", "none", "At work, wanted but not there, and lost so far.",
     [(f"max by (run) (ray_modip_rollout_workers{{{RUN}}})", "{{run}} at work"),
      (f"max by (run) (ray_modip_rollout_waiting{{{RUN}}})", "{{run}} waiting"),
      (f"max by (run) (ray_modip_rollout_lost{{{RUN}}})", "{{run}} lost"),
      (f"max by (run) (ray_modip_rollout_nodes{{{RUN}}})", "{{run}} nodes")]),
    ("Incidents and resumes", "none", "Of the whole run.",
     [(f"max by (run) (ray_modip_run_incidents{{{RUN}}})", "{{run}} incidents"), (f"max by (run) (ray_modip_run_resumes{{{RUN}}})", "{{run}} resumes")]),
    ("Planner: rows in a batch", "none", "Observations planned for at once.",
     [(f"max by (run) (ray_modip_planner_rows_per_batch{{{RUN}}})", "{{run}} rows"), (f"max by (run) (ray_modip_planner_queued{{{RUN}}})", "{{run}} queued")]),
    ("Planner: time to the answer", "ms", "From a worker's request to its plan.", [(f"max by (run) (ray_modip_planner_answer_ms{{{RUN}}})", "{{run}}")]),
    ("Planner: weights behind, updates", "none", "Updates of the world model that the oldest planner lacks.",
     [(f"max by (run) (ray_modip_planner_updates_behind{{{RUN}}})", "{{run}}")]),
    ("Planner: weights behind, seconds", "s", "Since the weights that it lacks were published.",
     [(f"max by (run) (ray_modip_planner_seconds_behind{{{RUN}}})", "{{run}}")]),
    ("Replay: collecting ahead of learning", "none", "Environment steps that the slower learner has not made its updates for.",
     [(f"max by (run) (ray_modip_replay_ahead{{{RUN}}})", "{{run}}")]),
    ("Replay: online transitions", "short", "", [(f"max by (run) (ray_modip_replay_transitions{{{RUN}}})", "{{run}}")]),
    ("World model and planner", "none", "Correlation of predicted value and realised return; shares of plans acted on, and distilled.",
     [(f"max by (run) (ray_modip_diagnostics_value_corr{{{RUN}}})", "{{run}} value correlation"),
      (f"max by (run) (ray_modip_diagnostics_plan_share_accepted{{{RUN}}})", "{{run}} plans acted on"),
      (f"max by (run) (ray_modip_distill_share{{{RUN}}})", "{{run}} distilled")]),
    ("Driver: memory", "mbytes", "", [(f"max by (run) (ray_modip_driver_rss_mb{{{RUN}}})", "{{run}}")]),
]


def panel(kind: str, number: int, at: tuple[int, int, int, int], title: str, unit: str, about: str, queries: list[tuple[str, str]]) -> dict[str, Any]:
    targets = [{"datasource": SOURCE, "editorMode": "code", "expr": expr, "legendFormat": legend, "range": True, "refId": chr(ord("A") + i)}
               for i, (expr, legend) in enumerate(queries)]
    x, y, w, h = at
    found = {"id": number, "type": kind, "title": title, "description": about, "datasource": SOURCE, "gridPos": {"x": x, "y": y, "w": w, "h": h},
             "fieldConfig": {"defaults": {"unit": unit}, "overrides": []}, "targets": targets}
    if kind == "timeseries":
        found["fieldConfig"]["defaults"]["custom"] = {"lineWidth": 1, "fillOpacity": 0, "showPoints": "auto", "spanNulls": 600_000}     # ms; scores are rare
        found["options"] = {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}, "tooltip": {"mode": "multi", "sort": "desc"}}
    else:
        found["options"] = {"colorMode": "none", "graphMode": "area", "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    return found


def variables() -> list[dict[str, Any]]:
    names = "label_values(ray_modip_updates_total, run)"
    windows = ("1m", "5m", "15m")
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1, "hide": 0, "current": {}},
        {"name": "run", "label": "Run", "type": "query", "datasource": SOURCE, "definition": names, "query": {"query": names, "refId": "runs"}, "refresh": 2,
         "sort": 1, "multi": True, "includeAll": True, "allValue": ".+", "current": {"text": ["All"], "value": ["$__all"]}},
        {"name": "window", "label": "Rates over", "type": "custom", "query": ",".join(windows), "current": {"text": windows[0], "value": windows[0]},
         "options": [{"text": w, "value": w, "selected": w == windows[0]} for w in windows]},
    ]


def dashboard() -> dict[str, Any]:
    panels = []
    for i, (title, unit, query) in enumerate(STATS):
        panels.append(panel("stat", i + 1, (i * STAT[0], 0, *STAT), title, unit, "", [(query, "{{run}}")]))
    across = COLUMNS // CHART[0]
    for i, (title, unit, about, queries) in enumerate(CHARTS):
        at = (i % across * CHART[0], STAT[1] + i // across * CHART[1], *CHART)
        panels.append(panel("timeseries", len(STATS) + i + 1, at, title, unit, about, queries))
    return {"uid": "modip", "title": "MODIP", "tags": ["ray", "modip"], "schemaVersion": 39, "version": 1, "editable": True, "graphTooltip": 1,
            "refresh": "10s", "time": {"from": "now-1h", "to": "now"}, "timezone": "browser", "annotations": {"list": []}, "links": [],
            "templating": {"list": variables()}, "panels": panels}


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
    print(FILE)
