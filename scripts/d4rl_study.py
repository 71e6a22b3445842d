"""Where D4RL's medium-v2 data come from: their behaviour policy rolled out, and their recorded steps repeated one by one.

    python scripts/d4rl_study.py regenerate --env Hopper-v4 --file hopper_medium-v2.hdf5 --episodes 1000 --json results/tasks/d4rl_regenerate_hopper.json
    python scripts/d4rl_study.py onestep --file hopper_medium-v2.hdf5 --json results/tasks/d4rl_onestep_hopper.json

Two physics are compared: "installed" is the installed MuJoCo as it is; "d4rl" weighs every capsule as MuJoCo before 2.1.2 did, which is what D4RL's
data were made with (modip_ray/tasks/d4rl_physics.py). FILE needs the v2 layout with infos/qpos, infos/qvel and metadata/policy; its first rows are enough.
"""
import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import h5py
import mujoco
import numpy as np

from modip_ray.runfolder import command_line, git_commit, machine, versions
from modip_ray.tasks.d4rl_physics import d4rl_env
from modip_ray.tasks.dataset import DataError
from modip_ray.tasks.demonstrator import TanhGaussianPolicy
from modip_ray.tasks.envs import make_env
from modip_ray.tasks.rollout import rollout_episodes
from modip_ray.tasks.scores import bootstrap_ci

PHYSICS = ("installed", "d4rl")
KEYS = ("observations", "next_observations", "actions", "rewards", "terminals", "timeouts", "infos/qpos", "infos/qvel", "infos/action_log_probs")
VELOCITY_CLIP = 10.0                    # Hopper and Walker2d clip the velocities in their observations
MAX_STEPS = 1000
ROWS = 5000                             # of a file that are looked at
#: The complete files: mean return, and mean and std of every observation column (published as the constants that Decision Transformers normalise with).
PUBLISHED = {
    "Hopper-v4": {
        "return": 1422.0,
        "obs_mean": [1.311279, -0.08469521, -0.5382719, -0.07201576, 0.04932366, 2.1066856, -0.15017354, 0.00878345, -0.2848186, -0.18540096, -0.28461286],
        "obs_std": [0.17790751, 0.05444621, 0.21297139, 0.14530419, 0.6124444, 0.85174465, 1.4515252, 0.6751696, 1.536239, 1.6160746, 5.6072536],
    },
    "HalfCheetah-v4": {
        "return": 4770.0,
        "obs_mean": [-0.06845774, 0.01641455, -0.18354906, -0.27624607, -0.34061527, -0.09339716, -0.21321271, -0.08774239, 5.1730075, -0.04275195,
                     -0.03610836, 0.14053793, 0.06049833, 0.09550975, 0.067391, 0.00562739, 0.01338279],
        "obs_std": [0.07472999, 0.30234998, 0.3020731, 0.34417078, 0.17619242, 0.5072056, 0.25670078, 0.32948127, 1.2574149, 0.7600542, 1.9800916,
                    6.5653625, 7.4663677, 4.472223, 10.566964, 5.6719327, 7.498259],
    },
}


# ---- physics ---------------------------------------------------------------------------------------------------------------------------------

def make(env_id: str, physics: str) -> gym.Env:
    return d4rl_env(env_id) if physics == "d4rl" else make_env(env_id)


# ---- the record ------------------------------------------------------------------------------------------------------------------------------

