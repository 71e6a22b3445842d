"""Environments that crash, hang, return NaN or a wrong shape, each once in a thousand steps: named, counted, replaced; training goes on."""

from __future__ import annotations

from tests.chaos.harness import Trial
from tests.chaos.ledger import Ledger
from tests.chaos.worlds import FAULTS

RATE = (4e-3, 1e-3)                 # fast: more often
GAUGES = {"crash": "rollout/env_crashed", "hang": "rollout/env_hung", "nan": "rollout/env_bad", "shape": "rollout/env_bad"}
WORDS = {"crash": "the simulator crashed", "hang": "hung", "nan": "not finite", "shape": "shape"}


def check_environments(trial: Trial) -> None:
    least = trial.pick(1, 5)
    run = trial.point("run", task__env="tests.chaos.worlds:FaultyPoint", task__env_kwargs={"rate": trial.pick(*RATE)}, log__audit=True,
                      rollout__env_timeout_s=trial.pick(3.0, 5.0))
    with run, Ledger(run.path) as ledger:
        run.wait("each fault to happen", lambda: all(named(run.incidents(), fault) >= least for fault in FAULTS), trial.pick(120.0, 300.0))
        at = run.position()
        run.wait_for_steps(at["env_steps"] + trial.pick(300, 2000))
        run.wait("updates", lambda: run.position()["updates"] > at["updates"])
        trial.stop(run)
        ledger.check(trial)
    incidents = run.incidents()
    trial.figures |= {f"{fault}_named": named(incidents, fault) for fault in FAULTS} | {
        "env_steps": run.position()["env_steps"], **{name: int(run.gauge(name)) for name in sorted(set(GAUGES.values()))}, "incidents": incidents[:40]}
    for name in set(GAUGES.values()):
        trial.demand(run.gauge(name) >= least, f"{name} is {run.gauge(name):g}, at least {least} happened")


def named(incidents: list[str], fault: str) -> int:
    return sum(WORDS[fault] in line for line in incidents)
