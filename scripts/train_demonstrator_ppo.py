"""Train a demonstrator by proximal policy optimisation: in wall time far ahead of SAC where SAC needs hundreds of thousands of updates (Walker2d).

    python scripts/train_demonstrator_ppo.py Walker2d-v4 --band 2500 3500 --out modip_ray/assets/demonstrator_walker2d.npz

PPO (Schulman et al., 1707.06347) with normalised observations and scaled rewards; the policy is the tanh-Gaussian ReLU network of
train_demonstrator.py, whose probability ratio is that of the Gaussian before the tanh. The observations' scales are folded into the first layer when it
is saved. Training stops at the first check whose *stochastic* return over 20 fresh episodes lies in the band.
"""
import argparse
import json
import time

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from train_demonstrator import Actor, stochastic_returns

torch.set_num_threads(1)
GAMMA, LAMBDA, CLIP, EPOCHS, MINIBATCH, STEPS = 0.99, 0.95, 0.2, 10, 256, 128
LEAST_LOG_STD, MOST_LOG_STD = -5.0, 2.0


class Running:
    """Mean and variance of all that was seen, a batch at a time (Chan et al.)."""
    def __init__(self, shape=()):
        self.mean, self.var, self.count = np.zeros(shape), np.ones(shape), 1e-4

    def add(self, x: np.ndarray):
        delta, total = x.mean(0) - self.mean, self.count + len(x)
        self.var = (self.var * self.count + x.var(0) * len(x) + delta**2 * self.count * len(x) / total) / total
        self.mean, self.count = self.mean + delta * len(x) / total, total

    def scaled(self, x: np.ndarray) -> np.ndarray:
        return np.clip((x - self.mean) / np.sqrt(self.var + 1e-8), -10, 10).astype(np.float32)


def gaussian(actor: Actor, obs: torch.Tensor) -> torch.distributions.Independent:
    """Of the action before the tanh."""
    h = torch.relu(actor.fc1(torch.relu(actor.fc0(obs))))
    log_std = actor.last_fc_log_std(h).clamp(LEAST_LOG_STD, MOST_LOG_STD)
    return torch.distributions.Independent(torch.distributions.Normal(actor.last_fc(h), log_std.exp()), 1)


