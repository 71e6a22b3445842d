"""Full speed for long: does any process grow after the buffers are full? Straight lines through memory over time, by role."""

from __future__ import annotations

import time

import numpy as np
import psutil

from tests.chaos.harness import Run, Trial

CAPACITY = 3000                     # transitions of the replay, so that it is full soon
KEPT = 60                           # samples of a role in the figures
MB = 2.0**20


def check_soak(trial: Trial) -> None:
    """Memory of a role: what its processes hold themselves (resident less shared: pages of the object store count once, in `object_store_mb`)."""
    run = trial.demo("run", replay__capacity=CAPACITY, log__checkpoint_every_s=60.0, eval__every_steps=5000)
    with run:
        watch_memory(run, trial)
        trial.stop(run)


def watch_memory(run: Run, trial: Trial) -> None:
    settle, seconds, limit, every = trial.pick((2.0, 20.0, 1000.0, 1.0), (300.0, 3600.0, 20.0, 2.0))
    run.wait("the replay to be full", lambda: run.gauge("replay/transitions") >= CAPACITY, 600.0)
    run.watch(settle)                                                               # allocators, first checkpoints and evaluations
    begun, at, samples = time.monotonic(), run.position(), {}
    while time.monotonic() - begun < seconds:
        for role, mb in memory(run).items():
            samples.setdefault(role, []).append((round(time.monotonic() - begun, 1), round(mb, 2)))
        run.watch(every)
    lasted, end = time.monotonic() - begun, run.position()
    fits = {role: line(found) for role, found in samples.items() if len(found) > 5}
    trial.figures |= {"seconds": round(lasted, 1), "steps_per_s": round((end["env_steps"] - at["env_steps"]) / lasted, 1),
                      "updates_per_s": round((end["updates"] - at["updates"]) / lasted, 2),
                      "worst_mb_per_h": max(fit["mb_per_h"] for fit in fits.values()), "limit_mb_per_h": limit, "fits": fits,
                      "samples": {role: found[::max(1, len(found) // KEPT)] for role, found in samples.items()}}
    for role, fit in fits.items():
        print(f"        {role:<15} {fit['mean_mb']:>8.1f} MB  {fit['mb_per_h']:>+9.2f} MB/h  (standard error {fit['error']:.2f})")
        trial.demand(fit["mb_per_h"] < limit, f"{role} grows by {fit['mb_per_h']:.1f} MB/h, allowed are {limit:g}")
    trial.demand({"driver", "replay", "planner", "learner_model", "learner_policy", "rollout"} <= fits.keys(), f"only {sorted(fits)} were seen")


def memory(run: Run) -> dict[str, float]:
    """MB by role, of all its processes together; a role one of whose processes is gone this moment is left out."""
    found = {}
    for role, pids in run.processes().items():
        try:
            infos = [psutil.Process(pid).memory_info() for pid in pids]
        except psutil.NoSuchProcess:
            continue
        found[role] = sum(info.rss - info.shared for info in infos) / MB
    return found


def line(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Least squares of MB over seconds: slope and its standard error in MB an hour, and the mean."""
    t, mb = np.array(samples).T
    (slope, _), covariance = np.polyfit(t / 3600.0, mb, 1, cov=True)
    return {"mb_per_h": round(float(slope), 2), "error": round(float(np.sqrt(covariance[0, 0])), 2), "mean_mb": round(float(mb.mean()), 1)}
