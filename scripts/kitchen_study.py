"""How close modip_ray's kitchen is to D4RL's data, and what behaviour cloning of them reaches in it.

    python scripts/kitchen_study.py replay --file mini_kitchen_microwave_kettle_light_slider-v0.hdf5 --json results/tasks/kitchen_replay.json
    python scripts/kitchen_study.py noise  --file mini_kitchen_microwave_kettle_light_slider-v0.hdf5 --json results/tasks/kitchen_noise.json
    python scripts/kitchen_study.py speed  --json results/tasks/kitchen_speed.json
    python scripts/kitchen_study.py bc     --file mini_kitchen_microwave_kettle_light_slider-v0.hdf5 --json results/tasks/kitchen_bc.json [key=value ...]

FILE is D4RL's kitchen-complete-v0 (19 human demonstrations), under its official name. `bc` trains the project's own policy on FILE alone, with the
settings of configs/tasks/kitchen-complete.yaml, then BC below, then the key=value ones, and rolls it out.
"""
import argparse
import json
import resource
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import torch

from modip_ray.config import Config, ConfigError, load
from modip_ray.learning.build import fitted_agent
from modip_ray.learning.env_source import env_factory, spaces
from modip_ray.learning.evaluation import jobs_for, joined, run_job
from modip_ray.learning.learner import Learner
from modip_ray.learning.offline_data import load_data
from modip_ray.learning.replay_server import build_replay
from modip_ray.learning.updater import Updater
from modip_ray.runfolder import command_line, git_commit, machine, versions
from modip_ray.tasks.d4rl_data import DataError, read_d4rl
from modip_ray.tasks.kitchen import COMPLETE, JOINTS, NOISE, POSITIONS, START, Kitchen, kitchen_env, newly_done
from modip_ray.tasks.scores import score_summary

TOLERANCE = 2.0                     # noise amplitudes: one for the noise of the compared observation, one for that of the recorded start
FRESH_SEEDS = 5
STILL = 20                          # first observations of a demonstration, before the hand touches anything
HAND = "panda0_link7"
KETTLE = slice(23, 26)              # its place, m
OWN_STARTS = 2000
BC = ["eval.episodes=50"]         # all else as in configs/tasks/kitchen-complete.yaml


@dataclass(frozen=True)
class Demo:
    """One demonstration of the file. Row t: what was observed, and the action taken there."""

    observed: np.ndarray            # (T, 30) positions with noise
    actions: np.ndarray             # (T, 9)
    counts: np.ndarray              # (T,) the file's rewards: subtasks done now


@dataclass(frozen=True)
class Replay:
    """What a replay did: true positions (T, 30) and the hand's place (T, 3) at the record's rows, and the row at which each subtask was done."""

    positions: np.ndarray
    hand: np.ndarray
    done: dict[str, int]


def demos_of(path: Path) -> list[Demo]:
    """DataError for a file that is not a kitchen's."""
    episodes = read_d4rl(path).episodes
    if episodes[0].observations.shape[1] != 2 * POSITIONS:
        raise DataError(f"{path}: observations have {episodes[0].observations.shape[1]} columns, expected a D4RL kitchen file's {2 * POSITIONS}")
    return [Demo(e.observations[:-1, :POSITIONS].astype(np.float64), e.actions, e.rewards) for e in episodes]


# ---- replay ----------------------------------------------------------------------------------------------------------------------------------

