"""MODIP on Ray: fine-tune diffusion policies with a world model, planning and distillation (El Asri et al., arXiv 2606.10825)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modip_ray.policy import load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> object:
    """`modip_ray.load`: imported when it is asked for, since it takes torch along."""
    if name == "load":
        from modip_ray.policy import load
        return load
    raise AttributeError(f"module 'modip_ray' has no attribute {name!r}")
