"""Short speed measurements, each beside a reference measured in the same run and the newest earlier result: a table and a JSON file. Gates nothing.

`modip bench {planner,learner,replay,envs,weights,e2e,channel,scale,all} [--json FILE]`. e2e, channel and scale start Ray. To add a group of measurements,
write a function (Setting) -> list[Row] and decorate it with @bench("name").
"""

from __future__ import annotations

import argparse
import copy
import json
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from modip_ray.bench import history, kernels
from modip_ray.bench.replay import gather, resume
from modip_ray.bench.rows import ACTION_DIM, OBS_DIM, Row, Setting, compared
from modip_ray.config import Config, ConfigError, load, nearest, task_names
from modip_ray.learning.env_source import env_factory
from modip_ray.learning.learner import Learner
from modip_ray.learning.replay import Segment
from modip_ray.model.hardware import prepare_process
from modip_ray.output_file import check_output
from modip_ray.planning.planner import Planner
from modip_ray.runfolder import command_line, git_commit, machine, versions
from modip_ray.tasks.env_group import EnvGroup

MUJOCO = ("halfcheetah", "hopper", "walker2d")      # families whose environments are fast
PLAN_ROWS = (1, 8, 16, 64)
MATRIX = 768                                        # size of the square matrix product that stands for the machine's peak

Bench = Callable[[Setting], list[Row]]
BENCHES: dict[str, Bench] = {}


def bench(name: str) -> Callable[[Bench], Bench]:
    def register(function: Bench) -> Bench:
        BENCHES[name] = function
        return function
    return register


def flops(function: Callable[[], object]) -> int:
    """Floating point operations of the matrix products in one call (two a multiply-add), backward passes included."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def matrix_product() -> Callable[[], object]:
    a, b, out = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX), torch.empty(MATRIX, MATRIX)
    return lambda: torch.mm(a, b, out=out)


@bench("planner")
def planner(s: Setting) -> list[Row]:
    """Plans a second by rows of a call, and the share of the matrix-product peak that a call of the demo's size reaches."""
    plan, rng = Planner(s.cfg, s.agent), np.random.default_rng(0)

    def call(rows: int) -> Callable[[], object]:
        obs, reset = rng.standard_normal((rows, OBS_DIM), dtype=np.float32), np.zeros(rows, bool)
        return lambda: plan.plan(obs, range(rows), reset)

    demo = s.cfg.rollout.least * s.cfg.rollout.envs_per_worker
    sizes = sorted({*PLAN_ROWS, demo})
    *seconds, product = s.medians(*(call(n) for n in sizes), matrix_product())
    rate = {n: n / t for n, t in zip(sizes, seconds, strict=True)}
    peak, reached = 2 * MATRIX**3 / product / 1e9, flops(call(demo)) / (demo / rate[demo]) / 1e9
    return [compared("planner.plans_per_s", rate[demo], "plans/s", rate[1], f"1 row a call, not {demo}"),
            *(compared(f"planner.plans_per_s.rows_{n}", rate[n], "plans/s", rate[1], "1 row a call") for n in PLAN_ROWS),
            compared("planner.roofline", reached, "GFLOP/s", peak, f"a {MATRIX}x{MATRIX} float32 matrix product; {demo} rows a call"),
            *kernels.precision_and_compilation(s), *kernels.tails(s)]


@bench("learner")
def learner(s: Setting) -> list[Row]:
    """Milliseconds of an update, against those that its matrix products would take at the peak."""
    learn, model_batch, policy_batch = Learner(s.cfg, copy.deepcopy(s.agent)), s.model_batch(), s.policy_batch()
    updates = {"model": lambda: learn.update_model(model_batch), "policy": lambda: learn.update_policy(policy_batch, distil=True)}
    *seconds, product = s.medians(*updates.values(), matrix_product())
    peak = 2 * MATRIX**3 / product
    rows = [compared(f"learner.{name}_update_ms", 1e3 * t, "ms", 1e3 * flops(update) / peak, "its matrix products at the measured peak")
            for (name, update), t in zip(updates.items(), seconds, strict=True)]
    return rows + kernels.targets(s) + kernels.compilation(s)


@bench("replay")
def replay(s: Setting) -> list[Row]:
    """Gathering a batch against copying as many bytes; and storing a segment."""
    batch = s.model_batch()
    ours, copied = s.medians(s.model_batch, copier(batch))
    chunk, chunk_copied = s.medians(s.policy_batch, copier(s.policy_batch()))
    online = s.replay.online
    n = min(s.cfg.rollout.segment_length, online.capacity)
    segment = Segment(np.zeros((n + 1, OBS_DIM), np.float32), np.zeros((n, ACTION_DIM), np.float32), np.ones(n, np.float32), False)
    add, _ = s.medians(lambda: online.add(segment), lambda: None)
    size = f"numpy copy of the same {sum(v.nbytes for v in batch.values()) // 1024} KiB, warm"
    return [*gather(s), *resume(s), compared("replay.batch_vs_memcpy", 1e3 * ours, "ms", 1e3 * copied, size),
            compared("replay.chunks_vs_memcpy", 1e3 * chunk, "ms", 1e3 * chunk_copied, "numpy copy of the same bytes"),
            Row("replay.add_transitions_per_s", n / add, "1/s")]


