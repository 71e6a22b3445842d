"""Mutated settings: each gives a clear error before anything is started, or a run that really starts, collects a segment and stops in order.

    python -m tests.chaos.configs 300 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import signal
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from modip_ray.cli import mendable
from modip_ray.config import Config, load
from modip_ray.run import train
from modip_ray.session import Stopped
from tests.fakes import small, write_data

Tree = dict[str, Any]
PATIENCE_S = 20.0                   # a run that has no segment by then is asked to stop, like any long run
LONGEST_MESSAGE = 1500
ODD = [None, "", "abc", "1e-4", "nan", "~", True, False, -1, 0, 1, 2, 3.7, -0.5, 1e-300, 1e308, float("nan"), float("inf"), -float("inf"), 10**12, 2**31, 2**63,
       10**30, [], [1], ["a"], {}, {"a": 1}, {"min": 3, "max": 1}, {1: 2}, "x" * 3000, "\u00fc\u4e2d\U0001f4a5", "a\nb", "../..", "module:Class", "os:getcwd"]
CONTRADICTIONS = [
    {"policy.horizon": 2, "planner.horizon": 3}, {"planner.elites": 500}, {"policy.n_action_steps": 9}, {"replay.capacity": 5},
    {"policy.sampling_steps": 50}, {"planner.proposal_steps": 50}, {"world_model.latent": 15}, {"rollout.groups": 2}, {"task.max_episode_steps": 1},
    {"guard.std_max": 0.001}, {"critic.bins": 1}, {"online.min_online": 10**9}, {"policy.batch_size": 10**7}, {"eval.episodes": 0},
    {"rollout.num_workers": {"min": 4, "max": 2}}, {"rollout.num_workers": {"min": 1}}, {"resources.device": "cuda:7"},
    {"policy.network": "unet", "policy.width": 30},
    {"data.source": "policy:/nowhere.hdf5"}, {"data.source": "minari:nothing/there-v0"}, {"task.env": "NoSuchEnv-v4"}, {"task.env": "CartPole-v1"},
    {"task.family": "cheetah"}, {"resources.placement": {"planner": {"GPU": 1}}}, {"resources.placement": {"plannr": {"a": 1}}},
    {"task.env_kwargs": {"nonsense": 1}}, {"data.max_transitions": 0}, {"data.rewards": "newly_done"}, {"planner.n_action_steps": 4, "planner.horizon": 3},
]


def base(data: Path, run_dir: Path) -> Tree:
    """Every setting spelled out: a run of seconds."""
    cfg = small(run_dir, data, serial=True, pretrain__updates=4, pretrain__policy_updates=4, eval__every_steps=0, log__grace_s=10.0,
                resources__call_timeout_s=20.0)
    return cfg.to_dict()


def leaves(tree: Tree) -> list[tuple[str, ...]]:
    return [(k, n) for k, v in tree.items() if isinstance(v, dict) for n in v] + [(k,) for k, v in tree.items() if not isinstance(v, dict)]


def put(tree: Tree, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


# ---- mutations: each changes a tree in place, or gives a file's text, and says the words of which one must be in an error's message -------------

def odd_leaf(rng: random.Random, tree: Tree) -> list[str]:
    path = rng.choice(leaves(tree))
    put(tree, path, copy.deepcopy(rng.choice(ODD)))
    return [path[-1]]


def two_odd_leaves(rng: random.Random, tree: Tree) -> list[str]:
    return odd_leaf(rng, tree) + odd_leaf(rng, tree)


def scaled_leaf(rng: random.Random, tree: Tree) -> list[str]:
    """A number of the right type, far off."""
    numbers = [p for p in leaves(tree) if len(p) == 2 and type(tree[p[0]][p[1]]) in (int, float)]
    group, name = rng.choice(numbers)
    tree[group][name] = type(tree[group][name])(tree[group][name] * rng.choice([-1, 0, 7, 1000, 10**6, 10**9]))
    return [name]


def misspelt(rng: random.Random, tree: Tree) -> list[str]:
    """A key with a letter missing: the message must name the right one."""
    path = rng.choice([p for p in leaves(tree) if len(p[-1]) > 3])
    group = tree if len(path) == 1 else tree[path[0]]
    at = rng.randrange(len(path[-1]))
    group[path[-1][:at] + path[-1][at + 1:]] = group.pop(path[-1])
    return [f"did you mean {path[-1]!r}"]


def unknown_group(rng: random.Random, tree: Tree) -> list[str]:
    name = rng.choice(["extra", "Planner", "a.b", "", "0"])
    (tree if rng.random() < 0.5 else tree[rng.choice([k for k, v in tree.items() if isinstance(v, dict)])])[name] = rng.choice([{}, 1, {"horizon": 3}])
    return [f"unknown setting '{name}'", f"{name!r}"]


def flattened_group(rng: random.Random, tree: Tree) -> list[str]:
    name = rng.choice([k for k, v in tree.items() if isinstance(v, dict)])
    tree[name] = rng.choice([None, 3, "x", [1, 2], list(tree[name])])
    return [name]


def swapped_groups(rng: random.Random, tree: Tree) -> list[str]:
    a, b = rng.sample([k for k, v in tree.items() if isinstance(v, dict)], 2)
    tree[a], tree[b] = tree[b], tree[a]
    return ["unknown setting"]


def contradiction(rng: random.Random, tree: Tree) -> list[str]:
    found = rng.choice(CONTRADICTIONS)
    for dotted, value in found.items():
        put(tree, tuple(dotted.split(".")), copy.deepcopy(value))
    return [name for dotted in found for name in dotted.split(".")]


def broken_text(rng: random.Random, tree: Tree) -> str:
    text = yaml.safe_dump(tree, sort_keys=False)
    at = rng.randrange(len(text))
    return rng.choice([lambda: text[:at], lambda: text[:at] + "\t: [" + text[at:], lambda: text.replace(":", "", 1), lambda: text[:at] + "\x00" + text[at:],
                       lambda: "", lambda: "- 1\n- 2", lambda: f"seed: !!python/object/apply:os.system ['exit 1']\n{text}", lambda: "&a [*a]",
                       lambda: text + text[:at], lambda: "a: &x [b]\nc: *y", lambda: text[:at] + "{" + text[at:]])()


#: With how often each is drawn.
MUTATIONS: dict[Callable[[random.Random, Tree], Any], int] = {
    odd_leaf: 8, two_odd_leaves: 3, scaled_leaf: 5, misspelt: 2, unknown_group: 1, flattened_group: 1, swapped_groups: 1, contradiction: 4, broken_text: 2}


# ---- what comes of them --------------------------------------------------------------------------------------------------------------------------

def outcome(text: str, words: list[str], folder: Path) -> str:
    """"refused", "started" or "stopped" (asked to, before its first segment); else what is wrong, beginning with "unclear"."""
    file = folder / "mutated.yaml"
    file.write_text(text)
    stage = "loading"
    try:
        cfg = load(file)
        stage = "running"
        return run_a_little(cfg)
    except mendable() as error:
        message = str(error)
        if not message.strip() or len(message) > LONGEST_MESSAGE:
            return f"unclear: a message of {len(message)} characters: {message[:200]!r}"
        if stage == "loading" and words and not any(word in message for word in words):
            return f"unclear: none of {words} is in {message!r}"
        return "refused"
    except Exception as error:                                                      # noqa: BLE001 - the finding itself
        return f"unclear: {stage}: {type(error).__name__}: {str(error)[:300]} at {traceback.extract_tb(error.__traceback__)[-1]}"


def run_a_little(cfg: Config) -> str:
    """Train until the first segment is made, then stop in order."""
    harmless = {"serial": True, "log.wandb": "disabled", "replay.shards": 1, "resources.ray_address": "local", "log.ray_metrics": False, "data.cache": None,
                "resources.compile": False}
    timers = [threading.Timer(s, os.kill, (os.getpid(), number)) for s, number in ((PATIENCE_S, signal.SIGTERM), (2 * PATIENCE_S, signal.SIGINT))]

    def enough(segment: Any) -> Any:
        raise Stopped
    for timer in timers:
        timer.start()
    try:
        train(cfg.replace(harmless), segment_hook=enough)
    except Stopped:
        return "started" if timers[0].is_alive() else "stopped"
    except KeyboardInterrupt:
        return f"unclear: did not stop within {PATIENCE_S:g} s of SIGTERM"
    finally:
        for timer in timers:
            timer.cancel()
    return "started"


def check_configs(n: int, seed: int) -> dict[str, Any]:
    """Figures: how many were refused by a clear error, started, and stopped when asked to; and each that did neither, with how it was made."""
    rng, found, unclear = random.Random(seed), Counter(), []
    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="configs_") as scratch, contextlib.ExitStack() as stack:
        data = write_data(Path(scratch) / "data.hdf5", 300)
        stack.enter_context(mock.patch.dict(os.environ, HOME=scratch))              # run_dir: "~" is a run in the home folder,
        os.chdir(scratch)                                                           # an empty one makes runs/ where the run is started
        try:
            for i in range(n):
                folder = Path(scratch) / str(i)
                folder.mkdir()
                tree, mutate = base(data, folder / "run"), rng.choices(list(MUTATIONS), list(MUTATIONS.values()))[0]
                made = mutate(rng, tree)
                text, words = (made, []) if isinstance(made, str) else (yaml.safe_dump(tree, sort_keys=False), made)
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    what = outcome(text, words, folder)
                found[what.partition(":")[0]] += 1
                if what.startswith("unclear"):
                    unclear.append({"number": i, "mutation": mutate.__name__, "words": words, "what": what})
        finally:
            os.chdir(before)
    return {"configs": n, "seed": seed, **{k: found[k] for k in ("refused", "started", "stopped", "unclear")}, "findings": unclear}


if __name__ == "__main__":
    top = argparse.ArgumentParser(description=__doc__)
    top.add_argument("n", type=int, nargs="?", default=300)
    top.add_argument("--seed", type=int, default=0)
    print(json.dumps(check_configs(**vars(top.parse_args())), indent=1))