def read_record(path: Path) -> dict[str, np.ndarray]:
    """First ROWS of the arrays in KEYS by the last part of their name, `ends` (T,), `starts` (rows beginning an episode); DataError names what is missing."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with h5py.File(path) as file:
        missing = [key for key in KEYS if key not in file]
        if missing:
            raise DataError(f"{path}: misses {', '.join(missing)}; expected a D4RL v2 file of a MuJoCo task")
        record = {key.split("/")[-1]: file[key][:ROWS] for key in KEYS}
    record["ends"] = record["terminals"].astype(bool) | record["timeouts"].astype(bool)
    record["starts"] = np.flatnonzero(np.concatenate([[True], record["ends"][:-1]]))
    return record


def env_of(path: Path) -> str:
    for name in ("HalfCheetah", "Hopper", "Walker2d"):
        if path.name.lower().startswith(name.lower()):
            return f"{name}-v4"
    raise DataError(f"{path}: its name does not begin with halfcheetah, hopper or walker2d; say which environment it is with --env")


def episodes_of(record: dict[str, np.ndarray]) -> list[slice]:
    stops = [*record["starts"][1:].tolist(), len(record["rewards"])]
    return [slice(a, b) for a, b in zip(record["starts"].tolist(), stops, strict=True)]


# ---- one step --------------------------------------------------------------------------------------------------------------------------------

def one_step(env: gym.Env, record: dict[str, np.ndarray], chain: bool = False, carry: bool = False, jitter: int | None = None) -> dict[str, np.ndarray]:
    """Every recorded step repeated from its recorded state: next observations (T, Do), rewards and terminations (T,).

    chain  : keep the simulator's own data (time, constraint forces of the step before: its warm start) from row to row; else they are cleared
    carry  : take velocities that the record clips from the simulator's own state, one step earlier (needs chain)
    jitter : seed of a random rounding of the state, within half a float32 unit in the last place
    """
    base = env.unwrapped
    base.reset(seed=0)
    model, data = base.model, base.data
    rng = np.random.default_rng(jitter)
    first, clipped = np.isin(np.arange(len(record["rewards"])), record["starts"]), clipped_rows(record)
    out: dict[str, list] = {"next_observations": [], "rewards": [], "terminals": []}
    for t, (qpos, qvel, action) in enumerate(zip(record["qpos"], record["qvel"], record["actions"], strict=True)):
        if carry and clipped[t] and not first[t]:
            qvel = np.where(np.abs(qvel) >= VELOCITY_CLIP, data.qvel, qvel)
        if not chain or first[t]:
            mujoco.mj_resetData(model, data)
        if jitter is not None:
            qpos, qvel = (x + rng.uniform(-0.5, 0.5, x.shape) * np.spacing(np.abs(x).astype(np.float32)) for x in (qpos, qvel))
        data.qpos[:], data.qvel[:] = qpos, qvel
        obs, reward, terminated, _, _ = base.step(action.astype(np.float64))
        for key, value in zip(out, (obs, reward, terminated), strict=True):
            out[key].append(value)
    return {key: np.asarray(value) for key, value in out.items()}


def phases(env: gym.Env, record: dict[str, np.ndarray]) -> np.ndarray:
    """"flight" (no constraint in any of the step's simulator steps), "limit" (a joint at its limit, no contact) or "contact", (T,)."""
    base = env.unwrapped
    model, data, found = base.model, base.data, []
    for qpos, qvel, action in zip(record["qpos"], record["qvel"], record["actions"], strict=True):
        mujoco.mj_resetData(model, data)
        data.qpos[:], data.qvel[:], data.ctrl[:] = qpos, qvel, action
        contact = limit = False
        for _ in range(base.frame_skip):
            mujoco.mj_step(model, data)
            contact, limit = contact or data.ncon > 0, limit or data.nl > 0
        found.append("contact" if contact else "limit" if limit else "flight")
    return np.array(found)


def difference(got: dict[str, np.ndarray], record: dict[str, np.ndarray]) -> np.ndarray:
    """Largest difference (T,) over the components of the next observation."""
    return np.abs(got["next_observations"] - record["next_observations"]).max(1)


def summary(error: np.ndarray) -> dict:
    """Of largest differences (n,): median, max and the shares above 1e-6, 1e-4 and 1e-2."""
    if not len(error):
        return {"steps": 0}
    return {"steps": len(error), "median": float(np.median(error)), "max": float(error.max()),
            **{f"share_above_{limit:g}": float((error > limit).mean()) for limit in (1e-6, 1e-4, 1e-2)}}


def full_summary(got: dict[str, np.ndarray], record: dict[str, np.ndarray], phase: np.ndarray) -> dict:
    """Differences by component, phase and by whether the record clips a velocity; of reward and termination too."""
    error, columns = difference(got, record), np.abs(got["next_observations"] - record["next_observations"])
    clipped = clipped_rows(record)
    reward = np.abs(got["rewards"] - record["rewards"])
    return {**summary(error), "component_median": np.median(columns, 0).tolist(), "component_max": columns.max(0).tolist(),
            "by_phase": {name: summary(error[(phase == name) & ~clipped]) for name in ("flight", "limit", "contact")},
            "velocity_clipped": summary(error[clipped]), "velocity_complete": summary(error[~clipped]),
            "reward_median": float(np.median(reward)), "reward_max": float(reward.max()),
            "terminations_that_differ": int((got["terminals"] != record["terminals"]).sum())}


def clipped_rows(record: dict[str, np.ndarray]) -> np.ndarray:
    """Rows (T,) whose true velocity is not in the file: a component stands at the clip of Hopper's and Walker2d's observations."""
    if np.abs(record["qvel"]).max() > VELOCITY_CLIP:                                  # HalfCheetah clips nothing
        return np.zeros(len(record["qvel"]), bool)
    return (np.abs(record["qvel"]) >= VELOCITY_CLIP).any(1)


def with_option(env: gym.Env, **options: float) -> gym.Env:
    for key, value in options.items():
        setattr(env.unwrapped.model.opt, key, value)
    return env


def with_frame_skip(env: gym.Env, change: int) -> gym.Env:
    env.unwrapped.frame_skip += change
    return env


def suspects(env_id: str) -> dict[str, Callable[[], gym.Env]]:
    """Simulators that differ from the installed one in one respect each."""
    opt, solver, integrator = (lambda **o: lambda: with_option(make(env_id, "installed"), **o)), mujoco.mjtSolver, mujoco.mjtIntegrator
    return {
        "integrator Euler": opt(integrator=integrator.mjINT_EULER), "integrator RK4": opt(integrator=integrator.mjINT_RK4),
        "integrator implicit": opt(integrator=integrator.mjINT_IMPLICIT), "solver PGS": opt(solver=solver.mjSOL_PGS), "solver CG": opt(solver=solver.mjSOL_CG),
        "solver 1000 iterations, tolerance 1e-14": opt(iterations=1000, tolerance=1e-14), "elliptic friction cone": opt(cone=mujoco.mjtCone.mjCONE_ELLIPTIC),
        "one simulator step fewer": lambda: with_frame_skip(make(env_id, "installed"), -1),
        "one simulator step more": lambda: with_frame_skip(make(env_id, "installed"), 1),
    }


def open_loop(env: gym.Env, record: dict[str, np.ndarray], rows: slice) -> dict:
    """An episode's recorded actions played from its first recorded state, the simulator left alone after that."""
    base = env.unwrapped
    base.reset(seed=0)
    mujoco.mj_resetData(base.model, base.data)
    base.data.qpos[:], base.data.qvel[:] = record["qpos"][rows.start], record["qvel"][rows.start]
    errors, rewards, terminated = [], [], False
    for action, following in zip(record["actions"][rows], record["next_observations"][rows], strict=True):
        obs, reward, terminated, _, _ = base.step(action.astype(np.float64))
        errors.append(np.abs(obs - following).max())
        rewards.append(reward)
        if terminated:
            break
    error = np.array(errors)
    off = {f"first_step_off_by_{limit:g}": int(np.argmax(error > limit)) if (error > limit).any() else None for limit in (1e-3, 1e-1)}
    return {"steps": len(error), "recorded_steps": rows.stop - rows.start, "return": float(sum(rewards)),
            "recorded_return": float(record["rewards"][rows].sum(dtype=np.float64)), "terminated": bool(terminated), **off}


def policy_check(path: Path, record: dict[str, np.ndarray]) -> dict:
    """Do the recorded actions come from the policy in the file? Noise (atanh(a) - mean) / std must be standard normal, log-probabilities equal."""
    policy = TanhGaussianPolicy.from_d4rl(path)
    mean, std = (x.astype(np.float64) for x in policy.distribution(record["observations"]))
    noise = np.sort(((np.arctanh(np.clip(record["actions"].astype(np.float64), -1 + 1e-7, 1 - 1e-7)) - mean) / std).ravel())
    n = len(noise)
    normal = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in noise])
    distance = float(max((np.arange(1, n + 1) / n - normal).max(), (normal - np.arange(n) / n).max()))
    log_prob, log_std = policy.log_prob(record["observations"], record["actions"]), np.log(std)
    return {"noise_mean": float(noise.mean()), "noise_std": float(noise.std()), "ks_distance": distance, "ks_limit_5_percent": 1.358 / float(np.sqrt(n)),
            "log_prob_largest_difference": float(np.abs(log_prob - record["action_log_probs"]).max()),
            "log_std_range": [float(log_std.min()), float(log_std.max())], "log_std_clip": list(policy.log_std_range)}


