"""kill -9 of the driver at random moments, inside checkpoint writes too; the same command resumes."""

from __future__ import annotations

import time
from pathlib import Path

from modip_ray.learning.checkpoint import newest
from tests.chaos.harness import ChaosError, Run, Trial
from tests.chaos.ledger import Ledger

COUNTERS = ("env_steps", "updates", "policy_updates")


def check_driver(trial: Trial) -> None:
    """Every second kill falls into a checkpoint write, the others anywhere from the start of the process on."""
    kills, resumed, inside = trial.pick(4, 20), 0, 0
    run = trial.point("run", log__checkpoint_every_s=0.5, log__audit=True, log__keep_checkpoints=2)
    counters, acknowledged = [dict.fromkeys(COUNTERS, 0)], 0
    with run, Ledger(run.path) as ledger:
        run.wait("a checkpoint of the online phase", lambda: saved(run)["env_steps"] > 0)
        for kill in range(kills):
            if kill % 2:
                inside += wait_for_a_write(run)
            else:
                time.sleep(trial.rng.uniform(0.0, 3.0))
            run.kill_driver()
            counters.append(saved(run))
            stored = ledger.audit()
            run.start()
            resumed += came_back(run, kill + 1)
            at = run.rows("resume")[-1]
            trial.demand(all(at[k] >= counters[-1][k] for k in COUNTERS if k in at), f"resume {kill + 1} began at {at}, the checkpoint was at {counters[-1]}")
            first = run.fresh("system")[0]
            trial.demand(first["env_steps"] >= stored.transitions, f"resume {kill + 1}: {first['env_steps']} steps, {stored.transitions} were journalled")
            acknowledged = max(acknowledged, stored.acknowledged)
        begun = run.position()["env_steps"]
        run.wait_for_steps(begun + 200)
        left = run.leavings()
        status = run.stop()
        ledger.check(trial)
    falls = [k for k in COUNTERS for a, b in zip(counters, counters[1:], strict=False) if b[k] < a[k]]
    trial.figures |= {"kills": kills, "inside_a_write": inside, "resumed": resumed, "checkpoint_counters": [list(c.values()) for c in counters[1:]]}
    trial.demand(resumed == kills, f"{resumed} of {kills} resumed")
    trial.demand(inside > 0, "no kill fell into a checkpoint write")
    trial.demand(not falls, f"counters fell from one checkpoint to a later one: {falls}")
    trial.demand(not left, f"60 s after the last kill -9 these processes of killed drivers still run: {left}")
    trial.demand(status == 0, f"SIGTERM at the end gave exit status {status}")


def saved(run: Run) -> dict[str, int]:
    """Counters of the newest sound checkpoint, zeros where there is none."""
    checkpoint = newest(run.path / "checkpoints")
    return {key: checkpoint.counters[key] if checkpoint is not None else 0 for key in COUNTERS}


def wait_for_a_write(run: Run, timeout_s: float = 30.0) -> bool:
    """Return as soon as a checkpoint is being written; False where none was seen."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if partial_folders(run.path):
            return True
        time.sleep(0.001)
    return False


def partial_folders(path: Path) -> list[str]:
    try:
        return [p.name for p in (path / "checkpoints").iterdir() if p.name.startswith(".partial")]
    except FileNotFoundError:
        return []


def came_back(run: Run, resumes: int) -> bool:
    """The run says that it resumed, and it counts on."""
    try:
        run.wait(f"resume {resumes}", lambda: len(run.rows("resume")) >= resumes and run.fresh("system"))
        return True
    except ChaosError:
        return False
