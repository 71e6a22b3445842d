"""Two processes that update together against one, by gloo on this machine."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from modip_ray.learning.learner import SKIPPED, Learner
from modip_ray.learning.parallel import LOOPBACK, Meeting, Place, ReplicaLost, Replicas, join, meeting
from modip_ray.learning.replay import MixedReplay
from tests.learning.test_learner import linear_system, make_learner

SIZE, UPDATES, SPOILT = 2, 6, 3
CASES = {"value": ["distill.rule=all"], "policy_q": ["critic.target=policy_q", "planner.tail=policy_q", "distill.rule=exponential"]}


def batches(spoilt: bool):
    """Mixed ones of 64 rows, with padding; in one of them a number of process 1's rows may be no number."""
    replay = MixedReplay(linear_system(1, steps=4, terminated=True), linear_system(2), 0, planned=True)
    for i in range(UPDATES):
        model, policy = replay.sequences(64, 3, 3, 0.5), replay.chunks(64, 2, 3, 0.5)
        if spoilt and i == SPOILT:
            model["reward"][1], policy["chunk"][1] = np.nan, np.nan
        yield model, policy


def updated(replicas: Replicas, overrides: list[str], spoilt: bool = False):
    """Weights and metrics after both streams' updates."""
    torch.set_num_threads(1)
    learner = make_learner(*overrides, seed=3)
    learner = Learner(learner.cfg, learner.agent, 3, replicas)
    rows = [learner.update_model(model) | {f"{SKIPPED}_policy": (found := learner.update_policy(policy, distil=True)).pop(SKIPPED), **found}
            for model, policy in batches(spoilt)]
    tensors = {f"{name}.{k}": t.numpy().copy() for name, module in learner.modules().items() for k, t in module.state_dict().items()}
    return tensors, [{k: float(v) for k, v in row.items()} for row in rows], learner.rng.get_state().numpy()


def rank_one(where: Meeting):
    """In a process of its own."""
    replicas = join(where, 1, SIZE)
    found = {name: updated(replicas, overrides) for name, overrides in CASES.items()}
    return found | {"spoilt": updated(replicas, CASES["value"], spoilt=True)}


@pytest.fixture(scope="module")
def found():
    """(one process, rank 0, rank 1) by case."""
    where, store = meeting([Place("here", "cpu")] * SIZE, 240.0)
    assert where.host == LOOPBACK and where.backend == "gloo"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        other = pool.submit(rank_one, where)
        replicas = join(where, 0, SIZE, store)
        first = {name: updated(replicas, overrides) for name, overrides in CASES.items()} | {"spoilt": updated(replicas, CASES["value"], spoilt=True)}
        second = other.result(240)
    with pytest.raises(ReplicaLost, match="process 0 of 2 lost the others"):        # the other's process has ended
        replicas.average([torch.ones(3)])
    torch.distributed.destroy_process_group()
    alone = {name: updated(Replicas(), overrides) for name, overrides in CASES.items()}
    return {name: (alone.get(name), first[name], second[name]) for name in first}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_where_one_with_the_whole_batches_does(found, case):
    """Sums are made in another order, so the last digits may differ."""
    (one, alone_metrics, rng), (two, metrics, two_rng), _ = found[case]
    assert np.array_equal(rng, two_rng) and set(one) == set(two)
    moved = [np.abs(one[k] - two[k]).max() for k in one]
    assert max(moved) < 3e-6
    for a, b in zip(alone_metrics, metrics, strict=True):
        own, both = ({k: v for k, v in metrics.items() if k != "value/target_std"} for metrics in (a, b))
        assert both == pytest.approx(own, rel=1e-4, nan_ok=True)                        # NaN: of no plan among the rows


@pytest.mark.parametrize("case", [*CASES, "spoilt"])
def test_both_processes_hold_the_same_weights_bit_for_bit(found, case):
    _, (first, _, rng), (second, _, other_rng) = found[case]
    assert all(np.array_equal(first[k], second[k]) for k in first) and np.array_equal(rng, other_rng)


def test_an_update_that_is_bad_in_one_process_is_skipped_in_both(found):
    _, *both = found["spoilt"]
    for tensors, metrics, _ in both:
        assert [row[SKIPPED] for row in metrics] == [row[f"{SKIPPED}_policy"] for row in metrics] == [float(i == SPOILT) for i in range(UPDATES)]
        assert all(np.isfinite(t).all() for t in tensors.values())


def test_rows_are_dealt_out_by_turns():
    rows = torch.arange(6)
    assert [Replicas(r, 3).own(rows).tolist() for r in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert Replicas().own(rows) is rows


def test_gradients_go_by_nccl_only_where_each_process_has_a_gpu_of_its_own():
    def way(*places):
        where, _ = meeting([Place(*p) for p in places], 5.0)
        return where.backend
    assert way((LOOPBACK, "gpu-a"), (LOOPBACK, "gpu-b")) == "nccl"
    assert way((LOOPBACK, "gpu-a"), (LOOPBACK, "gpu-a")) == way((LOOPBACK, "gpu-a"), (LOOPBACK, "cpu")) == "gloo"
