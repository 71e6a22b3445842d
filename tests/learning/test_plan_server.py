import numpy as np
import torch

from modip_ray.learning.build import agent_of, build_spec
from modip_ray.learning.collector import Planned, Query
from modip_ray.learning.plan_server import PlanServer
from modip_ray.planning.planner import Planner
from modip_ray.tasks.collect import collect
from tests.fakes import STEPS, Noisy, PointEnv, small


def test_a_replaced_worker_gets_no_plans_and_disturbs_nobody():
    cfg = small(resources__compile=False)
    episodes = collect(Noisy(), PointEnv, 60, STEPS, seed=0, num_envs=2)
    agent = agent_of(cfg, build_spec(cfg, episodes, -np.ones(2), np.ones(2)), torch.device("cpu"))
    server = PlanServer(cfg, Planner(cfg, agent, seed=0))

    def query(worker, incarnation):
        return Query((worker, 0), incarnation, np.zeros((2, 4), np.float32), np.ones(2, bool))
    assert all(isinstance(found, Planned) for found in server([query(0, "old"), query(1, "other")]))
    assert isinstance(server([query(0, "new")])[0], Planned)
    late, new, other = server([query(0, "old"), query(0, "new"), query(1, "other")])
    assert isinstance(late, ValueError) and "incarnation old gets no plans any more" in str(late)
    assert isinstance(new, Planned) and isinstance(other, Planned)