def copier(batch: dict[str, np.ndarray]) -> Callable[[], object]:
    source = np.zeros(sum(v.nbytes for v in batch.values()), np.uint8)
    target = np.empty_like(source)
    return lambda: np.copyto(target, source)


@bench("envs")
def envs(s: Setting) -> list[Row]:
    """Steps a second of a group as rollout workers step it, against one bare environment with the same actions; each environment of the tasks once."""
    rows, first = [], {task.split("-")[0]: task for task in reversed(task_names())}
    for name, task in sorted(first.items()):
        try:
            rows.append(env_row(s, name, load(overrides=[f"task={task}"])))
        except ConfigError as error:                                                # a package that only this environment needs is missing
            print(f"envs.steps_per_s.{name}: not measured: {error}")
    return rows


def env_row(s: Setting, name: str, cfg: Config, steps: int = 32) -> Row:
    factory = env_factory(cfg.task)
    slow = cfg.task.family not in MUJOCO                                           # seconds to build, milliseconds a step: fewer of both
    n, steps = (2, steps // 4) if slow else (s.cfg.rollout.envs_per_worker, steps)
    group, bare = EnvGroup(factory, n, cfg.task.max_episode_steps, 0), factory()
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, n, 1, group.action_dim)).astype(np.float32)

    def step_group() -> None:
        for chunk in actions:
            group.step(chunk)

    def step_bare() -> None:
        for action in actions.reshape(-1, group.action_dim):
            if any(bare.step(action)[2:4]):
                bare.reset()

    group.reset()
    bare.reset(seed=0)
    ours, theirs = s.medians(step_group, step_bare)
    group.close()
    bare.close()
    return compared(f"envs.steps_per_s.{name}", steps * n / ours, "steps/s", steps * n / theirs, f"bare {cfg.task.env.rpartition(':')[2]}")


@bench("weights")
def weights(s: Setting) -> list[Row]:
    """Publishing and loading weights as one flat vector, against a pickled state_dict."""
    source, target = s.agent, s.agent.frozen_copy()
    ours, theirs = s.medians(lambda: target.load_flat(source.flat()), lambda: target.load_state_dict(pickle.loads(pickle.dumps(source.state_dict()))))
    return [compared("weights.publish_ms", 1e3 * ours, "ms", 1e3 * theirs, f"torch state_dict, pickled; {source.flat().nbytes / 2**20:.1f} MiB")]


@bench("e2e")
def e2e(s: Setting) -> list[Row]:
    """Environment steps a second of each stage alone and of all together, processor time of a step by role; and Ray against one process, learners idle."""
    from modip_ray.bench.e2e import STAGES, measure, overhead
    seconds = 8 * s.seconds
    found = {stage: measure(s.cfg, stage, seconds) for stage in STAGES}
    together, cost = found["all"].steps_per_s, found["all"].processor_ms
    alone = {stage: m.steps_per_s for stage, m in found.items() if stage != "all"}
    slowest, total, cores = min(alone, key=alone.__getitem__), sum(cost.values()), machine()["cpus"]
    serial, ray = overhead(s.cfg, seconds / 2)
    return [compared("e2e.steps_per_s", together, "1/s", alone[slowest], f"the slowest stage alone: {slowest}"),
            *(compared(f"e2e.steps_per_s.{stage}_only", rate, "1/s", together, "all together") for stage, rate in alone.items()),
            *(compared(f"e2e.processor_ms_per_step.{role}", ms, "ms", total, "all roles together") for role, ms in sorted(cost.items())),
            compared("e2e.processors_busy", total * together / 1e3, "processors", cores, "all there are"),
            compared("e2e.ray_ms_per_env_step", ray, "ms", serial, "one process; learners idle"),
            Row("e2e.ray_overhead_ms_per_env_step", ray - serial, "ms")]


@bench("channel")
def channel(s: Setting) -> list[Row]:
    """A query to the planner on a socket, against the same as a call of a Ray actor."""
    from modip_ray.bench.channel import costs
    socket, call = costs(s.cfg, 2 * s.seconds)
    return [compared("channel.round_trip_ms", socket.round_trip, "ms", call.round_trip, "a Ray actor's method"),
            compared("channel.processor_ms", socket.processor, "ms", call.processor, "a Ray actor's method; both ends together")]


