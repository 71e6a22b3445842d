"""How near our RoboMimic environments are to RoboMimic's data and to older robosuites, and what they cost; figures go to results/tasks/robomimic_*.json.

    python scripts/robomimic_study.py replay FILE      # a robomimic file's demonstrations, their actions replayed from their first states
    python scripts/robomimic_study.py resets           # resets with a new model against those without; lite physics; speed; memory
    python scripts/robomimic_study.py versions DIR     # the same actions in robosuite 1.4.1: pip install --no-deps --target DIR robosuite==1.4.1
"""
from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import h5py
import numpy as np

from modip_ray.runfolder import command_line, git_commit, machine, versions
from modip_ray.tasks.robomimic_data import LAYOUTS, ROBOT_KEYS, read_env_args
from modip_ray.tasks.robosuite_env import CONTROLLER, DRAWN, RobosuiteEnv, env_kwargs, robosuite_env

RESULTS = Path(__file__).resolve().parent.parent / "results" / "tasks"
SHOWN_STEPS = (1, 2, 5, 10, 20, 30, 40, 50)
QUANTILES = (0.5, 0.9, 0.99, 1.0)


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    p = commands.add_parser("replay")
    p.add_argument("file", type=Path)
    p.set_defaults(run=lambda a: replay(a.file))
    p = commands.add_parser("resets")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--steps", type=int, default=100)
    p.set_defaults(run=lambda a: {task: own_process("resets-of", task, str(a.seeds), str(a.steps)) for task in LAYOUTS})
    p = commands.add_parser("versions")
    p.add_argument("old", type=Path, help="folder with robosuite 1.4.1")
    p.add_argument("--steps", type=int, default=120)
    p.set_defaults(run=lambda a: against_old(a.old, a.steps))
    for p in commands.choices.values():
        p.add_argument("--json", type=Path)
    p = commands.add_parser("resets-of")                                    # run by the commands above, in processes of their own
    p.add_argument("arguments", nargs=3)
    p.set_defaults(run=lambda a: resets(a.arguments[0], *map(int, a.arguments[1:])))
    p = commands.add_parser("record-old")
    p.add_argument("arguments", nargs=3)
    p.set_defaults(run=lambda a: record_old(a.arguments[0], int(a.arguments[1]), Path(a.arguments[2])))
    args = top.parse_args()
    figures = args.run(args)
    if args.command in ("resets-of", "record-old"):
        print(json.dumps(figures))
        return
    path = args.json or RESULTS / f"robomimic_{args.command}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"command": "python scripts/" + command_line(), "git": git_commit(), "machine": machine(),
            "versions": {**versions(), "robosuite": metadata.version("robosuite")}}
    path.write_text(json.dumps({**told, **figures}, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def own_process(*arguments: str, **environment: str) -> dict:
    done = subprocess.run([sys.executable, __file__, *arguments], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def quantiles(values: list | np.ndarray) -> dict[str, float]:
    return {f"q{q:g}": float(f"{v:.3g}") for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


# ---- replay ----------------------------------------------------------------------------------------------------------------------------------

def replay(path: Path) -> dict:
    kwargs = env_kwargs(read_env_args(path), gripper_ramp=True)
    figures = {"file": path.name, "env_name": kwargs["name"]}
    variants = (("recorded_object", True, True), ("object_drawn_anew", True, False), ("recorded_object_gripper_of_15", False, True))
    for name, gripper_ramp, with_object in variants:
        env = robosuite_env(**{**kwargs, "gripper_ramp": gripper_ramp})
        with h5py.File(path) as file:
            demos = sorted(file["data"], key=lambda name: int(name.split("_")[1]))
            figures[name] = summary([replayed(env, file["data"][demo], seed, with_object) for seed, demo in enumerate(demos)])
        env.close()
    return figures


def replayed(env: RobosuiteEnv, demo: h5py.Group, seed: int, with_object: bool) -> dict:
    """State errors (T-1,) against the recorded states, and how far observed gripper positions are from the recorded next_obs, in metres (T,)."""
    states, actions, hand = demo["states"][()], demo["actions"][()], demo["next_obs/robot0_eef_pos"][()]
    model = demo.attrs["model_file"] if with_object else None
    column, robots = sum(size for _, size in LAYOUTS[env.name].stored), LAYOUTS[env.name].robots
    env.reset(seed=seed)                                                    # without the recorded object: the one drawn here
    env.reset_to(states[0], model)
    rewards, reached, here = [], [], []
    for action, expected in zip(actions, hand, strict=True):
        obs, reward, *_ = env.step(action)
        rewards.append(reward)
        reached.append(env.state())
        here.append(np.abs(obs[column:column + 3] - expected).max())
    env.reset_to(states[0], model)
    suite = [np.abs(env.suite.step(action)[0]["robot0_eef_pos"] - expected).max() for action, expected in zip(actions, hand, strict=True)]
    wrong = np.abs(np.array(reached[:-1]) - states[1:])[:, 1:]              # without the time; each robot has 7 joints of its arm and 2 fingers
    arms, fingers = (np.concatenate([wrong[:, 9 * i + first:9 * i + last] for i in range(robots)], 1).max(1) for first, last in ((0, 7), (7, 9)))
    return {"arm_rad": arms, "fingers_m": fingers, "first_object_m": wrong[:, 9 * robots:9 * robots + 3].max(1), "success": max(rewards) == 1.0,
            "rewards_differ": rewards != demo["rewards"][()].tolist(), "here": here, "suite": suite}


def summary(runs: list[dict]) -> dict:
    parts = ("arm_rad", "fingers_m", "first_object_m")
    by_step = {}
    for step in SHOWN_STEPS:
        long = [r for r in runs if len(r["arm_rad"]) >= step]
        if long:
            by_step[step] = {"demonstrations": len(long), **{part: quantiles([r[part][step - 1] for r in long]) for part in parts}}
    return {
        "demonstrations": len(runs), "successes": sum(r["success"] for r in runs), "demonstrations_with_other_rewards": sum(r["rewards_differ"] for r in runs),
        "state_error": {part: quantiles(np.concatenate([r[part] for r in runs])) for part in parts}, "state_error_after_steps": by_step,
        # robomimic's extraction took next_obs from the recorded states, but at the last row from robosuite's step
        "observed_gripper_position_error_m": {key: quantiles(np.concatenate([r[key][:-1] for r in runs])) for key in ("here", "suite")},
        "at_the_last_row_m": {key: quantiles([r[key][-1] for r in runs]) for key in ("here", "suite")},
    }


# ---- resets, physics, speed, memory ----------------------------------------------------------------------------------------------------------

def resets(task: str, seeds: int, steps: int) -> dict:
    memory = {"imported": resident()}
    env = robosuite_env(task)
    memory["one_environment"] = resident()
    second = robosuite_env(task)
    memory["two"] = resident()
    second.close()
    env.suite.hard_reset = True
    for count in (10, 20):
        for _ in range(10):
            env.reset()
        memory[f"after_{count}_new_models"] = resident()
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (seeds, steps, *env.action_space.shape))
    new, kept, full = ([run(env, seed, actions[seed], hard, lite) for seed in range(seeds)] for hard, lite in ((True, True), (False, True), (False, False)))
    model = {key for a, b in zip(new, kept, strict=True) for key in a["model"] if not np.array_equal(a["model"][key], b["model"][key], equal_nan=True)}
    return {
        "new_model_by_default": task in DRAWN, "seeds": seeds, "steps": steps,
        "new_model_against_kept": {"first_observation": difference(new, kept, "first"), "states": difference(new, kept, "states"),
                                   "model_arrays_that_differ": sorted(model)},
        "lite_against_full_physics": {"states": difference(kept, full, "states"), "observations": difference(kept, full, "obs")},
        "reset_cpu_ms": {"new_model": median(new, "reset_ms"), "model_kept": median(kept, "reset_ms")},
        "steps_per_cpu_second": {"lite": median(kept, "rate"), "full": median(full, "rate"),
                                 "robosuite_with_all_sensors": round(suite_rate(env, actions[0]), 1)},
        "rss_mb": memory,
    }


def run(env: RobosuiteEnv, seed: int, actions: np.ndarray, hard: bool, lite: bool) -> dict:
    """One episode, with robosuite's own switches."""
    env.suite.hard_reset = hard
    env.suite.lite_physics = lite
    for robot in env.suite.robots:
        robot.lite_physics = lite
    for config in env.suite.robot_configs:
        config["lite_physics"] = lite
    reset_s = timed(lambda: env.reset(seed=seed))
    raw = env.suite.sim.model._model
    first, states, obs = env._observe(), [env.state()], []
    model = {key: np.array(value) for key in dir(raw) if not key.startswith("_") and isinstance(value := getattr(raw, key), np.ndarray)
             and not key.startswith(("mesh_", "tex_"))}
    begin = time.process_time()
    for action in actions:
        obs.append(env.step(action)[0])
        states.append(env.state())
    rate = len(actions) / (time.process_time() - begin)
    return {"first": first, "states": np.array(states), "obs": np.array(obs), "model": model, "reset_ms": 1000 * reset_s, "rate": rate}


def suite_rate(env: RobosuiteEnv, actions: np.ndarray) -> float:
    """Steps a CPU second of robosuite's own environment, with all of its sensors on."""
    env.reset(seed=0)
    for key in env.suite.observation_names:
        env.suite.modify_observable(key, "enabled", True)
    return len(actions) / timed(lambda: [env.suite.step(action) for action in actions])


def timed(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def median(runs: list[dict], key: str) -> float:
    return round(float(np.median([r[key] for r in runs])), 2)


def difference(a: list[dict], b: list[dict], key: str) -> float:
    """Largest over all seeds; 0.0 only where they are the same to the bit."""
    return float(max(np.abs(x[key] - y[key]).max() for x, y in zip(a, b, strict=True)))


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20)


# ---- robosuite 1.4.1 -------------------------------------------------------------------------------------------------------------------------

def against_old(folder: Path, steps: int) -> dict:
    if not (folder / "robosuite").is_dir():
        raise SystemExit(f"{folder} holds no robosuite; pip install --no-deps --target {folder} robosuite==1.4.1")
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        for task in LAYOUTS:
            recorded = Path(scratch) / f"{task}.npz"
            figures[task] = own_process("record-old", task, str(steps), str(recorded), PYTHONPATH=str(folder.resolve()))
            with np.load(recorded) as file:
                old = dict(file)
            for name, ramp in (("as_here", True), ("with_robosuite_15s_gripper", False)):
                env = robosuite_env(task, gripper_ramp=ramp)
                obs = [env.reset_to(old["states"][0], str(old["model"]))]
                states = [env.state()]
                for action in old["actions"]:
                    obs.append(env.step(action)[0])
                    states.append(env.state())
                env.close()
                joints = 1 + np.arange(9 * LAYOUTS[task].robots)
                wrong = np.abs(np.array(states) - old["states"])
                figures[task][name] = {
                    "robots_after_steps": {t: float(f"{wrong[t, joints].max():.2g}") for t in (*SHOWN_STEPS, steps) if t <= steps},
                    "robots": quantiles(wrong[:, joints].max(1)), "whole_state": quantiles(wrong.max(1)),
                    "observations": quantiles(np.abs(obs - old["obs"]).max(1))}
    return figures


def record_old(task: str, steps: int, out: Path) -> dict:
    """Runs with robosuite 1.4.1 before this environment's robosuite on the path."""
    import robosuite
    if not robosuite.__version__.startswith("1.4."):
        raise SystemExit(f"robosuite {robosuite.__version__} was found; expected 1.4.1")
    robots = LAYOUTS[task].robots
    old = {key: value for key, value in CONTROLLER.items() if not key.startswith(("damping", "input_type", "input_ref"))}
    old |= {"damping": 1, "damping_limits": [0, 10], "control_delta": True}
    np.random.seed(0)
    env = robosuite.make(task, robots=["Panda"] * robots, controller_configs=old, has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False,
                         use_object_obs=True, control_freq=20, reward_shaping=False, ignore_done=True, hard_reset=False,
                         **({"env_configuration": "single-arm-opposed"} if robots > 1 else {}))
    env.reset()
    start = env.sim.get_state().flatten()
    env.deterministic_reset = True                                          # as RoboMimic recorded: controllers start from the nominal pose
    env.reset()
    env.sim.set_state_from_flattened(start)
    env.sim.forward()
    rng = np.random.default_rng(5)
    action, actions, states, obs = np.zeros(env.action_dim), [], [start], [observed_old(env)]
    for t in range(steps):
        action = np.clip(0.8 * action + 0.5 * rng.standard_normal(env.action_dim), -1, 1)
        actions.append(action.copy())
        actions[-1][6::7] = 1.0 if t // 20 % 2 else -1.0                    # the grippers close and open
        env.step(actions[-1])
        env.sim.forward()
        states.append(env.sim.get_state().flatten())
        obs.append(observed_old(env))
    np.savez(out, states=states, actions=actions, obs=obs, model=env.model.get_xml())
    return {"robosuite": robosuite.__version__, "steps": steps}


def observed_old(env) -> np.ndarray:
    parts = env._get_observations(force_update=True)
    return np.concatenate([parts["object-state"], *(parts[f"robot{i}_{key}"] for i in range(len(env.robots)) for key in ROBOT_KEYS)])


if __name__ == "__main__":
    main()
