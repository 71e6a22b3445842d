"""DPPO (Ren et al., "Diffusion Policy Policy Optimization", arXiv 2409.00588): PPO over the last denoising steps of a behaviour-cloned diffusion policy.

A denoising step is an action of its own, with a Gaussian likelihood: that of the DDPM transition. The first K - F steps are a frozen copy's, the last F are
trained. The value network sees the observation only; one advantage, that of the executed chunk, serves all F steps of the chain that made it.
One process, environments one after another. Published settings and what differs: docs/method.md.

Symbols: T chunks of a rollout, N environments, R rows, H chunk length, Da action size, C = H * Da, Do observation size, K denoising steps, F of them trained.
State i of a chain, 0..F, is what denoising step F-1-i starts from; the last one is the chunk.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from modip_ray.baselines.dppo_policy import TunedPolicy, clip_range, gae, policy_loss
from modip_ray.config import Config
from modip_ray.learning import build
from modip_ray.learning.adam import Adam
from modip_ray.learning.checkpoint import Checkpoint, State, write_state
from modip_ray.learning.evaluation import Job, Outcome, run_jobs
from modip_ray.learning.system import Counts, Phase, Report, Setup, Snapshot, Status, means
from modip_ray.learning.updater import moments
from modip_ray.model.agent import Agent
from modip_ray.model.hardware import go_on, prepare_process
from modip_ray.model.networks import ResidualMLP, flat_vector
from modip_ray.tasks.env_group import EnvGroup, StepResult
from modip_ray.tasks.envs import EnvError, env_seed
from modip_ray.timing import Timer

LEARNER, COLLECTION = "learner_dppo", "collection"      # checkpoint components
LOG_PROB = (-5.0, 2.0)              # least and greatest log-likelihood of one number
REWARD_CLIP = 10.0                  # of scaled rewards


class RewardScale:
    """Divides rewards by the running deviation of their discounted sums, so that advantages and values are of size 1."""

    def __init__(self, num_envs: int, gamma: float):
        self.gamma, self.sums = gamma, np.zeros(num_envs)
        self.count, self.mean, self.squares = 1e-4, 0.0, 1e-4                       # of all sums so far; squares: of the distances from the mean

    def __call__(self, rewards: np.ndarray, first: np.ndarray) -> np.ndarray:
        """rewards (T, N) of chunks, first (T, N) where an episode begins -> scaled and clipped."""
        found = np.empty(rewards.shape)
        for t in range(len(rewards)):
            self.sums = found[t] = rewards[t] + self.gamma * (1 - first[t]) * self.sums
        n, gap = found.size, found.mean() - self.mean
        self.squares += found.var() * n + gap ** 2 * self.count * n / (self.count + n)
        self.mean += gap * n / (self.count + n)
        self.count += n
        return np.clip(rewards / math.sqrt(self.squares / self.count + 1e-8), -REWARD_CLIP, REWARD_CLIP)

    def state(self) -> State:
        return {"sums": self.sums.copy(), "moments": np.array([self.count, self.mean, self.squares])}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        self.sums = np.array(state["sums"])
        self.count, self.mean, self.squares = state["moments"].tolist()


def tuned_agent(agent: Agent, cfg: Config) -> Agent:
    """The agent with its diffusion policy made partly trainable, in place."""
    agent.policy = TunedPolicy(agent.policy, cfg.dppo.denoising_steps, cfg.dppo.min_std)
    return agent


def saved_agent(cfg: Config, checkpoint: Checkpoint, device: torch.device) -> Agent:
    """The agent of a DPPO run's checkpoint, or of the pre-training that one begins with. CheckpointError where `cfg` describes other networks."""
    if not checkpoint.has(LEARNER):
        return tuned_agent(build.saved_agent(cfg, checkpoint, device), cfg)
    arrays = part(checkpoint.read(LEARNER), "agent.")
    agent = tuned_agent(Agent(cfg, len(arrays["normalizer.obs_mean"]), len(arrays["normalizer.action_low"])), cfg)
    build.load_weights(agent, arrays, checkpoint)
    return agent.to(device)


def bc_policy(agent: Agent) -> np.ndarray:
    """Part "policy" of the agent, as a flat vector, as it was before fine-tuning: the frozen network in the trained one's place as well."""
    policy = copy.deepcopy(agent.policy)
    policy.tuned.load_state_dict(policy.bc.state_dict())
    return flat_vector(policy.state_dict().values())


def part(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): torch.from_numpy(np.array(v)) for k, v in state.items() if k.startswith(prefix)}


