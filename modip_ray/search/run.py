"""The driver of `modip tune`: one search in one folder, gone on with where it was left."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from ray import tune

from modip_ray.actors.cluster import Cluster, environment, nodes
from modip_ray.actors.placement import Demand, missing
from modip_ray.config import Config, ConfigError
from modip_ray.learning.checkpoint import write_synced
from modip_ray.runfolder import RunError, command_line, disk_errors, locked
from modip_ray.search import report
from modip_ray.search.report import TRIALS, TrialResult, read_rows, trial_number
from modip_ray.search.settings import differing, trial_settings
from modip_ray.search.space import check_space, pbt
from modip_ray.search.spec import Asha, Pbt, Search
from modip_ray.search.watch import TUNER, KeptRungs, KeptTuner, Lines, Rows, folder_name, kept_tuner, last_line, quiet, write_whole
from modip_ray.tune import MODIP

KINDS = {"choice": tune.choice, "grid": tune.grid_search, "uniform": lambda v: tune.uniform(*v), "loguniform": lambda v: tune.loguniform(*v),
         "quniform": lambda v: tune.quniform(*v), "randint": lambda v: tune.randint(*v)}
FREE = ("ray_address",)             # may differ when a search goes on
#: Tune's state is written this often, so that a killed driver repeats next to nothing; its loggers stay quiet.
TUNE_ENV = {"TUNE_GLOBAL_CHECKPOINT_S": "1", "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
            "RAY_AIR_NEW_OUTPUT": "0"}
BROKEN = (EOFError, pickle.UnpicklingError, json.JSONDecodeError)
RETRIES = 1                         # of a trial whose process or node dies, from its last checkpoint


def run_search(search: Search) -> dict[str, Any] | None:
    """Search, or go on searching, in search.out; returns what results.json holds (also for one that had finished), None where it was stopped.

    Raises ConfigError or RunError with what to do.
    """
    folder = search.folder
    space = param_space(search)
    scheduler = checked_scheduler(search, space)
    base = trial_settings(fixed(search, space)).cfg
    if search.metric.endswith("/normalized") and base.task.family is None:
        raise ConfigError(f"metric: got {search.metric!r}, but task.family is null, so there is no normalised score; use {search.metric.split('/')[0]}/mean")
    with opened(folder, search):
        found = report.read(folder)
        if found is not None and not any(t["error"] for t in found["trials"]):
            print(report.text_table(found))
            return found
        begun = time.monotonic()
        with started(search, base), environment(TUNE_ENV):
            write_synced(folder / "search.yaml", search.dump())
            tuner = restored(folder)
            if tuner is None:
                print(f"search {search.out}: {search.num_samples} samples, {search.scheduler.kind}, compared by {search.metric}", flush=True)
                tuner = fresh(search, space, scheduler, folder)
            else:
                print(f"search {search.out}: goes on from {folder / TRIALS}", flush=True)
            with sigterm_as_interrupt(), quiet():
                grid = tuner.fit()
        ended = [t.is_finished() for t in tune.ExperimentAnalysis(str(folder / TRIALS)).trials]     # results say "done" only where nothing came between
        if not all(ended) or len(ended) < drawn(search):
            print(f"stopped; the same command goes on: {command_line()}")
            return None
        trials = [trial_result(search, grid[i]) for i in range(len(grid))]
        found = report.summary(search, trials, time.monotonic() - begun)
        if found["best"] is None:
            raise RunError(f"{search.out}: no trial came to a report; the first error: {trials[0].error} (the same command tries them again)")
        report.write(folder, search, found, best_config(search, found, folder))
    print(f"\n{report.text_table(found)}\n\n{folder / 'results.md'}", flush=True)
    return found


# ---- what Tune is given ----------------------------------------------------------------------------------------------------------------------

def param_space(search: Search) -> dict[str, Any]:
    return search.params() | {key: KINDS[kind](values) for key, entry in search.search.items() for kind, values in entry.items()}


def drawn(search: Search) -> int:
    """Trials of a whole search: num_samples for every point of the grids."""
    return search.num_samples * math.prod(len(v) for entry in search.search.values() for kind, v in entry.items() if kind == "grid")


def fixed(search: Search, space: dict[str, Any]) -> dict[str, Any]:
    """The part of the space that is not drawn."""
    return {k: v for k, v in space.items() if k not in search.search}


def checked_scheduler(search: Search, space: dict[str, Any]) -> Any:
    """Tune's scheduler; ConfigError for a space that trials could not run with, or that cannot be perturbed."""
    s = search.scheduler
    if isinstance(s, Pbt):
        return pbt(space, perturbation_interval=s.perturbation_interval, quantile_fraction=s.quantile_fraction,
                   resample_probability=s.resample_probability, synch=s.synch)
    check_space(space)
    if isinstance(s, Asha):
        return tune.schedulers.ASHAScheduler(time_attr="training_iteration", max_t=search.iterations, grace_period=s.grace_period,
                                             reduction_factor=s.reduction_factor, brackets=s.brackets)
    return tune.schedulers.FIFOScheduler()


