"""A serial run on MuJoCo, killed and resumed, has the uninterrupted run's loss curve bit for bit."""

from __future__ import annotations

import json
from typing import Any

from modip_ray.report.metrics import live_rows
from tests.chaos.harness import Run, Trial

POSITION = ("phase", "env_steps", "updates", "policy_updates")


def check_serial(trial: Trial) -> None:
    steps, kills = trial.pick((400, 1), (3000, 5))
    settings = {"serial": True, "online__env_steps": steps, "pretrain__updates": 60, "pretrain__policy_updates": 60, "online__min_online": 100,
                "rollout__num_workers": 1, "rollout__envs_per_worker": 4, "task__max_episode_steps": 100, "data__transitions": 4000,
                "eval__episodes": 2, "log__every_s": 1e-6, "log__checkpoint_every_s": 0.3}
    with trial.demo("plain", **settings) as plain:
        plain.finish()
    with trial.demo("killed", **settings) as run:
        moments = sorted(trial.rng.sample(range(steps // 10, steps - steps // 10), kills))
        for moment in moments:
            run.wait_for_steps(moment)
            run.kill_driver()
            run.start()
        run.finish()
    a, b = curve(plain), curve(run)
    same = sum(x == y for x, y in zip(a, b, strict=False))
    trial.figures |= {"kills": kills, "killed_at_steps": moments, "resumed": len(run.rows("resume")), "rows": len(a), "rows_equal": same,
                      "env_steps": plain.position()["env_steps"]}
    trial.demand(len(run.rows("resume")) == kills, f"{len(run.rows('resume'))} of {kills} resumed")
    trial.demand(len(a) > 5, f"only {len(a)} rows have losses")
    first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    trial.demand(a == b, f"{len(a)} rows without a kill, {len(b)} with; the first that differs is number {first}")
    scores = [{mode: s["returns"] for mode, s in json.loads((r.path / "summary.json").read_text())["scores"].items()} for r in (plain, run)]
    trial.demand(scores[0] == scores[1], "the final returns differ")


def curve(run: Run) -> list[tuple[tuple, dict[str, Any]]]:
    """Position and losses of every slice of work that updated something."""
    return [(tuple(row[key] for key in POSITION), {k: v for k, v in row.items() if k.startswith("loss/")})
            for row in live_rows(run.rows()) if row["kind"] == "train" and any(k.startswith("loss/") for k in row)]