def onestep(path: Path, env_id: str) -> dict:
    record = read_record(path)
    steps, columns = len(record["rewards"]), record["observations"].shape[1]
    base = make(env_id, "installed").unwrapped
    if base.observation_space.shape != (columns,) or base.model.nq != record["qpos"].shape[1]:
        raise DataError(f"{path}: has {columns} observation columns and {record['qpos'].shape[1]} positions, {env_id} has {base.observation_space.shape[0]} "
                        f"and {base.model.nq}: is it another environment's file?")
    phase = phases(make(env_id, "d4rl"), record)
    installed, d4rl = (one_step(make(env_id, p), record) for p in PHYSICS)
    chain = one_step(make(env_id, "d4rl"), record, chain=True, carry=True)
    floor = one_step(make(env_id, "d4rl"), record, jitter=0)["next_observations"] - d4rl["next_observations"]
    starts = record["starts"]
    return {
        "env": env_id, "steps": steps, "episodes": len(starts), "velocity_clipped_steps": int(clipped_rows(record).sum()),
        "recorded_state": {"float32_positions": (record["qpos"] == record["qpos"].astype(np.float32)).all(0).tolist(),
                           "float32_velocities": bool((record["qvel"] == record["qvel"].astype(np.float32)).all())},
        "start_state": {"largest_position_noise": float(np.abs(record["qpos"][starts] - base.init_qpos).max()),
                        "largest_velocity_noise": float(np.abs(record["qvel"][starts] - base.init_qvel).max()), "reset_noise_scale": base._reset_noise_scale},
        "body_mass": {p: make(env_id, p).unwrapped.model.body_mass[1:].tolist() for p in PHYSICS},
        "installed": full_summary(installed, record, phase), "d4rl": full_summary(d4rl, record, phase),
        "d4rl, clipped velocities carried over": full_summary(chain, record, phase),
        "rounding of the state alone": summary(np.abs(floor).max(1)),
        "one change to the installed simulator": {
            "warm start kept": summary(difference(one_step(make(env_id, "installed"), record, chain=True), record)),
            **{name: summary(difference(one_step(build(), record), record)) for name, build in suspects(env_id).items()}},
        "open_loop": {p: [open_loop(make(env_id, p), record, rows) for rows in episodes_of(record)] for p in PHYSICS},
        "policy": policy_check(path, record),
    }


