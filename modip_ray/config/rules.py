"""What settings must satisfy beyond their types: ranges, and relations between fields."""

from __future__ import annotations

import re
import reprlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modip_ray.config.fields import Config


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the field, what was got and what is allowed."""


POSITIVE = """
    policy.horizon policy.n_action_steps policy.width policy.denoising_steps policy.sampling_steps policy.samples policy.batch_size policy.lr
    world_model.latent world_model.width world_model.batch_size world_model.horizon world_model.lr world_model.obs_std_floor world_model.simnorm_group
    world_model.grad_clip critic.members critic.n_step critic.pretrain_n_step critic.updates_per_update critic.width critic.bound planner.horizon
    planner.n_action_steps planner.proposals planner.elites planner.std_min planner.max_rows planner.replicas rollout.envs_per_worker
    rollout.groups rollout.segment_length rollout.env_timeout_s replay.shards replay.capacity replay.prefetch
    eval.episodes eval.every_episodes eval.bootstrap task.max_episode_steps data.transitions resources.torch_threads resources.call_timeout_s
    resources.silent_s resources.restart_s resources.snapshot_s resources.learner_replicas
    log.every_s log.keep_checkpoints log.grace_s distill.beta distill.n_step
    learner.max_bad_updates learner.snapshot_every learner.max_roll_backs
    dppo.denoising_steps dppo.num_envs dppo.n_steps dppo.epochs dppo.minibatches dppo.actor_lr dppo.critic_lr dppo.critic_width dppo.clip dppo.clip_rate
    dppo.min_std dppo.target_kl
""".split()

FRACTIONS = """
    critic.gamma critic.tau critic.expectile critic.td_lambda policy.ema world_model.rho online.online_share_start online.online_share_end
    distill.reanalyze distill.online_share_start distill.online_share_end dppo.gamma dppo.gae_lambda dppo.denoising_gamma
