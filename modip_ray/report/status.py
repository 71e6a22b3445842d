"""How a run stands, for `modip status`: facts out of its rows and settings, and the facts as text for a terminal of any width."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modip_ray.report.metrics import by_process
from modip_ray.report.rundata import RunData, role_times
from modip_ray.report.scores import duration, metric_of, number, score_cells, scores_from_rows

RATE_S = 60.0           # the rate is that of the last so many seconds of work
ROLES_S = 300.0         # utilisation is that of the last so many seconds of work, or of a role's whole life
KEY = "# work - wait"
INCIDENTS = 3           # shown, the newest
PHASES = {              # phase -> unit, what its rows count, the settings that say how far it goes, times how many
    "pretrain": ("updates", ("updates", "policy_updates"), ("pretrain.updates", "pretrain.policy_updates"), 1),
    "online": ("steps", ("env_steps",), ("online.env_steps",), 1),
    "evaluate": ("episodes", ("eval/episodes",), ("eval.episodes",), 3),
}


@dataclass(frozen=True)
class Progress:
    """Of the phase that is under way. `rate` in units a second of work and `left_s` are None where nothing says how fast it goes."""

    done: int
    total: int
    unit: str
    rate: float | None
    left_s: float | None


@dataclass(frozen=True)
class Role:
    """A role's processes together: shares of their time that went into work, and into waits by name, largest first; the rest was not timed."""

    role: str
    processes: int
    busy: float
    waits: dict[str, float]


def phase_of(run: RunData) -> str:
    """data, start, pretrain, online or evaluate: what is under way, or would be gone on with; finished."""
    if run.finished:
        return "finished"
    known = [row["phase"] for row in run.rows if row.get("kind") in ("phase", "train", "system", "resume")]
    if known and known[-1] != "data":
        return known[-1]
    return "start" if run.of_kind("data") else "data"


def since_resume(rows: Sequence[Mapping]) -> list[Mapping]:
    """Rows of the newest process, its resume row included."""
    return by_process(rows)[-1]


def progress_of(run: RunData, phase: str, running: bool) -> Progress | None:
    """How far a phase is; None for those before any counting."""
    if phase not in PHASES:
        return None
    unit, counts, settings, times = PHASES[phase]
    if phase == "evaluate" and run.config.get("method", "modip") != "modip":
        times = 2                                                                   # a rival has no planner
    rows = [row for row in since_resume(run.rows) if row.get("phase") == phase and row.get("kind") in ("phase", "train", "system", "resume")]
    points = [(float(row["wall_s"]), sum(int(row.get(k) or 0) for k in counts)) for row in rows]
    total, done = times * sum(int(run.config.get(k) or 0) for k in settings), points[-1][1] if points else 0
    rate = None
    if running and len(points) > 1:
        (t1, d1), (t0, d0) = points[-1], next((p for p in reversed(points) if points[-1][0] - p[0] >= RATE_S), points[0])
        rate = (d1 - d0) / (t1 - t0) if t1 > t0 and d1 > d0 else None
    return Progress(done, total, unit, rate, max(0, total - done) / rate if rate else None)


def scores_so_far(run: RunData) -> dict[str, dict[str, Any]]:
    """Newest score of data, bc, policy, mpc. Before the final evaluation, the policy's at the end of the offline phase stands for BC."""
    scores = scores_from_rows(run.rows) | (run.summary.get("scores") or {})
    first = next((row for row in run.of_kind("eval") if row.get("mode") == "policy" and row.get("env_steps") == 0), None)
    return scores if "bc" in scores or first is None else scores | {"bc": first}


def roles_of(rows: Sequence[Mapping]) -> list[Role]:
    """Utilisation by role: the newest timing row less an earlier one of the same processes (counts that fall mark a new process)."""
    rows = since_resume(rows)
    begun = float(rows[0]["wall_s"]) if rows and rows[0].get("kind") == "resume" else 0.0
    bursts: list[dict[str, Mapping]] = []                                           # timing rows are written for all roles at once
    for row in rows:
        if row.get("kind") == "timing":
            if not bursts or row["role"] in bursts[-1]:
                bursts.append({})
            bursts[-1][row["role"]] = row
    return [role_of(role, [burst.get(role) for burst in bursts], [max(row["wall_s"] for row in burst.values()) for burst in bursts], begun)
            for role in (bursts[-1] if bursts else ())]


