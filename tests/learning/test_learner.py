import copy
import math
import threading

import numpy as np
import pytest
import torch
from torch import nn

from modip_ray.config import load
from modip_ray.learning.learner import SKIPPED, Learner, mean_metrics
from modip_ray.learning.replay import MixedReplay, ReplayBuffer, Segment
from modip_ray.model.agent import Agent
from modip_ray.model.hardware import compiled_beside

TINY = ["policy.width=32", "policy.blocks=1", "policy.horizon=2", "policy.n_action_steps=1", "policy.denoising_steps=8", "policy.sampling_steps=4",
        "policy.lr=2e-3", "policy.ema=0.99", "policy.parametrization=sample", "planner.horizon=2", "planner.n_action_steps=1", "planner.proposal_steps=2",
        "world_model.latent=16", "world_model.width=32", "world_model.horizon=3", "world_model.lr=3e-3", "world_model.lr_final=1e-3",
        "world_model.encoder_lr_scale=0.3", "critic.width=16", "critic.members=2", "critic.gamma=0.5", "critic.tau=0.1", "critic.expectile=0.5",
        "critic.head=regression", "online.lr_scale=0.5"]
A = np.array([[0.9, 0.1], [0.0, 0.8]], np.float32)
GAMMA = 0.5


def linear_system(seed: int, episodes: int = 100, steps: int = 6, terminated: bool = False) -> ReplayBuffer:
    """s' = A s + 0.3 a, r = s_0 - 2 s_1 + a_0, actions a = 2 tanh(-s) and a little noise; raw actions live in -2..2."""
    rng, buffer = np.random.default_rng(seed), ReplayBuffer(episodes * steps, 2, 2, GAMMA, plan_horizon=2)
    for _ in range(episodes):
        obs, actions = [rng.normal(0, 1, 2).astype(np.float32)], []
        for _ in range(steps):
            actions.append((2 * np.tanh(-obs[-1]) + 0.1 * rng.normal(0, 1, 2)).clip(-2, 2).astype(np.float32))
            obs.append(A @ obs[-1] + 0.3 * actions[-1])
        obs, actions = np.stack(obs), np.stack(actions)
        buffer.add(Segment(obs, actions, obs[:-1, 0] - 2 * obs[:-1, 1] + actions[:, 0], terminated))
    return buffer


def make_learner(*overrides: str, seed: int = 0, **others) -> Learner:
    torch.manual_seed(0)
    cfg = load(overrides=[*TINY, *overrides])
    agent = Agent(cfg, 2, 2)
    data = linear_system(0).arrays
    agent.normalizer.fit(data["obs"], np.full(2, -2.0), np.full(2, 2.0), 0.01)
    agent.world_model.reward_scale.fill_(2 * float(data["reward"].std()))
    return Learner(cfg, agent, seed, **others)


def draw(buffer, rng, rows=64, horizon=3, n_step=3):
    return buffer.sequences(buffer.draw(rng, rows), horizon, n_step)


def draw_chunks(buffer, rng, rows=64):
    return {**buffer.chunks(buffer.draw(rng, rows), 2, 3, False), "online": np.zeros(rows, bool)}


def constant_critic(critic: nn.Module, value: float) -> None:
    for p in critic.parameters():
        nn.init.zeros_(p)
    critic.net.biases[-1].data.fill_(value)


