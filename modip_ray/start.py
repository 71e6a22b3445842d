"""Beginning a run with another run's pre-training (pretrain.start): all of it, or only its policy where the rest would have been trained otherwise."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modip_ray.config import Config, ConfigError
from modip_ray.learning.checkpoint import Checkpoint, begin, commit, folders, verified, write_state
from modip_ray.learning.limiter import STREAMS, Stream
from modip_ray.learning.replay_server import part
from modip_ray.learning.system import Setup
from modip_ray.runfolder import RunError, saved_config

#: How the policy acts by itself.
BY_ITSELF = ("policy.sampling_steps", "policy.samples", "policy.n_action_steps")
#: Settings that the offline phase does not depend on, but for planner.tail, which decides whether Q is trained, too. A name with a dot at its end stands
#: for the whole group.
ONLINE_ONLY = ("planner.", "guard.", "distill.", "online.", "critic.n_step", *BY_ITSELF, "policy.updates_per_update", "method", "dppo.")
#: Settings that decide nothing of what is learned: they may differ between a checkpoint and who goes on from it.
ELSEWHERE = ("run_dir", "seed", "serial", "log.", "resources.", "eval.", "rollout.", "replay.", "data.cache", "pretrain.start")
#: Of the others, those that the offline policy depends on: data, normaliser, network and its updates.
POLICY = ("task.", "data.", "policy.", "pretrain.policy_updates", "world_model.obs_")


def flat(cfg: Config) -> dict[str, Any]:
    """{"critic.gamma": 0.95, ...}: one level deep, free-form settings whole."""
    found: dict[str, Any] = {}
    for group, value in cfg.to_dict().items():
        found |= {f"{group}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {group: value}
    return found


def belongs(key: str, names: Sequence[str]) -> bool:
    """`key` is one of the names, or in one of the groups (names that end with a dot or an underscore)."""
    return any(key == name or (name.endswith((".", "_")) and key.startswith(name)) for name in names)


def offline_differences(saved: Config, cfg: Config) -> list[str]:
    """Settings that differ and that the offline phase depends on."""
    a, b = flat(saved), flat(cfg)
    asked = {"planned_q": ("planner.", "guard.", "policy.sampling_steps"), "policy_q": ("policy.sampling_steps",)}.get(cfg.critic.target, ())
    free = ELSEWHERE + tuple(k for k in ONLINE_ONLY if k not in asked)             # `asked`: Q's offline targets are of actions that these decide
    return [k for k in sorted(set(a) | set(b)) if a.get(k) != b.get(k) and (k == "planner.tail" or not belongs(k, free))]


def start_checkpoint(run: Path) -> Checkpoint:
    """The checkpoint of the end of pre-training in a run folder; RunError where there is none (any more)."""
    for folder in folders(run / "checkpoints"):
        checkpoint = verified(folder)
        if checkpoint.counters.get("env_steps") == 0 and checkpoint.has("bc"):
            return checkpoint
    raise RunError(f"{run}: has no checkpoint of the end of pre-training (a run that goes on drops its older ones); "
                   "'modip train ... online.env_steps=0 run_dir=...' makes one")


def adopt(setup: Setup, checkpoints: Path) -> Checkpoint:
    """The pre-training of cfg.pretrain.start as this run's first checkpoint, and one line that says what was taken.

    ConfigError where not even the policy would be the same.
    """
    import torch

    from modip_ray.learning.build import agent_of, device_of, load_weights
    from modip_ray.learning.learner import Learner
    from modip_ray.learning.updater import learner_state, load_learner
    cfg, run = setup.cfg, Path(os.path.expanduser(str(setup.cfg.pretrain.start)))
    source, differing = start_checkpoint(run), offline_differences(saved_config(run), cfg)
    own = differing if cfg.policy.kind == "tdmpc2" else [k for k in differing if belongs(k, POLICY)]           # a policy of latents goes with their encoder
    wrong = [k for k in own if not belongs(k, ONLINE_ONLY)]
    if wrong:
        raise ConfigError(f"pretrain.start: the policy of {run} was trained with other settings of {', '.join(wrong[:3])}; leave them as they were there, "
                          "or pre-train this run by itself (pretrain.start=null)")
    taken: Sequence[Stream] = ("policy",) if differing else STREAMS
    learner = Learner(cfg, agent_of(cfg, setup.spec, device_of(cfg, 0)), cfg.seed)
    for stream in taken:
        load_learner(learner, stream, source.read(f"learner_{stream}"))
    scales = {k.removeprefix("agent.normalizer."): torch.from_numpy(v) for k, v in source.read("learner_model").items() if k.startswith("agent.normalizer.")}
    load_weights(learner.agent.normalizer, scales, source)                          # the policy goes with those that it was trained with
    folder, shards = begin(checkpoints), cfg.replay.shards
    counts = {"model": learner.updates, "policy": learner.policy_updates}
    for stream, state in learner_state(learner).items():
        write_state(folder, f"learner_{stream}", state | {"shard_updates": np.array([part(counts[stream], shards, i) for i in range(shards)])})
    write_state(folder, "bc", source.read("bc"))
    counters = {"phase": "pretrain", "env_steps": 0, "updates": learner.updates, "policy_updates": learner.policy_updates, "next_eval": 0, "phase_s": {}}
    print(f"pre-training of {run}: " + ("taken over" if not differing else f"only its policy is taken over, as {', '.join(differing[:3])} differ"), flush=True)
    return verified(commit(folder, counters, cfg.log.keep_checkpoints))
