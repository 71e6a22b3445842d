"""Memory of one rollout worker's process by environment: what to divide a machine's memory by. Writes JSON.

    python cluster/memory.py --json results/cluster_memory.json

Each figure is the resident memory of a fresh process that has imported what a rollout worker imports (Ray included), made so many environments and
stepped each of them a hundred times. A worker that is connected to a cluster holds about 45 MB more. The kitchen and robosuite need their packages.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modip_ray.runfolder import command_line, git_commit, machine, versions  # noqa: E402

TASKS = ("halfcheetah-medium", "hopper-medium", "kitchen-complete", "lift-ph", "can-ph", "square-ph", "transport-ph")
COUNTS = (1, 2, 8)
MEASURE = """
import json, sys
import numpy as np, psutil
import modip_ray.actors.rollout
from modip_ray.config import load
from modip_ray.learning.env_source import env_factory
found = {"imported": psutil.Process().memory_info().rss / 1e6}
factory, envs = env_factory(load(overrides=[f"task={sys.argv[1]}"]).task), []
for count in map(int, sys.argv[2:]):
    envs += [factory() for _ in range(count - len(envs))]
    for seed, env in enumerate(envs):
        env.reset(seed=seed)
        for _ in range(100):
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            if terminated or truncated:
                env.reset()
    found[count] = psutil.Process().memory_info().rss / 1e6
print(json.dumps(found))
"""


def measure(task: str) -> dict[str, float]:
    """Resident MB after importing, and with 1, 2, ... environments."""
    words = [sys.executable, "-c", MEASURE, task, *map(str, COUNTS)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"cluster/memory.py: {task}: {done.stderr.strip().splitlines()[-1]}")
    return {name: round(mb, 1) for name, mb in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tasks", nargs="*", default=TASKS, metavar="TASK")
    p.add_argument("--json", type=Path, help="write the results there")
    args = p.parse_args()
    found = {}
    for task in args.tasks:
        mb = found[task] = measure(task)
        each = (mb[str(COUNTS[-1])] - mb[str(COUNTS[0])]) / (COUNTS[-1] - COUNTS[0])
        found[task]["each_further"] = round(each, 1)
        print(f"{task:<20} imported {mb['imported']:6.0f} MB, " + ", ".join(f"{n} env{'s' if n > 1 else ''} {mb[str(n)]:6.0f} MB" for n in COUNTS)
              + f", each further one {each:5.1f} MB", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"command": command_line(), "git": git_commit(), "machine": machine(), "versions": versions(), "rss_mb": found},
                                        indent=1) + "\n")


if __name__ == "__main__":
    main()
