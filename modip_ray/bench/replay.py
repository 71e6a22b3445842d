"""The replay against plain copies: a batch out of a memory larger than the caches, and a whole replay that comes back from the disk."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from modip_ray.bench.rows import ACTION_DIM, OBS_DIM, Row, Setting, compared
from modip_ray.config import Config
from modip_ray.learning.checkpoint import begin, commit, newest, write_state
from modip_ray.learning.replay import ReplayBuffer
from modip_ray.learning.replay_server import ReplayServer, restored_replay
from modip_ray.learning.segment import Segment
from modip_ray.session import rss_mb
from modip_ray.tasks.episode import Episode

RING_BYTES = 200e6                  # more than the last-level cache
BATCH = 256
STORED, IN_JOURNAL = 1_000_000, 50_000


def segments(cfg: Config, number: int, length: int, plans: bool) -> Iterator[Segment]:
    rng = np.random.default_rng(0)
    plan = rng.uniform(-1, 1, (length, cfg.planner.horizon, ACTION_DIM)).astype(np.float32) if plans else None
    for i in range(number):
        yield Segment(rng.standard_normal((length + 1, OBS_DIM), dtype=np.float32), np.zeros((length, ACTION_DIM), np.float32), np.ones(length, np.float32),
                      False, plan, None if plan is None else np.ones(length, np.float32), f"0/bench/{i}")


def gather(s: Setting) -> list[Row]:
    """Bytes of a batch of sequences a second out of a large ring, against one copy of as many bytes that lie together at a random place of it, and
    against numpy copying the very rows that a batch is made of, where they lie."""
    horizon, n_step, rng = s.cfg.world_model.horizon, s.cfg.critic.n_step, np.random.default_rng(0)
    width = ReplayBuffer(1, OBS_DIM, ACTION_DIM, s.cfg.critic.gamma).steps.nbytes
    ring = ReplayBuffer(int(RING_BYTES) // width, OBS_DIM, ACTION_DIM, s.cfg.critic.gamma)
    for segment in segments(s.cfg, ring.capacity // 1000 + 1, 1000, plans=False):
        ring.add(segment)
    n = sum(v.nbytes for v in ring.sequences(ring.draw(rng, BATCH), horizon, n_step).values()) // 4
    flat, out = ring.steps.reshape(-1), np.empty(n, np.float32)
    offsets = np.concatenate([np.arange(horizon + 1), n_step + np.arange(horizon + 1)])
    rows = np.empty((BATCH * len(offsets), ring.steps.shape[1]), np.float32)

    def copy_cold() -> None:
        start = int(rng.integers(0, len(flat) - n))
        np.copyto(out, flat[start:start + n])

    def copy_scattered() -> None:
        ring.steps.take((ring.draw(rng, BATCH)[:, None] + offsets).ravel(), 0, rows, "clip")
    ours, copied, scattered = s.medians(lambda: ring.sequences(ring.draw(rng, BATCH), horizon, n_step), copy_cold, copy_scattered)
    size = f"{BATCH} x {horizon + 1}, a ring of 200 MB"
    return [compared("replay.sample_vs_memcpy", 4e-6 * n / ours, "MB/s", 4e-6 * n / copied, f"one cold copy of as many bytes, lying together; {size}"),
            compared("replay.sample_vs_scattered_copy", 1e6 * ours, "us", 1e6 * scattered, f"numpy's take of the rows that a batch is made of; {size}")]


def resume(s: Setting) -> list[Row]:
    """A replay of 10^6 transitions with plans, written as checkpoint and journal, and read again: seconds, and the memory that the process grew by."""
    cfg = s.cfg.replace({"replay.capacity": STORED, "replay.shards": 1, "online.env_steps": STORED})
    offline = [Episode(np.zeros((2, OBS_DIM), np.float32), np.zeros((1, ACTION_DIM), np.float32), np.zeros(1, np.float32), False)]
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        write(cfg, restored_replay(cfg, offline, None, run), run)
        before, begun = rss_mb(), time.perf_counter()
        server = restored_replay(cfg, offline, newest(run / "checkpoints"), run)
        seconds, grown = time.perf_counter() - begun, rss_mb() - before
        if server.replay.online.size != STORED:
            raise RuntimeError(f"{server.replay.online.size} transitions came back of {STORED}")
        server.journal.close()
        files, begun = sum(p.stat().st_size for p in run.rglob("*") if p.is_file()), time.perf_counter()
        for path in run.rglob("*"):
            if path.is_file():
                path.read_bytes()
        reading = time.perf_counter() - begun
    raw = STORED * 4 * (OBS_DIM + ACTION_DIM + 2 + cfg.planner.horizon * ACTION_DIM) / 2**20             # each number once
    return [compared("replay.resume_1e6", seconds, "s", reading, f"reading its {files / 2**20:.0f} MiB of files"),
            compared("replay.memory_vs_raw", grown, "MiB", raw, "observations, actions, rewards, gains and plans alone")]


def write(cfg: Config, server: ReplayServer, run: Path) -> None:
    """A checkpoint of all but the last transitions, which are in the journal alone."""
    for i, segment in enumerate(segments(cfg, STORED // 1000, 1000, plans=True)):
        if i == (STORED - IN_JOURNAL) // 1000:
            folder = begin(run / "checkpoints")
            for stream in ("model", "policy"):
                write_state(folder, f"learner_{stream}", {"updates": np.array(0)})
            commit(folder, {"env_steps": server.save(folder), "updates": 0}, 2)
        server.add([segment])
    server.journal.close()