def replay(env: Kitchen, demo: Demo, start: np.ndarray | None = None, velocity: np.ndarray | None = None, reference: str = "own",
           noise: np.ndarray | None = None, sync: int = 0) -> Replay:
    """The demonstration's actions from its recorded start. Nothing is ever set back on the record but by `start`, `velocity` and `sync`. What may differ:

    start     : (30,) other start positions;  velocity : (9,) start speeds of the robot (default: at rest)
    reference : what an action is relative to: the simulation's "own" position, or the "recorded" observation, as it was for the demonstrator:
                then the servos get the very targets that they got when the data were made
    noise     : (T, 30) added to the own position that an action is relative to
    sync      : every so many steps the simulation is put back on the record (0: never)
    """
    env.reset(seed=0)
    place(env, demo.observed[0] if start is None else start, velocity)
    positions, hand, done = [env.data.qpos.copy()], [env.data.body(HAND).xpos.copy()], {}
    for t in range(len(demo.actions) - 1):
        if sync and t and t % sync == 0:
            place(env, demo.observed[t], (demo.observed[t] - demo.observed[t - 1])[:JOINTS] / 0.08)
        env.observed = demo.observed[t].copy() if reference == "recorded" else env.data.qpos + (0.0 if noise is None else noise[t])
        *_, info = env.step(demo.actions[t])
        done |= {task: t + 1 for task in info["done"]}
        positions.append(env.data.qpos.copy())
        hand.append(env.data.body(HAND).xpos.copy())
    return Replay(np.array(positions), np.array(hand), done)


def place(env: Kitchen, positions: np.ndarray, velocity: np.ndarray | None) -> None:
    """Put robot and objects there; the objects at rest."""
    env.data.qpos[:], env.data.qvel[:] = positions, 0.0
    if velocity is not None:
        env.data.qvel[:JOINTS] = velocity
    mujoco.mj_forward(env.model, env.data)


def settled(demo: Demo) -> np.ndarray:
    """Start positions (30,) with less noise for the objects, which stand still at first: the middle of what was observed of them."""
    first = demo.observed[:STILL]
    middle = (first.min(0) + first.max(0)) / 2
    return np.concatenate([first[0, :JOINTS], middle[JOINTS:]])


def leaves(path: Replay, demo: Demo, amplitude: np.ndarray) -> dict | None:
    """First row where a position is more than TOLERANCE noise amplitudes off the record, and which; None: never."""
    off = np.abs(path.positions - demo.observed) / amplitude
    rows, columns = np.nonzero(off > TOLERANCE)
    return None if len(rows) == 0 else {"step": int(rows[0]), "column": int(columns[0]), "amplitudes": float(off[rows[0], columns[0]])}


def recorded_done(env: Kitchen, demo: Demo) -> dict[str, int]:
    """Row of the record at which each subtask is first done."""
    return {task: int(np.argmax(distances(env, demo.observed, task) < env.near)) for task in COMPLETE}


def distances(env: Kitchen, positions: np.ndarray, task: str) -> np.ndarray:
    """(T,) distance to a subtask's goal."""
    columns = env.columns[task]
    return np.linalg.norm(positions[:, columns] - env.goal[columns], axis=1)


def study_replay(path: Path) -> dict:
    demos, env = demos_of(path), kitchen_env(noise=False)
    amplitude = env.sensor_noise
    exact = [replay(env, d, reference="recorded") for d in demos]
    first_speed = [(d.observed[1] - d.observed[0])[:JOINTS] / 0.08 for d in demos]
    fresh = [np.random.default_rng([seed, i]).uniform(-1, 1, d.observed.shape) * amplitude for seed in range(FRESH_SEEDS) for i, d in enumerate(demos)]
    variants = {
        "own position, no noise": [replay(env, d) for d in demos],
        "own position, no noise, start at the environment's": [replay(env, d, start=START) for d in demos],
        "own position, no noise, start speed estimated": [replay(env, d, velocity=v) for d, v in zip(demos, first_speed, strict=True)],
        f"own position, fresh noise ({FRESH_SEEDS} seeds)": [replay(env, demos[i % len(demos)], noise=n) for i, n in enumerate(fresh)],
        **{f"own position, no noise, back on the record every {k} steps": [replay(env, d, sync=k) for d in demos] for k in (40, 80)},
        "recorded observation": exact,
        "recorded observation, objects start at the middle of their first ones": [replay(env, d, start=settled(d), reference="recorded") for d in demos],
        "recorded observation, start at the environment's": [replay(env, d, start=START, reference="recorded") for d in demos],
    }
    rows = []
    for name, paths in variants.items():
        left = [found["step"] for i, p in enumerate(paths) if (found := leaves(p, demos[i % len(demos)], amplitude))]
        scores = [len(p.done) for p in paths]
        rows.append({"action relative to": name, "replays": len(paths), "all four": sum(s == 4 for s in scores), "subtasks_mean": float(np.mean(scores)),
                     "missed": dict(Counter(task for p in paths for task in COMPLETE if task not in p.done)),
                     "left_the_record": len(left), "left_at_median_step": float(np.median(left)) if left else None})
    plain = variants["own position, no noise"]
    return {"tolerance_in_noise_amplitudes": TOLERANCE, "variants": rows, "demonstrations": [
        demo_row(env, *row, amplitude) for row in zip(demos, plain, exact, strict=True)],
        "rewards_of_the_file": file_rewards(env, demos)}


