"""The demo, submitted as a job to an autoscaled local cluster, one node of which is killed while it collects. Writes JSON.

    python scripts/cluster_study.py --json results/cluster.json
    python scripts/cluster_study.py pretrain.updates=200 pretrain.policy_updates=200 online.env_steps=3000 eval.episodes=2     # a trial of minutes

The head has the trainer roles, the other nodes (two at most) a rollout worker each; Ray's autoscaler starts and replaces them. The same command goes
on where an interrupted one was: the run folder on the "cluster" stays until the study is complete.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cluster.local import LocalCluster  # noqa: E402
from modip_ray.config import load  # noqa: E402
from modip_ray.report.metrics import read_metrics  # noqa: E402
from modip_ray.runfolder import command_line, git_commit, machine, versions  # noqa: E402

HEAD, WORKER, NODES = {"CPU": 2.0, "trainer": 1.0}, {"CPU": 1.0, "rollout": 1.0}, (1, 2)
MODES = ("bc", "policy", "mpc")
LOOK_S = 0.5
GIVE_UP_S = 3600.0


class Timeline:
    """What happened when, in seconds since the job was submitted."""

    def __init__(self):
        self.begun, self.events = time.monotonic(), []

    def note(self, what: str, **facts: Any) -> None:
        self.events.append({"s": round(time.monotonic() - self.begun, 1), "what": what, **facts})
        print(f"study {self.events[-1]['s']:7.1f} s  {what}  {facts or ''}", flush=True)

    def when(self, what: str) -> float | None:
        return next((event["s"] for event in self.events if event["what"] == what), None)


class Observer:
    """Compares nodes, workers and rows with those of the last look, kills a node once, and notes every change."""

    def __init__(self, cluster: LocalCluster, run: Path, kill_after: int, timeline: Timeline):
        self.cluster, self.run, self.kill_after, self.timeline = cluster, run, kill_after, timeline
        self.killed: str | None = None
        self.before: dict[str, Any] = {"nodes": set(), "joined": set(), "workers": None, "rows": len(rows_of(run))}       # an interrupted study's are old

    def look(self) -> None:
        nodes = {node.id[:8] for node in self.cluster.workers()}
        joined = {node["raylet"]["nodeId"][:8] for node in self.cluster.joined() if "trainer" not in node["raylet"].get("resourcesTotal", {})}
        rows, seen = rows_of(self.run), self.before
        new = rows[seen["rows"]:]
        workers = next((row["rollout/workers"] for row in reversed(new) if "rollout/workers" in row), seen["workers"])
        for name, now, words in (("nodes", nodes, ("node started", "node gone")), ("joined", joined, ("Ray: node alive", "Ray: node dead"))):
            for change, what in ((now - seen[name], words[0]), (seen[name] - now, words[1])):
                for node in sorted(change):
                    self.timeline.note(what, node=node)
        steps = max((row.get("env_steps", 0) for row in new), default=0)
        if workers != seen["workers"]:
            self.timeline.note("rollout workers", workers=workers, env_steps=steps)
        for row in new:
            if row["kind"] == "incident":
                self.timeline.note("incident", text=row["text"])
        self.before = {"nodes": nodes, "joined": joined, "workers": workers, "rows": len(rows)}
        if self.killed is None and steps >= self.kill_after and workers:
            self.killed = self.cluster.kill_node().id[:8]
            self.timeline.note("killed", node=self.killed, env_steps=steps)


def rows_of(run: Path) -> list[dict]:
    return read_metrics(run) if (run / "metrics.jsonl").exists() else []


def follow(process: subprocess.Popen, log: Path) -> threading.Thread:
    """The CLI's output to our stdout and a file, beside the observing."""
    def copy() -> None:
        with log.open("a") as file:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def study(args: argparse.Namespace, cluster: LocalCluster) -> dict[str, Any]:
    settings = ["task=halfcheetah-medium", f"rollout.num_workers={{min: {NODES[0]}, max: {NODES[1]}}}", f"run_dir={args.run_dir}", *args.settings]
    command = [sys.executable, "-m", "modip_ray", "submit", "--storage", str(args.storage), "--", "train", "--config", "cluster", *settings]
    cfg = load("cluster", settings)
    timeline, run = Timeline(), args.storage / args.run_dir
    observer = Observer(cluster, run, int(args.kill_at * cfg.online.env_steps), timeline)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | cluster.client_environment() | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    reader = follow(process, args.storage / "job.log")
    try:
        while process.poll() is None:
            if time.monotonic() - timeline.begun > GIVE_UP_S:
                raise TimeoutError(f"the job did not end within {GIVE_UP_S:g} s")
            observer.look()
            time.sleep(LOOK_S)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)
        reader.join(10)
    timeline.note("job ended", exit_code=process.returncode)
    if process.returncode:
        raise SystemExit(f"the job failed with exit code {process.returncode}; its log is {args.storage / 'job.log'}")
    summary = json.loads((ROOT / args.run_dir / "summary.json").read_text())
    return {"command": command_line(), "job_command": " ".join(["modip", *command[3:]]), "git": git_commit(), "machine": machine(), "versions": versions(),
            "head": HEAD, "worker": WORKER, "nodes": NODES, "timeline": timeline.events, **answers(timeline, observer.killed),
            "env_steps": summary["env_steps"], "wall_s": summary["wall_s"], "phase_s": summary["phase_s"], "incidents": incidents(run),
            **compared(summary["scores"], json.loads(args.local.read_text())["scores"])}


