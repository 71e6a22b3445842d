"""Acting with a run from Python: one environment, several, and the example; without Ray."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import modip_ray
from modip_ray.config import ConfigError
from modip_ray.learning.checkpoint import CheckpointError, commit_best, newest, read_state, stage_best, write_state
from modip_ray.runfolder import RunError
from modip_ray.saved_run import evaluate_run
from tests.fakes import STEPS

ROOT = Path(__file__).resolve().parents[1]


def episode(policy, seed: int) -> tuple[float, int]:
    env = policy.make_env()
    obs, _ = env.reset(seed=seed)
    total, steps, over = 0.0, 0, False
    policy.reset()
    while not over:
        obs, reward, terminated, truncated, _ = env.step(policy.act(obs))
        total, steps, over = total + reward, steps + 1, terminated or truncated
    return total, steps


@pytest.mark.parametrize("mode", ["bc", "policy", "mpc"])
def test_act_is_what_the_evaluation_does(finished_run, mode):
    """The same episode, step by step: with the noise of the evaluation's planner, the same return."""
    measured = evaluate_run(finished_run, mode, episodes=1, seed=7)
    from modip_ray.tasks.envs import env_seed
    policy = modip_ray.load(finished_run, mode, seed=env_seed(1, 7))
    total, steps = episode(policy, 7)
    assert steps == STEPS and total == pytest.approx(measured["returns"][0], abs=1e-4)


def test_a_chunk_is_executed_before_the_next_look(finished_run):
    policy = modip_ray.load(finished_run)
    asked = []
    plan = policy.plan
    policy.plan = lambda obs, slots, reset: asked.append((obs.copy(), reset.copy())) or plan(obs, slots, reset)
    for i in range(5):
        policy.act(np.full(4, 0.1 * i))
    policy.reset()
    policy.act(np.zeros(4))
    assert [float(obs[0, 0]) for obs, _ in asked] == pytest.approx([0.0, 0.2, 0.4, 0.0])                 # policy.n_action_steps is 2
    assert [bool(reset[0]) for _, reset in asked] == [True, False, False, True]


def test_a_plan_warms_the_next_one_of_its_slot_only(finished_run):
    """The same noise twice: what a slot's last plan was makes the difference (not to all: a proposal of the policy may win), and a reset takes it away."""
    slots, obs = list(range(16)), np.random.default_rng(0).uniform(-1, 1, (16, 4)).astype(np.float32)
    even = np.arange(16) % 2 == 0

    def second(reset: np.ndarray) -> np.ndarray:
        policy = modip_ray.load(finished_run, "mpc")
        policy.chunks(obs, slots, np.ones(16, bool))
        return policy.chunks(obs, slots, reset)
    warm, cold = second(np.zeros(16, bool)), second(even)
    changed = (warm != cold).any((1, 2))
    assert warm.shape == (16, 1, 2) and changed[even].any() and not changed[~even].any()


def test_importing_the_package_takes_no_torch_along_and_the_example_runs_without_ray(finished_run):
    code = ("import sys, runpy, modip_ray, modip_ray.cli; assert not {'torch', 'ray'} & set(sys.modules); sys.modules['ray'] = None; "
            f"sys.argv = ['act.py', {str(finished_run)!r}]; runpy.run_path('examples/act.py'); assert 'torch' in sys.modules")
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and ran.stdout.startswith("return "), ran.stderr
    assert np.isfinite(float(ran.stdout.split()[1]))


def test_the_best_checkpoint_acts_where_one_is_kept(finished_run, tmp_path):
    """Made of the newest one, with other weights of the policy."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    with pytest.raises(CheckpointError, match="has no best checkpoint"):
        modip_ray.load(run, checkpoint="best")
    folder = stage_best(newest(run / "checkpoints").path)
    state = read_state(folder / "learner_policy.safetensors")
    write_state(folder, "learner_policy", {k: v * 0 if k.startswith("agent.policy.") else v for k, v in state.items()})
    commit_best(folder, 5.0)
    best, last = (modip_ray.load(run, checkpoint=which) for which in ("best", "newest"))
    assert best.version == f"best_{last.version}" and not np.array_equal(best.planner.agent.flat("policy"), last.planner.agent.flat("policy"))
    score, ev = evaluate_run(run, "policy", 1, checkpoint="best"), best.cfg.eval
    assert score["checkpoint"] == best.version and score["seeds"] == [ev.seed + ev.every_episodes], "none of those that it was chosen by"
    with pytest.raises(ConfigError, match="checkpoint: got 'last', expected newest or best"):
        modip_ray.load(run, checkpoint="last")


def test_mistakes_are_told(finished_run, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="no config.yaml there"):
        modip_ray.load(tmp_path)
    with pytest.raises(ConfigError, match="mode: got 'plan', expected one of bc, policy, mpc"):
        modip_ray.load(finished_run, "plan")
    with pytest.raises(ConfigError, match="critic.gamma: decides how the run was trained"):
        modip_ray.load(finished_run, overrides={"critic.gamma": 0.5})
    policy = modip_ray.load(finished_run)
    policy.act(np.zeros(4))
    for obs, words in ((np.zeros(3), r"shape \(3,\); expected 4 finite"), (np.full(4, np.nan), "expected 4 finite"), ({"x": 1}, "got dict, expected 4")):
        with pytest.raises(ValueError, match=words):                                # also in the middle of a chunk
            policy.act(obs)
    monkeypatch.setattr("modip_ray.policy.saved_bc", lambda checkpoint: None)
    with pytest.raises(CheckpointError, match="no frozen BC policy yet"):
        modip_ray.load(finished_run, "bc")
    with pytest.raises(AttributeError, match="no attribute 'loads'"):
        modip_ray.__getattr__("loads")