""".split()

#: Sizes that no machine has room or time for, and step sizes at which nothing is learned: slips of the hand.
MOST = {
    **dict.fromkeys("policy.width world_model.width world_model.latent critic.width critic.bins planner.max_rows dppo.critic_width".split(), 2**16),
    **dict.fromkeys("planner.proposals planner.gaussian rollout.envs_per_worker policy.denoising_steps dppo.num_envs dppo.epochs".split(), 10_000),
    **dict.fromkeys("policy.blocks policy.horizon world_model.horizon critic.members planner.iterations planner.replicas replay.prefetch".split(), 1000),
    "critic.updates_per_update": 1000,
    **dict.fromkeys("policy.batch_size world_model.batch_size eval.bootstrap eval.episodes eval.every_episodes rollout.segment_length".split(), 10**6),
    **dict.fromkeys("policy.lr policy.lr_final world_model.lr world_model.lr_final world_model.encoder_lr_scale".split(), 100.0),
    **dict.fromkeys("online.lr_scale online.policy_lr_scale online.lr_final_scale".split(), 100.0),
    **dict.fromkeys("critic.n_step critic.pretrain_n_step distill.n_step replay.shards resources.torch_threads".split(), 10_000),
    **dict.fromkeys("dppo.actor_lr dppo.critic_lr dppo.clip_rate".split(), 100.0),
    "dppo.n_steps": 10**6, "eval.seed": 2**31, "replay.capacity": 10**10,
}

ROLES = ("planner", "learner", "replay", "store", "rollout", "evaluator")


def validate(cfg: Config) -> None:
    """Raise ConfigError at the first setting that cannot be used, before anything is started."""
    tree = cfg.to_dict()
    for section, body in tree.items():
        for name, value in body.items() if isinstance(body, dict) else []:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                need(value >= 0 or name == "min_gain", f"{section}.{name}", value, "must not be negative")
    for dotted in POSITIVE:
        need(value_at(tree, dotted) > 0, dotted, value_at(tree, dotted), "must be positive")
    for dotted in FRACTIONS:
        need(0 <= value_at(tree, dotted) <= 1, dotted, value_at(tree, dotted), "must lie in 0..1")
    for dotted, most in MOST.items():
        value = value_at(tree, dotted)
        need(value is None or value <= most, dotted, value, f"must be at most {most}")
    need(0 <= cfg.seed < 2**63, "seed", cfg.seed, "must lie in 0..2**63-1")
    limit = cfg.data.max_transitions
    need(limit is None or limit > 0, "data.max_transitions", limit, "must be positive, or null for all")
    device = cfg.resources.device
    need(device in ("auto", "cpu") or re.fullmatch(r"cuda(:\d+)?", device) is not None, "resources.device", device, "must be auto, cpu, cuda or cuda:<index>")
    model_rules(cfg)
    planner_rules(cfg)
    scale_rules(cfg)
    if cfg.method == "dppo":
        dppo_rules(cfg)


def scale_rules(cfg: Config) -> None:
    """Workers, groups, processes of a role, and where the roles live."""
    rollout, replay = cfg.rollout, cfg.replay
    need(rollout.least >= 1, "rollout.num_workers", rollout.least, "must be at least 1")
    need(rollout.least <= rollout.most, "rollout.num_workers", f"min {rollout.least}, max {rollout.most}", "min must not exceed max")
    need(rollout.envs_per_worker % rollout.groups == 0, "rollout.groups", rollout.groups,
         f"must divide rollout.envs_per_worker={rollout.envs_per_worker} evenly")
    need(replay.capacity // replay.shards >= rollout.segment_length, "replay.shards", replay.shards,
         f"leaves {replay.capacity // replay.shards} transitions a shard; each must hold rollout.segment_length={rollout.segment_length}")
    need(replay.shards == 1 or not cfg.serial, "replay.shards", replay.shards, "must be 1 in serial mode, which has one replay")
    n = cfg.resources.learner_replicas
    need(n == 1 or not cfg.serial, "resources.learner_replicas", n, "must be 1 in serial mode, which has one process")
    for role, gpus, share in (("planner", cfg.resources.planner_gpus, 1), ("learner", cfg.resources.learner_gpus, 2)):
        rule = f"gives {gpus / share:g} to each of the two learners' processes, which must be" if share > 1 else "must be"
        need(cfg.one_process or divisible(gpus / share), f"resources.{role}_gpus", gpus, f"{rule} at most 1 or a whole number: Ray divides only single GPUs")
    for name, rows in (("world_model", cfg.world_model.batch_size), ("policy", cfg.policy.batch_size)):
        need(rows % n == 0, "resources.learner_replicas", n, f"must divide {name}.batch_size={rows} evenly: each process takes its share of the rows")
    for role, wanted in cfg.resources.placement.items():
        need(role in ROLES, "resources.placement", role, f"is no role; roles: {', '.join(ROLES)}")
        need(isinstance(wanted, dict), f"resources.placement.{role}", wanted, "must be a mapping of resources, e.g. {trainer: 0.01}")
        for name, amount in wanted.items():
            field = f"resources.placement.{role}.{name}"
            need(isinstance(amount, (int, float)) and not isinstance(amount, bool) and amount > 0, field, amount, "must be a positive number")
            need(name not in ("CPU", "GPU"), field, amount, "is set by resources.<role>_cpus and resources.<role>_gpus")


def model_rules(cfg: Config) -> None:
    p, w = cfg.policy, cfg.world_model
    need(p.n_action_steps <= p.horizon, "policy.n_action_steps", p.n_action_steps, f"must not exceed policy.horizon={p.horizon}")
    need(p.sampling_steps <= p.denoising_steps, "policy.sampling_steps", p.sampling_steps, f"must not exceed policy.denoising_steps={p.denoising_steps}")
    if p.network == "unet":
        need(p.width % 4 == 0, "policy.width", p.width, "must be a multiple of 4 for the unet")
        need(p.blocks > 0, "policy.blocks", p.blocks, "must be at least 1 for the unet")
    need(w.latent % w.simnorm_group == 0, "world_model.latent", w.latent, f"must be a multiple of world_model.simnorm_group={w.simnorm_group}")
    need(cfg.learner.explodes > 1, "learner.explodes", cfg.learner.explodes, "must be above 1: a multiple of the usual gradient norm")
    need(cfg.critic.updates_per_update == 1 or cfg.critic.target == "value", "critic.updates_per_update", cfg.critic.updates_per_update,
         "must be 1 unless critic.target is value: only V is updated more often")
    if cfg.critic.target_reduce == "min_two":
        need(cfg.critic.target != "value", "critic.target_reduce", "min_two", "is of action values: it needs critic.target: policy_q or planned_q")
        need(cfg.critic.members >= 2, "critic.members", cfg.critic.members, "must be at least 2 for critic.target_reduce: min_two")
    if p.kind == "tdmpc2":
        asks = f"critic.target: {cfg.critic.target}, planner.tail: {cfg.planner.tail}"
        need("policy_q" in (cfg.critic.target, cfg.planner.tail), "policy.kind", f"tdmpc2 with {asks}",
             "but it maximises Q, which is trained where one of them is policy_q (TD-MPC2: both)")
        need(cfg.distill.rule == "all", "distill.rule", cfg.distill.rule, "must be all for policy.kind: tdmpc2, which imitates nothing")
        need(cfg.distill.reanalyze == 0, "distill.reanalyze", cfg.distill.reanalyze, "must be 0 for policy.kind: tdmpc2, which imitates nothing")
        need(cfg.resources.learner_replicas == 1, "resources.learner_replicas", cfg.resources.learner_replicas,
             "must be 1 for policy.kind: tdmpc2, whose scale of Q is of one process's rows")
        need(cfg.planner.kind == "mppi", "planner.kind", cfg.planner.kind, "must be mppi for policy.kind: tdmpc2")
    if p.kind == "dsrl":
        need(cfg.critic.target == "policy_q", "policy.kind", f"dsrl with critic.target: {cfg.critic.target}", "but its noise follows Q: policy_q")
        for name, value in (("reanalyze", cfg.distill.reanalyze), ("q_weight", cfg.distill.q_weight)):
            need(value == 0, f"distill.{name}", value, "must be 0 for policy.kind: dsrl, whose diffusion policy learns offline only")
        need(cfg.distill.rule == "all", "distill.rule", cfg.distill.rule, "must be all for policy.kind: dsrl, which imitates nothing online")
        need(cfg.resources.learner_replicas == 1, "resources.learner_replicas", cfg.resources.learner_replicas, "must be 1 for policy.kind: dsrl")
    action_value_rules(cfg)
    need(cfg.critic.bins >= 2, "critic.bins", cfg.critic.bins, "must be at least 2")


def action_value_rules(cfg: Config) -> None:
    """What asks Q about single actions (baselines/parl.py, dql.py)."""
    p, target = cfg.planner, cfg.critic.target
    if p.kind == "action_values":
        need(target != "value", "planner.kind", "action_values with critic.target: value", "but it asks Q, which critic.target: policy_q or planned_q trains")
        need(p.elites <= p.proposals, "planner.elites", p.elites, f"must not exceed planner.proposals={p.proposals}, of which they are the best")
        need(p.n_action_steps == 1, "planner.n_action_steps", p.n_action_steps, "must be 1 for planner.kind: action_values: Q is of single actions")
        again = cfg.distill.reanalyze
        need(again in (0, 1), "distill.reanalyze", again, "must be 0 or 1 for planner.kind: action_values: of all rows or of none")
        need(not again or p.elites > 1, "planner.elites", p.elites, "must be at least 2 with distill.reanalyze: what was done takes the place of one")
        need(p.gaussian == 0, "planner.gaussian", p.gaussian, "must be 0 for planner.kind: action_values, which draws from the policy only")
    need(target != "planned_q" or p.kind == "action_values", "critic.target", "planned_q", f"needs planner.kind: action_values, not {p.kind}")
    if cfg.distill.q_weight:
        need(target != "value", "distill.q_weight", cfg.distill.q_weight, "needs Q, which critic.target: policy_q or planned_q trains")
        need(cfg.policy.kind == "diffusion", "distill.q_weight", cfg.distill.q_weight, "must be 0 unless policy.kind is diffusion")
    for name, used in (("critic.target: planned_q", target == "planned_q"), ("distill.q_weight", cfg.distill.q_weight > 0)):
        need(not used or cfg.resources.learner_replicas == 1, "resources.learner_replicas", cfg.resources.learner_replicas, f"must be 1 for {name}")


def planner_rules(cfg: Config) -> None:
    p, policy = cfg.planner, cfg.policy
    need(p.horizon <= policy.horizon, "planner.horizon", p.horizon, f"must not exceed policy.horizon={policy.horizon}: the policy proposes the sequences")
    need(policy.n_action_steps <= p.horizon or (cfg.distill.target == "executed" and not cfg.distill.reanalyze), "policy.n_action_steps",
         policy.n_action_steps, f"must not exceed planner.horizon={p.horizon} where the policy imitates plans (distill.target: planned, distill.reanalyze)")
    need(policy.samples <= p.proposals, "policy.samples", policy.samples, f"must not exceed planner.proposals={p.proposals}, of which they are the first")
    need(policy.samples == 1 or policy.kind == "diffusion", "policy.samples", policy.samples, f"must be 1 for policy.kind: {policy.kind}")
    need(p.n_action_steps <= p.horizon, "planner.n_action_steps", p.n_action_steps, f"must not exceed planner.horizon={p.horizon}")
    need(1 <= p.proposal_steps <= policy.denoising_steps, "planner.proposal_steps", p.proposal_steps,
         f"must lie in 1..policy.denoising_steps={policy.denoising_steps}")
    need(p.elites <= p.proposals + p.gaussian + 1, "planner.elites", p.elites, "must not exceed the number of candidates (proposals + gaussian + 1)")
    for name in ("std_max", "std_max_final"):
        value = getattr(cfg.guard, name)
        need(value >= p.std_min, f"guard.{name}", value, f"must be at least planner.std_min={p.std_min}")


def dppo_rules(cfg: Config) -> None:
    own, policy = cfg.dppo, cfg.policy
    need(cfg.pretrain.start is not None, "pretrain.start", None, "must name a run whose pre-training is done: method dppo fine-tunes the BC policy of that one")
    need(policy.kind == "diffusion", "policy.kind", policy.kind, "must be diffusion: method dppo trains denoising steps")
    need(own.denoising_steps <= policy.denoising_steps, "dppo.denoising_steps", own.denoising_steps,
         f"must not exceed policy.denoising_steps={policy.denoising_steps}")
    need(policy.sampling_steps > 1, "policy.sampling_steps", policy.sampling_steps, "must be at least 2 with method dppo: a single one asks no trained step")
    rollout = own.num_envs * own.n_steps
    need(own.minibatches <= rollout * own.denoising_steps, "dppo.minibatches", own.minibatches,
         f"must not exceed the denoising steps of a rollout, {rollout * own.denoising_steps}")
    steps = rollout * policy.n_action_steps
    need(cfg.online.env_steps == 0 or cfg.online.env_steps >= steps, "online.env_steps", cfg.online.env_steps,
         f"must be at least the {steps} of one rollout (dppo.num_envs * dppo.n_steps * policy.n_action_steps), else nothing is learned")


def value_at(tree: dict[str, Any], dotted: str) -> Any:
    section, name = dotted.split(".")
    return tree[section][name]


def divisible(gpus: float) -> bool:
    """Whether Ray can give a process so many."""
    return gpus <= 1 or gpus == int(gpus)


def need(ok: bool, field: str, got: Any, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{field}: got {shown(got)}, {rule}")


class Shown(reprlib.Repr):
    """A value as an error message shows it: one line of bounded length."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 80


shown = Shown().repr