def answers(timeline: Timeline, killed: str | None) -> dict[str, Any]:
    """Seconds from the kill to each step of the recovery; None where it did not happen."""
    at = timeline.when("killed")
    after = [event for event in timeline.events if at is not None and event["s"] >= at]

    def first(what: str, condition=lambda event: True) -> float | None:
        found = next((event["s"] for event in after if event["what"] == what and condition(event)), None)
        return None if found is None else round(found - at, 1)
    workers = [event["workers"] for event in timeline.events if event["what"] == "rollout workers" and event["s"] <= (at or 0.0)]
    had = workers[-1] if workers else None
    return {"killed": killed, "workers_before": had, "s_after_kill": {
        "replacement_started": first("node started"), "replacement_joined": first("Ray: node alive"), "workers_fewer": first("rollout workers"),
        "workers_as_before": first("rollout workers", lambda event: had is not None and (event["workers"] or 0) >= had)}}


def incidents(run: Path) -> list[str]:
    return [row["text"] for row in rows_of(run) if row["kind"] == "incident"]


def compared(here: dict, local: dict) -> dict[str, Any]:
    """Scores beside those of the local run, and whether each mean lies within the local run's 95 % interval."""
    def short(score: dict) -> dict:
        return {k: score[k] for k in ("mean", "ci95", "episodes")}
    within = {m: local[m]["ci95"][0] <= here[m]["mean"] <= local[m]["ci95"][1] for m in MODES}
    overlap = {m: local[m]["ci95"][0] <= here[m]["ci95"][1] and here[m]["ci95"][0] <= local[m]["ci95"][1] for m in MODES}
    return {"scores": {m: short(here[m]) for m in MODES}, "local_scores": {m: short(local[m]) for m in MODES}, "mean_within_local_interval": within,
            "intervals_overlap": overlap}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("settings", nargs="*", metavar="key=value", help="over those of the demo")
    p.add_argument("--json", type=Path, help="write the results there")
    p.add_argument("--local", type=Path, default=ROOT / "results" / "demo.json", help="summary of the local run to compare with")
    p.add_argument("--kill-at", type=float, default=0.4, metavar="SHARE", help="of the online steps, when a node is killed (default 0.4)")
    p.add_argument("--storage", type=Path, default=Path(tempfile.gettempdir()) / f"modip_cluster_study_{os.getuid()}", help="the cluster's folder for runs")
    p.add_argument("--run-dir", default="runs/cluster_study")
    args = p.parse_args()
    args.storage.mkdir(parents=True, exist_ok=True)
    with LocalCluster(Path(tempfile.mkdtemp(prefix="ms", dir="/tmp"))) as cluster:
        found = study(args, cluster.up(head=HEAD, worker=WORKER, autoscale=NODES))
    shutil.rmtree(args.storage / args.run_dir)                                                  # complete: the next study begins anew
    text = json.dumps(found, indent=1)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")
    print(json.dumps({k: v for k, v in found.items() if k in ("killed", "s_after_kill", "scores", "local_scores", "mean_within_local_interval")}, indent=1))


if __name__ == "__main__":
    main()
