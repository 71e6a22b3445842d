"""kill -9 of the driver at random moments, inside checkpoint writes too; the same command resumes."""

from __future__ import annotations

import time
from pathlib import Path

from modip_ray.learning.checkpoint import newest
from tests.chaos.harness import Run, Trial
from tests.chaos.ledger import Ledger

GONE_WITHIN_S = 120.0               # Ray's two agents look for their dead GCS for a minute before they end
COUNTERS = ("env_steps", "updates", "policy_updates")


def check_driver(trial: Trial) -> None:
    """In turn: anywhere in the online phase, inside a checkpoint write, and while the run is still starting."""
    kills, resumed, inside = trial.pick(2, 20), 0, 0
    run = trial.point("run", log__checkpoint_every_s=0.5, log__audit=True, log__keep_checkpoints=2)
    counters = [dict.fromkeys(COUNTERS, 0)]
    with run, Ledger(run.path) as ledger:
        run.wait("a checkpoint of the online phase", lambda: saved(run)["env_steps"] > 0)
        for kill in range(kills):
            if kill % 3 == 0:
                time.sleep(trial.rng.uniform(0.0, 3.0))
            elif kill % 3 == 1:
                inside += wait_for_a_write(run)
            else:
                run.kill_driver()
                run.start()
                time.sleep(trial.rng.uniform(0.0, 8.0))
            run.kill_driver()
            stored = ledger.audit()
            counters.append(saved(run))
            run.start()
            first = came_back(run)
            trial.demand(all(first[k] >= counters[-1][k] for k in COUNTERS), f"went on at {first}, the checkpoint was at {counters[-1]}")
            trial.demand(first["env_steps"] >= stored.transitions, f"{first['env_steps']} steps after a resume, {stored.transitions} were in the journal")
            resumed += 1
        run.wait_for_steps(run.position()["env_steps"] + 200)
        left = [] if trial.fast else run.leavings(GONE_WITHIN_S)
        status = run.stop()
        ledger.check(trial)
    falls = [k for k in COUNTERS for a, b in zip(counters, counters[1:], strict=False) if b[k] < a[k]]
    trial.figures |= {"kills": kills, "inside_a_write": inside, "resumed": resumed, "checkpoint_counters": [list(c.values()) for c in counters[1:]]}
    trial.demand(inside > 0, "no kill fell into a checkpoint write")
    trial.demand(not falls, f"counters fell from one checkpoint to a later one: {falls}")
    trial.demand(not left, f"{GONE_WITHIN_S:g} s after the last kill -9 these processes of killed drivers still run: {left}")
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


def came_back(run: Run) -> dict[str, int]:
    """The first counters after a resume; ChaosError where the run ends instead."""
    run.wait("the run to resume", lambda: run.fresh("resume") and run.fresh("system"))
    return {key: int(run.fresh("system")[0][key]) for key in COUNTERS}
