"""A Minari dataset of a gymnasium environment, here by random actions: python examples/own_dataset.py [EPISODES]"""
import sys

import gymnasium as gym
import minari
from minari.data_collector import EpisodeBuffer

env, episodes = gym.make("Pendulum-v1"), []
for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 100):
    steps, observations, over = [], [env.reset(seed=seed)[0]], False
    while not over:
        action = env.action_space.sample()
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        steps.append((action, reward, terminated, truncated))
        over = terminated or truncated
    episodes.append(EpisodeBuffer(seed, seed, None, observations, *map(list, zip(*steps, strict=True))))
minari.create_dataset_from_buffers("mine/pendulum-v0", episodes, env=env, algorithm_name="random", author="me", author_email="me@example.org",
                                   code_permalink="none", description="random actions")