@pytest.mark.parametrize("head", ["regression", "two_hot"])
def test_the_model_learns_a_linear_system(head):
    learner, buffer, rng = make_learner(f"critic.head={head}", "critic.bins=21", "critic.bound=3"), linear_system(1), np.random.default_rng(0)
    rows = [{k: float(v) for k, v in learner.update_model(draw(buffer, rng)).items()} for _ in range(200)]
    first, last = ({k: np.mean([r[k] for r in part]) for k in rows[0]} for part in (rows[:10], rows[-10:]))
    assert learner.updates == 200 and all(np.isfinite(v) for v in last.values())
    assert last["loss/reward"] < 0.1 * first["loss/reward"]
    assert last["loss/value"] < 0.7 * first["loss/value"]
    assert last["loss/consistency"] < 0.2                           # two simplices of two groups: at most 4 apart
    fresh = linear_system(2)
    batch = draw(fresh, rng, 256)
    with torch.no_grad():
        norm, model = learner.agent.normalizer, learner.agent.world_model
        z = model.encode(norm.obs(torch.from_numpy(batch["obs"][:, 0])))
        _, reward, _ = model.rollout(z, norm.action(torch.from_numpy(batch["action"])))
        error = (reward * model.reward_scale - torch.from_numpy(batch["reward"])) * torch.from_numpy(batch["mask"])
    assert error.square().mean() < 0.1 * batch["reward"].var()      # on data it has not seen, three steps ahead


