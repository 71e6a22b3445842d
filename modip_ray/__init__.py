"""MODIP on Ray: fine-tune diffusion policies with a world model, planning and distillation (El Asri et al., arXiv 2606.10825)."""

__version__ = "0.1.0"
