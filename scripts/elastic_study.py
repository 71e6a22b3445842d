"""Rollout workers that join and leave while one run goes on: 2 -> 6 -> 1 -> 4 by adding and killing Ray nodes. Writes JSON.

    python scripts/elastic_study.py --json results/elastic.json

A run of the real system (planner, learners, replay) on a small task whose environment takes 20 ms a step, so that the number of workers decides the
throughput. The nodes are processes of this machine (ray.cluster_utils.Cluster); a node is killed, not drained.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modip_ray.actors.cluster import NICENESS, THREADS, environment  # noqa: E402
from modip_ray.report.metrics import read_metrics  # noqa: E402
from modip_ray.run import train  # noqa: E402
from modip_ray.runfolder import command_line, git_commit, machine, versions  # noqa: E402
from tests.fakes import PointEnv, small, write_data  # noqa: E402

STEP_S = 0.02
WORKERS = (2, 6, 1, 4)
HOLD_S = 20.0                       # each number of workers stays so long
GIVE_UP_S = 180.0


class SlowPoint(PointEnv):
    def step(self, action):
        time.sleep(STEP_S)
        return super().step(action)


class Nodes:
    """Nodes with so many rollout slots each, by number of slots added."""

    def __init__(self):
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "resources": {"trainer": 10}, "include_dashboard": False})
        self.workers = []

    def add(self, slots: int) -> None:
        self.workers.append((self.cluster.add_node(num_cpus=slots, resources={"rollout": slots}), slots))

    def kill(self, keep: int) -> None:
        """Kill nodes, newest first, until `keep` slots are left."""
        while sum(slots for _, slots in self.workers) > keep:
            node, _ = self.workers.pop()
            self.cluster.remove_node(node, allow_graceful=False)


def last_rows(run: Path) -> tuple[dict, dict]:
    """The newest train row and system row; empty ones where there is none yet."""
    rows = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    newest = {row["kind"]: row for row in rows}
    return newest.get("train", {}), newest.get("system", {})


def scale(nodes: Nodes, run: Path, going: threading.Thread) -> list[dict]:
    """Change the cluster's size, wait until the workers have followed, hold, measure; while the run goes on in another thread."""
    found = []
    for wanted in WORKERS:
        have = sum(slots for _, slots in nodes.workers)
        begun = time.monotonic()
        if wanted > have:
            nodes.add(wanted - have)
        else:
            nodes.kill(keep=wanted)
        while int(last_rows(run)[1].get("rollout/workers", -1)) != wanted:
            if not going.is_alive() or time.monotonic() - begun > GIVE_UP_S:
                raise TimeoutError(f"{wanted} workers wanted, {last_rows(run)[1].get('rollout/workers')} there after {GIVE_UP_S:g} s")
            time.sleep(0.5)
        followed = time.monotonic() - begun
        time.sleep(2.0)
        first, _ = last_rows(run)
        time.sleep(HOLD_S)
        last, system = last_rows(run)
        rate = (last["env_steps"] - first["env_steps"]) / (last["wall_s"] - first["wall_s"])
        found.append({"workers": wanted, "followed_after_s": round(followed, 1), "steps_per_s": round(rate, 1), "at_env_steps": last["env_steps"],
                      "updates": last["updates"], "lost_workers": system["rollout/lost"], "acknowledged": system["rollout/acknowledged"],
                      "stored": system["replay/stored"], "segments": system["replay/segments"]})
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--env-steps", type=int, default=14_000, help="the run's length; it must outlast the four sizes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, environment({name: "1" for name in THREADS} | NICENESS):
        run = Path(folder) / "run"
        nodes = Nodes()
        nodes.add(1)
        nodes.add(1)
        cfg = small(run, write_data(Path(folder) / "data.hdf5"), online__env_steps=args.env_steps, rollout__num_workers={"min": 1, "max": 6},
                    rollout__envs_per_worker=2, rollout__groups=2, planner__proposals=4, planner__max_wait_ms=1.0, replay__samples_per_insert_slack=500.0,
                    eval__every_steps=0, log__every_s=1.0, resources__rollout_cpus=0.5,
                    resources__placement={"rollout": {"rollout": 1}, **{r: {"trainer": 0.01} for r in ("planner", "learner", "replay", "store", "evaluator")}})
        try:
            ray.init(address=nodes.cluster.address, log_to_driver=False, logging_level="ERROR")
            summaries: list[dict] = []
            going = threading.Thread(target=lambda: summaries.append(train(cfg, SlowPoint)), daemon=True)
            going.start()
            found = scale(nodes, run, going)                                        # nodes can be started from the main thread only
            going.join()
            (summary,) = summaries
            rows = read_metrics(run)
            last = [row for row in rows if "rollout/acknowledged" in row][-1]
            result = {"command": command_line(), "git": git_commit(), "machine": machine(), "versions": versions(), "step_s": STEP_S, "sizes": found,
                      "restarts_of_the_run": sum(row["kind"] == "resume" for row in rows), "env_steps": summary["env_steps"], "updates": summary["updates"],
                      "acknowledged": last["rollout/acknowledged"], "stored": last["replay/stored"]}
        finally:
            ray.shutdown()
            nodes.cluster.shutdown()
    lost = [size for size in found if size["acknowledged"] > size["stored"]]
    result["acknowledged_but_not_stored"] = len(lost)
    print(json.dumps({k: v for k, v in result.items() if k not in ("machine", "versions")}, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
