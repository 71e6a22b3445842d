"""The whole system on one screen: data -> pretrain -> online -> evaluate -> report, resumed where it was left.

    rollout workers --observations--> planner <--weights-- learners (world model + critic; policy)
          |         <----plans------     |                    ^
          +--segments--> replay ---------+------batches-------+          evaluator: own environments, fixed seeds
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from modip_ray.config import Config
from modip_ray.learning.build import build_spec, check_device
from modip_ray.learning.collector import SegmentHook
from modip_ray.learning.env_source import check_family, spaces
from modip_ray.learning.env_source import env_factory as named_env_factory
from modip_ray.learning.evaluation import Job, Outcome, jobs_for, modes_of
from modip_ray.learning.offline_data import load_data, rolls_out, source_label
from modip_ray.learning.offline_rows import write_rows
from modip_ray.learning.system import Setup, System
from modip_ray.progress import ProgressLine
from modip_ray.report.scores import final_table, method_of
from modip_ray.runfolder import RoleLost, RunFolder, command_line, disk_errors, machine, run_path, versions
from modip_ray.session import Session, Stopped, StopSignals, score, scores_of
from modip_ray.start import adopt, flat
from modip_ray.tasks.envs import EnvFactory
from modip_ray.tasks.scores import measure

TICK_S = 1.0


def train(cfg: Config, env_factory: EnvFactory | None = None, segment_hook: SegmentHook | None = None) -> dict:
    """Train, or go on training, in cfg.run_dir; returns what summary.json holds (also for a run that had finished before).

    env_factory  : makes your own environment, in place of cfg.task.env; any picklable callable, a notebook's class included
    segment_hook : called in the rollout workers with every Segment before it is stored; returns the one to store
    Raises ConfigError, DataError, EnvError, CheckpointError or RunError with what to do; Stopped after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    factory = env_factory or named_env_factory(cfg.task)
    if env_factory is not None:
        cfg = cfg.replace({"task.env": callable_name(env_factory)})                 # what the run is of, and what `load` makes where it can be imported
    check_family(cfg.task)
    check_device(cfg)
    with RunFolder(cfg) as folder, disk_errors(folder.path), StopSignals(cfg.log.grace_s) as stop:
        summary = folder.finished_summary()
        if summary is not None:
            print(final_table(summary))
            print("this run has ended; a larger online.env_steps goes on with it")
            return summary
        session = Session(cfg, folder, stop)
        try:
            with session.timed("data"), stop.at_once():
                rows = offline_phase(session, factory)
            with session.timed("start"), stop.at_once():
                session.system = system = build_system(cfg, rows, factory, segment_hook, folder)
            if cfg.log.ray_metrics and not cfg.one_process:
                from modip_ray.actors.metrics import RaySink
                session.log.add(lambda: RaySink(folder.path.name, cfg.task.name))
            pretrain(session, system)
            online(session, system)
            summary = evaluate(session, system)
            folder.write_summary(summary)
            from modip_ray.report.page import write_report  # matplotlib, which a run that is stopped has no need of
            session.progress.say(f"report: {write_report([folder.path])}")
        except Stopped:
            session.stopped()
            raise
        except RoleLost:
            session.broken()
            raise
        finally:
            if session.system is not None:
                session.system.close()
            session.close()
        print(final_table(summary))
        return summary


def offline_phase(session: Session, factory: EnvFactory) -> list[Path]:
    """The data, read, scored and written as rows: the episodes themselves are not needed any longer."""
    cfg = session.cfg
    session.progress.start("data", cfg.data.transitions if rolls_out(cfg.data.source) else 0, "transitions")

    def progress(done: int, total: int) -> None:
        session.progress.update(done)
    data = load_data(cfg, factory, session.folder.path, progress, ProgressLine(cfg.data.source))
    session.data_score = score(cfg, measure(cfg.task.metric, data.episodes))
    session.progress.scores(data=session.data_score["mean"])
    session.progress.update(data.transitions)
    session.progress.finish(source_label(cfg))
    session.log.write({"kind": "data", **session.data_score, "transitions": data.transitions, "source": source_label(cfg)})
    return write_rows(data.episodes, cfg.critic.gamma, cfg.replay.shards, session.folder.path / "offline")


