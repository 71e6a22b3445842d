"""The update step: world model, critic and policy from replay batches. Plain object, no Ray.

Symbols: B rows, H horizon, E critic members, Do / Da / Dz sizes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from modip_ray.baselines import dql
from modip_ray.baselines.dsrl import SteeredPolicy
from modip_ray.baselines.tdmpc2 import LatentPolicy
from modip_ray.config import Config
from modip_ray.learning.adam import Adam
from modip_ray.learning.distill import imitation_weights, share_of_plans
from modip_ray.learning.guard import UpdateGuard
from modip_ray.learning.limiter import STREAMS, Stream, updates_per_step
from modip_ray.learning.parallel import ALONE, Replicas
from modip_ray.learning.reanalyze import Reanalyze
from modip_ray.model.agent import Agent
from modip_ray.model.critic import td_target
from modip_ray.model.hardware import compiled, uses_compile
from modip_ray.model.networks import ema_update
from modip_ray.model.policy_critic import asks_policy
from modip_ray.schedule import cosine

Metrics = dict[str, Tensor]
T = TypeVar("T")
Compiler = Callable[[Callable[..., Any], str], Callable[..., Any]]
SKIPPED = "guard/skipped"           # 1.0 in the metrics of an update that the guard skipped


def to_tensors(batch: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """On the device. To CUDA from page-locked memory, so that this process need not wait for the copy."""
    if device.type != "cuda":
        return {k: torch.from_numpy(v).to(device) for k, v in batch.items()}
    return {k: torch.from_numpy(v).pin_memory().to(device, non_blocking=True) for k, v in batch.items()}


class Learner:
    """Owns the agent's trainable weights, the raw (not averaged) policy, the target critic and the optimisers.

    The world model with the critic, and the policy, share no gradient: `update_model` and `update_policy` may run in either order. A policy that
    maximises Q (baselines/tdmpc2.py) reads world model and critic as they are.
    `replicas`: the processes that make these updates together, each from the same weights and with the same whole batches.
    `compiler`: `compiled`, or `compiled_beside` for a learner that others wait for.
    """

    def __init__(self, cfg: Config, agent: Agent, seed: int = 0, replicas: Replicas = ALONE, compiler: Compiler = compiled):
        self.cfg, self.agent, self.replicas = cfg, agent, replicas
        self.device = agent.normalizer.obs_mean.device
        self.policy = copy.deepcopy(agent.policy)                                   # trained; agent.policy is its running average
        self.target_critic = copy.deepcopy(agent.critic).requires_grad_(False)
        self.rng = torch.Generator(self.device).manual_seed(seed)
        self.updates, self.policy_updates = 0, 0                                    # skipped ones included
        self.guards: dict[Stream, UpdateGuard] = {s: UpdateGuard(cfg.learner.explodes, self.device) for s in STREAMS}
        self.value_guard = UpdateGuard(cfg.learner.explodes, self.device)           # of V's further updates
        self.reanalyze = Reanalyze(cfg, agent, self.rng) if cfg.distill.reanalyze or cfg.critic.target == "planned_q" else None
        self.model_loss, self.policy_loss = self.world_model_and_value_loss, self.policy.loss
        if isinstance(self.policy, LatentPolicy):
            self.policy_loss = partial(self.policy.loss, agent.world_model, agent.critic)
        own = None
        if cfg.distill.q_weight:
            own = partial(dql.loss, self.policy, agent.world_model, agent.critic, cfg.distill.q_weight, cfg.policy.sampling_steps)
        elif isinstance(self.policy, SteeredPolicy):
            own = partial(self.policy.steer, agent.world_model, agent.critic, cfg.policy.sampling_steps)
        if uses_compile(cfg) and cfg.resources.learner_precision == "fp32":         # torch 2.13 generates invalid code for bf16 backward passes
            self.model_loss, self.policy_loss = compiler(self.model_loss, "the learner"), compiler(self.policy_loss, "the policy learner")
            own = own and compiler(own, "the policy learner")
            if self.reanalyze is not None:
                self.reanalyze.compile(compiler)
        self.online_loss = own or self.policy_loss                                  # DQL and DSRL train the policy online otherwise than offline
        w = cfg.world_model
        encoder = list(agent.world_model.encoder.parameters())
        rest = [p for p in agent.world_model.parameters() if not any(p is e for e in encoder)] + list(agent.critic.parameters())
        self.model_opt = Adam([{"params": encoder, "scale": w.encoder_lr_scale}, {"params": rest, "scale": 1.0}], lr=w.lr, fused=True)
        self.value_opt = Adam([{"params": list(agent.critic.parameters()), "scale": 1.0}], lr=w.lr, fused=True)      # of V's further updates
        self.policy_opt = Adam([{"params": list(self.policy.parameters()), "scale": 1.0}], lr=cfg.policy.lr, fused=True)

    def set_lr(self, progress: float, online: bool) -> None:
        """Cosine over a phase, progress 0..1: offline from lr to lr_final, online from online.lr_scale (or policy_lr_scale) of lr to lr_final_scale of that."""
        w, policy, o = self.cfg.world_model, self.cfg.policy, self.cfg.online
        policy_scale = o.lr_scale if o.policy_lr_scale is None else o.policy_lr_scale
        for opt, section, scale in ((self.model_opt, w, o.lr_scale), (self.value_opt, w, o.lr_scale), (self.policy_opt, policy, policy_scale)):
            first, last = (section.lr * scale, section.lr * scale * o.lr_final_scale) if online else (section.lr, section.lr_final)
            for group in opt.param_groups:
                group["lr"] = group["scale"] * cosine(first, last, progress)

    def update_model(self, batch: Mapping[str, np.ndarray]) -> Metrics:
        """One step of world model and critic on a batch of `ReplayBuffer.sequences`, then V's further ones, each on its part of the batch's rows."""
        tensors, parts = to_tensors(batch, self.device), self.cfg.critic.updates_per_update
        whole, *further = ({name: v[i::parts] for name, v in tensors.items()} for i in range(parts))           # offline rows come first: each has its share
        terminates = self.agent.world_model.terminates                              # 1 for good with the first row that terminates
        terminates.copy_(torch.maximum(terminates, (whole["terminated"] * whole["mask"]).amax()))
        b = self.replicas.own_rows(whole) | {"all_mask": whole["mask"], "all_value_mask": whole["value_mask"]}
        loss, metrics = self.with_precision(self.model_loss, b | self.asked_of_policy(b) if asks_policy(self.cfg) else b)
        norm, skipped = self.step(self.model_opt, loss, metrics, self.guards["model"], self.updates, self.cfg.world_model.grad_clip)
        ema_update(self.target_critic, self.agent.critic, self.cfg.critic.tau)
        for part in further:
            self.update_value(part)
        self.updates += 1
        return {**metrics, "model/grad_norm": norm, SKIPPED: skipped}

    def update_value(self, whole: Mapping[str, Tensor]) -> None:
        """One step of V alone: the states of the batch as they were seen, encoded by a world model that is left alone."""
        b, norm = self.replicas.own_rows(whole), self.agent.normalizer
        with torch.no_grad():
            z, z_boot = self.agent.world_model.encode(norm.obs(torch.stack([b["obs"], b["bootstrap_obs"]])))           # (B, H+1, Dz) each
            y = td_target(b["n_step_return"], b["discount"], self.target_critic(z_boot).mean(0))
        loss = self.with_precision(lambda: (self.agent.critic.loss(z, y).mean(0) * b["value_mask"]).sum() / self.total(whole["value_mask"]))
        self.step(self.value_opt, loss, {}, self.value_guard, self.updates, self.cfg.world_model.grad_clip)
        ema_update(self.target_critic, self.agent.critic, self.cfg.critic.tau)

    def step(self, opt: Adam, loss: Tensor, metrics: Metrics, guard: UpdateGuard, count: int, clip: float = math.inf) -> tuple[Tensor, Tensor]:
        """Backward pass and the optimiser's step, with the gradient norm limited to `clip`; the guard may say that there is none.

        Returns the norm () before that, and 1.0 where the step was skipped. As torch.amp.GradScaler does, both the divisor of the gradient and
        the verdict go to the optimiser as tensors, so nothing is read back. Where there are replicas, gradient, loss and metrics become their means.
        """
        opt.zero_grad()
        loss.backward()
        grads, loss = [p.grad for group in opt.param_groups for p in group["params"] if p.grad is not None], loss.detach()
        self.replicas.average([*grads, loss, *metrics.values()])
        norm = nn.utils.get_total_norm(grads)
        opt.grad_scale = ((norm + 1e-6) / clip).clamp(min=1)
        opt.found_inf = skipped = guard(loss, norm, count)
        opt.step()
        return norm, skipped

    def total(self, weights: Tensor) -> Tensor:
        """What this process divides a sum over its own rows by, from the weights of all rows."""
        return self.replicas.share(weights.sum().clamp(min=1))

    def world_model_and_value_loss(self, b: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """all_mask, all_value_mask: of the whole batch; all else of this process's rows."""
        cfg, model, critic, norm = self.cfg, self.agent.world_model, self.agent.critic, self.agent.normalizer
        obs = norm.obs(b["obs"])                                                    # (B, H+1, Do)
        actions = norm.action(b["action"])                                          # (B, H, Da)
        horizon = actions.shape[1]
        with torch.no_grad():
            ahead = model.encode(torch.cat([obs[:, 1:], norm.obs(b["bootstrap_obs"])], 1))            # (B, H + H+1, Dz)
            z_true, z_boot = ahead.split([horizon, horizon + 1], 1)                 # consistency targets; where the values' targets bootstrap
            next_value = self.target_critic(z_boot) if cfg.critic.target == "value" else self.target_critic.action_value(z_boot, b["policy_action"])
            next_value = next_value[b["heads"]].amin(0) if "heads" in b else next_value.mean(0)       # (B, H+1)
            y = td_target(b["n_step_return"], b["discount"], next_value)
        latents, rewards, terminations = model.rollout(model.encode(obs[:, 0]), actions)
        rho = cfg.world_model.rho ** torch.arange(horizon + 1, device=self.device)  # (H+1,)
        mask, rho_mask, value_mask = b["mask"], b["mask"] * rho[:-1], b["value_mask"] * rho                # (B, H), (B, H), (B, H+1)
        rho_total = self.total(b["all_mask"] * rho[:-1])
        # latents are simplices (SimNorm): summed over Dz a squared error lies in 0..2 per group, whatever Dz is
        consistency = ((latents[:, 1:] - z_true).square().sum(-1) * rho_mask).sum() / rho_total
        reward = ((rewards - b["reward"] / model.reward_scale).square() * rho_mask).sum() / rho_total
        ended = b["terminated"].float()
        termination = (nn.functional.binary_cross_entropy_with_logits(terminations, ended, reduction="none") * mask).sum() / self.total(b["all_mask"])
        value = (critic.loss(latents, y).mean(0) * value_mask).sum() / self.total(b["all_value_mask"] * rho)
        w = cfg.world_model
        loss = w.consistency * consistency + w.reward * reward + w.termination * model.terminates * termination + cfg.critic.weight * value
        if asks_policy(cfg):
            total = self.total(b["all_value_mask"][:, :-1] * rho[:-1] * b["all_mask"])
            loss = loss + self.action_value_loss(b, latents[:, :-1], actions, y[:, :-1], value_mask[:, :-1] * mask, total)
        seen = b["value_mask"] / self.total(b["all_value_mask"])
        mean = (y * seen).sum()
        spread = ((y - mean).square() * seen).sum().sqrt()
        return loss, {"loss/consistency": consistency.detach(), "loss/reward": reward.detach(), "loss/termination": termination.detach(),
                      "loss/value": value.detach(), "value/target_mean": mean, "value/target_std": spread}

    @torch.no_grad()
    def asked_of_policy(self, b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the losses of a `PolicyCritic` need and a compiled graph does not draw: the policy's actions where the targets bootstrap, random numbers."""
        policy, norm, found = self.agent.policy, self.agent.normalizer, {}
        rows = len(b["all_mask"])                                                   # random numbers are drawn for all, and these rows' kept
        def noise(*shape: int) -> Tensor:
            return self.replicas.own(torch.randn(rows, *shape, generator=self.rng, device=self.device))
        if self.cfg.critic.target != "value":
            obs = norm.obs(b["bootstrap_obs"])                                      # (B, H+1, Do)
            if self.cfg.critic.target == "policy_q":
                start = noise(obs.shape[1], 1, policy.horizon, policy.action_dim)   # (B, H+1, 1, chunk, Da)
                actions = self.agent.first_action(obs.flatten(0, 1), start.flatten(0, 1), self.cfg.policy.sampling_steps)
                found["policy_action"] = actions.view(*obs.shape[:-1], -1)          # (B, H+1, Da)
            else:                                                                   # plans are dear: none behind the last latent, of which there is no Q
                actions = self.reanalyze.plan(obs[:, :-1].flatten(0, 1), self.env_steps()).plan[:, 0].view(len(obs), obs.shape[1] - 1, -1)
                found["policy_action"] = nn.functional.pad(actions, (0, 0, 0, 1))
                found |= {name: nn.functional.pad(b[name][:, :-1], (0, 1)) for name in ("value_mask", "all_value_mask")}
        if self.cfg.critic.target_reduce == "min_two":
            found["heads"] = torch.randperm(self.cfg.critic.members, generator=self.rng, device=self.device)[:2]
        if self.agent.critic.policy is not None:
            found["noise"] = noise(*b["action"].shape[1:])
            found["t"] = self.replicas.own(torch.randint(policy.denoising_steps, (rows,), generator=self.rng, device=self.device))
        return found

    def action_value_loss(self, b: Mapping[str, Tensor], z: Tensor, actions: Tensor, y: Tensor, mask: Tensor, total: Tensor) -> Tensor:
        """Of Q on the actions that were taken, z (B, H, Dz), targets y (B, H); and of the latent's policy, where the planner asks one."""
        critic, w = self.agent.critic, self.cfg.critic.weight
        loss = w * (critic.action_loss(z, actions, y).mean(0) * mask).sum() / total
        if critic.policy is not None:
            loss = loss + critic.policy.loss(z[:, 0].detach(), actions, torch.ones_like(mask[:, 0]), b["mask"], b["t"], b["noise"], self.total(b["all_mask"]))
        return loss

    def update_policy(self, batch: Mapping[str, np.ndarray], distil: bool) -> Metrics:
        """One denoising step on a batch of `ReplayBuffer.chunks`; `distil` applies the imitation rule, else plain behaviour cloning."""
        b = to_tensors(batch, self.device)
        obs, chunk = self.agent.normalizer.obs(b["obs"]), self.agent.normalizer.action(b["chunk"])    # (B, Do), (B, H, Da)
        plain = not distil or self.cfg.distill.rule == "all"                        # every row counts 1: no value is asked for
        weight = torch.ones(len(obs), device=self.device) if plain else self.weights(b, obs)          # (B,)
        mask, metrics = b["mask"], {}
        if distil and self.cfg.distill.reanalyze:
            chunk, mask, planned = self.reanalyze(obs, chunk, mask, b["online"], self.env_steps())
            weight = torch.where(planned, 1.0, weight)
            metrics["distill/reanalyzed"] = planned.float().mean()
        if distil:
            metrics["distill/share_of_plans"] = share_of_plans(self.cfg, b["online"], b["gain"], weight)
        t = torch.randint(self.policy.denoising_steps, (len(obs),), generator=self.rng, device=self.device)
        noise = torch.randn(chunk.shape, generator=self.rng, device=self.device)
        total = self.replicas.share((weight[:, None] * mask).sum())
        loss = self.with_precision(self.online_loss if distil else self.policy_loss, *map(self.replicas.own, (obs, chunk, weight, mask, t, noise)), total)
        metrics["loss/policy"] = loss.detach().clone()
        norm, skipped = self.step(self.policy_opt, loss, metrics, self.guards["policy"], self.policy_updates)
        self.policy_updates += 1
        ema_update(self.agent.policy, self.policy, 1 - self.ema_decay())
        return {**metrics, "policy/grad_norm": norm, "distill/share": (weight > 0).float().mean(), SKIPPED: skipped}

    def begin_online(self) -> bool:
        """Before the first online update of the policy. True where another loss than offline begins with it (DQL, DSRL): its gradients are not measured by
        the offline ones. DSRL's diffusion policy stays what acted so far, the running average."""
        if self.online_loss is self.policy_loss:
            return False
        if isinstance(self.policy, SteeredPolicy):
            self.policy.load_state_dict(self.agent.policy.state_dict())
        self.guards["policy"].reset()
        return True

    def with_precision(self, loss: Callable[..., T], *args: Any) -> T:
        """A loss with its matrix products in bf16 where resources.learner_precision says so; their gradients follow."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.resources.learner_precision == "bf16"):
            return loss(*args)

    def guards_of(self, stream: Stream) -> list[UpdateGuard]:
        """Those that judge the updates of a stream."""
        return [self.guards[stream], *([self.value_guard] if stream == "model" else [])]

    def env_steps(self) -> float:
        """Environment steps that this many policy updates belong to."""
        rate = updates_per_step(self.cfg)["policy"]
        return max(self.policy_updates - self.cfg.pretrain.policy_updates, 0) / rate if rate else 0.0

    def ema_decay(self) -> float:
        """Warm-up as in Diffusion Policy: early steps average over fewer updates, so the start point is forgotten. DSRL's actor acts as it is."""
        if isinstance(self.policy, SteeredPolicy) and self.policy_updates > self.cfg.pretrain.policy_updates:
            return 0.0
        return min(self.cfg.policy.ema, (1 + self.policy_updates) / (10 + self.policy_updates))

    @torch.no_grad()
    def weights(self, b: Mapping[str, Tensor], obs: Tensor) -> Tensor:
        """The imitation rule's row weights (B,)."""
        model, target = self.agent.world_model, self.target_critic
        both = model.encode(torch.cat([obs, self.agent.normalizer.obs(b["bootstrap_obs"])]))          # (2B, Dz)
        v, v_boot = target(both).mean(0).chunk(2)                                   # (B,), (B,)
        advantage = td_target(b["n_step_return"], b["discount"], v_boot) - v
        return imitation_weights(self.cfg, b["online"], b["gain"], advantage / advantage.std().clamp(min=1e-6))

    def modules(self) -> dict[str, nn.Module]:
        """The trained parts by checkpoint name."""
        return {"agent": self.agent, "policy_raw": self.policy, "target_critic": self.target_critic}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        further = {"value_opt": self.value_opt} if self.cfg.critic.updates_per_update > 1 else {}
        return {"model_opt": self.model_opt, "policy_opt": self.policy_opt} | further


def mean_metrics(rows: Iterable[Metrics]) -> dict[str, float]:
    """Means over the updates that were not skipped, of those where it is a number, read from the device once; {} where there is none."""
    rows = list(rows)
    if not rows:
        return {}
    names = [k for k in rows[0] if k != SKIPPED]
    table = torch.stack([torch.stack([r[k].float() for r in rows]) for k in (*names, SKIPPED)]).cpu()           # (metrics + 1, rows)
    good = table[:-1, table[-1] == 0]
    return {name: mean for name, mean in zip(names, good.nanmean(1).tolist(), strict=True) if not math.isnan(mean)}
