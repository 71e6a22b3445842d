"""Which resources each role's actors take, from the settings: where Ray may put them, and what a cluster must have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modip_ray.config import Config
from modip_ray.learning.limiter import STREAMS

Bundle = dict[str, float]
PROBE = ".seen_by_all_nodes"
SPARE = 1e-6                        # Ray counts resources in ten-thousandths


class Demand(NamedTuple):
    """`count` actors of a role, each of which needs `bundle` on one node; `asked_by`: the setting that asks for each resource."""

    role: str
    count: int
    bundle: Bundle
    asked_by: dict[str, str]


def bundle(cfg: Config, role: str) -> Bundle:
    """What one actor of a role takes: CPU, GPU, memory (bytes) and custom resources; zeros left out."""
    r = cfg.resources
    cpus = {"planner": r.planner_cpus, "learner": r.learner_cpus, "rollout": r.rollout_cpus}
    gpus = {"planner": r.planner_gpus, "learner": r.learner_gpus / len(STREAMS)}
    found = {"CPU": cpus.get(role, 0.0), "GPU": gpus.get(role, 0.0), **r.placement.get(role, {})}
    return {name: float(amount) for name, amount in found.items() if amount}


def options(cfg: Config, role: str) -> dict[str, Any]:
    """The same as arguments of an actor's `.options(...)`."""
    wanted = bundle(cfg, role)
    custom = {k: v for k, v in wanted.items() if k not in ("CPU", "GPU", "memory")}
    return {"num_cpus": wanted.get("CPU", 0), "num_gpus": wanted.get("GPU", 0), "memory": wanted.get("memory"), "resources": custom}


def demands(cfg: Config) -> list[Demand]:
    """All that must be there before a run starts: every role, with the least number of rollout workers."""
    counts = {"store": 1, "replay": cfg.replay.shards, "learner": len(STREAMS) * cfg.resources.learner_replicas, "planner": cfg.planner.replicas,
              "evaluator": 1, "rollout": cfg.rollout.least}
    return [Demand(role, n, bundle(cfg, role), {k: setting(role, k) for k in bundle(cfg, role)}) for role, n in counts.items()]


def setting(role: str, resource: str) -> str:
    """The setting that asks for a resource."""
    return f"resources.{role}_{resource.lower()}s" if resource in ("CPU", "GPU") else f"resources.placement.{role}.{resource}"


def total(asked: Iterable[Demand]) -> Bundle:
    found: Counter[str] = Counter()
    for d in asked:
        found.update({name: d.count * amount for name, amount in d.bundle.items()})
    return dict(found)


def missing(asked: Sequence[Demand], nodes: Mapping[str, Bundle]) -> list[str]:
    """What these nodes cannot give, one line each; empty: it fits (by sums, and each actor on some node).

    nodes: resources by the node's name.
    """
    lines = []
    for name, amount in total(asked).items():
        have = sum(node.get(name, 0.0) for node in nodes.values())
        if amount > have + SPARE:
            by = [f"{d.asked_by[name]}={d.bundle[name]:g}" + (f" x {d.count}" if d.count > 1 else "") for d in asked if name in d.bundle]
            lines.append(f"{name}: {amount:g} asked for ({', '.join(by)}), Ray has {have:g}")
    if lines:
        return lines
    return [f"{d.role}: no node has {d.bundle} at once" for d in asked
            if d.bundle and not any(all(node.get(k, 0.0) + SPARE >= v for k, v in d.bundle.items()) for node in nodes.values())]


def sees(folder: str, token: str) -> bool:
    """This node sees the driver's folder: the same storage, not just a folder of that name."""
    try:
        return (Path(folder) / PROBE).read_text() == token
    except OSError:
        return False
