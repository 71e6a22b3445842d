"""What a search comes to: a table, results.json and results.md, best.yaml, and a picture. From the trials' files; no Ray."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modip_ray.config import Config, ConfigError
from modip_ray.learning.checkpoint import write_synced
from modip_ray.report.rundata import flatten
from modip_ray.report.scores import duration, interval, number
from modip_ray.runfolder import command_line, git_commit, machine, versions
from modip_ray.search.spec import PARTS, Search, beside

TRIALS = "trials"                   # folder of Tune's own files inside the search's


@dataclass(frozen=True)
class TrialResult:
    """One trial as it ended. `rows`: its reports, flat, oldest first; `params`: what the search drew (for PBT: as last perturbed)."""

    number: int
    folder: Path
    params: dict[str, Any]
    rows: list[dict[str, Any]]
    error: str | None
    checkpoint: str | None

    def last(self, key: str) -> Any:
        return self.rows[-1].get(key) if self.rows else None

    def status(self, iterations: int) -> str:
        done = self.last("training_iteration") or 0
        if self.error is not None:
            return "error"
        return "finished" if done >= iterations else f"stopped at {done} of {iterations}"


def trial_number(folder: Path | str) -> int:
    """3 of ".../trial_003_5f2a1"."""
    return int(re.match(r"trial_(\d+)", Path(folder).name)[1])


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """A trial's reports, flat ("mpc/mean"), oldest first; of an iteration that was reported twice (a killed driver) the later one counts, and a line that a
    full disk or a power cut left unfinished does not."""
    try:
        lines = (folder / "result.json").read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        row.pop("config", None)
        rows[row["training_iteration"]] = {k.replace(".", "/"): v for k, v in flatten(row).items()}
    return [rows[i] for i in sorted(rows)]


def ranked(trials: Sequence[TrialResult], search: Search) -> list[TrialResult]:
    """Those that came furthest first, among equals the best last report; trials without one last.

    A trial that the scheduler stopped was worse than others after as many steps, even where its score is above what those ended with.
    """
    sign = -1.0 if search.mode == "max" else 1.0
    return sorted(trials, key=lambda t: (-(t.last("training_iteration") or 0), sign * (t.last(search.metric) or 0.0), t.number))


def summary(search: Search, trials: Sequence[TrialResult], wall_s: float) -> dict[str, Any]:
    """results.json."""
    rows = []
    for t in ranked(trials, search):
        rows.append({"trial": t.number, "status": t.status(search.iterations), "iterations": t.last("training_iteration") or 0,
                     "env_steps": t.last("env_steps"), "updates": t.last("updates"), search.metric: t.last(search.metric),
                     **{part: t.last(beside(search.metric, part)) for part in PARTS},
                     "policy/mean": t.last("policy/mean"), "mpc/mean": t.last("mpc/mean"), "seconds": t.last("time_total_s"), "params": t.params,
                     "checkpoint": t.checkpoint, "error": t.error,
                     "history": [{k: r.get(k) for k in ("training_iteration", "env_steps", "updates", search.metric)} for r in t.rows]})
    best = rows[0]["trial"] if rows and rows[0][search.metric] is not None else None
    return {"search": search.to_dict(), "best": best, "trials": rows, "wall_s": round(wall_s, 1), "command": command_line(), "git": git_commit(),
            "machine": machine(), "versions": versions()}


# ---- for people ------------------------------------------------------------------------------------------------------------------------------

def cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """Header and one row a trial, best first."""
    metric, params = found["search"]["metric"], list(found["search"]["search"])
    header = ["trial", metric, "95 % interval", "by seed", "env steps", "status", *params]
    rows = []
    for t in found["trials"]:
        seeds = ", ".join(number(v) for v in t["by_seed"] or [])
        steps = "-" if t["env_steps"] is None else f"{t['env_steps']:,}"
        rows.append([str(t["trial"]), number(t[metric]), interval(t["ci95"]), seeds or "-", steps, t["status"], *(cell(t["params"].get(p)) for p in params)])
    return [header, *rows]


def text_table(found: Mapping[str, Any]) -> str:
    """For a terminal: columns aligned."""
    rows = table(found)
    widths = [max(len(r[k]) for r in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def markdown(found: Mapping[str, Any]) -> str:
    """results.md."""
    rows, search = table(found), found["search"]
    lines = [f"# Search {Path(search['out']).name}", "",
             f"{len(found['trials'])} trials ({search['scheduler']['kind']}), compared by {search['metric']} ({search['mode']}); each is a configuration with "
             f"its seeds. Wall time of the last process {duration(found['wall_s'])}.", "", f"`{found['command']}`, git {found['git'][:12]}", "",
             *("| " + " | ".join(r) + " |" for r in rows[:1]), "|" + "---|" * len(rows[0]), *("| " + " | ".join(r) + " |" for r in rows[1:]), ""]
    lines += [f"Best: trial {found['best']}. `modip train --config {search['out']}/best.yaml run_dir=...` trains with its settings.", "",
              "![settings and score of each trial](parallel.png)", ""]
    failed = [t for t in found["trials"] if t["error"]]
    return "\n".join([*lines, *(f"- trial {t['trial']}: {t['error']}" for t in failed), *([""] if failed else [])])


def write(folder: Path, search: Search, found: Mapping[str, Any], best: Config) -> None:
    """results.json, results.md, best.yaml, parallel.png and parallel.svg into the search's folder; results.json last, as it says that all is there."""
    from modip_ray.report.parallel import write_parallel
    write_synced(folder / "results.md", markdown(found))
    head = f"# Settings of trial {found['best']}, the best of the search {search.out}: modip train --config {search.out}/best.yaml run_dir=...\n"
    write_synced(folder / "best.yaml", head + best.dump())
    logs = {k for k, v in search.search.items() if "loguniform" in v}
    write_parallel(folder / "parallel", [(k, k in logs) for k in search.search], found["trials"], search.metric, search.mode)
    write_synced(folder / "results.json", json.dumps(found, indent=1))


def read(folder: Path) -> dict[str, Any] | None:
    """results.json of a search that has finished; None where there is none."""
    try:
        return json.loads((folder / "results.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{folder / 'results.json'}: is not JSON ({error}); delete it, and the same command writes it again") from error
