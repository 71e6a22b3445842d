"""How the parts of the system got on: utilisation by role, waits, staleness of weights, batches, restarts, memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modip_ray.report.metrics import by_process
from modip_ray.report.names import ROLES, SYSTEM
from modip_ray.report.parts import chart_of, esc, folded, missing, section, table
from modip_ray.report.plots import Line
from modip_ray.report.rundata import RoleTime, RunData, role_times
from modip_ray.report.scores import duration, number
from modip_ray.report.svg import RUNS

MINUTES = "wall time, minutes"
CHARTS = (                          # title, (key of the system rows, label) of each line
    ("staleness of the planner's weights, updates", (("planner/updates_behind", "updates behind"),)),
    ("staleness of the planner's weights, s", (("planner/seconds_behind", "since newer ones were published"),)),
    ("observations planned for at once", (("planner/rows_per_batch", "rows of a batch"),)),
    ("from request to plan, ms", (("planner/answer_ms", "answer"),)),
    ("requests waiting at the planners", (("planner/queued", "queued"),)),
    ("steps that learning is behind", (("replay/ahead", "of the slower learner"),)),
    ("rollout workers", (("rollout/workers", "at work"), ("rollout/waiting", "wanted, not there"))),
)
EVENTS = (*(key for key in SYSTEM if key.endswith("/restarts")), "rollout/lost", "rollout/env_crashed", "rollout/env_hung", "rollout/env_bad",
          "planner/not_finite")
SHOWN = 30                          # incidents, the newest


def system(run: RunData) -> str:
    rows, roles = run.of_kind("system"), role_times(run.rows)
    parts = [utilisation(roles) if roles else missing("No utilisation: metrics.jsonl holds no row of kind 'timing' yet.")]
    walls = [row["wall_s"] / 60 for row in rows if row.get("wall_s") is not None] or [0.0]
    how = {"level": 0.0, "span": (min(walls), max(walls))}
    charts = [chart_of(speed(run.rows, "env_steps", "environment steps"), "environment steps a second", MINUTES, keys=False, **how),
              chart_of(speed(run.rows, "updates", "updates of world model and critic"), "updates of the world model a second", MINUTES, keys=False, **how)]
    for title, keys in CHARTS:
        found = gauges(rows, keys)
        charts.append(chart_of(found, title, MINUTES, keys=len(keys) > 1, **how) if any(max(line.y) > 0 for line in found) else "")
    charts.append(chart_of(gauges(rows, [(f"{role}/rss_mb", role) for role in ROLES]), "memory by role, MB", MINUTES, **how))
    if any(charts):
        parts.append(f'<div class="charts small">{"".join(charts)}</div>')
    else:
        parts.append(missing("No speeds, batches, staleness or memory: metrics.jsonl holds too few rows of kind 'system' (one every log.every_s)."))
    if not any(row.get("planner/rows_per_batch") is not None for row in rows):
        parts.append(missing("No planner's batches and no staleness of weights: they are numbers of a run on Ray, and of runs long enough for two rows."))
    parts.append(waits(rows, how))
    parts.append(happenings(run))
    return section("System", *parts)


def utilisation(roles: Sequence[RoleTime]) -> str:
    """A bar for each role: work, waits (striped), and time that was not timed; of the whole run, all processes of the role together."""
    body = []
    for role in roles:
        seconds = role.snapshot["seconds"]
        named = {name.removeprefix("wait/"): s / role.total for name, s in seconds.items() if name.startswith("wait/")} if role.total > 0 else {}
        top = sum(s for name, s in seconds.items() if not any(name.startswith(f"{other}/") for other in seconds))
        busy = min(1.0, max(0.0, (top / role.total if role.total > 0 else 0.0) - sum(named.values())))
        waiting = min(1.0 - busy, sum(named.values()))                              # calls that wait at once count more than once
        largest = [f"{name} {100 * share:.0f} %" for name, share in sorted(named.items(), key=lambda item: -item[1]) if share >= 0.005]
        bar = "".join(f'<div class="{kind}" style="width: {100 * share:.1f}%"></div>' for kind, share in
                      (("", busy), ("wait", waiting), ("rest", 1.0 - busy - waiting)) if share >= 0.0005)
        label = f"{role.role} \u00d7 {role.workers}" if role.workers > 1 else role.role
        body.append(f'<tr><td>{esc(label)}</td><td class="bar"><span>{bar}</span></td><td>{100 * busy:.0f}%</td><td>{100 * waiting:.0f}%</td>'
                    f'<td class="waiting names">{esc(", ".join(largest)) or "-"}</td></tr>')
    head = "<tr><th></th><th></th><th>work</th><th>waits</th><th class=\"names\">for what</th></tr>"
    note = '<p class="note">Shares of each role\'s time in the whole run: work, waits (striped), not timed (grey). The role that works most limits the run.</p>'
    return f'<h3>Utilisation by role</h3>{note}<div class="scroll"><table class="time roles">{head}{"".join(body)}</table></div>'


def gauges(rows: Sequence[Mapping], keys: Iterable[tuple[str, str]]) -> list[Line]:
    """A line over wall minutes for each number that is there at all."""
    found = []
    for i, (key, label) in enumerate(keys):
        points = [(row["wall_s"] / 60, float(row[key])) for row in rows if row.get(key) is not None and row.get("wall_s") is not None]
        if len(points) > 1:
            x, y = zip(*points, strict=True)
            found.append(Line(label, RUNS[i % len(RUNS)], x, y))
    return found


def speed(rows: Sequence[Mapping], key: str, label: str) -> list[Line]:
    """What a counter grew by in a second, between system rows of one process; rows between which it fell or no time passed are left out."""
    rates = []
    for process in by_process(rows):
        points = [(float(row["wall_s"]), float(row[key])) for row in process
                  if row.get("kind") == "system" and row.get(key) is not None and row.get("wall_s") is not None]
        rates += [((t0 + t1) / 120, (c1 - c0) / (t1 - t0)) for (t0, c0), (t1, c1) in zip(points, points[1:], strict=False) if t1 > t0 and c1 >= c0]
    if len(rates) < 2:
        return []
    x, y = zip(*rates, strict=True)
    return [Line(label, "on", x, y)]


def waits(rows: Sequence[Mapping], how: Mapping[str, Any]) -> str:
    """Shares of waiting by role and reason over time."""
    by_role: dict[str, list[tuple[str, str]]] = {}
    for key in dict.fromkeys(k for row in rows for k in row if k.startswith("wait/")):
        by_role.setdefault(key.split("/")[1], []).append((key, key.split("/", 2)[2]))
    charts = [chart_of(gauges(rows, keys), f"{role}: share of time waiting", MINUTES, **how) for role, keys in by_role.items()]
    return folded("Waits by role and reason over time", f'<div class="charts small">{"".join(charts)}</div>') if any(charts) else ""


def happenings(run: RunData) -> str:
    """Restarts and failures, counted over all processes of the run, steps that were lost included, and the incidents in words."""
    processes = by_process(run.written)
    counted = {key: sum(over_processes([float(row[key]) for row in rows if row.get("kind") == "system" and row.get(key) is not None]) for rows in processes)
               for key in EVENTS}
    body = [[f"<code>{esc(key)}</code>", number(n, 0), esc(re.sub(",? since this process began", "", SYSTEM[key].meaning))] for key, n in counted.items() if n]
    incidents = run.of_kind("incident")
    said = f"resumed {len(run.resumes)} time{'' if len(run.resumes) == 1 else 's'}, {len(incidents)} incident{'' if len(incidents) == 1 else 's'}"
    begun = "Counts of the whole run" if body else "No role was restarted and nothing failed"
    parts = [f'<h3>Restarts and incidents</h3><p class="note">{begun}; {said}.</p>']
    if body:
        parts.append(table([], body, "left counts"))
    if incidents:
        lines = "".join(f"<li>{esc(duration(row.get('wall_s')))} {esc(row.get('text'))}</li>" for row in incidents[-SHOWN:])
        more = f"Incidents ({len(incidents)}{f', the newest {SHOWN}' if len(incidents) > SHOWN else ''})"
        parts.append(folded(more, f'<ul class="incidents">{lines}</ul>'))
    return "".join(parts)


def over_processes(values: Sequence[float]) -> float:
    """The total of a count that begins at 0 with each process of its role: what it had reached at every fall, and at the end."""
    ends = [a for a, b in zip(values, [*values[1:], 0.0], strict=False) if b < a]
    return float(sum(ends))
