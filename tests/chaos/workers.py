"""kill -9 of a random rollout worker every few seconds: the run goes on, at a speed that is compared with a quiet run of the same."""

from __future__ import annotations

import time

from tests.chaos.harness import Run, Trial, hurt
from tests.chaos.ledger import Ledger

EVERY_S = 5.0
LEAST_SHARE = 0.7                   # of the environment steps stored a second while nothing is harmed
SEGMENT = 20                        # a worker lives for 10 s: the default of 200 steps an environment would hardly ever be sent
SLACK = 300.0                       # learning and collection keep pace from the beginning, so that the speeds are those of the whole system


def check_workers(trial: Trial) -> None:
    """The demo: left alone, harmed, left alone again. The speed is that of stored steps, what the dead had not sent is gone."""
    run = trial.demo("run", log__audit=True, rollout__segment_length=SEGMENT, replay__samples_per_insert_slack=SLACK)
    with run, Ledger(run.path) as ledger:
        run.wait_for_steps(1000)
        kill_workers(run, trial)
        end = run.position()
        trial.stop(run)
        audit = ledger.check(trial)
    trial.demand(audit.transitions >= end["env_steps"], f"{end['env_steps']} steps are counted, {audit.transitions} are in the journal")


def kill_workers(run: Run, trial: Trial) -> None:
    quiet_s, harmed_s = trial.pick((5.0, 15.0), (75.0, 300.0))
    kills, lost = 0, run.gauge("rollout/lost")
    before = speed(run, quiet_s)
    begun, at = time.monotonic(), run.position()
    while time.monotonic() < begun + harmed_s:
        kills += hurt(trial.rng.choice(run.wait("a worker", lambda: run.processes().get("rollout"))))
        run.watch(min(EVERY_S, max(0.0, begun + harmed_s - time.monotonic())))
    end, harmed = run.position(), (run.position()["env_steps"] - at["env_steps"]) / (time.monotonic() - begun)
    run.watch(EVERY_S)
    quiet, lost = (before + speed(run, quiet_s)) / 2, run.gauge("rollout/lost") - lost
    trial.figures |= {"kills": kills, "noticed": int(lost), "quiet_steps_per_s": round(quiet, 1), "steps_per_s": round(harmed, 1),
                      "share": round(harmed / quiet, 3), "updates": end["updates"] - at["updates"]}
    trial.demand(kills >= harmed_s / EVERY_S - 1, f"only {kills} kills")
    trial.demand(lost >= 0.9 * kills - 1, f"{kills} workers were killed, {lost:g} are counted as lost")
    trial.demand(harmed >= LEAST_SHARE * quiet, f"{harmed:.1f} steps/s, the quiet run has {quiet:.1f}")
    trial.demand(end["updates"] > at["updates"], "no update was made meanwhile")


def speed(run: Run, seconds: float) -> float:
    """Environment steps a second over so long."""
    begun, at = time.monotonic(), run.position()["env_steps"]
    run.watch(seconds)
    return (run.position()["env_steps"] - at) / (time.monotonic() - begun)
