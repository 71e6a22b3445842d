"""The learner role: the same class twice, once for world model and critic, once for the policy. They share no gradient, so they run side by side."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from modip_ray.actors.batches import BatchSource
from modip_ray.actors.placement import sees
from modip_ray.actors.pulse import GROUP, PULSE, Life, Pulse
from modip_ray.actors.ranks import Ranks
from modip_ray.config import Config
from modip_ray.learning.build import Spec, agent_of, device_of
from modip_ray.learning.checkpoint import Checkpoint, write_state
from modip_ray.learning.learner import Learner
from modip_ray.learning.limiter import STREAMS, Stream
from modip_ray.learning.live import newest_state, write_snapshot
from modip_ray.learning.replay_server import shard_updates
from modip_ray.learning.updater import State, Updater, learner_state, load_learner, load_parts
from modip_ray.model.hardware import compiled_beside, prepare_process
from modip_ray.model.networks import flat_vector
from modip_ray.timing import Timer


class LearnerReport(NamedTuple):
    stream: Stream
    count: int
    metrics: dict[str, float]
    timing: dict[str, Any]
    incidents: list[str]


@ray.remote(max_restarts=-1, max_task_retries=-1, concurrency_groups=GROUP)
class LearnerActor:
    """Killed, it goes on from its last snapshot: the updates since are made again, on other data if more is there by now. Any call may be repeated.

    Where resources.learner_replicas is above 1, this is rank 0 of so many processes, and starts the others (ranks.py).
    """

    def __init__(self, cfg: Config, spec: Spec, stream: Stream, replays: Sequence[str], store: str, checkpoint: Checkpoint | None, live: Path | None = None):
        """live: where snapshots are kept; then it is from there, or the run's newest checkpoint of now, that it begins, not from the one given."""
        prepare_process(cfg.resources.torch_threads)
        self.cfg, self.stream, self.timer, self.live = cfg, stream, Timer(), live
        self.store = ray.get_actor(store)
        device = device_of(cfg, cfg.resources.learner_gpus)
        self.ranks = Ranks(cfg, spec, stream, device)
        self.learner = Learner(cfg, agent_of(cfg, spec, device), cfg.seed, self.ranks.replicas, compiled_beside)
        self.updater = Updater(cfg, self.learner, self.timer)
        used = [0] * len(replays)
        self.life = Life(self.timer)
        for part in STREAMS:
            state, source = newest_state(f"learner_{part}", "updates", live, checkpoint)
            if state is not None:
                load_learner(self.learner, part, state)
                if part == stream:
                    used = shard_updates(state, len(replays)).tolist()
            if part == stream:
                self.life.note = f"from update {self.updater.count(stream)} on ({source})"
        self.ranks.begin(self.learner)
        self.batches = BatchSource([ray.get_actor(name) for name in replays], stream, used, cfg.replay.prefetch, cfg.resources.patience_s, self.timer)
        self.versions: dict[str, int] = {}
        self.exchanged_at = float("-inf")
        self.sent: deque[ray.ObjectRef] = deque()
        self.writer, self.writing, self.snapshot_at = ThreadPoolExecutor(1, "snapshot"), Future(), time.monotonic()
        self.writing.set_result(None)
        self.copy: dict[Stream, State] | None = None
        self.incidents: list[str] = []

    @ray.method(**PULSE)
    def pulse(self) -> Pulse:
        return self.ranks.with_helpers(self.life.pulse())

    def sees(self, folder: str, token: str) -> bool:
        return sees(folder, token)

    def work(self, seconds: float) -> LearnerReport:
        """Updates for about so many seconds; batches are fetched ahead and stay on their way between two calls."""
        torch.set_num_threads(self.cfg.resources.torch_threads)                     # counts for the thread that calls it
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if time.monotonic() - self.snapshot_at >= self.cfg.resources.snapshot_s:
                self.keep_snapshot()
            if time.monotonic() - self.exchanged_at >= self.cfg.planner.weights_every_s:
                self.exchange()
            batch = self.batches.next()
            if batch is not None:
                self.ranks.update(batch)
                self.updater.update(self.stream, batch)
        incidents, self.incidents = self.incidents + self.updater.take_incidents(), []
        return LearnerReport(self.stream, self.updater.count(self.stream), self.updater.take_metrics(), self.timer.snapshot(), incidents)

    def exchange(self) -> None:
        """Publish the own part; take over what the own updates ask of the other learner: the policy's imitation rule, or its objective
        (baselines/tdmpc2.py), asks world model and critics, targets that ask the policy (critic.target) the policy.
        """
        with self.timer("publish"):
            self.publish()
        if self.stream == "policy" or self.cfg.critic.target != "value":
            with self.timer("pull"):
                self.pull()
        self.exchanged_at = time.monotonic()

    def publish(self) -> int:
        """Send the part's weights to the store; returns their version, the count of updates."""
        while self.sent:
            self.get(self.sent.popleft())                                           # one exchange at a time is on its way
        version = self.updater.count(self.stream)
        self.sent.append(self.store.put.remote(self.stream, version, self.learner.agent.flat(self.stream)))
        if self.stream == "model":
            self.sent.append(self.store.put.remote("target_critic", version, flat_vector(self.learner.target_critic.state_dict().values())))
        return version

    def pull(self) -> None:
        newer, _ = self.get(self.store.newer.remote(self.versions, wait=False))
        self.versions |= {part: version for part, (version, _) in newer.items()}
        wanted = ("model", "target_critic") if self.stream == "policy" else ("policy",)
        parts = {part: vector for part, (_, vector) in newer.items() if part in wanted}
        if parts:
            self.ranks.load(parts)
            load_parts(self.learner, parts)

    def settle(self) -> int:
        """Publish, and wait until the store has it."""
        version = self.publish()
        while self.sent:
            self.get(self.sent.popleft())
        return version

    def weights(self) -> np.ndarray:
        return self.learner.agent.flat(self.stream)

    def acting(self) -> np.ndarray:
        """The policy as it acts now, with all that it needs for that (`Agent.acting_part`)."""
        part = self.learner.agent.acting_part
        if part is None:
            self.pull()                                                             # the newest of what the other learner trains
        return self.learner.agent.flat(part)

    def state(self) -> dict[str, np.ndarray]:
        """A copy, valid until the next one: nothing may still be written from it then."""
        self.copy = learner_state(self.learner, [self.stream], self.copy)
        return self.copy[self.stream] | {"shard_updates": np.array(self.batches.used)}

    def keep_snapshot(self) -> None:
        """Copy the state and write it beside the updates. One that cannot be written is said, and no reason to stop."""
        self.snapshot_at = time.monotonic()
        if self.live is None or not self.writing.done():
            return
        error = self.writing.exception()
        if error is not None:
            self.incidents.append(f"the {self.stream} learner's snapshot could not be written ({error}); should it die, it goes on from an older one")
        with self.timer("snapshot"):
            self.writing = self.writer.submit(write_snapshot, self.live, f"learner_{self.stream}", self.state())

    def save(self, folder: str) -> int:
        with self.timer("wait/snapshot"):
            wait([self.writing])                                                    # of the copy that is filled again now
        write_state(Path(folder), f"learner_{self.stream}", self.state())
        return self.updater.count(self.stream)

    def get(self, ref: ray.ObjectRef) -> Any:
        return ray.get(ref, timeout=self.cfg.resources.patience_s)
