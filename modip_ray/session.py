"""One process's work on a run: phases and their time, progress line, metrics rows, checkpoints, and stopping in good order."""

from __future__ import annotations

import shlex
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from modip_ray.config import Config
from modip_ray.learning.checkpoint import begin, best_score, commit, commit_best, stage_best
from modip_ray.learning.evaluation import MODES, Job, Outcome, joined, modes_of
from modip_ray.learning.mirror import Mirroring
from modip_ray.learning.plan_probe import summary as plan_summary
from modip_ray.learning.system import Report, Status, System, means
from modip_ray.report.metrics import MetricsLog
from modip_ray.report.progress import Progress
from modip_ray.report.scores import number
from modip_ray.runfolder import RunError, RunFolder, command_line, git_commit, rss_mb
from modip_ray.tasks.scores import score_summary

PERIODIC = "eval on the way"        # phase, in one process: training waits meanwhile


class Stopped(SystemExit):
    """The user asked to stop; everything that can be saved is. No failure of what it comes out of, an environment's step say, and a script that lets it pass
    ends with exit code 0."""


class StopSignals:
    """The first Ctrl-C, SIGTERM or SIGHUP (unless that is ignored, as nohup has it) is noted, and `check` raises Stopped; the second Ctrl-C interrupts at
    once. Outside the main thread signals stay as they are.

    From the first one on there are `grace_s` seconds (0: no limit) until `saved` is called: then RunError is raised wherever the main thread is.
    """

    def __init__(self, grace_s: float):
        self.grace_s = grace_s
        self.asked = self.immediate = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGINT: self.note, signal.SIGTERM: self.note, signal.SIGALRM: self.too_late}
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                handlers[signal.SIGHUP] = self.note
            self.before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def note(self, number: int, frame: object) -> None:
        if self.asked:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.asked = True
        signal.setitimer(signal.ITIMER_REAL, self.grace_s)
        if self.immediate:
            raise Stopped

    def too_late(self, number: int, frame: object) -> None:
        raise RunError(f"stopped without a checkpoint: it was not written within {self.grace_s:g} s (log.grace_s); the same command goes on from the last one")

    def saved(self) -> None:
        """Nothing is left to be saved: time no longer matters."""
        if self.before:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def __exit__(self, *exc: object) -> None:
        self.saved()
        for signal_number, handler in self.before.items():
            signal.signal(signal_number, handler)

    def check(self) -> None:
        if self.asked:
            raise Stopped

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In the block a signal itself raises Stopped: for long calls that change nothing that is to be saved."""
        self.check()
        self.immediate = True
        try:
            yield
        finally:
            self.immediate = False


def score(cfg: Config, measures: Mapping[str, Sequence[float]], seeds: Sequence[int] | None = None) -> dict:
    """S of summary.json: see `score_summary`."""
    return score_summary(measures, cfg.task.family, seeds, cfg.eval.bootstrap)


def scores_of(cfg: Config, outcomes: Sequence[Outcome]) -> dict[str, dict]:
    """S by mode, for the modes that were evaluated."""
    found = {mode: joined(outcomes, mode) for mode in MODES}
    return {mode: score(cfg, measures, seeds) for mode, (measures, seeds) in found.items() if seeds}


class PhaseClock:
    """Wall seconds of each phase, earlier processes included. A phase inside another one is no part of that one's time."""

    def __init__(self, seconds: Mapping[str, float]):
        self.seconds, self.running, self.since = dict(seconds), list[str](), 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """The block's time is the phase's, also when it is left by a stop."""
        self.count()
        self.running.append(phase)
        try:
            yield
        finally:
            self.count()
            self.running.pop()

    def count(self) -> dict[str, float]:
        """The seconds as of now."""
        now = time.monotonic()
        if self.running:
            self.seconds[self.running[-1]] = self.seconds.get(self.running[-1], 0.0) + now - self.since
        self.since = now
        return {k: round(v, 2) for k, v in self.seconds.items()}


