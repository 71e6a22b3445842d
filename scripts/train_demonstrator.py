"""Train the small SAC policies shipped under modip_ray/assets/ (the demonstrators of `make demo`).

    python scripts/train_demonstrator.py HalfCheetah-v4 --band 4500 5000 --lr 3e-4 --seed 1 --out modip_ray/assets/demonstrator_halfcheetah.npz

Plain soft actor-critic (Haarnoja et al., arXiv 1812.05905): tanh-Gaussian actor 256-256, twin critics, tuned temperature. Training stops at
the first checkpoint whose *stochastic* return over 20 fresh episodes lies in the band, so the demonstrator has the level of D4RL "medium".
The npz holds fc0, fc1, last_fc, last_fc_log_std (weight, bias): the names D4RL uses for its behaviour policies.
"""
import argparse
import copy
import json
import time

import gymnasium as gym
import numpy as np
import torch
from torch import nn

torch.set_num_threads(1)


class Actor(nn.Module):
    def __init__(self, obs_dim: int, act_dim: int, width: int = 256):
        super().__init__()
        self.fc0, self.fc1 = nn.Linear(obs_dim, width), nn.Linear(width, width)
        self.last_fc, self.last_fc_log_std = nn.Linear(width, act_dim), nn.Linear(width, act_dim)

    def forward(self, obs):
        """Sample actions (B, Da) in (-1, 1) and their log-probabilities (B,)."""
        h = torch.relu(self.fc1(torch.relu(self.fc0(obs))))
        mean, log_std = self.last_fc(h), self.last_fc_log_std(h).clamp(-5, 2)
        eps = torch.randn_like(mean)
        u = mean + log_std.exp() * eps
        log_prob = (-0.5 * eps.square() - log_std - 0.9189385).sum(-1)
        log_prob = log_prob - 2 * (0.6931472 - u - nn.functional.softplus(-2 * u)).sum(-1)
        return torch.tanh(u), log_prob


class TwinQ(nn.Module):
    """Two critics as one batched product: weights (2, in, out). `norm`: layer normalisation of hidden layers (RLPD, 2302.02948), which steadies them."""
    def __init__(self, dim: int, width: int = 256, norm: bool = False):
        super().__init__()
        self.norm = norm
        sizes = [dim, width, width, 1]
        self.w = nn.ParameterList(nn.Parameter((torch.rand(2, i, o) * 2 - 1) / i**0.5) for i, o in zip(sizes[:-1], sizes[1:], strict=True))
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(2, 1, o)) for o in sizes[1:])

    def forward(self, obs, act):
        x = torch.cat([obs, act], -1).expand(2, -1, -1)
        for i, (w, b) in enumerate(zip(self.w, self.b, strict=True)):
            x = torch.baddbmm(b, x, w)
            if i < 2:
                x = torch.relu(nn.functional.layer_norm(x, x.shape[-1:]) if self.norm else x)
        return x.squeeze(-1)                                                        # (2, B)


