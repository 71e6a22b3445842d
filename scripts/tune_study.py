"""Measure what `modip tune` promises on a real (small) task: killed half-way and resumed, and PBT's takeovers; writes results/tune.json.

    python scripts/tune_study.py [--out FOLDER] [--json results/tune.json]

1. configs/tune/tiny.yaml: 8 trials, ASHA, 2 seeds each. The driver is killed (-9) once half of the trials have reported and one is on its way;
   the same command goes on.
2. The same settings with PBT: the next iteration of every takeover that ran is computed again from the donor's checkpoint and compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune

from modip_ray.learning.checkpoint import newest
from modip_ray.runfolder import command_line, git_commit, machine, versions
from modip_ray.search.run import param_space
from modip_ray.search.settings import trial_settings
from modip_ray.search.spec import load_search
from modip_ray.search.trial import Trial
from modip_ray.search.watch import number_of

PARTS = ("learner_model", "learner_policy", "replay", "bc")
LIMIT_S = 3600.0


def command(*settings: str) -> list[str]:
    return [sys.executable, "-m", "modip_ray", "tune", *settings]


def reports(log: Path) -> list[tuple[int, int]]:
    """(trial, iteration) of each report on the terminal."""
    return [(int(t), int(k)) for t, k in re.findall(r"^trial (\d+): (\d+) of", log.read_text(), re.M)]


def killed_and_resumed(folder: Path) -> dict[str, Any]:
    out, args = folder / "asha", ("tiny", f"out={folder / 'asha'}")
    logs = [folder / "before.log", folder / "after.log"]
    begun = time.monotonic()
    with logs[0].open("w") as log:
        process = subprocess.Popen(command(*args), stdout=log, stderr=subprocess.STDOUT)
        while len({t for t, _ in reports(logs[0])}) < 4 or reports(logs[0])[-1][1] not in (2, 3):     # with a trial in the middle of its way
            if process.poll() is not None or time.monotonic() - begun > LIMIT_S:
                raise SystemExit(f"the search ended before it could be killed:\n{logs[0].read_text()}")
            time.sleep(0.2)
        process.kill()
        process.wait()
    killed_s = time.monotonic() - begun
    known = tune.ExperimentAnalysis(str(out / "trials")).trials
    finished = sorted(number_of(t) for t in known if t.is_finished())
    saved = {number_of(t): t.latest_checkpoint_result.metrics["training_iteration"] for t in known if t.latest_checkpoint_result and not t.is_finished()}
    begun = time.monotonic()
    with logs[1].open("w") as log:
        subprocess.run(command(*args), stdout=log, stderr=subprocess.STDOUT, check=True, timeout=LIMIT_S)
    after = reports(logs[1])
    found = json.loads((out / "results.json").read_text())
    first = {t: min(k for u, k in after if u == t) for t, _ in after}
    return {"trials": len(found["trials"]), "killed_after_s": round(killed_s, 1), "resumed_s": round(time.monotonic() - begun, 1),
            "finished_when_killed": finished, "finished_trials_run_again": sorted(set(finished) & set(first)),
            "checkpoint_when_killed": saved, "first_report_after_resume": {t: first.get(t) for t in saved},
            "iterations_repeated": sorted(set(reports(logs[0])) & set(after)), "iterations_of_all_trials": sum(t["iterations"] for t in found["trials"]),
            "env_steps_monotone": all(np.all(np.diff([h["env_steps"] for h in t["history"]]) > 0) for t in found["trials"]),
            "status": {t["trial"]: t["status"] for t in found["trials"]}, "best": found["best"],
            "scores": {t["trial"]: {"mean": t["mpc/mean"], "ci95": t["ci95"], "by_seed": t["by_seed"], "env_steps": t["env_steps"], **t["params"]}
                       for t in found["trials"]}, "files": sorted(p.name for p in out.iterdir() if p.is_file() and not p.name.startswith("."))}


def pbt_takeovers(folder: Path) -> dict[str, Any]:
    """Every takeover that the terminal names: its settings, and whether the trial's next checkpoint is the donor's state trained on, bit for bit."""
    file, out = folder / "pbt.yaml", folder / "pbt"
    base = load_search("tiny")
    scheduler = {"kind": "pbt", "perturbation_interval": 1, "quantile_fraction": 0.5}
    search = {**base.to_dict(), "out": str(out), "scheduler": scheduler, "num_samples": 4, "seeds": 1}
    file.write_text(json.dumps(search))                                             # JSON is YAML
    begun = time.monotonic()
    run = subprocess.run(command(str(file)), capture_output=True, text=True, check=True, timeout=LIMIT_S)
    wall_s = time.monotonic() - begun
    spec = load_search(file)
    shared, checked = out / "trials" / "data", []
    for line in (out / "trials" / "pbt_global.txt").read_text().splitlines():
        tag, donor_tag, _, _, _, changed = json.loads(line)
        checked.append(takeover(out, shared, number(tag), number(donor_tag), changed, {k: changed[k] for k in param_space(spec) if k in spec.search}))
    return {"trials": spec.num_samples, "wall_s": round(wall_s, 1), "takeovers": len(checked), "that_ran": sum(c["ran"] for c in checked),
            "bit_for_bit": sum(c["same"] for c in checked), "named_on_terminal": run.stdout.count("goes on from trial"), "checked": checked}


def number(tag: str) -> int:
    return int(re.match(r"\d+", tag)[0])


def takeover(out: Path, shared: Path, trial: int, donor: int, changed: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """Train each of the donor's checkpoints for an iteration with the changed settings, until one gives a checkpoint of the trial that took over."""
    (mine,), (theirs,) = (list((out / "trials").glob(f"trial_{n:03d}_*")) for n in (trial, donor))
    settings = trial_settings(changed)
    own = [p for p in sorted(mine.glob("checkpoint_*")) if settings_of(p) == settings.member(0).dump()]
    about = {"trial": trial, "donor": donor, **params, "ran": bool(own)}            # PBT may replace a trial once more before it has run
    for start in sorted(theirs.glob("checkpoint_*")) if own else []:
        again = Trial(settings, shared)
        again.load(start)
        before = again.systems[0].replay.env_steps
        result = again.iterate()
        target = out.parent / "again"
        again.save(target)
        again.close()
        same = [p.name for p in own if equal(p, target)]
        shutil.rmtree(target)
        if same:
            return {**about, "donor_env_steps": before, "env_steps": result["env_steps"], "same": True}
    return {**about, "same": False}


def settings_of(checkpoint: Path) -> str:
    return (checkpoint / "seed_0" / "config.yaml").read_text()


def equal(a: Path, b: Path) -> bool:
    x, y = (newest(p / "seed_0" / "checkpoints") for p in (a, b))
    return all(u.keys() == v.keys() and all(np.array_equal(u[k], v[k], equal_nan=u[k].dtype.kind == "f") for k in u)
               for u, v in ((x.read(part), y.read(part)) for part in PARTS))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=Path("runs/tune_study"))
    p.add_argument("--json", type=Path, default=Path("results/tune.json"))
    args = p.parse_args()
    folder = args.out.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = {"asha": killed_and_resumed(folder), "pbt": pbt_takeovers(folder)}
    about = {"command": f"python scripts/{command_line()}", "git": git_commit(), "machine": machine(), "versions": versions()}
    args.json.write_text(json.dumps({**found, **about}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