def build_system(cfg: Config, rows: list[Path], factory: EnvFactory, hook: SegmentHook | None, folder: RunFolder) -> System:
    _, low, high = spaces(factory)
    setup = Setup(cfg, build_spec(cfg, rows, low, high), rows, factory, hook, folder.checkpoint, folder=folder.path)
    if setup.checkpoint is None and cfg.pretrain.start is not None:
        setup = replace(setup, checkpoint=adopt(setup, folder.checkpoints))
    if cfg.method == "dppo":
        from modip_ray.baselines.dppo import DPPOSystem
        return DPPOSystem(setup)
    if cfg.serial:
        from modip_ray.learning.serial import SerialSystem
        return SerialSystem(setup)
    from modip_ray.actors.system import RaySystem
    return RaySystem(setup)


def pretrain(session: Session, system: System) -> None:
    """Offline updates of world model, critic and policy; the policy at the end is the BC baseline."""
    cfg, total = session.cfg, session.cfg.pretrain.updates + session.cfg.pretrain.policy_updates
    if session.phase not in ("data", "pretrain"):
        return
    session.begin("pretrain")
    with session.timed("pretrain"):
        session.progress.start("pretrain", total, "updates", session.status.updates + session.status.policy_updates)
        while not session.status.done:
            status = system.advance("pretrain", TICK_S, until=0)
            session.tick(status, status.updates + status.policy_updates, **losses(status.metrics))
        session.progress.finish()
        system.freeze_bc()
        session.next_eval = 1                                                       # a checkpoint before its report says that it is overdue
        session.request_evaluation(periodic_jobs(cfg) if cfg.eval.every_steps else [])
        session.next_eval = 0
        session.record(system.reports())
        session.enter("online")


def online(session: Session, system: System) -> None:
    """The planner collects, everything is updated on mixed replay, the evaluator measures beside."""
    cfg, steps = session.cfg, session.cfg.online.env_steps
    with session.timed("online"):
        session.phase = "online"
        session.schedule_evaluation()
        session.progress.start("online", steps, "steps", session.status.env_steps)
        done = False
        while not done:
            due = 0 < session.next_eval < steps
            if due and session.status.env_steps >= session.next_eval and session.request_evaluation(periodic_jobs(cfg)):
                session.next_eval = 0
                session.schedule_evaluation()
            status = system.advance("online", TICK_S, until=session.next_eval if 0 < session.next_eval < steps else steps)
            session.record(system.reports())
            session.tick(status, status.env_steps, **losses(status.metrics))
            done = status.done
        session.progress.finish()
    session.enter("evaluate")


def callable_name(factory: EnvFactory) -> str:
    """ "module:Class" of an environment of one's own, so that nothing takes it for the default task's."""
    return f"{getattr(factory, '__module__', '')}:{getattr(factory, '__qualname__', type(factory).__name__)}"


def evaluate(session: Session, system: System) -> dict:
    """Every way of acting on the same seeds; the summary."""
    cfg = session.cfg
    finished: list[int] = []
    with session.timed("eval"), session.stop.at_once():
        jobs = [job for mode in reversed(modes_of(cfg)) for job in jobs_for(mode, cfg.eval.episodes, cfg.eval.seed)]    # the planner's first: they take longest
        session.progress.start("evaluate", sum(len(job.seeds) for job in jobs), "episodes")

        def progress(outcome: Outcome) -> None:
            finished.append(len(outcome.returns))
            session.evaluated(sum(finished))
        report = system.evaluate(jobs, progress)
        session.record(system.reports())
        session.record([report])
        session.progress.finish()
    found = scores_of(cfg, report.outcomes)
    scores: dict[str, dict] = {"data": session.data_score, **{mode: found[mode] for mode in modes_of(cfg)}}
    return {"task": cfg.task.name, "method": cfg.method, "algorithm": method_of(flat(cfg)), "env_id": cfg.task.env,
            "run_dir": str(run_path(cfg) if cfg.run_dir else session.folder.path), "command": command_line(), "scores": scores,
            "env_steps": report.env_steps, "updates": report.updates,
            "wall_s": round(session.log.wall_s, 2), "phase_s": session.timed.count(), "versions": versions(),
            "git": session.git, "machine": machine(), "config_hash": cfg.hash()}


def periodic_jobs(cfg: Config) -> list[Job]:
    return [job for mode in modes_of(cfg) if mode != "bc" for job in jobs_for(mode, cfg.eval.every_episodes, cfg.eval.seed)]


def losses(metrics: dict[str, float]) -> dict[str, float]:
    """What the progress line shows of the metrics."""
    return {k.removeprefix("loss/"): v for k, v in metrics.items() if k in ("loss/value", "loss/policy")}
