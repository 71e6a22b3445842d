"""Scores: from a summary or from metrics rows, how they compare with BC, and the final table as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from modip_ray.report.published import NOTE, published_for

ROWS = {"data": "data", "bc": "BC", "policy": "DP-only", "mpc": "MPC"}
MEANING = {
    "data": "episodes of the offline dataset",
    "bc": "the policy before fine-tuning",
    "policy": "the policy acting alone, after fine-tuning",
    "mpc": "the planner acting, with the policy's proposals",
}
FEW = 10                        # episodes below which no verdict is given: an interval of so few is little more than their range


def method_of(config: Mapping[str, Any]) -> str:
    """What a run's settings (dotted names) make of it: MODIP, or the rival of configs/studies/rivals.yaml."""
    if config.get("method") == "dppo":
        return "DPPO"
    kind = {"tdmpc2": "TD-MPC2", "dsrl": "DSRL"}.get(str(config.get("policy.kind")))
    if kind is None and config.get("planner.kind") == "action_values":
        kind = "DQL" if config.get("distill.q_weight") else "PA-RL"
    return kind or "MODIP"


def number(value: float | None, digits: int | None = None) -> str:
    """A score for people: 13,775 / 52.3 / 0.941; '-' for None."""
    if value is None:
        return "-"
    if digits is None:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3
    return f"{value:,.{digits}f}"


def interval(ci95: Iterable[float] | None) -> str:
    """'4,700 .. 4,890', or '-' where there is none."""
    low, high = ci95 if ci95 is not None else (None, None)
    return "-" if low is None or high is None else f"{number(low)} .. {number(high)}"


def duration(seconds: float | None) -> str:
    """0:42, 12:07 or 3:05:10."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def scores_from_rows(rows: Iterable[Mapping]) -> dict[str, dict]:
    """The latest score of each kind in metrics rows (for a run without a summary): {'data'|'bc'|'policy'|'mpc': row}."""
    scores: dict[str, dict] = {}
    for row in rows:
        name = "data" if row.get("kind") == "data" else row.get("mode") if row.get("kind") == "eval" else None
        if name in ROWS and row.get("mean") is not None:
            scores[name] = dict(row)
    return scores


def ratio(scores: Mapping[str, Mapping], name: str) -> float | None:
    """Mean of `name` over the mean of BC; None where either is absent or BC's mean is not positive (a ratio would mislead)."""
    mean, base = scores.get(name, {}).get("mean"), scores.get("bc", {}).get("mean")
    return None if mean is None or base is None or base <= 0 else mean / base


def verdict(scores: Mapping[str, Mapping], name: str) -> str:
    """'above BC, intervals apart', 'below BC, intervals apart', 'intervals overlap', or '' where it cannot be said, of few episodes too."""
    ours, base = scores.get(name, {}).get("ci95"), scores.get("bc", {}).get("ci95")
    few = any((scores.get(mode, {}).get("episodes") or FEW) < FEW for mode in (name, "bc"))
    if name in ("bc", "data") or few or not ours or not base or None in (*ours, *base):
        return ""
    if ours[0] > base[1]:
        return "above BC, intervals apart"
    return "below BC, intervals apart" if ours[1] < base[0] else "intervals overlap"


def run_title(task: str, env_id: str) -> str:
    """The environment's id; for one made by "module:function", whose name says little, the task."""
    return task if task and (":" in env_id or not env_id) else env_id


def metric_of(scores: Mapping[str, Mapping]) -> str:
    """What the means are of: "return" (also for runs that do not say), "subtasks/4" or "success"."""
    return next((s["metric"] for s in scores.values() if s.get("metric")), "return")


def also_measured(scores: Mapping[str, Mapping]) -> list[str]:
    """Names of the measures beside the headline, e.g. "all four"."""
    return list(next((s["also"] for s in scores.values() if s.get("also")), {}))


def score_cells(scores: Mapping[str, Mapping], task: str, env_id: str, method: str = "MODIP") -> list[dict[str, str]]:
    """One dict of display strings per present score, in the order data, BC, DP-only, MPC. method: whose published score stands beside how it acts."""
    paper = published_for(task, env_id)
    published = {"MODIP": paper.modip, **dict(paper.others)}.get(method, "") if paper else ""
    beside = {"bc": paper.bc if paper else "", "mpc" if "mpc" in scores else "policy": published}
    cells = []
    for name, label in ROWS.items():
        score = scores.get(name)
        if score is None:
            continue
        times = ratio(scores, name)
        cell = {
            "name": name,
            "label": label,
            "mean": number(score.get("mean")),
            "ci95": interval(score.get("ci95") if score.get("episodes") != 1 else None),
            "normalized": number(score.get("normalized")),
        }
        cell |= {"ratio": "-" if times is None else f"{times:.2f}", "verdict": verdict(scores, name), "episodes": str(score.get("episodes") or "-")}
        also = {measure: number((score.get("also") or {}).get(measure, {}).get("mean")) for measure in also_measured(scores)}
        cells.append({**cell, "paper": beside.get(name, ""), **also})
    return cells


def final_table(summary: Mapping) -> str:
    """The table printed when a run ends; `summary` as in summary.json, parts of it may be absent."""
    task, env_id = str(summary.get("task", "")), str(summary.get("env_id", ""))
    scores = summary.get("scores") or {}
    cells = score_cells(scores, task, env_id, str(summary.get("algorithm", "MODIP")))
    if not cells:
        return f"{run_title(task, env_id) or 'run'}: no scores yet"
    paper = published_for(task, env_id)
    columns = [("label", "", 9), ("mean", "mean", 9), ("ratio", "x BC", 7), ("ci95", "95 % interval", 19)]
    columns += [(name, name, len(name) + 3) for name in also_measured(scores)]
    columns += [("normalized", "normalised", 12), ("episodes", "episodes", 10)]
    columns += [("paper", "paper", 16)] if paper else []
    title = run_title(task, env_id)
    lines = [f"{title} ({task}): {metric_of(scores)}" if task not in ("", title) else f"{title}: {metric_of(scores)}"]
    lines.append("".join(f"{title:<{width}}" if key == "label" else f"{title:>{width}}" for key, title, width in columns))
    for cell in cells:
        line = "".join(f"{cell[key]:<{width}}" if key == "label" else f"{cell[key]:>{width}}" for key, _, width in columns)
        lines.append((line + "  " + cell["verdict"]).rstrip())
    if paper:
        lines.append("others in the paper: " + ", ".join(f"{method} {score}" for method, score in paper.others))
        lines.append(NOTE)
    phases = summary.get("phase_s") or {}
    spent = [f"{name} {duration(seconds)}" for name, seconds in phases.items()]
    if spent or summary.get("wall_s") is not None:
        total = summary.get("wall_s") if summary.get("wall_s") is not None else sum(phases.values())
        lines.append(f"wall time: {', '.join([*spent, 'total ' + duration(total)])}")
    return "\n".join(line.rstrip() for line in lines)
