"""DPPO: its likelihoods and advantages against independent formulas, what it learns on the point in the plane, and its runs as ordinary runs."""

import copy
import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import modip_ray
from modip_ray.baselines.dppo import DPPOSystem, RewardScale, last_observations
from modip_ray.baselines.dppo_policy import TunedPolicy, clip_range, gae, policy_loss
from modip_ray.config import ConfigError, load
from modip_ray.export import ExportError, export_run, load_safetensors
from modip_ray.learning.build import build_spec
from modip_ray.learning.checkpoint import begin, commit, newest, verified
from modip_ray.learning.evaluation import Job
from modip_ray.learning.system import Setup
from modip_ray.model.diffusion import DiffusionPolicy
from modip_ray.report.metrics import read_metrics
from modip_ray.report.page import write_report
from modip_ray.report.rundata import load_run
from modip_ray.report.status import progress_of
from modip_ray.run import train
from modip_ray.saved_run import compare_run, evaluate_run
from modip_ray.session import Stopped
from modip_ray.start import adopt
from modip_ray.study.spec import build_study
from modip_ray.study.table import write_results
from modip_ray.tasks.collect import collect
from modip_ray.tasks.d4rl_data import write_d4rl
from modip_ray.tasks.env_group import EnvGroup
from tests.fakes import SMALL, STEPS, PointEnv, small

TASK = "halfcheetah-medium"         # a name of configs/tasks; its settings are replaced by those of the tiny task
OWN = {"method": "dppo", "policy.n_action_steps": 2, "policy.sampling_steps": 5, "dppo.denoising_steps": 3, "dppo.num_envs": 6, "dppo.n_steps": 12,
       "dppo.epochs": 2, "dppo.minibatches": 3, "dppo.critic_width": 32, "online.env_steps": 400}


