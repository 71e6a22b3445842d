"""The chaos suite: `python -m tests.chaos [--fast] [--only NAME ...]` harms runs of the normal command from outside and checks what docs/faults.md promises."""