def role_of(role: str, rows: Sequence[Mapping | None], walls: Sequence[float], begun: float) -> Role:
    """One role's row of each burst (None: it was not there yet), and when the burst was written."""
    last, base, since = rows[-1], {}, begun
    newer = last
    for row, wall in zip(reversed(rows[:-1]), reversed(walls[:-1]), strict=True):
        if row is None or blocks(row) > blocks(newer):                              # it began after that
            base, since = {}, wall
            break
        if walls[-1] - wall >= ROLES_S:
            base, since = row["seconds"], wall
            break
        newer = row
    spent = {name: seconds - base.get(name, 0.0) for name, seconds in last["seconds"].items()}
    (timed,) = role_times([{**last, "seconds": spent, "wall_s": 0.0}])
    waits = {name.removeprefix("wait/"): seconds for name, seconds in spent.items() if name.startswith("wait/") and seconds > 0}
    total = max(timed.total, (walls[-1] - since) * timed.workers) or 1.0
    shares = {name: seconds / total for name, seconds in sorted(waits.items(), key=lambda item: -item[1])}
    return Role(role, timed.workers, max(0.0, timed.total / total - sum(shares.values())), shares)


def blocks(row: Mapping) -> int:
    return sum(row["counts"].values())


def gauges_of(rows: Sequence[Mapping]) -> dict[str, dict[str, float]]:
    """The newest system row by group: {"planner": {"queued": 0.0, ...}, ...}."""
    system = next((row for row in reversed(rows) if row.get("kind") == "system"), {})
    groups: dict[str, dict[str, float]] = {}
    for key, value in system.items():
        group, slash, name = key.partition("/")
        if slash and isinstance(value, int | float):
            groups.setdefault(group, {})[name] = value
    return groups


def facts_of(run: RunData, running: bool) -> dict[str, Any]:
    """What `modip status --json` prints, less what lies in the folder beside the rows (lock, checkpoints)."""
    phase = phase_of(run)
    counters = {k: int(run.latest(k) or 0) for k in ("env_steps", "updates", "policy_updates")}
    incidents = [str(row["text"]) for row in run.of_kind("incident")]
    wall = run.summary["wall_s"] if phase == "finished" else max((row.get("wall_s") or 0.0 for row in run.rows), default=0.0)
    return {"task": run.task, "env_id": run.env_id, "state": "running" if running else "finished" if phase == "finished" else "stopped", "phase": phase,
            "progress": progress_of(run, phase, running), **counters, "wall_s": wall, "scores": scores_so_far(run), "roles": roles_of(run.rows),
            "gauges": gauges_of(since_resume(run.rows)), "incidents": incidents, "resumes": len(run.resumes)}


# ---- text ------------------------------------------------------------------------------------------------------------------------------------

class Ink:
    """Colours by their ANSI numbers, or none."""

    def __init__(self, on: bool):
        self.on = on

    def __call__(self, text: str, code: int) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.on and text else text

    def bold(self, text: str) -> str:
        return self(text, 1)

    def faint(self, text: str) -> str:
        return self(text, 2)

    def state(self, state: str) -> str:
        return self(state, {"running": 32, "finished": 36}.get(state, 33))


def status_text(facts: Mapping[str, Any], width: int = 80, color: bool = False) -> str:
    """`facts` as `facts_of` makes them, with run, row_age_s, checkpoint and resume; lines of at most `width` columns, commands excepted."""
    ink = Ink(color)
    parts = (headline(facts, ink), progress_lines(facts, width, ink), score_lines(facts, width, ink), role_lines(facts, width, ink),
             gauge_lines(facts, width, ink), incident_lines(facts, width, ink), folder_lines(facts, ink))
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part)))


def headline(facts: Mapping[str, Any], ink: Ink) -> Iterator[str]:
    yield ink.bold(facts["task"] or "run") + f"  {facts['run']}"
    age = facts["row_age_s"]
    heard = f"last row {duration(age)} ago" if age is not None else "no row yet"
    yield ink.state(facts["state"]) + {"running": f", {heard}", "stopped": f", {heard}; no process holds its lock"}.get(facts["state"], "")


