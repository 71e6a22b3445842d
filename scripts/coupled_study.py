"""A whole run with the policy-independent critic, and the same run with one that asks the policy: processor time, wall time, scores. Writes JSON.

    python scripts/coupled_study.py --json results/speed/coupled.json [--steps 20000] [--runs runs/coupled]

Both runs take the demo's settings in one process (serial=true), one after the other, offline phase included. Processor time is of the whole command, so that
other work on the machine counts little; it is what the ratio is of. The same command goes on; a run that is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from modip_ray.config import load
from modip_ray.report.scores import duration, interval, number
from modip_ray.runfolder import command_line, git_commit, machine, versions

CRITICS = {"policy-independent": {}, "policy-coupled": {"critic.target": "policy_q"},
           "policy-coupled, Q tail": {"critic.target": "policy_q", "planner.tail": "policy_q"}}


def processor_s() -> float:
    """Of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(name: str, folder: Path, steps: int) -> float:
    """Train; seconds of processor time. CalledProcessError where the run fails."""
    settings = {"run_dir": str(folder), "serial": True, "online.env_steps": steps, "eval.every_steps": 0, "resources.compile": False, **CRITICS[name]}
    dotted = [f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in settings.items()]
    load("demo", dotted)                                                            # what is wrong with them, before anything runs
    before = processor_s()
    subprocess.run([sys.executable, "-m", "modip_ray", "train", "--config", "demo", *dotted], check=True)
    return processor_s() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--runs", type=Path, default=Path("runs/coupled"), help="where the runs are kept")
    args = parser.parse_args()
    found = json.loads(args.json.read_text())["critics"] if args.json.exists() else {}
    found = {name: entry for name, entry in found.items() if entry["env_steps"] >= args.steps}
    for name in CRITICS:
        folder = args.runs / name.replace(", ", "_").replace(" ", "_")
        if name not in found:
            used = run(name, folder, args.steps)
            summary = json.loads((folder / "summary.json").read_text())
            keep = {mode: {k: summary["scores"][mode][k] for k in ("mean", "ci95", "episodes")} for mode in ("bc", "policy", "mpc")}
            found[name] = {"processor_s": round(used, 1), "wall_s": summary["wall_s"], "phase_s": summary["phase_s"], "env_steps": summary["env_steps"],
                           "updates": summary["updates"], "scores": keep}
        for entry in found.values():
            entry["times_independent"] = round(entry["processor_s"] / found["policy-independent"]["processor_s"], 2)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"command": command_line(), "git": git_commit(), "machine": machine(), "versions": versions(), "critics": found},
                                        indent=1))
    print("| critic | processor time | of the independent one | wall time | DP-only | MPC-acting |\n|---|---|---|---|---|---|")
    for name, e in found.items():
        scores = " | ".join(f"{number(e['scores'][m]['mean'])} [{interval(e['scores'][m]['ci95'])}]" for m in ("policy", "mpc"))
        print(f"| {name} | {duration(e['processor_s'])} | {e['times_independent']} x | {duration(e['wall_s'])} | {scores} |")


if __name__ == "__main__":
    main()