def stochastic_returns(env_id: str, actor: Actor, episodes: int, seed: int) -> np.ndarray:
    """Returns of `episodes` episodes run side by side with sampled actions."""
    envs = [gym.make(env_id) for _ in range(episodes)]
    obs = np.stack([e.reset(seed=seed + i)[0] for i, e in enumerate(envs)])
    total, live = np.zeros(episodes), np.ones(episodes, bool)
    while live.any():
        with torch.no_grad():
            act = actor(torch.as_tensor(obs, dtype=torch.float32))[0].numpy()
        for i in np.flatnonzero(live):
            obs[i], r, term, trunc, _ = envs[i].step(act[i])
            total[i] += r
            live[i] = not (term or trunc)
    return total


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("env_id")
    p.add_argument("--band", type=float, nargs=2, required=True, help="accepted range of the mean stochastic return")
    p.add_argument("--out", required=True)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max-steps", type=int, default=1_000_000)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--check-every", type=int, default=5000)
    p.add_argument("--layer-norm", action="store_true", help="layer-normalised critics")
    a = p.parse_args()
    torch.manual_seed(a.seed)
    rng = np.random.default_rng(a.seed)
    env = gym.make(a.env_id)
    do, da = env.observation_space.shape[0], env.action_space.shape[0]
    actor, q = Actor(do, da), TwinQ(do + da, norm=a.layer_norm)
    q_target = copy.deepcopy(q).requires_grad_(False)
    log_alpha = torch.zeros((), requires_grad=True)
    opt_a = torch.optim.Adam(actor.parameters(), a.lr, fused=True)
    opt_q = torch.optim.Adam(q.parameters(), a.lr, fused=True)
    opt_t = torch.optim.Adam([log_alpha], a.lr)
    cap = a.max_steps
    buf = {"o": np.zeros((cap, do), np.float32), "a": np.zeros((cap, da), np.float32), "r": np.zeros(cap, np.float32),
           "n": np.zeros((cap, do), np.float32), "d": np.zeros(cap, np.float32)}
    obs, _ = env.reset(seed=a.seed)
    t0 = time.time()
    for step in range(a.max_steps):
        if step < 5000:
            act = env.action_space.sample()
        else:
            with torch.no_grad():
                act = actor(torch.as_tensor(obs, dtype=torch.float32)[None])[0][0].numpy()
        nxt, rew, term, trunc, _ = env.step(act)
        for k, v in zip("oarnd", (obs, act, rew, nxt, float(term)), strict=True):
            buf[k][step] = v
        obs = env.reset()[0] if term or trunc else nxt
        if step < 5000:
            continue
        idx = rng.integers(0, step + 1, 256)
        o, u, r, n, d = (torch.from_numpy(buf[k][idx]) for k in "oarnd")
        alpha = log_alpha.exp().detach()
        with torch.no_grad():
            nu, nlp = actor(n)
            y = r + 0.99 * (1 - d) * (q_target(n, nu).min(0).values - alpha * nlp)
        loss_q = (q(o, u) - y).square().mean(1).sum()
        opt_q.zero_grad()
        loss_q.backward()
        opt_q.step()
        q.requires_grad_(False)
        pu, lp = actor(o)
        loss_a = (alpha * lp - q(o, pu).min(0).values).mean()
        opt_a.zero_grad()
        loss_a.backward()
        opt_a.step()
        q.requires_grad_(True)
        loss_t = -(log_alpha * (lp.detach().mean() - da))
        opt_t.zero_grad()
        loss_t.backward()
        opt_t.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(q_target.parameters()), list(q.parameters()), 0.005)
        if (step + 1) % a.check_every == 0:
            ret = stochastic_returns(a.env_id, actor, 5, seed=10_000)
            rate = (step + 1) / (time.time() - t0)
            print(f"{a.env_id} step {step + 1} return {ret.mean():.0f} +- {ret.std():.0f} alpha {alpha:.3f} {rate:.0f} steps/s", flush=True)
            if a.band[0] * 0.9 <= ret.mean() <= a.band[1] * 1.1:
                ret = stochastic_returns(a.env_id, actor, 20, seed=20_000)
                print(f"  20 episodes: {ret.mean():.0f} +- {ret.std():.0f}", flush=True)
                if a.band[0] <= ret.mean() <= a.band[1]:
                    flat = {k: v.detach().numpy() for k, v in actor.state_dict().items()}
                    meta = {"env_id": a.env_id, "env_steps": step + 1, "seed": a.seed, "return_mean": float(ret.mean()), "return_std": float(ret.std()),
                            "episodes": 20, "algorithm": "SAC"}
                    np.savez(a.out, meta=json.dumps(meta), **flat)
                    print(json.dumps(meta))
                    return
    raise SystemExit(f"no checkpoint of {a.max_steps} steps lay in {a.band}; try another --seed or a wider band")


if __name__ == "__main__":
    main()
