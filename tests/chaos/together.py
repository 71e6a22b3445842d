"""Fast: one run of the tiny task is watched, loses its workers, its roles, and has processes frozen. Most of a short test's time is the start of a run."""

from __future__ import annotations

from tests.chaos.frozen import freeze_roles
from tests.chaos.harness import Trial
from tests.chaos.ledger import Ledger
from tests.chaos.roles import kill_roles
from tests.chaos.soak import CAPACITY, watch_memory
from tests.chaos.workers import SEGMENT, kill_workers

SILENT_S = 8.0
FROZEN = ("rollout", "planner")


def check_together(trial: Trial) -> None:
    run = trial.point("run", log__audit=True, replay__capacity=CAPACITY, rollout__segment_length=SEGMENT, eval__every_steps=1000, eval__every_episodes=1,
                      resources__silent_s=SILENT_S)
    with run, Ledger(run.path) as ledger:
        watch_memory(run, trial)
        kill_workers(run, trial)
        kill_roles(run, trial)
        freeze_roles(run, trial, FROZEN)
        trial.stop(run)
        audit = ledger.check(trial)
    trial.demand(audit.retired >= FROZEN.count("rollout"), "the frozen worker's incarnation is not retired in the journal")
