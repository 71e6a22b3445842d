"""Scores printed in the paper (arXiv 2606.10825, table of main results), shown beside ours for orientation only."""

from __future__ import annotations

from dataclasses import dataclass

NOTE = "paper: up to 1e6 online steps, its own offline data and hardware; other budgets and data than this run's, so compare with care"


@dataclass(frozen=True)
class Published:
    """Score strings as printed ('mean' or 'mean +- std'); None where the paper has no number."""

    bc: str
    modip: str
    others: tuple[tuple[str, str], ...]  # (method, score)


_TABLE = {
    "halfcheetah": Published("5108 ± 730", "13775 ± 203", (("DPPO", "4290"), ("PA-RL", "14254 ± 1564"), ("TD-MPC2", "12054"))),
    "walker2d": Published("5721 ± 324", "6081 ± 66", (("DPPO", "2848"), ("PA-RL", "5361"), ("TD-MPC2", "5433"))),
    "hopper": Published("3050 ± 90", "3281 ± 370", (("DPPO", "1612"), ("PA-RL", "2855"), ("TD-MPC2", "2129"))),
    "kitchen-complete": Published("0.41 ± 0.20", "0.94 ± 0.14", (("DPPO", "0.88 ± 0.02"), ("PA-RL", "0.85 ± 0.01"), ("TD-MPC2", "0.65 ± 0.13"))),
    "kitchen-partial": Published(
        "0.32 ± 0.06", "0.98 ± 0.01", (("DQL", "0.45 ± 0.03"), ("DPPO", "0.67 ± 0.04"), ("PA-RL", "0.93 ± 0.01"), ("TD-MPC2", "0.55 ± 0.28"))
    ),
    "lift": Published("0.95 ± 0.01", "0.98 ± 0.03", (("DPPO", "0.99"), ("DSRL", "1.00"), ("PA-RL", "0.99"), ("TD-MPC2", "0.00"))),
    "can": Published("0.87 ± 0.04", "0.92 ± 0.01", (("DPPO", "0.93"), ("DSRL", "0.94 ± 0.02"), ("PA-RL", "0.90"), ("TD-MPC2", "0.00"))),
    "square": Published("0.62", "0.85", (("DPPO", "0.73"), ("PA-RL", "0.81"), ("TD-MPC2", "0.00"))),
}


def published_for(task: str, env_id: str = "") -> Published | None:
    """The paper's row for a task name such as 'hopper-medium' or an environment id such as 'Hopper-v4'; None where it has none."""
    for name in (task, env_id):
        words = name.lower().replace("_", "-").split("-")
        for key, row in _TABLE.items():
            parts = key.split("-")
            if all(part in words for part in parts):
                return row
    return None
