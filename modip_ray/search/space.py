"""Search spaces of Ray Tune over a run's settings: checked before anything runs, and made into a PBT that stays inside them."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search.sample import Categorical, Domain, Float, Integer, Quantized

from modip_ray.config import ConfigError
from modip_ray.search.settings import SEARCH_KEYS, base_config, check_mutation, settled, split

MOST_CORNERS = 256                  # of a space that are tried; of more, so many are drawn
MOST_VALUES = 100                   # of an integer range that PBT steps through one by one


def check_space(param_space: Mapping[str, Any], mutated: Iterable[str] = ()) -> None:
    """ConfigError for a setting, a value or a combination of extreme values that a trial could not run with, or for a key that must not be perturbed.

    mutated: keys that a scheduler changes on trained states (hyperparam_mutations of PBT)
    """
    split(param_space)                                                              # unknown keys first
    base = functools.cache(lambda text: base_config(json.loads(text)))
    for corner in corners({k: extremes(v) for k, v in param_space.items()}):
        search, dotted = split(corner)
        settings = settled(base(json.dumps({k: search.get(k) for k in ("task", "config", "start")}, default=str)), search, dotted)
        for key in mutated:
            check_mutation(key, settings.cfg)


def corners(values: Mapping[str, Sequence[Any]]) -> Iterable[dict[str, Any]]:
    """All combinations, or (seeded) so many random ones, in which any three settings meet with near certainty."""
    if math.prod(map(len, values.values())) <= MOST_CORNERS:
        return (dict(zip(values, row, strict=True)) for row in itertools.product(*values.values()))
    rng = random.Random(0)
    return ({k: rng.choice(v) for k, v in values.items()} for _ in range(MOST_CORNERS))


def searched(param_space: Mapping[str, Any]) -> list[str]:
    """Keys that the search draws."""
    return [k for k, v in param_space.items() if isinstance(v, Domain) or grid(v) is not None]


def grid(value: Any) -> list | None:
    return list(value["grid_search"]) if isinstance(value, Mapping) and set(value) == {"grid_search"} else None


def extremes(value: Any) -> list[Any]:
    """Values of an entry of a space among which the most demanding ones are; [value] for one that is fixed."""
    values = grid(value)
    if values is not None:
        return values
    if isinstance(value, Categorical):
        return list(value.categories)
    if isinstance(value, Integer):
        return sorted({*integers(value)[:1], *integers(value)[-1:]})
    if isinstance(value, Float) and math.isfinite(value.lower) and math.isfinite(value.upper):
        return [value.lower, value.upper]
    return [value.sample()] if isinstance(value, Domain) else [value]


def integers(domain: Integer) -> range:
    """Values of randint (upper end excluded) and qrandint (included)."""
    step = quantum(domain)
    return range(domain.lower, domain.upper + (step is not None), int(step or 1))


def quantum(domain: Domain) -> float | None:
    sampler = domain.get_sampler()
    return sampler.q if isinstance(sampler, Quantized) else None


def pbt(param_space: Mapping[str, Any], **fields: Any) -> PopulationBasedTraining:
    """Population-based training that perturbs every setting that `param_space` draws; fields: as of Ray's class, metric and mode among them if you like.

    Lists and integer ranges move to a neighbour, real numbers are multiplied and stay inside their range. Time is counted in iterations.
    ConfigError names a setting that cannot change on a trained state.
    """
    keys = searched(param_space)
    if not keys:
        raise ConfigError("pbt: the search draws no setting, so there is nothing to perturb; give at least one as tune.uniform(...) or tune.choice([...])")
    for key in keys:
        if key in SEARCH_KEYS:
            raise ConfigError(f"{key}: cannot be perturbed on a trained state; fix it, and search settings of the online phase")
    check_space(param_space, keys)
    mutations: dict[str, Any] = {key: steps_of(param_space[key]) for key in keys}
    floats = {key: d for key, d in mutations.items() if isinstance(d, Domain)}
    return PopulationBasedTraining(time_attr="training_iteration", hyperparam_mutations=mutations, custom_explore_fn=Inside(floats), **fields)


def steps_of(entry: Any) -> list | Domain:
    """What PBT moves along: a list of values, or a range of real numbers."""
    values = grid(entry)
    if values is not None:
        return values
    if isinstance(entry, Categorical):
        return list(entry.categories)
    return list(integers(entry)) if isinstance(entry, Integer) and len(integers(entry)) <= MOST_VALUES else entry


class Inside:
    """Puts perturbed numbers back into the ranges that they are drawn from: Ray multiplies them without a limit."""

    def __init__(self, domains: Mapping[str, Domain]):
        self.ranges = {key: (min(extremes(d)), max(extremes(d)), quantum(d)) for key, d in domains.items()}

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        for key, (low, high, step) in self.ranges.items():
            value = config[key] if step is None else type(config[key])(round(config[key] / step) * step)
            config[key] = min(max(value, low), high)
        return config