def print_onestep(r: dict) -> None:
    print(f"{r['env']}: {r['steps']} recorded steps of {r['episodes']} episodes, {r['velocity_clipped_steps']} with a clipped velocity; "
          "largest difference of the next observation")
    rows = {name: r[name] for name in ("installed", "d4rl", "d4rl, clipped velocities carried over", "rounding of the state alone")}
    for physics in PHYSICS:
        rows |= {f"{physics}, {name} only": s for name, s in r[physics]["by_phase"].items()}
    rows |= {f"installed, {name}": s for name, s in r["one change to the installed simulator"].items()}
    print(f"{'':56}{'steps':>7}{'median':>10}{'max':>10}{'>1e-6':>8}{'>1e-4':>8}{'>1e-2':>8}")
    for name, s in rows.items():
        if s["steps"] and (r["velocity_clipped_steps"] or "carried" not in name):
            shares = "".join(f"{100 * s[f'share_above_{limit}']:7.1f}%" for limit in ("1e-06", "0.0001", "0.01"))
            print(f"{name:56}{s['steps']:7}{s['median']:10.1e}{s['max']:10.1e}{shares}")
    for physics in PHYSICS:
        s = r[physics]
        print(f"{physics}: reward off by {s['reward_median']:.1e} (median), {s['reward_max']:.1e} (max); {s['terminations_that_differ']} terminations differ")
        for e in r["open_loop"][physics]:
            print(f"  open loop: {e['steps']} steps of {e['recorded_steps']}, return {e['return']:.1f} (recorded {e['recorded_return']:.1f}), "
                  f"off by 0.001 at step {e['first_step_off_by_0.001']}, by 0.1 at {e['first_step_off_by_0.1']}")
    print("policy:", json.dumps(r["policy"]))
    print("start :", json.dumps(r["start_state"]))


# ---- regenerate ------------------------------------------------------------------------------------------------------------------------------

