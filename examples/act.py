"""An episode with the policy of a run: python examples/act.py runs/demo"""
import sys

import modip_ray

policy = modip_ray.load(sys.argv[1], mode="policy")         # or "bc", before fine-tuning; or "mpc", the planner
env = policy.make_env()
obs, _ = env.reset(seed=0)
total, over = 0.0, False
while not over:
    obs, reward, terminated, truncated, _ = env.step(policy.act(obs))
    total, over = total + float(reward), terminated or truncated
print(f"return {total:.1f}")