def demo_row(env: Kitchen, demo: Demo, plain: Replay, exact: Replay, amplitude: np.ndarray) -> dict:
    """One demonstration: plainly replayed, and replayed as it was recorded."""
    reached = recorded_done(env, demo)
    missed = {task: {"closest": float(distances(env, plain.positions, task).min()), "needed": env.near,
                     "hand_off_cm_when_the_record_has_it_done": 100 * float(np.linalg.norm(plain.hand[reached[task]] - exact.hand[reached[task]]))}
              for task in COMPLETE if task not in plain.done}
    off = np.abs(exact.positions - demo.observed) / amplitude
    return {"steps": len(demo.actions), "subtasks": len(plain.done), "leaves": leaves(plain, demo, amplitude), "missed": missed,
            "as_recorded": {"subtasks": len(exact.done), "leaves": leaves(exact, demo, amplitude),
                            "steps_late": {task: exact.done[task] - reached[task] for task in COMPLETE if task in exact.done},
                            "robot_worst_amplitudes": float(off[1:, :JOINTS].max()),
                            "objects_but_kettle_worst_amplitudes": float(off[:, JOINTS:KETTLE.start].max()),
                            "kettle_worst_mm": 1000 * float(np.linalg.norm((exact.positions - demo.observed)[:, KETTLE], axis=1).max())}}


def file_rewards(env: Kitchen, demos: list[Demo]) -> dict:
    """What the file's rewards are: counts at the row's own observation, or at the next; ever falling; and what `newly_done` makes of them."""
    counts = [sum((distances(env, d.observed, task) < env.near).astype(int) for task in COMPLETE) for d in demos]
    own = sum(int((c == d.counts).sum()) for c, d in zip(counts, demos, strict=True))
    following = sum(int((c[1:] == d.counts[:-1]).sum()) for c, d in zip(counts, demos, strict=True))
    rows = sum(len(c) for c in counts)
    after = [int((d.counts == len(COMPLETE)).sum()) - 1 for d in demos]
    converted = [newly_done(d.counts) for d in demos]
    from_env = [np.diff([0, *c]) for c in counts]                                   # newly done at each row's observation: the env's reward one step earlier
    return {"rows": rows, "equal_to_count_at_the_rows_own_observation": own, "equal_to_count_at_the_next_observation": following,
            "of_rows_with_a_next": rows - len(demos), "falls": sum(int((np.diff(d.counts) < 0).sum()) for d in demos),
            "converted_sums": Counter(float(c.sum()) for c in converted),
            "converted_equal_to_the_environments_rule": all((c[:-1] == f[1:]).all() for c, f in zip(converted, from_env, strict=True)),
            "rows_after_the_last_subtask": {"min": min(after), "max": max(after)}}