@bench("scale")
def scale(s: Setting) -> list[Row]:
    """Real actors with a fake accelerator (10 ms + 0.05 ms a row) and fake environments (5 ms a step) against the smaller of both limits; and the model."""
    from modip_ray.bench.scale import ENVS, MEASURED, Fleet, measure, predict, prediction_table, predictions
    rows = []
    for workers in MEASURED:
        fleet = Fleet(workers, ENVS // workers)
        rate, batch, answer_ms = measure(s.cfg, fleet, 6 * s.seconds)
        name, model = f"scale.workers_{workers}", predict(fleet)
        in_turns = min(fleet.env_limit, fleet.loop_limit)
        rows += [compared(f"{name}.steps_per_s", rate, "1/s", fleet.ideal, f"ideal: workers {fleet.env_limit:.0f}, planner {fleet.planner_limit:.0f}"),
                 compared(f"{name}.steps_per_s_in_turns", rate, "1/s", in_turns, "ideal, half of the environments planned while the others step"),
                 compared(f"{name}.steps_per_s_vs_model", rate, "1/s", model.steps_per_s, "scale_model.py"),
                 compared(f"{name}.rows_per_batch", batch, "rows", model.rows_per_batch, "scale_model.py"),
                 compared(f"{name}.answer_ms", answer_ms, "ms", 1e3 * model.answer_s, "scale_model.py")]
    fleet = Fleet(8, ENVS // 8, groups=1)
    rows.append(compared("scale.workers_8.one_group_steps_per_s", measure(s.cfg, fleet, 6 * s.seconds)[0], "1/s",
                         predict(fleet).steps_per_s, "scale_model.py; each worker waits while the planner plans"))
    found = predictions()
    print(prediction_table(found, s.cfg.online.updates_per_step) + "\n", flush=True)
    return rows + [compared(f"scale.model.workers_{fleet.workers}.planners_{fleet.planners}", p.steps_per_s, "1/s", fleet.ideal,
                            f"ideal; {p.rows_per_batch:.0f} rows a batch, {1e3 * p.answer_s:.1f} ms to an answer, {p.saturated} limits") for fleet, p in found]


def table(rows: Sequence[Row], before: Mapping[str, history.Earlier] | None = None) -> str:
    """Aligned columns: name, value, unit, reference, ratio, the ratio (or value, where there is none) of an earlier run, what the reference is."""
    def text(x: float | None) -> str:
        return "" if x is None else f"{x:.4g}" if abs(x) < 1e4 else f"{x:.0f}"

    def was(row: Row) -> str:
        old = (before or {}).get(row.name)
        return text(old.figure) if old is not None and old.unit == row.unit else ""

    lines = [("measurement", "value", "unit", "reference", "ratio", "before", "against"),
             *((r.name, text(r.value), r.unit, text(r.reference), text(r.ratio), was(r), r.against) for r in rows)]
    justify = (str.ljust, str.rjust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust)
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(j(cell, w) for j, cell, w in zip(justify, line, width, strict=True)).rstrip() for line in lines)


def run_bench(what: Sequence[str], json_path: str | Path | None = None, seconds: float = 1.0, overrides: Sequence[str] = (),
              tdmpc2: Path | None = None, processor_time: bool = False) -> list[Row]:
    """Measure the groups in `what` ("all": every one), print a table each, write JSON when asked. ValueError on an unknown group.

    seconds: time for each timed function; overrides: dotted settings that differ from configs/default.yaml.
    tdmpc2: a checkout of TD-MPC2 that planner and learner are also timed against.
    processor_time: calls are timed by the processor time of this process, which other work on the machine hardly changes. Not for a GPU, nor for e2e and scale.
    """
    for name in what:
        if name not in (*BENCHES, "all"):
            raise ValueError(f"unknown benchmark {name!r}{nearest(name, list(BENCHES))}; known: {', '.join(BENCHES)}, all")
    names = list(BENCHES) if "all" in what else list(dict.fromkeys(what))
    setting = Setting(load(overrides=overrides), seconds, time.process_time if processor_time else time.perf_counter)
    rows: list[Row] = []
    before, threads = history.earlier(), torch.get_num_threads()
    prepare_process(1)
    try:
        for name in names:
            found = BENCHES[name](setting)
            if tdmpc2 is not None and name in ("planner", "learner"):
                from modip_ray.bench.tdmpc2 import against
                found += against(setting, tdmpc2, name)
            print("\n".join([table(found, before), *history.regressions(found, before)]) + "\n", flush=True)
            rows += found
    finally:
        torch.set_num_threads(threads)
    if json_path is not None:
        save(rows, Path(json_path))
    return rows


def save(rows: Sequence[Row], path: Path) -> None:
    """The rows as JSON, with machine, git commit, versions and command."""
    report = {"rows": [asdict(r) for r in rows], "machine": machine(), "git": git_commit(), "versions": versions(), "command": command_line()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("modip bench", description="Short speed measurements, each beside a reference measured in the same run.")
    p.add_argument("what", nargs="*", default=["all"], help=f"{', '.join(BENCHES)} or all")
    p.add_argument("--json", metavar="FILE", help="write the rows there, with machine, git commit and versions")
    p.add_argument("--seconds", type=float, default=1.0, help="time for each timed function (default 1)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting that differs from the defaults, e.g. planner.gaussian=128")
    p.add_argument("--processor-time", action="store_true", help="time calls by processor time: for a machine that does other work, too")
    p.add_argument("--against", type=Path, metavar="PATH", help="a checkout of TD-MPC2: planner and learner at its shapes, by turns with its own")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        check_output(Path(args.json) if args.json else None)
        run_bench(args.what, args.json, args.seconds, args.set, args.against, args.processor_time)
    except ValueError as error:                     # an unknown group or setting: the message says it all
        parser().error(str(error))


if __name__ == "__main__":
    main()