def regenerate(path: Path, env_id: str, episodes: int, seed: int, physics: list[str]) -> dict:
    policy, record = TanhGaussianPolicy.from_d4rl(path), read_record(path)
    recorded = [(float(record["rewards"][rows].sum(dtype=np.float64)), rows.stop - rows.start) for rows in episodes_of(record) if record["ends"][rows.stop - 1]]
    published = PUBLISHED.get(env_id)
    result = {"env": env_id, "published_return": published and published["return"], "recorded": [{"return": r, "length": n} for r, n in recorded]}
    for name in physics:
        rng = np.random.default_rng([seed, 1])
        found = rollout_episodes(lambda obs, slots, reset, rng=rng: policy.act(obs, rng)[:, None], lambda name=name: make(env_id, name),
                                 range(seed, seed + episodes), MAX_STEPS, num_envs=min(50, episodes))
        returns, lengths = np.array([e.ret for e in found]), np.array([e.length for e in found])
        observations = np.concatenate([e.observations[:-1] for e in found])
        entry = {"episodes": episodes, "transitions": int(lengths.sum()), "return": {**spread(returns), "ci95": bootstrap_ci(returns)},
                 "length": spread(lengths), "terminated": float(np.mean([e.terminated for e in found])),
                 "recorded_percentiles": [{"return": 100 * float((returns <= r).mean()), "length": 100 * float((lengths <= n).mean())} for r, n in recorded]}
        if published:
            mean, std = np.array(published["obs_mean"]), np.array(published["obs_std"])
            entry |= {"against_published": entry["return"]["mean"] / published["return"],
                      "obs_mean_off_in_std": np.abs((observations.mean(0) - mean) / std).tolist(),
                      "obs_std_ratio": (observations.std(0) / std).tolist()}
        result[name] = entry
        print_regenerated(env_id, name, entry, published)
    return result


def print_regenerated(env_id: str, name: str, entry: dict, published: dict | None) -> None:
    r = entry["return"]
    print(f"{env_id}, {name} physics: return {r['mean']:.0f} ± {r['std']:.0f} [{r['ci95'][0]:.0f}, {r['ci95'][1]:.0f}] over {entry['episodes']} episodes, "
          f"length {entry['length']['mean']:.1f} ± {entry['length']['std']:.1f}; the recorded episodes lie at percentile "
          + ", ".join(f"{p['return']:.0f}" for p in entry["recorded_percentiles"]))
    if published:
        print(f"  {entry['against_published']:.3f} x the published {published['return']:.0f}; observation means off by at most "
              f"{max(entry['obs_mean_off_in_std']):.3f} published std, std ratios {min(entry['obs_std_ratio']):.3f} to {max(entry['obs_std_ratio']):.3f}")


def spread(x: np.ndarray) -> dict:
    quantiles = np.percentile(x, [5, 25, 50, 75, 95]).tolist()
    return {"mean": float(x.mean()), "std": float(x.std()), "min": float(x.min()), "max": float(x.max()), "percentiles_5_25_50_75_95": quantiles}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    roll, step = what.add_parser("regenerate", help="roll the behaviour policy in the file out"), what.add_parser("onestep", help="repeat its recorded steps")
    for sub in (roll, step):
        sub.add_argument("--file", type=Path, required=True, metavar="FILE", help="D4RL v2 file, or its first rows")
        sub.add_argument("--env", metavar="ID", help="gymnasium id (default: after the file's name)")
        sub.add_argument("--json", type=Path, metavar="OUT", help="write all figures there")
    roll.add_argument("--episodes", type=int, default=200)
    roll.add_argument("--seed", type=int, default=0)
    roll.add_argument("--physics", choices=(*PHYSICS, "both"), default="both")
    args = parser.parse_args()
    try:
        env_id = args.env or env_of(args.file)
        if args.what == "onestep":
            result = onestep(args.file, env_id)
            print_onestep(result)
        else:
            if args.episodes < 2:
                parser.error(f"--episodes is {args.episodes}; at least 2 are needed")
            result = regenerate(args.file, env_id, args.episodes, args.seed, list(PHYSICS) if args.physics == "both" else [args.physics])
    except DataError as error:
        parser.error(str(error))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        header = {"command": f"python scripts/{command_line()}", "git": git_commit(), "machine": machine(), "versions": versions()}
        args.json.write_text(json.dumps({**header, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
