"""SIGSTOP instead of SIGKILL: a process that lives but says nothing is noticed, replaced, and not listened to when it comes to itself."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

from tests.chaos.harness import Run, Trial, hurt
from tests.chaos.ledger import Ledger

ROLES = ("rollout", "planner", "learner_model", "replay")
FOR_GOOD = "learner_model"          # never woken: the kill must reach a stopped process


def check_frozen(trial: Trial) -> None:
    silent, times = 15.0, 3
    run = trial.point("run", log__audit=True, resources__silent_s=silent)
    with run, Ledger(run.path) as ledger:
        run.wait_for_steps(300)
        freeze_roles(run, trial, ROLES * times)
        trial.stop(run)
        audit = ledger.check(trial)
    trial.figures |= {"silent_s": silent, "late_stored": len(audit.late), "retired": audit.retired, "incidents": run.incidents()}
    trial.demand(audit.retired >= times, f"{times} workers were frozen, {audit.retired} incarnations are retired in the journal")


def freeze_roles(run: Run, trial: Trial, roles: Sequence[str]) -> None:
    """In random order; each time the run has to go on before the next."""
    replaced = {role: [] for role in roles}
    for role in trial.rng.sample(roles, len(roles)):
        replaced[role].append(round(freeze(run, trial, role), 1))
        run.wait_for_steps(run.position()["env_steps"] + 100)
    run.watch(2.0)                                                                  # for late answers
    trial.figures |= {"frozen": len(roles), "replaced_within_s": max(max(s) for s in replaced.values()), "replaced_after_s": replaced}


def freeze(run: Run, trial: Trial, role: str) -> float:
    """Stop one of the role's processes, wake it as soon as it is given up; seconds until another one has taken its place."""
    pids = run.wait(f"the {role}", lambda: run.processes().get(role))
    pid, begun, told = trial.rng.choice(pids), time.monotonic(), len(run.incidents())
    hurt(pid, signal.SIGSTOP)
    if role != FOR_GOOD:
        run.wait(f"the frozen {role} to be noticed", lambda: len(run.incidents()) > told or pid not in run.processes().get(role, [pid]))
        hurt(pid, signal.SIGCONT)
    run.wait(f"another {role} than {pid}", lambda: (now := run.processes().get(role, [])) and len(now) == len(pids) and pid not in now)
    return time.monotonic() - begun
