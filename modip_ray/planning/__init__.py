"""What acts: MPPI over diffusion proposals, the guard, warm starts. Batched rows, no Ray."""