def print_replay(r: dict) -> None:
    print(f"{'an action is relative to':70s} {'replays':>7s} {'all 4':>5s} {'mean':>5s} {'left record (median step)':>26s}  missed")
    for v in r["variants"]:
        print(f"{v['action relative to']:70s} {v['replays']:7d} {v['all four']:5d} {v['subtasks_mean']:5.2f} "
              f"{v['left_the_record']:15d} ({v['left_at_median_step']})  {v['missed']}")
    for i, d in enumerate(r["demonstrations"]):
        a = d["as_recorded"]
        own, recorded = ("never" if x is None else f"at step {x['step']}, column {x['column']}" for x in (d["leaves"], a["leaves"]))
        print(f"demo {i:2d}: relative to the own position {d['subtasks']}/4, leaves {own}; to the recorded observation {a['subtasks']}/4, leaves {recorded}, "
              f"robot within {a['robot_worst_amplitudes']:.2f} amplitudes, objects but the kettle {a['objects_but_kettle_worst_amplitudes']:.2f}, "
              f"kettle {a['kettle_worst_mm']:.0f} mm")
        for task, m in d["missed"].items():
            print(f"         missed {task}: {m['closest']:.2f} from its goal at best, hand {m['hand_off_cm_when_the_record_has_it_done']:.0f} cm off then")
    print("rewards of the file:", r["rewards_of_the_file"])


# ---- noise -----------------------------------------------------------------------------------------------------------------------------------

def study_noise(path: Path) -> dict:
    """Spread of what the sensors add, per column: file, ours, FrankaKitchen-v1 as it comes; and the distribution of start states."""
    demos, still, noisy = demos_of(path), kitchen_env(noise=False), kitchen_env()
    exact = [replay(still, d, reference="recorded") for d in demos]
    file_noise = step_to_step([d.observed - p.positions for d, p in zip(demos, exact, strict=True)], [steady(p, still) for p in exact])
    ours = step_to_step([own_noise(noisy, d, seed) for seed, d in enumerate(demos)])
    at_rest = step_to_step([d.observed[:STILL] for d in demos])                     # assumes nothing; for the objects only
    library = step_to_step([library_noise(seed) for seed in range(5)])
    starts = np.array([d.observed[0] for d in demos])
    own_starts = np.array([noisy.reset(seed=s)[0][:POSITIONS] for s in range(OWN_STARTS)])
    columns = [{"column": i, "file": file_noise[i], "file_at_rest": at_rest[i] if i >= JOINTS else None, "ours": ours[i],
                "ours_over_file": ours[i] / file_noise[i], "FrankaKitchen-v1": library[i],
                "start_mean": {"file": starts[:, i].mean(), "ours": own_starts[:, i].mean()},
                "start_std": {"file": starts[:, i].std(), "ours": own_starts[:, i].std()},
                "start_range_file": [starts[:, i].min(), starts[:, i].max()]} for i in range(POSITIONS)]
    return {"statistic": "root mean square of (noise at a step - noise at the step before) / sqrt 2; noise = observation - true position, "
                         "the file's true positions being those of its replay, while they do not move (objects)", "columns": columns}


def step_to_step(sequences: list[np.ndarray], usable: list[np.ndarray] | None = None) -> list[float]:
    """Per column, from sequences (T, 30); usable (T-1, 30): steps that count (default: all)."""
    squares = np.concatenate([np.diff(s, axis=0) ** 2 for s in sequences])
    return np.sqrt(np.average(squares, axis=0, weights=None if usable is None else np.concatenate(usable)) / 2).tolist()


def steady(path: Replay, env: Kitchen) -> np.ndarray:
    """(T-1, 30) where the replay's position hardly changes: where an object moves, the replay's own error would count as noise. All of the robot's."""
    found = np.abs(np.diff(path.positions, axis=0)) < 0.1 * env.sensor_noise
    found[:, :JOINTS] = True
    return found


def own_noise(env: Kitchen, demo: Demo, seed: int) -> np.ndarray:
    """(T, 30) what our sensors add on a demonstration's actions."""
    env.reset(seed=seed)
    found = [env.observed - env.data.qpos]
    for action in demo.actions:
        env.step(action)
        found.append(env.observed - env.data.qpos)
    return np.array(found)


