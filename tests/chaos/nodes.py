"""A cluster of two nodes: the one with all rollout workers is taken away, another one is added, and the workers follow."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from cluster.local import LocalCluster
from tests.chaos.harness import Trial
from tests.chaos.ledger import Ledger

HEAD, WORKER = {"CPU": 4.0, "trainer": 1.0}, {"CPU": 2.0, "rollout": 2.0}
PLACEMENT = {"rollout": {"rollout": 1}, **{role: {"trainer": 0.01} for role in ("planner", "learner", "replay", "store", "evaluator")}}


def check_nodes(trial: Trial) -> None:
    times, followed, away = trial.pick(1, 4), [], []
    cluster = LocalCluster(Path(tempfile.mkdtemp(prefix="cc", dir="/tmp")))                 # sockets need a short path
    with cluster:
        cluster.up(head=HEAD, worker=WORKER, workers=1)
        run = trial.point("run", resources__ray_address=cluster.facts()["gcs"], resources__placement=PLACEMENT, log__audit=True,
                          rollout__num_workers={"min": 1, "max": 2}, replay__samples_per_insert_slack=2000.0)
        run.environment |= cluster.client_environment()
        with run, Ledger(run.path) as ledger:
            run.wait("two workers at work", lambda: run.gauge("rollout/workers") == 2 and run.position()["env_steps"] > 0)
            for _ in range(times):
                time.sleep(trial.rng.uniform(0.0, 3.0))
                begun = time.monotonic()
                cluster.kill_node()
                run.wait("the workers of the dead node to be missed", lambda: run.gauge("rollout/workers") == 0)
                away.append(round(time.monotonic() - begun, 1))
                at, begun = run.position(), time.monotonic()
                cluster.add_node()
                run.wait("two workers on the new node", lambda: run.gauge("rollout/workers") == 2)
                run.wait_for_steps(at["env_steps"] + 100)
                run.wait("updates", lambda at=at: run.position()["updates"] > at["updates"])
                followed.append(round(time.monotonic() - begun, 1))
            trial.stop(run)
            ledger.check(trial)
        trial.figures |= {"nodes_removed": times, "missed_after_s": away, "followed_after_s": followed}