class Session:
    def __init__(self, cfg: Config, folder: RunFolder, stop: StopSignals):
        self.cfg, self.folder, self.stop = cfg, folder, stop
        self.git = git_commit()                                                     # of the code that runs: the checkout may go on meanwhile
        saved = folder.checkpoint.counters if folder.checkpoint is not None else {}
        self.phase: str = saved.get("phase", "data")
        self.timed = PhaseClock(saved.get("phase_s", {}))
        self.next_eval: int = saved.get("next_eval", 0)
        self.unreported: int | None = None                                          # when the one was due that is under way: a resumed run repeats it
        self.status = Status(saved.get("env_steps", 0), saved.get("updates", 0), saved.get("policy_updates", 0), False)
        earlier = (folder.path / "metrics.jsonl").exists()
        resumed_at = self.position() if earlier else None
        self.progress = Progress()
        self.log = MetricsLog(folder.path, cfg.log.tensorboard, cfg.log.wandb, cfg.log.wandb_project, cfg.to_dict(), resumed_at, self.progress.say)
        self.mirror = Mirroring(cfg.log.mirror, folder.path, cfg.log.keep_checkpoints) if cfg.log.mirror is not None else None
        self.system: System | None = None
        self.data_score: dict = {}
        self.pending: list[Status] = []
        self.logged_at = self.saved_at = time.monotonic()

    def tick(self, status: Status, done: int, **extras: float | str) -> None:
        """After each piece of work: show, log, save, and stop if asked to."""
        self.status = status
        for incident in status.incidents:
            self.incident(incident)
        if self.mirror is not None:
            self.incident(self.mirror.problem())
        self.pending.append(status)
        self.progress.update(done, **extras)
        now = time.monotonic()
        if now - self.logged_at >= self.cfg.log.every_s or status.done:
            self.write_train_row()
            self.write_system_row((self.system.gauges() if self.system is not None else {}) | (self.mirror.gauges() if self.mirror is not None else {}))
        self.stop.check()
        if now - self.saved_at >= self.cfg.log.checkpoint_every_s:
            self.save()

    def incident(self, text: str | None) -> None:
        if text is not None:
            self.progress.say(text)
            self.log.write({"kind": "incident", "text": text})

    # ---- rows --------------------------------------------------------------------------------------------------------------------------------

    def write_train_row(self) -> None:
        metrics, returns = means(s.metrics for s in self.pending), [r for s in self.pending for r in s.returns]
        self.pending = []
        if returns:
            metrics["rollout/return"] = sum(returns) / len(returns)
        self.log.write({"kind": "train", **self.position(), **metrics})
        self.distilled = metrics.get("distill/share_of_plans", self.distilled)

    distilled: float | None = None

    def position(self) -> dict[str, Any]:
        s = self.status
        return {"phase": self.phase, "env_steps": s.env_steps, "updates": s.updates, "policy_updates": s.policy_updates}

    def write_system_row(self, gauges: Mapping[str, float]) -> None:
        """Numbers of now: the system's gauges, the driver's memory, and what has gone wrong in the whole run."""
        self.logged_at, written = time.monotonic(), self.log.written
        facts = {"driver/rss_mb": rss_mb(), "run/incidents": written["incident"], "run/resumes": written["resume"]}
        self.log.write({"kind": "system", **self.position(), **gauges, **facts})

    def evaluated(self, episodes: int) -> None:
        """So many episodes of the final evaluation are done; the training roles are gone, so the row has no gauges of theirs."""
        self.progress.update(episodes)
        if time.monotonic() - self.logged_at >= self.cfg.log.every_s:
            self.write_system_row({"eval/episodes": episodes})

    def request_evaluation(self, jobs: Sequence[Job]) -> bool:
        """As `System.request_evaluation` (serially it is made here and now); with log.keep_best the weights that are evaluated are put by."""
        if jobs and self.cfg.one_process:
            self.progress.say(f"evaluating {sum(len(job.seeds) for job in jobs)} episodes; in one process training waits meanwhile")
        with self.stop.at_once(), self.timed(PERIODIC) if self.cfg.one_process else nullcontext():
            begun = self.system.request_evaluation(jobs)
        if jobs and begun:                                                          # of no jobs there will be no score
            self.unreported = self.next_eval                                        # one at a time; that before, if any, was given up
            if self.cfg.log.keep_best:
                self.candidate = stage_best(self.save())
        return begun

    candidate: Path | None = None

    def schedule_evaluation(self) -> None:
        """When the next one is due, by the step that the run is at; one that is overdue stays so. The settings may have changed since a checkpoint."""
        every = self.cfg.eval.every_steps
        due = (self.status.env_steps // every + 1) * every if every else 0
        self.next_eval = min(self.next_eval or due, due)

    def keep_if_best(self, score: float) -> None:
        """`score`: of the evaluation that was asked for last."""
        if self.candidate is not None and score > best_score(self.folder.checkpoints):
            self.progress.say(f"best so far, {number(score)}: {commit_best(self.candidate, score)}")
        self.candidate = None

    def record(self, reports: Sequence[Report]) -> None:
        """Rows of finished evaluations: scores, diagnostics, timings."""
        for report in reports:
            if report.outcomes:
                self.unreported = None
            at = {"env_steps": report.env_steps, "updates": report.updates}
            for text in report.incidents:
                self.incident(text)
            for fault in (fault for outcome in report.outcomes for fault in outcome.faults):
                self.incident(f"evaluation: {fault}; the episode was begun anew in a new environment")
            for mode, found in scores_of(self.cfg, report.outcomes).items():
                self.log.write({"kind": "eval", "mode": mode, **at, **found})
                self.progress.scores(**{mode: found["mean"]})
                if mode == modes_of(self.cfg)[-1]:
                    self.keep_if_best(found["mean"])
            if report.diagnostics:
                shares = {} if self.distilled is None or self.phase == "pretrain" else {"plan_share_distilled": self.distilled}
                plans = plan_summary(outcome.plans for outcome in report.outcomes)
                phase = "pretrain" if report.env_steps == 0 else "online"
                self.log.write({"kind": "diagnostics", "phase": phase, **at, **report.diagnostics, **plans, **shares})
            self.write_timings()

    def write_timings(self) -> None:
        for role, (snapshot, workers) in (self.system.timings() if self.system is not None else {}).items():
            self.log.write({"kind": "timing", "role": role, "workers": workers, **snapshot})

    # ---- checkpoints -------------------------------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """A checkpoint of everything, after the rows of what it holds."""
        if self.pending:
            self.write_train_row()
        folder = begin(self.folder.checkpoints)
        try:
            counters = {"phase": self.phase, **self.system.save(folder), "phase_s": self.timed.count(),
                        "next_eval": self.next_eval if self.unreported is None else self.unreported}
            final = commit(folder, counters, self.cfg.log.keep_checkpoints)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)                               # a full disk gets its room back
            raise
        self.saved_at = time.monotonic()
        self.write_timings()
        if self.mirror is not None:
            self.mirror.offer(final)
        return final

    def stopped(self) -> None:
        """Save what training has not saved yet, and say how the run goes on."""
        if self.system is not None and self.phase in ("pretrain", "online"):
            self.save()
        self.stop.saved()
        self.progress.finish("stopped")
        where = "" if self.cfg.run_dir else f" run_dir={shlex.quote(str(self.folder.path))}"
        at = f"{self.status.env_steps:,} environment steps and {self.status.updates:,} updates"
        print(f"stopped at {at}; the same command resumes: {command_line()}{where}", flush=True)

    def broken(self) -> None:
        """A process of the run is beyond help: what the others hold is saved, unless that needs the lost one."""
        if self.system is not None and self.phase in ("pretrain", "online"):
            with suppress(RunError):
                self.save()

    def enter(self, phase: str) -> None:
        """The run goes over to a phase: what comes next, and a checkpoint that says so."""
        self.begin(phase)
        self.save()

    def begin(self, phase: str) -> None:
        self.phase = phase
        self.log.write({"kind": "phase", **self.position()})

    def close(self) -> None:
        self.stop.saved()
        if self.mirror is not None:
            self.incident(self.mirror.finish())
        self.log.close()