def library_noise(seed: int, steps: int = 100) -> np.ndarray:
    """(T, 30) the same of gymnasium-robotics' own environment with D4RL's noise ratios, at rest."""
    env = library_env()
    env.reset(seed=seed)
    found = []
    for _ in range(steps):
        obs = env.step(np.zeros(JOINTS))[0]["observation"]
        found.append(np.concatenate([obs[:JOINTS], obs[2 * JOINTS:2 * JOINTS + 21]]) - env.unwrapped.data.qpos)
    return np.array(found)


def library_env(**kwargs) -> gym.Env:
    import gymnasium_robotics  # noqa: F401  registers FrankaKitchen-v1
    return gym.make("FrankaKitchen-v1", tasks_to_complete=list(COMPLETE), robot_noise_ratio=NOISE, object_noise_ratio=NOISE, max_episode_steps=-1,
                    disable_env_checker=True, **kwargs)


def print_noise(r: dict) -> None:
    print("column      file   at rest      ours ours/file        v1 | start: mean file    ours  std file      ours")
    for c in r["columns"]:
        rest = "" if c["file_at_rest"] is None else f"{c['file_at_rest']:.6f}"
        print(f"{c['column']:6d} {c['file']:9.6f} {rest:>9s} {c['ours']:9.6f} {c['ours_over_file']:9.3f} {c['FrankaKitchen-v1']:9.6f} | "
              f"{c['start_mean']['file']:16.5f} {c['start_mean']['ours']:9.5f} {c['start_std']['file']:9.6f} {c['start_std']['ours']:9.6f}")


# ---- speed -----------------------------------------------------------------------------------------------------------------------------------

def study_speed(steps: int = 280, rounds: int = 5) -> dict:
    """Processor seconds of the same actions in FrankaKitchen-v1 and in ours, in turns; memory and time to make one."""
    before = rss_mb()
    begun = time.process_time()
    ours = kitchen_env()
    ours_made, ours_mb = time.process_time() - begun, rss_mb() - before
    begun = time.process_time()
    kitchen_env()
    ours_again, before = time.process_time() - begun, rss_mb()
    begun = time.process_time()
    library = library_env()
    library_made, library_mb = time.process_time() - begun, rss_mb() - before
    rates: dict[str, list[float]] = {"ours": [], "FrankaKitchen-v1": [], "mj_step alone": []}
    for k in range(rounds):
        actions = np.random.default_rng(k).uniform(-1, 1, (steps, JOINTS)).astype(np.float32)
        for name, env in (("ours", ours), ("FrankaKitchen-v1", library)):
            env.reset(seed=k)
            rates[name].append(steps / cpu_seconds(lambda env=env, actions=actions: [env.step(a) for a in actions]))
        controls = controls_of(ours, actions, k)
        rates["mj_step alone"].append(steps / cpu_seconds(lambda controls=controls, k=k: bare_steps(ours, controls, k)))
    return {"steps_per_cpu_second": {name: {"median": statistics.median(v), "all": v} for name, v in rates.items()},
            "make_cpu_s": {"ours": ours_made, "ours, second in a process": ours_again, "FrankaKitchen-v1 (after ours)": library_made},
            "resident_mb_added": {"ours": ours_mb, "FrankaKitchen-v1 (after ours)": library_mb}}


def controls_of(env: Kitchen, actions: np.ndarray, seed: int) -> np.ndarray:
    env.reset(seed=seed)
    controls = []
    for action in actions:
        env.step(action)
        controls.append(env.data.ctrl.copy())
    return np.array(controls)


def bare_steps(env: Kitchen, controls: np.ndarray, seed: int) -> None:
    env.reset(seed=seed)
    for control in controls:
        env.data.ctrl[:] = control
        mujoco.mj_step(env.model, env.data, nstep=40)


def cpu_seconds(function) -> float:
    begun = time.process_time()
    function()
    return time.process_time() - begun


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def print_speed(r: dict) -> None:
    for name, v in r["steps_per_cpu_second"].items():
        print(f"{name:20s} {v['median']:7.0f} steps a processor second  ({', '.join(f'{x:.0f}' for x in v['all'])})")
    print("making one, s:", r["make_cpu_s"], " resident MB:", r["resident_mb_added"])