def test_the_policy_learns_the_behaviour_and_its_average_follows():
    learner, buffer, rng = make_learner(), linear_system(1), np.random.default_rng(0)
    before = {k: v.clone() for k, v in learner.agent.world_model.state_dict().items()}
    losses = [float(learner.update_policy(draw_chunks(buffer, rng), distil=False)["loss/policy"]) for _ in range(300)]
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
    obs = linear_system(2).arrays["obs"][:200]
    agent = learner.agent
    noise = torch.randn(200, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    actions = agent.normalizer.raw_action(agent.policy.sample(agent.normalizer.obs(torch.from_numpy(obs)), noise, 4)[:, 0, 0]).numpy()
    assert np.abs(actions - 2 * np.tanh(-obs)).mean() < 0.25        # in a range of -2..2
    for key, value in agent.world_model.state_dict().items():       # the policy's update touches nothing else
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("terminated, n, expected", [
    (True, 1, [1 + 5, 2 + 5, 4.0]), (False, 1, [1 + 5, 2 + 5, 4 + 5.0]), (True, 1000, [3, 4, 4.0]), (False, 1000, [3 + 1.25, 4 + 2.5, 4 + 5.0]),
])
def test_targets_with_termination_and_time_limit_by_hand(terminated, n, expected):
    """Rewards 1, 2, 4, gamma 0.5 and a target critic that always says 10: the mean target over the three steps."""
    learner, buffer = make_learner(), ReplayBuffer(3, 2, 2, GAMMA)
    buffer.add(Segment(np.zeros((4, 2), np.float32), np.zeros((3, 2), np.float32), np.array([1, 2, 4], np.float32), terminated))
    constant_critic(learner.target_critic, 10.0)
    out = learner.update_model(buffer.sequences(np.arange(3), 1, n))
    first, second, third = expected                                 # each start and its next; the last one has none
    assert float(out["value/target_mean"]) == pytest.approx(np.mean(seen := [first, second, second, third, third]), rel=1e-5)
    assert float(out["value/target_std"]) == pytest.approx(np.std(seen), rel=1e-5)


def test_values_converge_to_the_discounted_return():
    """One state, reward 1 for ever, cut by a time limit: V = 1 / (1 - gamma) = 2; the same with a termination after each step: V = 1."""
    for terminated, value in ((False, 2.0), (True, 1.0)):
        learner, buffer = make_learner("world_model.lr=1e-2"), ReplayBuffer(8, 2, 2, GAMMA)
        for _ in range(8):
            buffer.add(Segment(np.zeros((2, 2), np.float32), np.zeros((1, 2), np.float32), np.ones(1, np.float32), terminated))
        for _ in range(150):
            learner.update_model(buffer.sequences(np.arange(8), 1, 1))
        with torch.no_grad():
            z = learner.agent.world_model.encode(learner.agent.normalizer.obs(torch.zeros(1, 2)))
            torch.testing.assert_close(learner.agent.critic(z), torch.full((2, 1), value), atol=0.1, rtol=0)


def test_every_part_of_a_batch_has_its_share_of_online_rows():
    """MixedReplay puts offline rows first: of four parts in a row, the one that trains the world model would have no online row."""
    learner, seen = make_learner("critic.updates_per_update=4"), []
    learner.update_value = seen.append
    loss = learner.model_loss
    learner.model_loss = lambda b: (seen.append(b), loss(b))[1]
    learner.update_model(MixedReplay(linear_system(1), linear_system(2, terminated=True), 0, False).sequences(64, 3, 1000, 0.25))
    assert [int((part["discount"][:, 0] == 0).sum()) for part in seen] == [4, 4, 4, 4]                # all returns of the online part end in a termination


def test_further_updates_of_v_bring_it_nearer_and_leave_the_world_model_alone():
    """The same batches: with 16 updates of V for each of the model, V is much nearer the returns; they touch nothing but V."""
    found = {}
    for updates in (1, 16):
        learner, buffer, rng = make_learner(f"critic.updates_per_update={updates}"), linear_system(1), np.random.default_rng(0)
        for _ in range(15):
            batch = draw(buffer, rng, 16 * 64)
            learner.update_model(batch if updates == 16 else {k: v[:64] for k, v in batch.items()})
        norm, model = learner.agent.normalizer, learner.agent.world_model
        test = draw(linear_system(2), np.random.default_rng(1), 256, 0, 1000)
        with torch.no_grad():
            value = learner.agent.critic(model.encode(norm.obs(torch.from_numpy(test["obs"][:, 0])))).mean(0)
        assert ("value_opt" in learner.optimizers()) == (updates == 16)
        found[updates] = float((value - torch.from_numpy(test["n_step_return"][:, 0])).square().mean())
    assert found[16] < 0.4 * found[1]
    learner = make_learner("critic.updates_per_update=2")
    before = {k: v.clone() for k, v in learner.agent.world_model.state_dict().items()}
    value = copy.deepcopy(learner.agent.critic.state_dict())
    learner.update_value({k: torch.from_numpy(v) for k, v in draw(linear_system(1), np.random.default_rng(0)).items()})
    torch.testing.assert_close(dict(learner.agent.world_model.state_dict()), before, rtol=0, atol=0)
    assert any(not torch.equal(v, value[k]) for k, v in learner.agent.critic.state_dict().items())


def test_padding_never_reaches_the_loss():
    buffer, rng = linear_system(1, episodes=6, steps=3, terminated=True), np.random.default_rng(0)
    batch = draw(buffer, rng)
    assert 0 < batch["mask"].mean() < 1
    spoiled = {k: v.copy() for k, v in batch.items()}
    dead, dead_value = batch["mask"] == 0, batch["value_mask"] == 0
    behind = np.concatenate([np.zeros((64, 1), bool), dead], 1)     # observations behind the true last one
    spoiled["action"][dead], spoiled["reward"][dead], spoiled["terminated"][dead] = 1.7, 1e3, True
    spoiled["obs"][behind] = 77.0
    spoiled["n_step_return"][dead_value], spoiled["bootstrap_obs"][dead_value] = 1e6, -50.0
    one, two = make_learner(), make_learner()
    a, b = one.update_model(batch), two.update_model(spoiled)
    for key in a:
        if not key.startswith("value/"):
            torch.testing.assert_close(a[key], b[key])
    for p, q in zip(one.agent.parameters(), two.agent.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_the_target_critic_follows_by_tau():
    learner, buffer = make_learner(), linear_system(1)
    nn.init.normal_(learner.target_critic.net.biases[0])
    before = [p.clone() for p in learner.target_critic.parameters()]
    learner.update_model(draw(buffer, np.random.default_rng(0)))
    for old, new, source in zip(before, learner.target_critic.parameters(), learner.agent.critic.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * source)


def test_ema_warm_up_by_hand():
    learner = make_learner()
    for updates, decay in ((0, 0.1), (1, 2 / 11), (8, 0.5), (890, 891 / 900), (10**6, 0.99)):
        learner.policy_updates = updates
        assert learner.ema_decay() == pytest.approx(decay)
    learner.policy_updates = 2                                      # the next update is the third: decay 4/13
    nn.init.normal_(learner.policy.chunk_in.bias)
    before = [p.clone() for p in learner.agent.policy.parameters()]
    learner.update_policy(draw_chunks(linear_system(1), np.random.default_rng(0)), distil=False)
    for old, new, raw in zip(before, learner.agent.policy.parameters(), learner.policy.parameters(), strict=True):
        torch.testing.assert_close(new, (4 * old + 9 * raw) / 13)


def test_step_sizes_by_hand():
    learner = make_learner()
    middle = 1e-3 + (3e-3 - 1e-3) / 2
    for progress, online, lr in ((0.0, False, 3e-3), (0.5, False, middle), (1.0, False, 1e-3), (7.0, False, 1e-3), (0.5, True, 1.5e-3),
                                 (0.25, False, 1e-3 + 2e-3 * (1 + math.cos(math.pi / 4)) / 2)):
        learner.set_lr(progress, online)
        encoder, rest = (group["lr"] for group in learner.model_opt.param_groups)
        assert rest == pytest.approx(lr) and encoder == pytest.approx(0.3 * lr)


@pytest.mark.parametrize("share, expected", [("null", 0.5), ("0.1", 0.1)])
def test_the_policys_own_share_of_its_step_size(share, expected):
    learner = make_learner(f"online.policy_lr_scale={share}")
    learner.set_lr(0.5, online=True)
    assert learner.policy_opt.param_groups[0]["lr"] == pytest.approx(expected * learner.cfg.policy.lr)
    assert learner.value_opt.param_groups[0]["lr"] == pytest.approx(0.5 * learner.cfg.world_model.lr)


@pytest.mark.parametrize(("progress", "left"), [(0.0, 1.0), (0.5, 0.6), (1.0, 0.2), (1.5, 0.2)])
def test_online_step_sizes_fall_to_what_shall_be_left_of_them(progress, left):
    learner = make_learner("online.policy_lr_scale=0.1", "online.lr_final_scale=0.2")
    learner.set_lr(progress, online=True)
    assert learner.policy_opt.param_groups[0]["lr"] == pytest.approx(0.1 * left * learner.cfg.policy.lr)
    assert learner.value_opt.param_groups[0]["lr"] == pytest.approx(0.5 * left * learner.cfg.world_model.lr)


def test_every_parameter_is_trained_once():
    learner = make_learner()
    trained = [id(p) for opt in learner.optimizers().values() for group in opt.param_groups for p in group["params"]]
    expected = [id(p) for m in (learner.agent.world_model, learner.agent.critic, learner.policy) for p in m.parameters()]
    assert sorted(trained) == sorted(expected)
    assert set(learner.modules()) == {"agent", "policy_raw", "target_critic"}


def test_the_same_seed_updates_the_same_bit_for_bit():
    def run(seed):
        learner, buffer, rng = make_learner(seed=seed), linear_system(1), np.random.default_rng(0)
        for _ in range(3):
            learner.update_model(draw(buffer, rng))
            learner.update_policy(draw_chunks(buffer, rng), distil=True)
        return learner.agent.flat()
    np.testing.assert_array_equal(run(1), run(1))
    assert not np.array_equal(run(1), run(2))


def test_no_termination_loss_where_the_data_hold_none():
    def moved(terminates, terminated=False):
        learner = make_learner()
        learner.agent.world_model.terminates.fill_(terminates)
        before = learner.agent.world_model.heads.weight.detach().clone()
        learner.update_model(draw(linear_system(1, terminated=terminated), np.random.default_rng(0)))
        return (learner.agent.world_model.heads.weight.detach() - before).abs().amax(1)
    assert moved(1.0)[1] > 0 and moved(0.0)[1] == 0 and moved(0.0)[0] > 0               # rows: reward, termination
    assert moved(0.0, terminated=True)[1] > 0                                           # the first one, of online data, turns the head on


def test_realised_advantages_by_hand():
    """V says 1 everywhere, gamma 0.5: advantages r + 0.5 * discount-part - 1, so only rows with r > 0.5 count."""
    learner, buffer = make_learner("distill.rule=realised", "distill.min_gain=0"), ReplayBuffer(8, 2, 2, GAMMA, plan_horizon=2)
    for reward, terminated in ((0.4, False), (0.6, False), (0.9, True), (1.1, True)):   # 0.4 + 0.5 < 1; 0.6 + 0.5 > 1; terminated: 0.9 < 1; 1.1 > 1
        buffer.add(Segment(np.zeros((2, 2), np.float32), np.zeros((1, 2), np.float32), np.array([reward], np.float32), terminated))
    constant_critic(learner.target_critic, 1.0)
    batch = {**buffer.chunks(np.arange(4), 2, 1, False), "online": np.ones(4, bool)}
    b = {k: torch.from_numpy(v) for k, v in batch.items()}
    assert learner.weights(b, learner.agent.normalizer.obs(b["obs"])).tolist() == [0, 1, 0, 1]
    assert float(learner.update_policy(batch, distil=True)["distill/share"]) == 0.5
    batch["gain"] = np.array([1.0, -1.0, np.nan, 2.0], np.float32)                      # of four rows two plans were accepted, and one of them turned out well
    shares = [learner.update_policy(batch | {"online": online}, distil=True)["distill/share_of_plans"] for online in (np.ones(4, bool), np.zeros(4, bool))]
    assert float(shares[0]) == 0.5 and shares[1].isnan()
    assert float(learner.update_policy(batch, distil=False)["distill/share"]) == 1.0


@pytest.mark.parametrize("rule", ["all", "predicted", "realised", "positive", "exponential"])
@pytest.mark.parametrize("parametrization", ["sample", "eps"])
def test_every_rule_updates_on_mixed_batches(rule, parametrization):
    learner = make_learner(f"distill.rule={rule}", f"policy.parametrization={parametrization}")
    mixed = MixedReplay(linear_system(1), linear_system(2), 0, planned=True)
    out = learner.update_policy(mixed.chunks(64, 2, 3, 0.5), distil=True)
    assert np.isfinite(float(out["loss/policy"])) and 0 <= float(out["distill/share"]) <= 1
    assert all(torch.isfinite(p).all() for p in learner.policy.parameters())


def test_means_are_of_the_updates_that_have_a_number_and_were_not_skipped():
    rows = [{"a": torch.tensor(a), "b": torch.tensor(b), "c": torch.tensor(math.nan), SKIPPED: torch.tensor(s)}
            for a, b, s in ((1.0, 2.0, 0.0), (3.0, math.nan, 0.0), (90.0, 90.0, 1.0))]
    assert mean_metrics(rows) == {"a": 2.0, "b": 2.0} and mean_metrics(rows[2:]) == {} == mean_metrics([])


# ---- compiled beside

def compiling() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("compile ")]


def test_updates_are_made_at_once_and_go_on_compiled_when_that_is_ready():
    """Eight updates, half of them before the compiler is done: the weights are those of a learner that never compiles, within rounding."""
    from torch._dynamo.utils import counters  # here: it takes seconds, and a learner without a compiler needs it nowhere
    short = ("world_model.horizon=1", "planner.horizon=1")                         # a small graph
    learner = make_learner(*short, "resources.compile=true", compiler=compiled_beside)
    plain, buffer, rng = make_learner(*short), linear_system(1), np.random.default_rng(0)
    before = counters["stats"]["unique_graphs"]
    for part in range(2):
        for _ in range(4):
            batch = draw(buffer, rng, horizon=1)
            for each in (learner, plain):
                each.update_model(batch)
        if part == 0:
            for thread in compiling():
                thread.join(240)
    assert counters["stats"]["unique_graphs"] > before
    assert not compiling()
    for mine, other in zip(learner.agent.parameters(), plain.agent.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-3, atol=2e-4)