def folded(actor: Actor, scale: Running) -> Actor:
    """The same policy on raw observations: W (x - m) / s + b = (W / s) x + b - (W / s) m."""
    raw = Actor(len(scale.mean), actor.last_fc.out_features, actor.fc0.out_features)
    raw.load_state_dict(actor.state_dict())
    with torch.no_grad():
        std, mean = (torch.as_tensor(x, dtype=torch.float32) for x in (np.sqrt(scale.var + 1e-8), scale.mean))
        raw.fc0.weight /= std
        raw.fc0.bias -= raw.fc0.weight @ mean
    return raw


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("env_id")
    p.add_argument("--band", type=float, nargs=2, required=True, help="accepted range of the mean stochastic return")
    p.add_argument("--out", required=True)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max-steps", type=int, default=3_000_000)
    p.add_argument("--lr", type=float, default=3e-4)
    p.add_argument("--envs", type=int, default=16)
    p.add_argument("--width", type=int, default=128)
    p.add_argument("--check-every", type=int, default=25, help="rounds between checks")
    a = p.parse_args()
    torch.manual_seed(a.seed)
    envs = [gym.make(a.env_id) for _ in range(a.envs)]
    do, da = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    actor, critic = Actor(do, da, a.width), nn.Sequential(nn.Linear(do, a.width), nn.Tanh(), nn.Linear(a.width, a.width), nn.Tanh(), nn.Linear(a.width, 1))
    with torch.no_grad():
        for layer in (actor.last_fc, actor.last_fc_log_std):
            layer.weight *= 0.01
            layer.bias.zero_()
        actor.last_fc_log_std.bias.fill_(-0.5)
    params = [*actor.parameters(), *critic.parameters()]
    opt = torch.optim.Adam(params, a.lr, fused=True, eps=1e-5)
    scale, returns, running_return = Running((do,)), Running(), np.zeros(a.envs)
    raw = np.stack([e.reset(seed=a.seed * 1000 + i)[0] for i, e in enumerate(envs)])
    start, rounds = time.time(), a.max_steps // (STEPS * a.envs)
    for round_ in range(rounds):
        for group in opt.param_groups:
            group["lr"] = a.lr * (1 - 0.9 * round_ / rounds)
        obs, act = np.zeros((STEPS, a.envs, do), np.float32), np.zeros((STEPS, a.envs, da), np.float32)
        reward, ended, after = np.zeros((STEPS, a.envs), np.float32), np.zeros((STEPS, a.envs), bool), np.zeros((STEPS, a.envs, do), np.float32)
        terminated, log_prob = np.zeros((STEPS, a.envs), bool), np.zeros((STEPS, a.envs), np.float32)
        for t in range(STEPS):
            scale.add(raw)
            obs[t] = scale.scaled(raw)
            with torch.no_grad():
                pi = gaussian(actor, torch.from_numpy(obs[t]))
                u = pi.sample()
                act[t], log_prob[t] = u.numpy(), pi.log_prob(u).numpy()
            for i, (env, squashed) in enumerate(zip(envs, np.tanh(act[t]), strict=True)):
                raw[i], reward[t, i], terminated[t, i], truncated, _ = env.step(squashed)
                after[t, i] = scale.scaled(raw[i])
                ended[t, i] = terminated[t, i] or truncated
                if ended[t, i]:
                    raw[i] = env.reset()[0]
            running_return = running_return * GAMMA + reward[t]
            returns.add(running_return)
            running_return[ended[t]] = 0
        reward = np.clip(reward / np.sqrt(returns.var + 1e-8), -10, 10)
        with torch.no_grad():
            v, v_after = (critic(torch.from_numpy(x)).squeeze(-1).numpy() for x in (obs, after))      # (T, N)
        delta = reward + GAMMA * v_after * ~terminated - v
        advantage, last = np.zeros_like(delta), np.zeros(a.envs, np.float32)
        for t in range(STEPS - 1, -1, -1):
            last = delta[t] + GAMMA * LAMBDA * last * ~ended[t]
            advantage[t] = last
        flat = [torch.from_numpy(x.reshape(STEPS * a.envs, *x.shape[2:])) for x in (obs, act, log_prob, advantage, advantage + v)]
        for _ in range(EPOCHS):
            for idx in torch.randperm(STEPS * a.envs).split(MINIBATCH):
                o, u, lp, adv, target = (x[idx] for x in flat)
                ratio = (gaussian(actor, o).log_prob(u) - lp).exp()
                adv = (adv - adv.mean()) / (adv.std() + 1e-8)
                loss = -torch.minimum(ratio * adv, ratio.clamp(1 - CLIP, 1 + CLIP) * adv).mean() + 0.5 * (critic(o).squeeze(-1) - target).square().mean()
                opt.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(params, 0.5)
                opt.step()
        if (round_ + 1) % a.check_every:
            continue
        steps, policy = (round_ + 1) * STEPS * a.envs, folded(actor, scale)
        ret = stochastic_returns(a.env_id, policy, 5, seed=10_000)
        print(f"{a.env_id} step {steps} return {ret.mean():.0f} +- {ret.std():.0f} {steps / (time.time() - start):.0f} steps/s", flush=True)
        if a.band[0] * 0.9 <= ret.mean() <= a.band[1] * 1.1:
            ret = stochastic_returns(a.env_id, policy, 20, seed=20_000)
            print(f"  20 episodes: {ret.mean():.0f} +- {ret.std():.0f}", flush=True)
            if a.band[0] <= ret.mean() <= a.band[1]:
                meta = {"env_id": a.env_id, "env_steps": steps, "seed": a.seed, "return_mean": float(ret.mean()), "return_std": float(ret.std()),
                        "episodes": 20, "algorithm": "PPO"}
                np.savez(a.out, meta=json.dumps(meta), **{k: v.detach().numpy() for k, v in policy.state_dict().items()})
                print(json.dumps(meta))
                return
    raise SystemExit(f"no checkpoint of {a.max_steps} steps lay in {a.band}; try another --seed or a wider band")


if __name__ == "__main__":
    main()
