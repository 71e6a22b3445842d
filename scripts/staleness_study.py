"""How old the weights are that plan, and what looking for newer ones costs: planner.weights_every_s against steps a second. Writes JSON.

    python scripts/staleness_study.py --json results/speed/staleness.json [--seconds 30]

The demo's settings, collection from the start and learning beside it, on a private Ray; a reading of the gauges a second.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from modip_ray.actors.system import RaySystem
from modip_ray.bench import e2e
from modip_ray.config import load
from modip_ray.runfolder import command_line, git_commit, machine, versions

EVERY_S = (0.2, 1.0, 5.0, 20.0)


def measure(every_s: float, seconds: float) -> dict[str, float]:
    """Means over the readings, and steps and updates a second."""
    cfg = load("demo", [f"planner.weights_every_s={every_s}"])
    cfg = e2e.online_only(cfg, replay__samples_per_insert_slack=float(e2e.WARM_UP))
    system = RaySystem(e2e.setup_of(cfg))
    try:
        while (before := system.advance("online", 0.2, until=e2e.ENDLESS)).env_steps < e2e.WARM_UP:
            pass
        begun, readings = time.monotonic(), []
        while time.monotonic() - begun < seconds:
            status = system.advance("online", 1.0, until=e2e.ENDLESS)
            gauges = system.gauges()
            readings.append((gauges["planner/updates_behind"], gauges["planner/seconds_behind"]))
        lasted = time.monotonic() - begun
        updates, age = np.array(readings).T
        return {"updates_behind": float(updates.mean()), "most_updates_behind": float(updates.max()), "seconds_behind": float(age.mean()),
                "steps_per_s": (status.env_steps - before.env_steps) / lasted, "updates_per_s": (status.updates - before.updates) / lasted}
    finally:
        system.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=30.0)
    args = parser.parse_args()
    found = {}
    print("| planner.weights_every_s | updates behind, mean | at most | s since newer ones | steps/s | updates/s |\n|---|---|---|---|---|---|")
    for every_s in EVERY_S:
        m = found[str(every_s)] = measure(every_s, args.seconds)
        print(f"| {every_s:g} | {m['updates_behind']:.1f} | {m['most_updates_behind']:.0f} | {m['seconds_behind']:.2f} | {m['steps_per_s']:.0f} | "
              f"{m['updates_per_s']:.1f} |", flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"by_seconds": found, "command": command_line(), "git": git_commit(), "machine": machine(), "versions": versions()}
    args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
