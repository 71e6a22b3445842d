"""Other settings of the planner on a finished run's weights: score over the same seeds, and processor time of a plan.

    python scripts/planner_study.py runs/demo --json results/speed/planner_settings.json --episodes 20 [--only NAME ...]

A setting that the file has already is kept, so a run that was cut off goes on; more episodes than it has are measured anew.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from modip_ray.planning.planner import Planner
from modip_ray.runfolder import command_line, git_commit, machine, versions
from modip_ray.saved_run import agent_of_run, evaluate_run
from modip_ray.tasks.scores import paired_difference

REFERENCE = "24 proposals, 64 Gaussian, 3 DDIM steps"
SETTINGS = {
    REFERENCE: {},
    "32 Gaussian": {"planner.gaussian": 32},
    "16 Gaussian": {"planner.gaussian": 16, "planner.elites": 8},
    "no Gaussian: the best proposals": {"planner.gaussian": 0},
    "1 iteration": {"planner.iterations": 1},
    "12 proposals": {"planner.proposals": 12},
    "12 proposals, 32 Gaussian": {"planner.proposals": 12, "planner.gaussian": 32},
    "12 proposals, 32 Gaussian, 8 elites": {"planner.proposals": 12, "planner.gaussian": 32, "planner.elites": 8},
    "8 proposals, 24 Gaussian, 6 elites": {"planner.proposals": 8, "planner.gaussian": 24, "planner.elites": 6},
    "4 proposals, 32 Gaussian, 8 elites": {"planner.proposals": 4, "planner.gaussian": 32, "planner.elites": 8},
    "2 DDIM steps": {"planner.proposal_steps": 2},
    "1 DDIM step": {"planner.proposal_steps": 1},
    "12 proposals, 32 Gaussian, 8 elites, 2 DDIM steps": {"planner.proposals": 12, "planner.gaussian": 32, "planner.elites": 8, "planner.proposal_steps": 2},
    "2 actions a plan": {"planner.n_action_steps": 2},
    "horizon 4": {"planner.horizon": 4},
    "horizon 4, 2 actions a plan": {"planner.horizon": 4, "planner.n_action_steps": 2},
    "horizon 4, 4 actions a plan": {"planner.horizon": 4, "planner.n_action_steps": 4},
}
SEED = 8000                         # of the first episode; the run's own evaluations use others
ROWS = 16                           # of a call whose time is taken: the demo's environments
CALLS = 25


def processor_ms(run: Path, names: list[str]) -> dict[str, float]:
    """Least processor time of a plan for ROWS rows, milliseconds by setting; calls by turns, so that a busy machine slows all alike."""
    old, planners, best = np.zeros(ROWS, bool), {}, dict.fromkeys(names, float("inf"))
    for name in names:
        saved = agent_of_run(run, SETTINGS[name])
        planners[name] = Planner(saved.cfg, saved.agent)
        planners[name].env_steps = saved.env_steps
    obs = np.random.default_rng(0).standard_normal((ROWS, saved.agent.obs_dim), dtype=np.float32)
    for _ in range(CALLS):
        for name, planner in planners.items():
            begun = time.thread_time()
            planner.plan(obs, range(ROWS), old, explore=True)
            best[name] = min(best[name], 1e3 * (time.thread_time() - begun))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME", help="; ".join(SETTINGS))
    args = parser.parse_args()
    found = json.loads(args.json.read_text())["settings"] if args.json.exists() else {}
    for name in args.only:
        if name not in found or len(found[name]["values"]) < args.episodes:
            found[name] = evaluate_run(args.run, "mpc", args.episodes, SEED, SETTINGS[name])
        paired(found)
        save(args.json, args.run, found)
        print(line(name, found[name]), flush=True)
    for name, ms in processor_ms(args.run, list(found)).items():
        found[name]["plan_ms"], found[name]["plan_ms_per_step"] = ms, ms / SETTINGS[name].get("planner.n_action_steps", 1)
    save(args.json, args.run, found)
    print("\n".join(line(name, s) for name, s in found.items()))


def paired(found: dict[str, dict]) -> None:
    """Adds the differences to the reference on the seeds that both have."""
    reference = found.get(REFERENCE, {"values": []})["values"]
    for s in found.values():
        n = min(len(reference), len(s["values"]))
        s["difference"] = paired_difference(s["values"][:n], reference[:n]) if n else None


def save(path: Path, run: Path, found: dict[str, dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": f"python scripts/{command_line()}", "run": str(run), "machine": machine(), "git": git_commit(), "versions": versions()}
    path.write_text(json.dumps({**about, "settings": found}, indent=1) + "\n")


def line(name: str, s: dict) -> str:
    d = s["difference"]
    against = f"{d['mean']:+.0f} [{d['ci95'][0]:+.0f}, {d['ci95'][1]:+.0f}]" if d else ""
    mean, ms = f"{s['mean']:.0f} [{s['ci95'][0]:.0f}, {s['ci95'][1]:.0f}]", s.get("plan_ms_per_step", float("nan"))
    return f"| {name} | {mean} | {len(s['values'])} | {against} | {ms:.1f} |"


if __name__ == "__main__":
    main()
