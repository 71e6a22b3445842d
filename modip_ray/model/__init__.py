"""What is learned: diffusion policy, world model, critic. Pure torch; symbols in docs/method.md."""
