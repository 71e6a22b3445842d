"""kill -9 of the roles that hold state, one after another at random moments: each serves again by itself, and nothing that was acknowledged is lost."""

from __future__ import annotations

import time

from tests.chaos.harness import Run, Trial, hurt
from tests.chaos.ledger import Ledger

ROLES = ("planner", "learner_model", "learner_policy", "replay", "evaluator", "store")
SERVES_WITHIN_S = 20.0
PROGRESS = {"planner": "env_steps", "replay": "env_steps", "learner_model": "updates", "learner_policy": "policy_updates"}


def check_roles(trial: Trial) -> None:
    """The demo, with evaluations beside the training. Serving again: a new process answers, and the counter that it drives rises.

    Segments are short, as the counters rise by whole segments and all environments begin theirs together: with 200 steps each that is every 3,200 steps.
    """
    run = trial.demo("run", log__audit=True, eval__every_steps=1000, eval__every_episodes=1, task__max_episode_steps=200, rollout__segment_length=20)
    with run, Ledger(run.path) as ledger:
        run.wait_for_steps(600)
        kill_roles(run, trial)
        trial.stop(run)
        ledger.check(trial)


def kill_roles(run: Run, trial: Trial) -> None:
    times, served, before = trial.pick(1, 5), {role: [] for role in ROLES}, {role: run.gauge(f"{role}/restarts") for role in ROLES}
    for role in trial.rng.sample(ROLES * times, len(ROLES) * times):
        run.watch(trial.rng.uniform(0.0, trial.pick(1.0, 3.0)))
        served[role].append(round(kill(run, role), 1))
    evaluations = len(run.rows("eval"))
    run.wait("an evaluation after the last kill", lambda: len(run.rows("eval")) > evaluations)
    slowest = {role: max(seconds) for role, seconds in served.items()}
    trial.figures |= {"kills": times * len(ROLES), "slowest_s": max(slowest.values()), "serves_again_s": served, "incidents": run.incidents()}
    for role, seconds in slowest.items():
        trial.demand(seconds <= SERVES_WITHIN_S, f"{role} served again after {seconds:g} s, allowed are {SERVES_WITHIN_S:g}")
        restarts = run.gauge(f"{role}/restarts") - before[role]
        trial.demand(restarts == times, f"{role} was killed {times} times, {restarts:g} restarts are counted")


def kill(run: Run, role: str) -> float:
    """SIGKILL for the role's process; seconds until a new one serves and works. A learner's counter first falls back to the state that it goes on from."""
    (pid,) = run.wait(f"the {role}", lambda: run.processes().get(role))
    counter = PROGRESS.get(role)
    begun = time.monotonic()
    hurt(pid)
    run.wait(f"another {role} than {pid}", lambda: pid not in run.processes().get(role, [pid]))
    if counter is not None:
        rows = len(run.fresh("system"))
        run.wait("the next row of counters", lambda: len(run.fresh("system")) > rows)            # what it says is of the time since the kill
        seen = [run.position()[counter]]
        run.wait(f"{counter} to rise after the {role} was killed", lambda: seen.append(run.position()[counter]) or seen[-1] > min(seen))
    return time.monotonic() - begun
