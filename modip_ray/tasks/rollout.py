"""Whole episodes run side by side: what evaluation and collection share."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from modip_ray.tasks.envs import ActionCheck, EnvError, EnvFactory, made_anew, make_envs, reset_env, run_chunk
from modip_ray.tasks.episode import Episode, first_non_finite

#: act(obs (m, Do) float32, slots (m,) int, reset (m,) bool) -> action chunks (m, c, Da). Row j belongs to slot slots[j]; reset marks a slot's new episode.
Act = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class EpisodeRunner:
    """Runs one episode at a time in each of `num_envs` slots; each episode has a number and a seed given by the caller.

    attempts: at an episode. One whose env raises or returns what is of no use is begun anew in a new env, from the same seed, and `faults` says what was
    wrong; the last attempt's failure is raised.
    """

    def __init__(self, env_factory: EnvFactory, num_envs: int, max_episode_steps: int, attempts: int = 1):
        if max_episode_steps < 1:
            raise ValueError(f"max_episode_steps is {max_episode_steps}; at least 1 is needed")
        self._envs, self._factory, self._attempts = make_envs(env_factory, num_envs), env_factory, attempts
        self.faults: list[EnvError] = []
        self._check = ActionCheck(self._envs[0].action_space)
        self._limit = max_episode_steps
        obs_dim = self._envs[0].observation_space.shape[0]
        self._obs = np.empty((num_envs, max_episode_steps + 1, obs_dim), np.float32)
        self._actions = np.empty((num_envs, max_episode_steps, self._check.dim), np.float32)
        self._rewards = np.empty((num_envs, max_episode_steps), np.float32)
        self._length = np.zeros(num_envs, np.int64)
        self._number = np.full(num_envs, -1, np.int64)                  # the episode a slot runs, -1: idle
        self._seed, self._failed = [0] * num_envs, [0] * num_envs       # of that episode, and how often it failed
        self.env_steps = 0

    @property
    def idle(self) -> np.ndarray:
        """Slots (ascending) that run nothing."""
        return np.flatnonzero(self._number < 0)

    def running_lengths(self) -> np.ndarray:
        """Steps done so far by each running episode."""
        return self._length[self._number >= 0]

    def start(self, slot: int, number: int, seed: int) -> None:
        """Begin episode `number` in an idle slot, with the env reset to `seed`."""
        self._obs[slot, 0] = reset_env(self._envs[slot], seed, f"env {slot}, episode {number}")
        self._number[slot], self._length[slot] = number, 0
        self._seed[slot], self._failed[slot] = seed, 0

    def step(self, act: Act) -> list[tuple[int, Episode]]:
        """Ask `act` once for all live slots and execute the chunks; returns the (number, episode) that ended."""
        slots = np.flatnonzero(self._number >= 0)
        lengths = self._length[slots]
        actions = self._check(act(self._obs[slots, lengths], slots, lengths == 0), slots)
        return [ended for row, slot in enumerate(slots.tolist()) if (ended := self._attempt(slot, actions[row])) is not None]

    def _attempt(self, slot: int, chunk: np.ndarray) -> tuple[int, Episode] | None:
        try:
            return self._execute(slot, chunk)
        except EnvError as error:
            if (failed := self._failed[slot] + 1) >= self._attempts:
                raise
            self.faults.append(error)
        self._envs[slot] = made_anew(self._envs[slot], self._factory)
        self.start(slot, int(self._number[slot]), self._seed[slot])
        self._failed[slot] = failed
        return None

    def _execute(self, slot: int, chunk: np.ndarray) -> tuple[int, Episode] | None:
        start, number = int(self._length[slot]), int(self._number[slot])
        name = f"env {slot}, episode {number}"
        obs, rewards = self._obs[slot], self._rewards[slot]
        k, terminated, truncated = run_chunk(self._envs[slot], chunk, obs[start + 1:], rewards[start:], self._limit - start, name)
        end = start + k
        for what, new in (("observation", obs[start + 1:end + 1]), ("reward", rewards[start:end])):
            if (index := first_non_finite(new)) is not None:
                raise EnvError(f"{name}: {what} {new[index[0]]} is not finite at step {start + index[0] + 1}")
        self._actions[slot, start:end] = chunk[:k]
        self._length[slot] = end
        self.env_steps += k
        if not (terminated or truncated):
            return None
        self._number[slot] = -1
        return number, Episode(obs[:end + 1].copy(), self._actions[slot, :end].copy(), rewards[:end].copy(), terminated)

    def close(self) -> None:
        for env in self._envs:
            env.close()


def rollout_episodes(act: Act, env_factory: EnvFactory, seeds: Sequence[int], max_episode_steps: int, num_envs: int | None = None, attempts: int = 1,
                     faults: list[EnvError] | None = None) -> list[Episode]:
    """One episode for each seed, in the order of `seeds`, run side by side; `act` sees live envs only.

    num_envs: environments at a time, by default one a seed (then slot j runs seeds[j] and nothing else). With fewer, a slot takes the next
    seed when its episode ends. EnvError names the env that crashed or returned a non-finite number, at the last of so many attempts at an episode; those
    before it are appended to `faults`.
    """
    if len(seeds) == 0:
        return []
    runner = EpisodeRunner(env_factory, min(num_envs or len(seeds), len(seeds)), max_episode_steps, attempts)
    episodes: list[Episode | None] = [None] * len(seeds)
    started = done = 0
    try:
        while done < len(seeds):
            for slot in runner.idle[:len(seeds) - started].tolist():
                runner.start(slot, started, int(seeds[started]))
                started += 1
            for number, episode in runner.step(act):
                episodes[number] = episode
                done += 1
    finally:
        runner.close()
    if faults is not None:
        faults += runner.faults
    return episodes