class DPPOSystem:
    """What `modip train` asks of a system (learning/system.py): rollouts of T chunks in N environments, then epochs of minibatches, in turn.

    A checkpoint may fall anywhere in that, and a resumed run is the uninterrupted one.
    """

    def __init__(self, setup: Setup):
        if setup.checkpoint is None:
            raise ValueError("method dppo begins with the pre-training of another run (pretrain.start)")
        self.setup, self.cfg, self.own = setup, setup.cfg, setup.cfg.dppo
        cfg, own = self.cfg, self.own
        prepare_process(cfg.resources.torch_threads)
        self.device = build.device_of(cfg)
        self.agent = saved_agent(cfg, setup.checkpoint, self.device)
        self.policy: TunedPolicy = self.agent.policy
        self.bc = bc_policy(self.agent)
        torch.manual_seed(cfg.seed)
        width = own.critic_width
        self.critic = nn.Sequential(nn.Linear(self.agent.obs_dim, width), ResidualMLP(width, 1), nn.SiLU(), nn.Linear(width, 1)).to(self.device)
        self.actor_opt = Adam(self.policy.tuned.parameters(), lr=own.actor_lr, fused=True)
        self.critic_opt = Adam(self.critic.parameters(), lr=own.critic_lr, fused=True)
        self.rng = torch.Generator(self.device).manual_seed(cfg.seed)
        self.scale = RewardScale(own.num_envs, own.gamma)
        self.timers = {role: Timer() for role in ("driver", "evaluator")}
        self.env_steps, self.iteration, self.filled, self.minibatch = 0, 0, 0, 0    # filled: chunks of the rollout; minibatch: updates made on it
        self.updates, self.policy_updates = (int(setup.checkpoint.counters[k]) for k in ("updates", "policy_updates"))
        self.obs = np.zeros((own.num_envs, self.agent.obs_dim), np.float32)         # what the next chunk is for
        self.first = np.ones(own.num_envs, np.float32)                              # where that begins an episode
        self.rollout = self.empty_rollout()
        self.group: EnvGroup | None = None
        self.returns: list[float] = []
        self.incidents: list[str] = []
        self.metrics: list[dict[str, float]] = []
        self.finished: list[Report] = []
        if setup.checkpoint.has(LEARNER):
            self.resume(setup.checkpoint)

    def empty_rollout(self) -> dict[str, Tensor]:
        t, n, obs_dim, f = self.own.n_steps, self.own.num_envs, self.agent.obs_dim, self.own.denoising_steps
        shapes = {"obs": (obs_dim,), "next_obs": (obs_dim,), "chain": (f + 1, self.policy.horizon * self.policy.action_dim), "log_prob": (f,),
                  **dict.fromkeys(("reward", "first", "terminated", "ended", "advantage", "return"), ())}
        return {name: torch.zeros(t, n, *shape, device=self.device) for name, shape in shapes.items()}

    # ---- collecting --------------------------------------------------------------------------------------------------------------------------

    def advance(self, phase: Phase, seconds: float, until: int) -> Status:
        """A step of the environments or an update at a time. A rollout that the last environment step leaves incomplete is not used."""
        total, end = self.cfg.online.env_steps, time.monotonic() + seconds
        while phase == "online":
            if self.filled == self.own.n_steps:
                with self.timers["driver"]("learn"):
                    self.update()
            elif self.env_steps >= min(until, total):
                break
            else:
                with self.timers["driver"]("collect"):
                    self.collect()
            if time.monotonic() >= end:
                break
        done = phase == "pretrain" or (self.env_steps >= total and self.filled < self.own.n_steps)
        (returns, self.returns), (incidents, self.incidents), (metrics, self.metrics) = (self.returns, []), (self.incidents, []), (self.metrics, [])
        return Status(self.env_steps, self.updates, self.policy_updates, done, means(metrics), returns, incidents)

    def new_group(self) -> EnvGroup:
        return EnvGroup(self.setup.env_factory, self.own.num_envs, self.cfg.task.max_episode_steps, (self.cfg.seed, 0, self.env_steps),
                        self.cfg.rollout.max_env_failures)

    def collect(self) -> None:
        """One chunk in every environment."""
        if self.group is None:
            self.group = self.new_group()
            self.obs, self.first = self.group.reset(), np.ones(self.own.num_envs, np.float32)
        obs = self.normalized(self.obs)                                             # (N, Do)
        chain = self.policy.chain(obs, self.rng)                                    # (N, F+1, C)
        chunk = chain[:, -1].view(len(obs), self.policy.horizon, -1)[:, :self.cfg.policy.n_action_steps]           # (N, c, Da)
        if not bool(chunk.isfinite().all()):
            raise FloatingPointError("dppo: the policy's actions are not finite; lower dppo.actor_lr and resume from an earlier checkpoint")
        result = self.group.step(self.agent.normalizer.raw_action(chunk).cpu().numpy())
        now = {"obs": obs, "chain": chain, "next_obs": self.normalized(last_observations(self.obs, result)), "first": self.tensor(self.first),
               "reward": self.tensor([float(x.rewards.sum()) for x in result.transitions]), "terminated": self.tensor(result.terminated),
               "ended": self.tensor(result.finished)}
        for name, value in now.items():
            self.rollout[name][self.filled] = value
        self.obs, self.first = result.obs, result.reset.astype(np.float32)
        self.filled += 1
        self.env_steps += sum(len(x.rewards) for x in result.transitions)
        self.returns += [episode.ret for episode in self.group.finished_returns()]
        self.incidents += [f"{fault}; the environment was made anew" for fault in self.group.faults]
        self.group.faults.clear()
        if self.filled == self.own.n_steps:
            self.rate()

    def normalized(self, obs: np.ndarray) -> Tensor:
        return self.agent.normalizer.obs(self.tensor(obs))

    def tensor(self, values: np.ndarray | list[float]) -> Tensor:
        return torch.as_tensor(np.asarray(values, np.float32), device=self.device)

    # ---- learning ----------------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rate(self) -> None:
        """Advantages, returns and likelihoods of a complete rollout, under the weights that it was collected with."""
        r = self.rollout
        rewards = self.tensor(self.scale(r["reward"].cpu().numpy().astype(np.float64), r["first"].cpu().numpy()))           # (T, N)
        values, next_values = self.critic(r["obs"])[..., 0], self.critic(r["next_obs"])[..., 0]                             # (T, N)
        r["advantage"] = gae(rewards, values, next_values, r["terminated"], r["ended"], self.own.gamma, self.own.gae_lambda)
        r["return"] = r["advantage"] + values
        for t in range(self.own.n_steps):
            i = torch.arange(self.own.denoising_steps, device=self.device).repeat(self.own.num_envs)                        # (N * F,)
            rows = torch.arange(self.own.num_envs, device=self.device).repeat_interleave(self.own.denoising_steps)
            r["log_prob"][t] = self.log_prob(r["obs"][t], r["chain"][t], rows, i).view(self.own.num_envs, -1)

    def log_prob(self, obs: Tensor, chain: Tensor, rows: Tensor, i: Tensor) -> Tensor:
        """Mean log-likelihood (R,) of the executed actions' numbers, from state i (R,) to the next of chains `rows` (R,)."""
        found = self.policy.log_prob(obs[rows], chain[rows, i], chain[rows, i + 1], self.own.denoising_steps - 1 - i)       # (R, H, Da)
        return found.clamp(*LOG_PROB)[:, :self.cfg.policy.n_action_steps].mean((1, 2))

    def update(self) -> None:
        """The next minibatch of denoising steps, drawn from all T * N * F of the rollout; after the last one a new rollout begins."""
        own, r = self.own, {k: v.flatten(0, 1) for k, v in self.rollout.items()}    # (T * N, ...)
        epoch, number = divmod(self.minibatch, own.minibatches)
        shuffled = np.random.default_rng(env_seed(self.cfg.seed, self.iteration, epoch)).permutation(len(r["obs"]) * own.denoising_steps)
        picked = torch.from_numpy(np.array_split(shuffled, own.minibatches)[number]).to(self.device)
        rows, i = picked // own.denoising_steps, picked % own.denoising_steps       # (R,), (R,)
        log_ratio = self.log_prob(r["obs"], r["chain"], rows, i) - r["log_prob"][rows, i]
        loss = policy_loss(own, log_ratio, r["advantage"][rows], i)
        value_loss = 0.5 * (self.critic(r["obs"][rows])[:, 0] - r["return"][rows]).square().mean()
        kl = (log_ratio.exp() - 1 - log_ratio).mean()
        found = torch.stack([loss, value_loss, kl, (log_ratio.expm1().abs() > clip_range(own, i)).float().mean()]).tolist()
        if not all(map(math.isfinite, found)):
            raise FloatingPointError(f"dppo: the losses of iteration {self.iteration} are not finite (policy {found[0]:.4g}, value {found[1]:.4g}); lower "
                                     "dppo.actor_lr or dppo.critic_lr, and go on from an earlier checkpoint")
        self.step(self.critic_opt, value_loss)
        if self.iteration >= own.critic_warmup:
            self.step(self.actor_opt, loss)
            self.policy_updates += 1
        self.metrics.append(dict(zip(("ppo/loss", "loss/value", "ppo/kl", "ppo/clipped"), found, strict=True)))
        self.updates += 1
        self.minibatch += 1
        if self.minibatch == own.epochs * own.minibatches or found[2] > own.target_kl:
            self.filled, self.minibatch, self.iteration = 0, 0, self.iteration + 1

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # ---- checkpoints -------------------------------------------------------------------------------------------------------------------------

    def freeze_bc(self) -> None:
        """The frozen half of the policy is the BC baseline."""

    def counts(self) -> dict[str, int]:
        return {"env_steps": self.env_steps, "updates": self.updates, "policy_updates": self.policy_updates, "iteration": self.iteration, "filled": self.filled,
                "minibatch": self.minibatch}

    def save(self, folder: Path) -> Counts:
        state: State = {f"scale.{k}": v for k, v in self.scale.state().items()} | {f"count.{k}": np.array(v) for k, v in self.counts().items()}
        for name, module in (("agent", self.agent), ("critic", self.critic)):
            state |= {f"{name}.{k}": t.detach().cpu().numpy() for k, t in module.state_dict().items()}
        for name, opt in (("actor_opt", self.actor_opt), ("critic_opt", self.critic_opt)):
            state |= {f"{name}.{i}.{k}": torch.as_tensor(v).cpu().numpy() for i, found in opt.state_dict()["state"].items() for k, v in found.items()}
        write_state(folder, LEARNER, state | {"rng": self.rng.get_state().numpy()})
        rollout = {f"rollout.{k}": v[:self.filled].cpu().numpy() for k, v in self.rollout.items()} if self.filled else {}
        episodes = {f"group.{k}": v for k, v in self.group.state().items()} | {"first": self.first} if self.group is not None else {}
        if rollout or episodes:
            write_state(folder, COLLECTION, rollout | episodes)
        return {"env_steps": self.env_steps, "updates": self.updates, "policy_updates": self.policy_updates}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on where `save` was, in the middle of episodes; where an environment does not come out where it was, the rollout begins anew."""
        state = checkpoint.read(LEARNER)
        build.load_weights(self.critic, part(state, "critic."), checkpoint)
        for name, opt in (("actor_opt", self.actor_opt), ("critic_opt", self.critic_opt)):
            opt.load_state_dict({"state": moments(state, name), "param_groups": opt.state_dict()["param_groups"]})
        self.scale.load({k.removeprefix("scale."): v for k, v in state.items() if k.startswith("scale.")})
        for name in self.counts():
            setattr(self, name, int(state[f"count.{name}"]))
        go_on(self.rng, state["rng"], env_seed(self.cfg.seed, self.updates))
        state = checkpoint.read(COLLECTION) if checkpoint.has(COLLECTION) else {}
        rollout = part(state, "rollout.")
        for name, value in rollout.items():
            self.rollout[name][:self.filled] = value.to(self.device)
        if not rollout:
            self.filled = self.minibatch = 0
        if "first" not in state:
            return
        group = self.new_group()
        try:
            group.resume({k.removeprefix("group."): v for k, v in state.items() if k.startswith("group.")})
        except (ValueError, EnvError) as error:
            group.close()
            self.filled = self.filled if self.filled == self.own.n_steps else 0
            self.incidents.append(f"new episodes instead of the open ones, this run is not the uninterrupted one: {error}")
            return
        self.group, self.obs, self.first = group, state["group.obs"], state["first"]

    # ---- measuring ---------------------------------------------------------------------------------------------------------------------------

    def request_evaluation(self, jobs: Sequence[Job]) -> bool:
        self.finished.append(self.evaluate(jobs))
        return True

    def reports(self) -> list[Report]:
        finished, self.finished = self.finished, []
        return finished

    def evaluate(self, jobs: Sequence[Job], progress: Callable[[Outcome], None] | None = None) -> Report:
        outcomes = run_jobs(self.cfg, self.agent, self.setup.env_factory, jobs, self.env_steps, self.bc, self.timers, progress)
        return Report(self.env_steps, self.updates, outcomes, {})

    def timings(self) -> dict[str, tuple[Snapshot, int]]:
        return {role: (timer.snapshot(), 1) for role, timer in self.timers.items()}

    def gauges(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        if self.group is not None:
            self.group.close()
            self.group = None


def last_observations(before: np.ndarray, result: StepResult) -> np.ndarray:
    """(N, Do) where each chunk led, an episode's true last observation included; `before` where an environment failed at once."""
    return np.stack([x.next_obs[-1] if len(x.next_obs) else obs for x, obs in zip(result.transitions, before, strict=True)])