def fresh(search: Search, space: dict[str, Any], scheduler: Any, folder: Path) -> tune.Tuner:
    callbacks: list[tune.Callback] = [Lines(search.metric, search.mode, search.iterations), Rows(), KeptTuner(folder)]
    callbacks += [KeptRungs(scheduler)] if isinstance(search.scheduler, Asha) else []
    draws = tune.search.BasicVariantGenerator(random_state=search.seed, max_concurrent=search.max_concurrent or 0)
    kept = 4 + (search.scheduler.perturbation_interval if isinstance(search.scheduler, Pbt) else 0)       # a donor's must outlast the copying
    return tune.Tuner(
        MODIP, param_space=space,
        tune_config=tune.TuneConfig(metric=search.metric, mode=search.mode, num_samples=search.num_samples, scheduler=scheduler, search_alg=draws,
                                    reuse_actors=True, trial_dirname_creator=folder_name),
        run_config=tune.RunConfig(name=TRIALS, storage_path=str(folder), callbacks=callbacks, verbose=0, failure_config=tune.FailureConfig(RETRIES),
                                  checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1, num_to_keep=kept)))


def restored(folder: Path) -> tune.Tuner | None:
    """The search as its last process left it: finished trials stay, others go on from their last checkpoint, failed ones begin again."""
    path = folder / TRIALS
    if not tune.Tuner.can_restore(str(path)) or not any(path.glob("experiment_state-*.json")):            # killed before the first trial was drawn
        return None
    tuner, kept = path / TUNER, kept_tuner(folder)
    try:
        found = restore(path)
    except BROKEN as error:                                                         # Tune writes in place: it was killed while it did
        if not kept.is_file() or kept.read_bytes() == tuner.read_bytes():
            raise RunError(f"{path}: Tune's state of the search cannot be read ({type(error).__name__}: {error}); its trials are there, but the search cannot "
                           "go on: give another out=... to search anew") from error
        write_whole(tuner, kept.read_bytes())
        found = restore(path)
    write_whole(kept, tuner.read_bytes())
    return found


def restore(path: Path) -> tune.Tuner:
    return tune.Tuner.restore(str(path), trainable=MODIP, resume_unfinished=True, restart_errored=True)


# ---- folder, Ray, signals --------------------------------------------------------------------------------------------------------------------

@contextmanager
def opened(folder: Path, search: Search) -> Iterator[None]:
    """The search's folder for this process alone; ConfigError where it was begun with another search."""
    busy = "another process is searching in this folder; wait for it, stop it, or give another out=..."
    with locked(folder, "out", busy), disk_errors(folder, "the same command goes on"):
        saved = folder / "search.yaml"
        if saved.is_file():
            old, new = yaml.safe_load(saved.read_text()), yaml.safe_load(search.dump())
            changed = [k for k in differing(old, new) if k not in FREE]
            if changed:
                shown = "; ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed[:3])
                raise ConfigError(f"{folder}: was begun with another search ({shown}); give another out=..., or the fields as they were")
        yield


@contextmanager
def started(search: Search, cfg: Config) -> Iterator[None]:
    """Ray, and room in it for at least one trial."""
    none = {f"resources.{role}_{kind}": 0.0 for role in ("planner", "learner") for kind in ("cpus", "gpus")}
    cluster = Cluster(cfg.replace({**none, "resources.rollout_cpus": 0.0, "resources.placement": {}, "resources.ray_address": search.ray_address}))
    try:
        wanted = {k: v for k, v in (("CPU", search.cpus), ("GPU", search.gpus)) if v}
        lacking = missing([Demand("a trial", 1, wanted, {"CPU": "cpus", "GPU": "gpus"})], nodes())
        if lacking:
            raise ConfigError(f"Ray lacks resources for a trial: {'; '.join(lacking)}; lower them")
        yield
    finally:
        cluster.close()


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the search in good order, as Ctrl-C does with Tune."""
    before = signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- what came of it -------------------------------------------------------------------------------------------------------------------------

def trial_result(search: Search, result: tune.Result) -> TrialResult:
    folder = Path(result.path)
    checkpoint = result.checkpoint and str(Path(result.checkpoint.path).relative_to(search.folder))
    return TrialResult(trial_number(folder), folder, {k: (result.config or {}).get(k) for k in search.search}, read_rows(folder),
                       last_line(result.error) if result.error is not None else None, checkpoint)


def best_config(search: Search, found: dict[str, Any], folder: Path) -> Config:
    """The best trial's settings, with the data that it was trained on."""
    from modip_ray.search.trial import with_cache
    best = next(t for t in found["trials"] if t["trial"] == found["best"])
    settings = trial_settings(fixed(search, search.params()) | best["params"])
    return with_cache(settings.cfg, folder / TRIALS / "data", settings.start)
