"""The further processes of a learner (resources.learner_replicas): they make its updates along with it, each on its own rows.

They belong to the learner, rank 0, which starts them, gives them its state and passes every batch on. They live and die together: where one of them is gone
or silent, rank 0 ends its own process; Ray then ends the others, whose owner it was, and starts rank 0 anew, which begins again from its last snapshot.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import ray
import torch
from ray.exceptions import RayError

from modip_ray.actors.placement import options
from modip_ray.actors.pulse import GROUP, PULSE, Life, Pulse
from modip_ray.config import Config
from modip_ray.learning.build import Spec, agent_of, device_of
from modip_ray.learning.learner import Learner
from modip_ray.learning.limiter import STREAMS, Stream
from modip_ray.learning.parallel import ALONE, Meeting, Place, ReplicaLost, join, meeting, place_of
from modip_ray.learning.updater import State, Updater, learner_state, load_learner, load_parts
from modip_ray.model.hardware import compiled_beside, prepare_process
from modip_ray.oneline import first_line
from modip_ray.timing import Timer

IN_FLIGHT = 2                       # updates that a rank may be behind rank 0's orders
PULSES = 5                          # looks at the ranks within resources.silent_s


def leave(reason: str) -> NoReturn:
    """End this process at once, as a kill would: Ray starts it anew where it may."""
    print(f"modip: learner: {reason}; it begins again from its last snapshot", file=sys.stderr, flush=True)
    os._exit(1)


def here(device: torch.device) -> Place:
    return place_of(ray.util.get_node_ip_address(), device)


@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups=GROUP)
class RankActor:
    """Rank 1, 2, ... of a learner. Its calls come from rank 0 alone, in order."""

    def __init__(self, cfg: Config, spec: Spec, stream: Stream):
        prepare_process(cfg.resources.torch_threads)
        self.cfg, self.spec, self.stream, self.life = cfg, spec, stream, Life(Timer())
        self.device = device_of(cfg, cfg.resources.learner_gpus)

    @ray.method(**PULSE)
    def pulse(self) -> Pulse:
        return self.life.pulse()

    def place(self) -> Place:
        return here(self.device)

    def join(self, where: Meeting, rank: int, size: int) -> None:
        torch.set_num_threads(self.cfg.resources.torch_threads)                     # counts for the thread that calls it
        self.replicas = join(where, rank, size)

    def begin(self, state: dict[Stream, State]) -> None:
        learner = Learner(self.cfg, agent_of(self.cfg, self.spec, self.device), self.cfg.seed, self.replicas, compiled_beside)
        for stream in STREAMS:
            load_learner(learner, stream, state[stream])
        self.updater = Updater(self.cfg, learner, self.life.timer)

    def update(self, batch: dict[str, np.ndarray]) -> None:
        self.updater.update(self.stream, {k: np.array(v) for k, v in batch.items()})
        self.updater.rows[self.stream].clear()                                      # rank 0 reports them

    def load(self, parts: dict[str, np.ndarray]) -> None:
        load_parts(self.updater.learner, parts)


class Ranks:
    """Rank 0's side. Without further ranks every method does nothing."""

    def __init__(self, cfg: Config, spec: Spec, stream: Stream, device: torch.device):
        self.timeout_s, self.silent_s = cfg.resources.call_timeout_s, cfg.resources.silent_s
        self.replicas, self.actors, self.pulses = ALONE, [], []
        self.sent: deque[list[ray.ObjectRef]] = deque()
        size = cfg.resources.learner_replicas
        if size > 1:
            self.start(RankActor.options(**options(cfg, "learner")), (cfg, spec, stream), size, device)

    def start(self, kind: Any, arguments: tuple, size: int, device: torch.device) -> None:
        self.actors = [kind.remote(*arguments) for _ in range(1, size)]
        where, store = meeting([here(device), *self.get([a.place.remote() for a in self.actors])], self.timeout_s)
        joining = [actor.join.remote(where, rank, size) for rank, actor in enumerate(self.actors, 1)]
        threading.Thread(target=self.watch, daemon=True).start()
        try:
            self.replicas = join(where, 0, size, store, lost=leave)
        except RuntimeError as error:
            leave(f"its processes do not find each other: {first_line(error)}")
        self.get(joining)

    def begin(self, learner: Learner) -> None:
        """All ranks go on from rank 0's state."""
        if self.actors:
            state = ray.put(learner_state(learner))
            self.get([actor.begin.remote(state) for actor in self.actors])

    def update(self, batch: Mapping[str, np.ndarray]) -> None:
        """Have the others make the next update, on this batch."""
        if self.actors:
            batch = ray.put(dict(batch))
            self.order([actor.update.remote(batch) for actor in self.actors])

    def load(self, parts: Mapping[str, np.ndarray]) -> None:
        """Have the others take over weights, between two updates."""
        if self.actors:
            parts = ray.put(dict(parts))
            self.order([actor.load.remote(parts) for actor in self.actors])

    def order(self, refs: list[ray.ObjectRef]) -> None:
        self.sent.append(refs)
        if len(self.sent) > IN_FLIGHT:
            self.get(self.sent.popleft())

    def get(self, refs: list[ray.ObjectRef]) -> list[Any]:
        """Answers; an error that a rank raised itself is raised, its death ends this process."""
        try:
            return ray.get(refs, timeout=self.timeout_s)
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, Exception) and not isinstance(cause, (RayError, ReplicaLost)):
                raise cause from error
            leave(f"one of its processes died ({type(cause or error).__name__})")

    # ---- who lives ---------------------------------------------------------------------------------------------------------------------------

    def watch(self) -> NoReturn:
        """In a thread of its own: the all-reduce of a rank that waits for one that is gone need not end."""
        pause = threading.Event()
        while True:
            asked = [actor.pulse.remote() for actor in self.actors]
            ready, _ = ray.wait(asked, num_returns=len(asked), timeout=self.silent_s)
            if len(ready) < len(asked):
                leave(f"one of its processes did not answer for {self.silent_s:g} s (resources.silent_s)")
            try:
                self.pulses = ray.get(asked)
            except RayError as error:
                leave(f"one of its processes died ({type(error).__name__})")
            pause.wait(self.silent_s / PULSES)

    def with_helpers(self, own: Pulse) -> Pulse:
        """Rank 0's pulse with the ids and the memory of all."""
        others = self.pulses
        return own._replace(helpers=tuple(p.pid for p in others), rss_mb=own.rss_mb + sum(p.rss_mb for p in others))
