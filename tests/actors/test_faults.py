"""Each role killed, a planner and a worker stopped, in the course of one run that ends as if nothing had been."""

import dataclasses
import json
import os
import signal
import time

import numpy as np
import pytest

from modip_ray.learning.build import build_spec
from modip_ray.learning.evaluation import jobs_for
from modip_ray.learning.journal import Journal
from modip_ray.learning.replay_server import SEGMENT
from modip_ray.learning.segment import decode
from modip_ray.learning.system import Setup
from modip_ray.tasks.collect import collect
from tests.advance import PATIENCE_S
from tests.fakes import STEPS, Noisy, PointEnv, small

pytestmark = pytest.mark.ray
ROLES = {"planner": "the planner", "learner_model": "the model learner", "learner_policy": "the policy learner", "replay": "the replay",
         "store": "the weight store", "evaluator": "evaluator 0"}


class Steps:
    """Advances a system until something has happened."""

    def __init__(self, system):
        self.system, self.incidents, self.status = system, [], None

    def until(self, ready):
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            self.status = self.system.advance("online", 0.2, until=10**9)
            self.incidents += self.status.incidents
            assert time.monotonic() < deadline, "\n".join(map(str, [self.status, *self.incidents, self.system.processes(), self.system.gauges()]))

    def progress(self):
        """More steps stored, and more updates of both streams."""
        at, counts = self.system.env_steps, dict(self.system.counts)
        self.until(lambda: self.system.env_steps > at and all(self.system.counts[s] > n for s, n in counts.items()))

    def hit(self, role, number, says):
        """Signal one process of a role; returns its id and the seconds until an incident says so."""
        self.until(lambda: self.system.processes().get(role))
        pid, before, begun = self.system.processes()[role][0], len(self.incidents), time.monotonic()
        os.kill(pid, number)
        self.until(lambda: any(says(line) for line in self.incidents[before:]))
        return pid, time.monotonic() - begun


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from modip_ray.actors.system import RaySystem
    folder = tmp_path_factory.mktemp("run")
    cfg = small(folder, pretrain__updates=20, pretrain__policy_updates=20, online__env_steps=100_000, online__min_online=30, rollout__num_workers=1,
                resources__silent_s=10.0, resources__snapshot_s=0.5)
    episodes = collect(Noisy(), PointEnv, 600, STEPS, seed=0, num_envs=4)
    system = RaySystem(Setup(cfg, build_spec(cfg, episodes, -np.ones(2), np.ones(2)), episodes, PointEnv, folder=folder))
    facts, steps = {"seconds": {}}, Steps(system)
    try:
        while not system.advance("pretrain", 1.0, until=0).done:
            pass
        system.freeze_bc()
        steps.until(lambda: system.counts["model"] > 25 and "rollout" in system.processes())
        facts["processes"] = system.processes()
        for role, name in ROLES.items():
            _, facts["seconds"][role] = steps.hit(role, signal.SIGKILL, lambda line, name=name: line.startswith(f"{name} died; it serves again after"))
            steps.progress()
        for role, name in {"planner": "the planner", "rollout": "rollout worker 0"}.items():
            pid, seconds = steps.hit(role, signal.SIGSTOP, lambda line, name=name: line.startswith(f"{name} did not answer for 10 s"))
            facts["seconds"][f"{role} stopped"] = seconds
            steps.progress()
            steps.until(lambda role=role: role in system.processes())               # the new one has answered
            facts[f"{role} stopped"] = (pid, system.processes()[role])
        steps.until(lambda: len(system.pool.acknowledged) == 2)                      # the new worker's first report is there
        system.cfg = dataclasses.replace(cfg, online=dataclasses.replace(cfg.online, env_steps=system.env_steps + 100))
        steps.until(lambda: steps.status.done)
        facts |= {"gauges": system.gauges(), "replay": system.replay_status(), "incidents": steps.incidents, "status": steps.status}
        facts["acknowledged"], facts["file"] = dict(system.pool.acknowledged), json.loads((folder / "live" / "processes.json").read_text())
        facts["listed"] = system.processes()
        steps.until(lambda: system.processes().get("evaluator"))
        evaluator, told = system.processes()["evaluator"][0], []

        def progress(outcome):                                                      # killed after its first outcome, before it is given the next job
            if not told:
                os.kill(evaluator, signal.SIGKILL)
            told.append(outcome)
        facts["report"], facts["told"] = system.evaluate(jobs_for("bc", 2, 5) + jobs_for("policy", 2, 5), progress), told
    finally:
        system.close()
    journal = Journal(folder / "journal" / "replay")
    facts["stored"] = [decode(record.payload) for record in journal.read(0) if record.kind == SEGMENT]
    journal.close()
    return facts


def test_each_role_serves_again_within_a_minute(run):
    """20 seconds are promised, and measured by tests/chaos; here other tests run beside."""
    assert set(run["seconds"]) == {*ROLES, "planner stopped", "rollout stopped"}
    assert all(seconds < 60 for seconds in run["seconds"].values()), run["seconds"]


def test_every_acknowledged_segment_is_stored_once_and_the_run_ends_as_it_should(run):
    ids, lengths = [segment.id for segment in run["stored"]], {}
    assert len(set(ids)) == len(ids) == run["replay"]["segments"]
    for segment in run["stored"]:
        lengths[segment.incarnation] = lengths.get(segment.incarnation, 0) + len(segment)
    assert sum(lengths.values()) == run["replay"]["env_steps"] == run["status"].env_steps
    assert len(run["acknowledged"]) == 2 and all(lengths[incarnation] >= n > 0 for incarnation, n in run["acknowledged"].items())
    assert run["status"].done and run["status"].updates == run["replay"]["allowed"]["model"] == 20 + int(0.25 * run["status"].env_steps)


def test_learners_go_on_from_their_snapshots(run):
    lines = [line for line in run["incidents"] if "learner died" in line]
    assert len(lines) == 2 and all("(its snapshot)" in line for line in lines), lines
    assert [run["gauges"][f"{group}/restarts"] for group in ("learner_model", "learner_policy", "replay", "store", "evaluator")] == [1.0] * 5
    assert run["gauges"]["planner/restarts"] == 2.0 and run["gauges"]["rollout/lost"] == 1.0


def test_stopped_processes_are_replaced_for_good(run):
    for role in ("planner", "rollout"):
        pid, now = run[f"{role} stopped"]
        assert pid not in now and len(now) == 1
        assert not os.path.exists(f"/proc/{pid}") or open(f"/proc/{pid}/stat").read().split()[2] == "Z"


def test_processes_are_listed_for_who_looks_from_outside(run):
    assert run["file"] == run["listed"] and {*ROLES, "rollout", "driver"} == set(run["file"])


def test_the_evaluation_at_the_end_outlives_the_death_of_an_evaluator(run):
    jobs = jobs_for("bc", 2, 5) + jobs_for("policy", 2, 5)
    assert run["told"] == run["report"].outcomes and run["report"].diagnostics
    assert any(line.startswith("evaluator 0 ") and "died" in line for line in run["report"].incidents), run["report"].incidents
    assert sorted((o.job.mode, o.job.seeds) for o in run["report"].outcomes) == sorted((job.mode, job.seeds) for job in jobs)
