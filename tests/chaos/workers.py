"""kill -9 of a random rollout worker every few seconds: the run goes on, at a speed that is compared with a quiet run of the same."""

from __future__ import annotations

import time

from tests.chaos.harness import Run, Trial, hurt
from tests.chaos.ledger import Ledger

EVERY_S = 5.0
LEAST_SHARE = 0.7                   # of the quiet run's environment steps a second


def check_workers(trial: Trial) -> None:
    """The demo. In fast mode one run, first quiet and then harmed; else a run each, the quiet one first."""
    quiet_s, harmed_s = trial.pick((10.0, 15.0), (150.0, 300.0))
    run = trial.demo("run", log__audit=True)
    kills = 0
    with run, Ledger(run.path) as ledger:
        run.wait_for_steps(1000)
        quiet = speed(run, quiet_s)
        deadline, begun, at = time.monotonic() + harmed_s, time.monotonic(), run.position()
        while time.monotonic() < deadline:
            kills += hurt(trial.rng.choice(run.wait("a worker", lambda: run.processes().get("rollout"))))
            run.watch(min(EVERY_S, max(0.0, deadline - time.monotonic())))
        lasted, end = time.monotonic() - begun, run.position()
        harmed = (end["env_steps"] - at["env_steps"]) / lasted
        status = run.stop()
        audit = ledger.check(trial)
    lost = run.gauge("rollout/lost")
    trial.figures |= {"kills": kills, "noticed": int(lost), "quiet_steps_per_s": round(quiet, 1), "steps_per_s": round(harmed, 1),
                      "share": round(harmed / quiet, 3), "updates": end["updates"], "job_restarts": len(run.rows("resume"))}
    trial.demand(kills >= harmed_s / EVERY_S - 1, f"only {kills} kills")
    trial.demand(lost >= 0.9 * kills - 1, f"{kills} workers were killed, {lost:g} are counted as lost")
    trial.demand(harmed >= LEAST_SHARE * quiet, f"{harmed:.1f} steps/s, the quiet run has {quiet:.1f}")
    trial.demand(audit.transitions >= end["env_steps"], f"{end['env_steps']} steps are counted, {audit.transitions} are in the journal")
    trial.demand(end["updates"] > at["updates"], "no update was made meanwhile")
    trial.demand(status == 0 and not run.rows("resume"), f"exit status {status}, {len(run.rows('resume'))} restarts of the job")


def speed(run: Run, seconds: float) -> float:
    """Environment steps a second over so long."""
    begun, at = time.monotonic(), run.position()["env_steps"]
    run.watch(seconds)
    return (run.position()["env_steps"] - at) / (time.monotonic() - begun)
