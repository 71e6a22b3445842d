"""An episode acted by a server: modip serve runs/demo & python examples/serve_client.py http://127.0.0.1:8000 HalfCheetah-v4"""
import sys

import gymnasium as gym

from modip_ray.serve.client import PolicyClient

env = gym.make(sys.argv[2])
with PolicyClient(sys.argv[1], client="example") as policy:
    obs, _ = env.reset(seed=0)
    total, over, begins = 0.0, False, True
    while not over:
        for action in policy.act(obs, reset=begins):                # a chunk; usually of one action
            obs, reward, terminated, truncated, _ = env.step(action)
            total, over = total + float(reward), terminated or truncated
            if over:
                break
        begins = False
print(f"return {total:.1f} by {policy.version}")
