"""torch's Adam, fused, without the machinery of torch.compile.

torch imports that (four seconds of a process's start) where an optimiser is built, emptied or steps, to keep those calls out of compiled graphs. Here losses
are compiled, never a step, so the undecorated methods do: a learner is there, and there again after a death, so much sooner.
"""

from __future__ import annotations

import inspect

import torch


class Adam(torch.optim.Adam):
    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Adam.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Adam.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
