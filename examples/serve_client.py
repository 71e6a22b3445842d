"""An episode acted by a server: `modip serve runs/demo` in one terminal; once it has printed its address, in another one

    python examples/serve_client.py http://127.0.0.1:8000 HalfCheetah-v4
"""
import sys
import time

import gymnasium as gym
import numpy as np

from modip_ray.serve.client import PolicyClient

env = gym.make(sys.argv[2])
with PolicyClient(sys.argv[1], client="example") as policy:
    obs, _ = env.reset(seed=0)
    total, over, begins, waits = 0.0, False, True, []
    while not over:
        asked = time.perf_counter()
        actions = policy.act(obs, reset=begins)                     # a chunk; usually of one action
        waits.append(1e3 * (time.perf_counter() - asked))
        for action in actions:
            obs, reward, terminated, truncated, _ = env.step(action)
            total, over = total + float(reward), terminated or truncated
            if over:
                break
        begins = False
p50, p95 = np.percentile(waits, (50, 95))
print(f"return {total:.1f} by {policy.version}; {len(waits)} answers, p50 {p50:.1f} ms, p95 {p95:.1f} ms")