class Careless:
    """Drives to a place beside the origin, with noise: there is much to gain."""

    def act(self, obs, rng):
        return np.clip(-0.4 * (obs[:, :2] - 0.7) - obs[:, 2:] + 0.3 * rng.standard_normal((len(obs), 2)), -1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.hdf5"
    write_d4rl(path, collect(Careless(), PointEnv, 1500, STEPS, seed=0, num_envs=8), {"source": "tests"})
    return path


@pytest.fixture(scope="module")
def study(data, tmp_path_factory):
    """A finished study of both methods, made in this process."""
    settings = SMALL | {"serial": True, "data.source": str(data), "pretrain.policy_updates": 300, "online.env_steps": 200, "eval.every_steps": 150}
    found = build_study({"out": str(tmp_path_factory.mktemp("study")), "tasks": {TASK: {}}, "methods": {"modip": {}, "dppo": OWN}, "seeds": [0],
                         "settings": settings}, "a test", "tiny")
    for cell in found.cells():
        cell.folder.mkdir(parents=True)
        train(cell.cfg)
    return found


def folder_of(study, method: str) -> Path:
    return study.folder / TASK / method / "seed_0"


def built(study, root: Path, **dotted) -> DPPOSystem:
    """A system that begins with the study's start, settings as there."""
    cfg = study.cells()[2].cfg.replace({k.replace("__", "."): v for k, v in dotted.items()})
    rows = [folder_of(study, "start") / "offline" / "rows_0_of_1.npy"]
    setup = Setup(cfg, build_spec(cfg, rows, -np.ones(2), np.ones(2)), rows, PointEnv)
    return DPPOSystem(dataclasses.replace(setup, checkpoint=adopt(setup, root)))


def fill(system: DPPOSystem) -> None:
    while system.filled < system.own.n_steps:
        system.collect()


# ---- the two-layer decision process ----------------------------------------------------------------------------------------------------------

def tuned(parametrization: str) -> TunedPolicy:
    torch.manual_seed(0)
    policy = TunedPolicy(DiffusionPolicy(4, 2, horizon=3, denoising_steps=8, width=16, blocks=1, parametrization=parametrization), steps=5, min_std=0.1)
    with torch.no_grad():
        for p in policy.tuned.parameters():                                         # as if trained
            p.add_(0.05 * torch.randn_like(p))
    return policy


@pytest.mark.parametrize("parametrization", ["sample", "eps"])
def test_the_likelihood_of_a_chain_is_that_of_bayes_rule(parametrization):
    """q(x_t-1 | x_t, x_0) from its two factors by precisions, the clean chunk as predicted, with torch's normal distribution."""
    policy = tuned(parametrization)
    obs, net = torch.randn(7, 4), policy.tuned
    chain = policy.chain(obs, torch.Generator().manual_seed(1))
    assert chain.shape == (7, 6, 6)
    ab = net.alpha_bar.double()
    for i in range(5):
        t = 4 - i
        x, less = chain[:, i].double(), chain[:, i + 1].double()
        clean = net.denoise(net.embed(obs), chain[:, i], torch.full((7,), t))[0].double().clamp(-1, 1)
        alpha, before = (ab[t] / ab[t - 1], ab[t - 1]) if t else (ab[0], torch.tensor(1.0))
        if t:
            precision = 1 / (1 - before) + alpha / (1 - alpha)
            mean, std = (before.sqrt() * clean / (1 - before) + alpha.sqrt() * x / (1 - alpha)) / precision, precision ** -0.5
        else:
            mean, std = clean, torch.tensor(0.0)
        expected = Normal(mean, std.clamp(min=0.1)).log_prob(less).view(7, 3, 2)
        found = policy.log_prob(obs, chain[:, i], chain[:, i + 1], torch.full((7,), t))
        assert torch.allclose(found.double(), expected, atol=2e-4), t
        assert found.std() > 0.1


def test_chains_are_drawn_from_the_distribution_whose_likelihood_is_taken():
    policy = tuned("sample")
    obs = torch.randn(4000, 4)
    chain = policy.chain(obs, torch.Generator().manual_seed(2))
    for i, t in ((0, 4), (4, 0)):
        with torch.no_grad():
            clean, _ = policy.tuned.denoise(policy.tuned.embed(obs), chain[:, i], torch.full((4000,), t))
            drawn = (chain[:, i + 1] - policy.mean(clean, chain[:, i], torch.tensor([t]))) / policy.std[t]
        assert drawn.abs().max() <= 3.001 and abs(float(drawn.mean())) < 0.03 and 0.95 < float(drawn.std()) < 1.02
    assert policy.std.min() == pytest.approx(0.1)


def test_the_first_steps_are_the_frozen_ones_and_the_last_ones_are_trained():
    policy, obs = tuned("sample"), torch.randn(5, 4)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        other.tuned.out[-1].bias.add_(0.3)
    a, b = (p.chain(obs, torch.Generator().manual_seed(3)) for p in (policy, other))
    assert torch.equal(a[:, 0], b[:, 0]) and not torch.allclose(a[:, 1], b[:, 1])
    noise = torch.randn(5, 1, 3, 2)
    assert not torch.allclose(policy.sample(obs, noise, 8), other.sample(obs, noise, 8))
    other.tuned.load_state_dict(other.bc.state_dict())
    assert torch.allclose(other.sample(obs, noise, 8), policy.bc.sample(obs, noise, 8), atol=1e-6)       # nothing trained yet: the BC policy
    assert not any(p.requires_grad for p in policy.bc.parameters())


def test_advantages_are_the_sums_of_their_definition():
    """Episodes that terminate, are cut by the time limit, and go on, against sums written out."""
    rng, (t, n), gamma, lam = np.random.default_rng(0), (9, 3), 0.9, 0.8
    rewards, values, after = (rng.normal(size=(t, n)) for _ in range(3))
    terminated, ended = np.zeros((t, n)), np.zeros((t, n))
    terminated[2, 0] = ended[2, 0] = ended[5, 1] = 1                                # env 0 terminates, env 1 is cut, env 2 goes on
    expected = np.zeros((t, n))
    for e in range(n):
        for start in range(t):
            for k in range(start, t):
                target = rewards[k, e] + (0.0 if terminated[k, e] else gamma * after[k, e])
                expected[start, e] += (gamma * lam) ** (k - start) * (target - values[k, e])
                if ended[k, e]:
                    break
    found = gae(*(torch.tensor(x) for x in (rewards, values, after, terminated, ended)), gamma, lam)
    assert np.allclose(found.numpy(), expected)
    assert found[2, 0] == pytest.approx(rewards[2, 0] - values[2, 0]) and found[5, 1] == pytest.approx(rewards[5, 1] + gamma * after[5, 1] - values[5, 1])


def test_the_clipped_loss_by_hand():
    cfg = dataclasses.replace(load().dppo, denoising_steps=3, clip=0.1, clip_base=0.01, denoising_gamma=0.5, clip_rate=2.0)
    i = torch.tensor([0, 2])
    assert clip_range(cfg, torch.arange(3)).tolist() == pytest.approx([0.01, 0.01 + 0.09 * (np.e - 1) / (np.e ** 2 - 1), 0.1])
    a = 1 / np.sqrt(2)                                                              # of two advantages, normalised: -a and a
    loss = policy_loss(cfg, torch.log(torch.tensor([1.5, 1.5])), torch.tensor([1.0, 3.0]), i)
    assert loss.item() == pytest.approx(-(-a * 0.25 * 1.5 + a * 1.1) / 2, abs=1e-5)  # the worse is never clipped, the better at 1.1


def test_rewards_are_scaled_by_the_deviation_of_their_discounted_sums():
    rng, scale = np.random.default_rng(0), RewardScale(2, 0.9)
    rewards, first = rng.normal(3, 2, (40, 2)), (rng.random((40, 2)) < 0.1).astype(float)
    sums, running = [], np.zeros(2)
    for r, f in zip(rewards, first, strict=True):
        running = r + 0.9 * np.where(f > 0, 0, running)
        sums.append(running)
    parts = [scale(rewards[:15], first[:15]), scale(rewards[15:], first[15:])]
    assert np.allclose(parts[0], rewards[:15] / np.std(sums[:15]), rtol=1e-3) and np.allclose(parts[1], rewards[15:] / np.std(sums), rtol=1e-3)


# ---- the learner -----------------------------------------------------------------------------------------------------------------------------

def test_the_first_minibatch_has_ratio_one_and_a_gradient(study, tmp_path):
    system = built(study, tmp_path)
    fill(system)
    before = {k: v.clone() for k, v in system.policy.state_dict().items()}
    system.update()
    first = system.metrics[0]
    assert first["ppo/kl"] < 1e-6 and first["ppo/clipped"] == 0 and first["loss/value"] > 0
    grads = [p.grad.abs().max() for p in system.policy.tuned.parameters()]
    assert max(grads) > 1e-4 and all(p.grad is None for p in system.policy.bc.parameters())
    after = system.policy.state_dict()
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    assert moved and all(k.startswith("tuned.") for k in moved)
    system.update()
    assert system.metrics[1]["ppo/kl"] > 0
    system.close()


def test_a_time_limit_keeps_the_true_last_observation(study, tmp_path):
    system = built(study, tmp_path, dppo__n_steps=20)                               # 40 steps: each episode of 30 is cut once
    fill(system)
    r = {k: v.numpy() for k, v in system.rollout.items()}
    assert r["ended"].sum() == 6 and r["terminated"].sum() == 0 and (r["ended"][14] == 1).all()
    go_on = r["ended"][:-1] == 0
    assert np.array_equal(r["next_obs"][:-1][go_on], r["obs"][1:][go_on])
    assert (np.abs(r["next_obs"][:-1][~go_on] - r["obs"][1:][~go_on]).max(-1) > 0.05).all()
    assert (r["first"][0] == 1).all() and (r["first"][15] == 1).all() and r["first"].sum() == 12
    system.close()


def test_an_environment_that_fails_at_once_led_nowhere():
    class Step:
        transitions = [type("T", (), {"next_obs": np.zeros((0, 3))}), type("T", (), {"next_obs": np.ones((2, 3))})]
    assert last_observations(np.full((2, 3), 7.0), Step).tolist() == [[7.0] * 3, [1.0] * 3]


def test_it_improves_on_its_bc_policy(study, tmp_path):
    """With ten times the published clip range, or it would take ten times as long."""
    system = built(study, tmp_path, online__env_steps=6000, dppo__num_envs=20, dppo__n_steps=15, dppo__epochs=10, dppo__actor_lr=1e-3, dppo__clip=0.1,
                   dppo__clip_base=0.1)
    job = Job("policy", tuple(range(1000, 1020)))
    before = np.mean(system.evaluate([job]).outcomes[0].returns)
    assert before == pytest.approx(np.mean(system.evaluate([Job("bc", job.seeds)]).outcomes[0].returns))
    status = system.advance("online", 1e9, until=6000)
    assert status.done and status.env_steps >= 6000 and status.metrics["ppo/kl"] > 0
    after = np.mean(system.evaluate([job]).outcomes[0].returns)
    bc = np.mean(system.evaluate([Job("bc", job.seeds)]).outcomes[0].returns)
    system.close()
    assert bc == pytest.approx(before) and after > before + 2, (before, after)


# ---- ordinary runs ---------------------------------------------------------------------------------------------------------------------------

def test_a_study_shows_it_beside_modip(study):
    found = write_results(study)
    assert found["methods"]["modip"][TASK]["mpc"]["seeds"] == 1 and "mpc" not in found["methods"]["dppo"][TASK]
    line = next(x for x in (study.folder / "results.md").read_text().splitlines() if x.startswith("| dppo |"))
    cells = [c.strip() for c in line.strip("|").split("|")]
    assert cells[3] == "-" and cells[2] != "-" and cells[5] != "-" and cells[8] == "1 of 1"
    assert (study.folder / f"curves_{TASK}.png").stat().st_size > 5_000
    rows = read_metrics(folder_of(study, "dppo"))
    assert [r["env_steps"] > 0 for r in rows if r["kind"] == "eval"][0] is False and {r["mode"] for r in rows if r["kind"] == "eval"} == {"bc", "policy"}
    assert any("ppo/kl" in r for r in rows if r["kind"] == "train") and not [r for r in rows if r["kind"] == "incident"]
    bc = json.loads((folder_of(study, "start") / "summary.json").read_text())
    assert bc["method"] == "modip" and json.loads((folder_of(study, "dppo") / "summary.json").read_text())["method"] == "dppo"


def test_eval_report_and_acting_work_and_the_planner_is_refused(study):
    run = folder_of(study, "dppo")
    summary = json.loads((run / "summary.json").read_text())
    again = compare_run(run)
    assert set(again["scores"]) == {"bc", "policy"}
    for mode in ("bc", "policy"):
        assert again["scores"][mode]["values"] == summary["scores"][mode]["values"]
    assert again["scores"]["bc"]["values"] != again["scores"]["policy"]["values"]
    assert progress_of(load_run(run), "evaluate", False).total == 2 * 4              # episodes of two modes
    assert modip_ray.load(run).act(np.zeros(4, np.float32)).shape == (2,)
    for refused in (lambda: evaluate_run(run, "mpc"), lambda: modip_ray.load(run, "mpc")):
        with pytest.raises(ConfigError, match="method dppo has no planner"):
            refused()
    with pytest.raises(ExportError, match="method is dppo"):
        export_run(run, "safetensors")
    assert "DP-only" in Path(write_report([run, folder_of(study, "modip")])).read_text()


def test_its_bc_policy_is_exported_as_any(study, tmp_path):
    """It is one as any other, so one format of tests/test_export.py's shows that it is the BC policy that is taken."""
    run = folder_of(study, "dppo")
    done = export_run(run, "safetensors", tmp_path / "bc.safetensors", "bc")
    assert done.difference <= 1e-4 and done.metadata["mode"] == "bc" and list(tmp_path.iterdir()) == [done.path]
    policy, obs = load_safetensors(done.path)[0], np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    noise = torch.randn((8, 1, policy.policy.horizon, 2), generator=torch.Generator().manual_seed(0))[:, 0]              # what a planner of seed 0 draws
    found = policy(torch.from_numpy(obs), noise).detach().numpy()
    acting = {mode: modip_ray.load(run, mode, overrides={"resources.precision": "fp32"}).plan(obs, range(8), np.ones(8, bool)).plans
              for mode in ("bc", "policy")}
    assert np.abs(found - acting["bc"]).max() <= 1e-4 < np.abs(found - acting["policy"]).max()


@pytest.mark.parametrize("step", [230, 300])
def test_stopped_at_any_moment_it_goes_on_as_if_nothing_had_been(study, tmp_path, monkeypatch, step):
    """SIGTERM in an environment's step, of an evaluation and of a rollout; then the same command: the scores of the run that was not stopped, bit for bit."""
    own_step, taken = PointEnv.step, itertools.count(1)

    def stopping(env, action):
        if next(taken) == step:                                                     # 60 of an evaluation, 156 of rollouts, 60, 144
            os.kill(os.getpid(), signal.SIGTERM)
        return own_step(env, action)
    cell = study.cells()[2]
    cfg = cell.cfg.replace({"run_dir": str(tmp_path / "run")})
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(PointEnv, "step", stopping)
        train(cfg)
    counters = newest(tmp_path / "run" / "checkpoints").counters
    assert counters["phase"] == "online" and 156 <= counters["env_steps"] <= (156 if step == 230 else 300)
    resumed, plain = train(cfg), json.loads((cell.folder / "summary.json").read_text())
    assert resumed["updates"] == plain["updates"] and resumed["env_steps"] == plain["env_steps"]
    assert resumed["scores"]["policy"]["values"] == plain["scores"]["policy"]["values"]
    assert not [r for r in read_metrics(tmp_path / "run") if r["kind"] == "incident"]


def test_the_policy_keeps_the_scales_that_it_was_trained_with(study, tmp_path):
    """Where the rest of the start is not taken over, and the data of this run would give others."""
    cfg = study.cells()[2].cfg.replace({"critic.gamma": 0.5})
    rows = [folder_of(study, "start") / "offline" / "rows_0_of_1.npy"]
    found = adopt(Setup(cfg, build_spec(cfg, rows, -2 * np.ones(2), 2 * np.ones(2)), rows, PointEnv), tmp_path).read("learner_model")
    assert (found["agent.normalizer.action_low"] == -1).all() and (found["agent.normalizer.action_high"] == 1).all()


def test_a_full_rollout_outlives_environments_that_do_not_come_out_where_they_were(study, tmp_path, monkeypatch):
    """Stopped twice within one rollout's minibatches: what is trained on stays; without it the rollout begins anew."""
    system = built(study, tmp_path / "start")
    fill(system)
    system.minibatch, rewards = 2, system.rollout["reward"].clone()

    def saved(system, name):
        folder = begin(tmp_path / name)
        counts = system.save(folder)
        return verified(commit(folder, dict(counts), 2))
    first = saved(system, "first")
    monkeypatch.setattr(EnvGroup, "resume", lambda *_: (_ for _ in ()).throw(ValueError("elsewhere")))
    again = built(study, tmp_path / "again")
    again.resume(first)
    second = saved(again, "second")                                 # no environments yet
    for checkpoint, filled in ((first, system.own.n_steps), (second, system.own.n_steps)):
        other = built(study, tmp_path / f"other_{checkpoint.path.parent.name}")
        other.resume(checkpoint)
        assert (other.filled, other.minibatch) == (filled, 2) and torch.equal(other.rollout["reward"], rewards)
    (second.path / "collection.safetensors").unlink()
    other = built(study, tmp_path / "bare")
    other.resume(second)
    assert other.filled == other.minibatch == 0


def test_a_run_of_modip_keeps_its_identity():
    cfg = small()
    assert cfg.replace({"dppo.num_envs": 3}).hash() == cfg.hash()
    dppo = cfg.replace(OWN | {"pretrain.start": "x"})
    assert dppo.replace({"dppo.num_envs": 7}).hash() != dppo.hash() != cfg.hash() and dppo.one_process and not cfg.one_process


@pytest.mark.parametrize("settings, message", [
    ({"pretrain.start": None}, "pretrain.start.*fine-tunes the BC policy"),
    ({"policy.kind": "gaussian"}, "policy.kind.*diffusion"),
    ({"dppo.denoising_steps": 6}, "dppo.denoising_steps.*policy.denoising_steps=5"),
    ({"policy.sampling_steps": 1}, "policy.sampling_steps.*at least 2"),
    ({"online.env_steps": 100}, "online.env_steps.*144 of one rollout"),
    ({"dppo.minibatches": 1000}, "dppo.minibatches.*216"),
    ({"dppo.actor_lr": 0.0}, "dppo.actor_lr.*positive"),
    ({"dppo.gae_lambda": 1.5}, "dppo.gae_lambda.*0..1"),
    ({"method": "dpo"}, "modip, dppo.*did you mean 'dppo'"),
])
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        small().replace(OWN | {"pretrain.start": "runs/x"} | settings)
