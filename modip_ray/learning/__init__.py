"""What improves it: replay, rate limiter, update step, distillation rule, checkpoints."""
