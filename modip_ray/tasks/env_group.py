"""A group of environments stepped together with action chunks: what a rollout worker runs."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from modip_ray.tasks.envs import ActionCheck, EnvError, EnvFactory, env_seed, made_anew, make_env, make_envs, reset_env, run_chunk
from modip_ray.tasks.rollout import rollout_episodes

__all__ = ["EnvError", "EnvFactory", "EnvGroup", "FinishedEpisode", "StepResult", "Transitions", "make_env", "rollout_episodes"]


class Transitions(NamedTuple):
    """The k <= chunk steps one env executed in one call, all of one episode. The arrays are views of buffers made for this call."""

    obs: np.ndarray         # (k, Do) float32
    actions: np.ndarray     # (k, Da) float32, clipped: as executed
    rewards: np.ndarray     # (k,) float32
    next_obs: np.ndarray    # (k, Do) float32; its last row is the true last observation when the episode ended
    terminated: bool        # the last of the k steps was a real termination
    truncated: bool         # the last of the k steps hit the time limit (never together with terminated)


class FinishedEpisode(NamedTuple):
    env: int
    ret: float
    length: int
    seed: int


@dataclass(frozen=True, eq=False)
class StepResult:
    obs: np.ndarray                 # (n, Do) float32, to act on next: after the auto-reset where an episode ended
    reset: np.ndarray               # (n,) bool: obs[i] begins a new episode
    terminated: np.ndarray          # (n,) bool
    truncated: np.ndarray           # (n,) bool
    transitions: list[Transitions]  # one an env

    @property
    def finished(self) -> np.ndarray:
        """(n,) bool: the episode ended in this call; the same as `reset`."""
        return self.reset


class EnvGroup:
    """`num_envs` environments stepped one after another; ended episodes are reset at once.

    Env i's episode k is seeded by (seed, i, k). `seed` may be several numbers, e.g. (run seed, worker, incarnation).
    `env_steps` counts executed actions, not chunks.

    max_failures: tolerated for each thousand steps, and at the beginning. Within that, an env that raises or returns what is of no use is made anew; the
    good part of its episode ends as if by a time limit, and `faults` says what was wrong. Beyond it, the failure is raised. Construction and the first
    reset must succeed.
    """

    def __init__(self, env_factory: EnvFactory, num_envs: int, max_episode_steps: int, seed: int | Sequence[int], max_failures: float = 0.0):
        if max_episode_steps < 1:
            raise ValueError(f"max_episode_steps is {max_episode_steps}; at least 1 is needed")
        self._envs, self._factory = make_envs(env_factory, num_envs), env_factory
        self._max_failures, self._failures = max_failures, 0
        self.faults: list[EnvError] = []            # since the owner took them last
        self.busy: int | None = None                # the env that is at work now
        self._check = ActionCheck(self._envs[0].action_space)
        self._seed = (seed,) if isinstance(seed, int | np.integer) else tuple(seed)
        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.obs_dim, self.action_dim = self._envs[0].observation_space.shape[0], self._check.dim
        self.env_steps = 0
        self._obs: np.ndarray | None = None         # (n, Do)
        self._episode = [-1] * num_envs             # number of the running episode
        self._episode_seed = [0] * num_envs
        self._length = [0] * num_envs
        self._return = [0.0] * num_envs
        self._executed: list[list[np.ndarray]] = [[] for _ in range(num_envs)]      # actions (k, Da) of the running episode
        self._finished: list[FinishedEpisode] = []

    def reset(self) -> np.ndarray:
        """Begin a new episode in every env; episodes that were running are given up. Returns obs (n, Do) float32."""
        self._obs = np.stack([self._reset_one(i) for i in range(self.num_envs)])
        return self._obs.copy()

    def step(self, actions: np.ndarray) -> StepResult:
        """Execute a chunk `actions` (n, c, Da) in each env; an env whose episode ends drops the rest of its chunk and is reset.

        Raises EnvError naming the env for a crash, a non-finite observation or reward, where those are too many; ValueError for actions of a wrong shape
        or with NaN.
        """
        if self._obs is None:
            raise RuntimeError("call reset() before step()")
        n, actions = self.num_envs, self._check(actions, range(self.num_envs))
        chunk = actions.shape[1]
        trail = np.zeros((n, chunk + 1, self.obs_dim), np.float32)      # row 0: where the chunk starts
        rewards = np.zeros((n, chunk), np.float32)
        trail[:, 0] = self._obs
        ends, failed = [], {}
        for i, env in enumerate(self._envs):
            self.busy = i
            try:
                ends.append(run_chunk(env, actions[i], trail[i, 1:], rewards[i], self.max_episode_steps - self._length[i], f"env {i}"))
            except EnvError as error:
                failed[i] = error
                ends.append((error.steps, False, True))
                trail[i, error.steps + 1:], rewards[i, error.steps:] = 0.0, 0.0
        for i, error in self._not_finite(trail, rewards).items():
            failed[i], ends[i] = error, (error.steps, False, True)
        for error in failed.values():
            self._note(error)
        executed = actions.astype(np.float32, copy=False)
        obs = np.empty((n, self.obs_dim), np.float32)
        transitions = []
        for i, (k, terminated, truncated) in enumerate(ends):
            transitions.append(Transitions(trail[i, :k], executed[i, :k], rewards[i, :k], trail[i, 1:k + 1], terminated, truncated))
            self._executed[i].append(actions[i, :k])
            self.env_steps += k
            self._length[i] += k
            self._return[i] += sum(rewards[i, :k].tolist())
            self.busy = i
            if i in failed:
                obs[i] = self._made_anew(i)
            elif terminated or truncated:
                self._finished.append(FinishedEpisode(i, self._return[i], self._length[i], self._episode_seed[i]))
                obs[i] = self._next_episode(i)
            else:
                obs[i] = trail[i, k]
        self._obs, self.busy = obs, None
        flags = np.array([end[1:] for end in ends], bool)               # (n, 2)
        return StepResult(obs.copy(), flags.any(1), flags[:, 0], flags[:, 1], transitions)

    def finished_returns(self) -> list[FinishedEpisode]:
        """(env, return, length, seed) of the episodes that ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def state(self) -> dict[str, np.ndarray]:
        """Where every env is: the seed of its running episode and the actions executed since."""
        return {"seed": np.array(self._seed), "episode": np.array(self._episode), "return": np.array(self._return), "length": np.array(self._length),
                "obs": self._obs.copy(), "actions": np.concatenate([a for executed in self._executed for a in executed] or [np.zeros((0, self.action_dim))])}

    def resume(self, state: Mapping[str, np.ndarray]) -> None:
        """Put every env where `state` says, by executing the running episodes' actions again.

        ValueError for the state of other envs, or where an env is not a function of its seed and actions: then it does not come out at the same observation.
        """
        if len(state["episode"]) != self.num_envs or state["actions"].shape[1] != self.action_dim or state["obs"].shape[1] != self.obs_dim:
            raise ValueError(f"the state of {len(state['episode'])} environments of other shapes does not fit {self.num_envs}")
        self._seed, self._episode = tuple(state["seed"].tolist()), (state["episode"] - 1).tolist()
        ends = np.cumsum(state["length"])
        self._obs = np.empty_like(state["obs"])
        for i, (env, length, actions) in enumerate(zip(self._envs, state["length"].tolist(), np.split(state["actions"], ends[:-1]), strict=True)):
            self._obs[i] = self._reset_one(i)
            trail = np.zeros((length, self.obs_dim), np.float32)
            ended = run_chunk(env, actions, trail, np.zeros(length, np.float32), self.max_episode_steps, f"env {i}") if length else (0, False, False)
            if ended != (length, False, False) or not np.array_equal([*self._obs[i:i + 1], *trail][-1], state["obs"][i]):
                raise ValueError(f"env {i} does not come out where it was by the seed and the {length} actions of its episode")
            self._obs[i], self._length[i], self._return[i], self._executed[i] = state["obs"][i], length, float(state["return"][i]), [actions]

    def close(self) -> None:
        for env in self._envs:
            env.close()

    def _reset_one(self, i: int) -> np.ndarray:
        self._episode[i] += 1
        self._episode_seed[i] = env_seed(*self._seed, i, self._episode[i])
        self._length[i], self._return[i], self._executed[i] = 0, 0.0, []
        return reset_env(self._envs[i], self._episode_seed[i], f"env {i}")

    def _next_episode(self, i: int) -> np.ndarray:
        """First observation of env i's next episode; of a new env in its place where its reset fails."""
        try:
            return self._reset_one(i)
        except Exception as error:                  # whatever a simulator raises
            self._note(error if isinstance(error, EnvError) else EnvError(f"env {i}: reset failed with {type(error).__name__}: {error}", crashed=True))
            return self._made_anew(i)

    def _made_anew(self, i: int) -> np.ndarray:
        """A new env in place of env i, which failed; the first observation of its episode."""
        self._envs[i] = made_anew(self._envs[i], self._factory)
        return self._next_episode(i)

    def _note(self, error: EnvError) -> None:
        """Count a failure; raise it when there are too many."""
        self._failures += 1
        if self._failures > self._max_failures * (1 + self.env_steps / 1000):
            raise error
        self.faults.append(error)

    def _not_finite(self, trail: np.ndarray, rewards: np.ndarray) -> dict[int, EnvError]:
        """By env: what is wrong first in trail (n, c+1, Do) or rewards (n, c)."""
        if np.isfinite(trail).all() and np.isfinite(rewards).all():
            return {}
        bad = ~(np.isfinite(trail[:, 1:]).all(2) & np.isfinite(rewards))            # (n, c)
        first = {int(i): int(bad[i].argmax()) for i in np.flatnonzero(bad.any(1))}
        return {i: EnvError(self._what(i, k, trail[i, k + 1], rewards[i, k]), k) for i, k in first.items()}

    def _what(self, i: int, k: int, obs: np.ndarray, reward: np.float32) -> str:
        what = f"observation {obs}" if not np.isfinite(obs).all() else f"reward {reward}"
        return f"env {i}: {what} is not finite at step {self._length[i] + k + 1} of the episode seeded {self._episode_seed[i]}"