# ---- behaviour cloning -----------------------------------------------------------------------------------------------------------------------

def study_bc(path: Path, overrides: list[str]) -> dict:
    """Train the diffusion policy on the file alone, as the offline phase of a run does, and evaluate it as `policy alone`."""
    cfg = load(overrides=["task=kitchen-complete", *BC, *overrides]).replace({"data.source": str(path)})
    torch.set_num_threads(cfg.resources.torch_threads)
    factory = env_factory(cfg.task)
    data = load_data(cfg, factory, Path())
    _, low, high = spaces(factory)
    agent = fitted_agent(cfg, data.episodes, low, high)
    updater, replay_server = Updater(cfg, Learner(cfg, agent, cfg.seed)), build_replay(cfg, data.episodes)
    total, begun, cpu = cfg.pretrain.policy_updates, time.monotonic(), time.process_time()
    losses = {}
    for update in range(1, total + 1):
        updater.update("policy", replay_server.sample("policy"))
        if update % max(total // 20, 1) == 0:
            losses[update] = updater.take_metrics()["loss/policy"]
            print(f"{update:,} updates, loss {losses[update]:.5f}, {(time.monotonic() - begun) / 60:.1f} min", flush=True)
    wall, cpu = time.monotonic() - begun, time.process_time() - cpu
    outcomes = [run_job(cfg, agent, factory, job, 0, None) for job in jobs_for("policy", cfg.eval.episodes, cfg.eval.seed)]
    measures, seeds = joined(outcomes, "policy")
    return {"updates": total, "minutes": wall / 60, "cpu_minutes": cpu / 60, "loss": losses, **normaliser(cfg, agent),
            "scores": score_summary(measures, "kitchen", seeds),
            "settings": {"policy": cfg.to_dict()["policy"], "obs_std_floor": cfg.world_model.obs_std_floor, "seed": cfg.seed}}


def normaliser(cfg: Config, agent) -> dict:
    std, floor = agent.normalizer.obs_std.numpy()[:POSITIONS], np.float32(cfg.world_model.obs_std_floor)
    return {"obs_std_floor": float(floor), "columns_at_the_floor": np.flatnonzero(std <= floor).tolist()}


def print_bc(r: dict) -> None:
    s = r["scores"]
    f = s["also"]["all four"]
    print(f"{r['updates']:,} updates, {r['minutes']:.1f} min ({r['cpu_minutes']:.1f} of processor), obs_std_floor {r['obs_std_floor']:g} holds columns "
          f"{r['columns_at_the_floor']}\nsubtasks/4 {s['mean']:.3f} [{s['ci95'][0]:.3f}, {s['ci95'][1]:.3f}], all four {f['mean']:.2f} "
          f"[{f['ci95'][0]:.2f}, {f['ci95'][1]:.2f}], {s['episodes']} episodes, subtasks done {dict(sorted(Counter(int(x) for x in s['returns']).items()))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    for name in ("replay", "noise", "speed", "bc"):
        sub = what.add_parser(name)
        if name != "speed":
            sub.add_argument("--file", type=Path, required=True, metavar="FILE", help="D4RL's kitchen-complete-v0")
        sub.add_argument("--json", type=Path, metavar="OUT", help="write all figures there")
        if name == "bc":
            sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as `modip train` takes them")
    args = parser.parse_args()
    try:
        match args.what:
            case "replay":
                print_replay(result := study_replay(args.file))
            case "noise":
                print_noise(result := study_noise(args.file))
            case "speed":
                print_speed(result := study_speed())
            case "bc":
                print_bc(result := study_bc(args.file, args.overrides))
    except (ConfigError, DataError) as error:
        parser.error(str(error))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        header = {"command": f"python scripts/{command_line()}", "git": git_commit(), "machine": machine(), "versions": versions()}
        args.json.write_text(json.dumps({**header, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