def progress_lines(facts: Mapping[str, Any], width: int, ink: Ink) -> Iterator[str]:
    p: Progress | None = facts["progress"]
    if p is not None:
        share = min(1.0, p.done / p.total) if p.total else 1.0
        filled = round(share * (bar := max(10, min(30, width - 50))))
        yield f"{facts['phase']:<9} {ink('#' * filled, 32)}{ink.faint('.' * (bar - filled))} {100 * share:3.0f} %  {p.done:,}/{p.total:,} {p.unit}"
        if p.rate is not None:
            yield f"{'':<9} {number(p.rate)} {p.unit}/s, {duration(p.left_s)} left in this phase"
    elif facts["phase"] != "finished":
        yield f"phase     {facts['phase']}"
    often = f", resumed {facts['resumes']} time{'s' if facts['resumes'] > 1 else ''}" if facts["resumes"] else ""
    yield f"so far    {facts['env_steps']:,} env steps in {duration(facts['wall_s'])}{often}"
    yield f"{'':<9} {facts['updates']:,} updates of the model, {facts['policy_updates']:,} of the policy"


def score_lines(facts: Mapping[str, Any], width: int, ink: Ink) -> Iterator[str]:
    scores = facts["scores"]
    cells = score_cells(scores, facts["task"], facts["env_id"])
    if not cells:
        return
    yield ink.faint(f"{metric_of(scores):<10}{'mean':>9}{'x BC':>7}{'95 % interval':>21}{'episodes':>10}" + ("   at step" if width >= 72 else ""))
    for cell in cells:
        line = f"{cell['label']:<10}{cell['mean']:>9}{cell['ratio']:>7}{cell['ci95']:>21}{cell['episodes']:>10}"
        at = scores[cell["name"]].get("env_steps")
        yield line + (f"{at:>10,}" if width >= 72 and at is not None else "")


def role_lines(facts: Mapping[str, Any], width: int, ink: Ink) -> Iterator[str]:
    roles: Sequence[Role] = facts["roles"]
    if not roles:
        return
    bar = max(len(KEY), min(30, width - 50))
    yield ink.faint(f"{'role':<14}{KEY:<{bar}}  busy  largest waits")
    for r in roles:
        waiting = min(1.0 - min(1.0, r.busy), sum(r.waits.values()))
        busy, idle = round(bar * min(1.0, r.busy)), round(bar * waiting)
        rest = max(0, bar - busy - idle)
        waits = [f"{name} {100 * share:.0f} %" for name, share in r.waits.items() if share >= 0.005]
        while len(", ".join(waits)) > max(0, width - 22 - bar):                     # the largest that there is room for
            waits.pop()
        name = f"{r.role} x{r.processes}" if r.processes > 1 else r.role
        drawn = ink("#" * busy, 32) + ink("-" * min(idle, bar - busy), 33) + ink.faint("." * rest)
        yield f"{name:<14}{drawn} {100 * r.busy:3.0f} %  {', '.join(waits)}".rstrip()


def gauge_lines(facts: Mapping[str, Any], width: int, ink: Ink) -> Iterator[str]:
    """Whatever the newest system row holds, a line or more for each group; of a finished run nothing of it is true any more."""
    for group, values in facts["gauges"].items() if facts["state"] != "finished" else ():
        text = ", ".join(f"{name.replace('_', ' ')}\xa0{short(value)}".replace(" ", "\xa0") for name, value in values.items())
        for i, line in enumerate(textwrap.wrap(text, max(20, width - 10))):
            yield f"{ink.faint(f'{group:<10}') if i == 0 else ' ' * 10}" + line.replace("\xa0", " ")


def incident_lines(facts: Mapping[str, Any], width: int, ink: Ink) -> Iterator[str]:
    count = len(facts["incidents"])
    if count:
        yield ink(f"{count} incident{'s' if count > 1 else ''}", 33) + (f", the newest {INCIDENTS}:" if count > INCIDENTS else ":")
        for text in facts["incidents"][-INCIDENTS:]:
            yield from textwrap.wrap(text, max(20, width), initial_indent="  ", subsequent_indent="    ")


def folder_lines(facts: Mapping[str, Any], ink: Ink) -> Iterator[str]:
    c = facts["checkpoint"]
    if c is not None:
        yield f"checkpoint {c['name']}: {duration(c['age_s'])} old, {number(c['mb'])} MB"
    elif facts["state"] != "finished":
        yield "no checkpoint yet"
    if facts["resume"] is not None:
        yield "go on with: " + ink.bold(facts["resume"])


def short(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.3g}"
