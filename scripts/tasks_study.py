"""Does every task work? Each environment of the tasks is built, stepped, seeded again in a fresh process, and trained on for 200 updates with planning.

    python scripts/tasks_study.py [--only lift kitchen] [--json results/tasks/every_task.json]

The data are of a uniformly random policy, collected here and labelled so: this shows that everything fits together, nothing about scores.
"""
import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from modip_ray.config import load, task_names
from modip_ray.learning.env_source import env_factory
from modip_ray.run import train
from modip_ray.runfolder import command_line, git_commit, machine, versions
from modip_ray.tasks.collect import collect
from modip_ray.tasks.d4rl_data import write_d4rl

STEPS, LIMIT, TRANSITIONS = 100, 25, 400
SMALL = ["serial=true", f"task.max_episode_steps={LIMIT}", "pretrain.updates=100", "pretrain.policy_updates=100", "online.env_steps=50", "online.min_online=20",
         "rollout.num_workers=1", "rollout.envs_per_worker=2", "rollout.segment_length=10", "eval.episodes=2", "eval.every_steps=0", "log.tensorboard=false"]


def environments() -> dict[str, list[str]]:
    """Tasks by what makes their environment."""
    found: dict[str, list[str]] = {}
    for task in task_names():
        cfg = load(overrides=[f"task={task}"]).task
        found.setdefault(json.dumps([cfg.env, cfg.env_kwargs]), []).append(task)
    return found


def fingerprint(task: str, seed: int = 7) -> dict:
    """100 random steps from a seeded reset, a reset, and as many again from the same seed: hashes of all that was observed."""
    cfg = load(overrides=[f"task={task}"])
    start = time.perf_counter()
    env = env_factory(cfg.task)()
    built, hashes = time.perf_counter() - start, []
    for _ in range(2):
        rng, seen = np.random.default_rng(seed), [np.asarray(env.reset(seed=seed)[0], np.float64)]
        start = time.perf_counter()
        for _ in range(STEPS):
            obs, reward, terminated, truncated, _ = env.step(rng.uniform(env.action_space.low, env.action_space.high))
            seen += [np.asarray(obs, np.float64), np.array([reward])]
            if terminated or truncated:
                seen.append(np.asarray(env.reset()[0], np.float64))
        hashes.append(hashlib.sha256(b"".join(x.tobytes() for x in seen)).hexdigest()[:16])
    env.close()
    return {"obs_dim": env.observation_space.shape[0], "action_dim": env.action_space.shape[0], "built_s": round(built, 2),
            "steps_per_s": round(STEPS / (time.perf_counter() - start)), "hashes": hashes}


def in_fresh_process(task: str) -> dict:
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--fingerprint", task], capture_output=True, text=True, timeout=300, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def trained(task: str, folder: Path) -> dict:
    """BC, world model, planning online and all three evaluations, on random data."""
    overrides, factory = [f"task={task}", *SMALL], env_factory(load(overrides=[f"task={task}"]).task)
    box, rng = factory().action_space, np.random.default_rng(0)
    data = folder / f"{task}.hdf5"
    episodes = collect(lambda obs, slots, reset: rng.uniform(box.low, box.high, (len(obs), 1, len(box.low))), factory, TRANSITIONS, LIMIT, 0, num_envs=2)
    write_d4rl(data, episodes, {"source": "uniformly random actions"})
    start = time.perf_counter()
    summary = train(load(overrides=[*overrides, f"data.source={data}", "data.rewards=stored", "data.filter_key=null", f"run_dir={folder / task}"]))
    found = {mode: {"metric": s["metric"], "episodes": s["episodes"], "finite": bool(np.isfinite(s["returns"]).all())} for mode, s in summary["scores"].items()}
    return {"updates": summary["updates"], "env_steps": summary["env_steps"], "seconds": round(time.perf_counter() - start, 1), "scores": found}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="*", default=[], help="words that a task's name must have one of")
    p.add_argument("--json", type=Path)
    p.add_argument("--fingerprint", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.fingerprint:
        print(json.dumps(fingerprint(a.fingerprint)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for made_of, tasks in environments().items():
            if a.only and not any(word in task for word in a.only for task in tasks):
                continue
            here, fresh = in_fresh_process(tasks[0]), in_fresh_process(tasks[0])
            same = {"in one process": here["hashes"][0] == here["hashes"][1], "in a fresh process": here["hashes"] == fresh["hashes"]}
            rows.append({"environment": json.loads(made_of), "tasks": tasks, **here, "seed reproduces": same, "trained": trained(tasks[0], Path(folder))})
            print(json.dumps(rows[-1]), flush=True)
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"command": command_line(), "git": git_commit(), "machine": machine(), "versions": versions()}
        a.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
