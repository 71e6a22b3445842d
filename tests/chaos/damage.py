"""Damaged checkpoint files: each flip, cut or deletion is noticed, and the run goes on from the checkpoint before.

    python -m tests.chaos.damage 100 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from modip_ray.config import Config
from modip_ray.learning.checkpoint import CheckpointError, folders, newest, verified
from modip_ray.learning.collector import SegmentHook
from modip_ray.run import train
from modip_ray.session import Stopped
from tests.fakes import small, write_data

RESUME_EVERY = 20                   # every so many damages the run itself goes on with what is left


def check_damage(n: int, seed: int) -> dict[str, Any]:
    """Figures: damages by kind, how many were noticed and named, and how often the other checkpoint was used; `findings` has those that were not."""
    rng, kinds, findings, resumed = random.Random(seed), Counter(), [], 0
    detected = other_used = 0
    with tempfile.TemporaryDirectory(prefix="damage_") as scratch, contextlib.redirect_stdout(io.StringIO()):
        sound, run = Path(scratch) / "sound", Path(scratch) / "run"
        cfg = small(run, write_data(Path(scratch) / "data.hdf5", 300), serial=True, pretrain__updates=20, pretrain__policy_updates=20, eval__every_steps=0,
                    online__env_steps=10**6, log__checkpoint_every_s=0.01)
        stop_after(cfg, 12)
        shutil.copytree(run, sound)
        for i in range(n):
            shutil.rmtree(run)
            shutil.copytree(sound, run)
            last, before = folders(run / "checkpoints")
            path = rng.choice(sorted(p for folder in (last, before) for p in folder.iterdir()))
            kind = damage(rng, path)
            kinds[kind] += 1
            told = io.StringIO()
            with contextlib.redirect_stderr(told):
                used = newest(run / "checkpoints")
            noticed, expected = refused(path.parent), before if path.parent == last else last
            named = path.parent == before or last.name in told.getvalue()
            detected += noticed and named
            other_used += used.path == expected
            if not (noticed and named and used.path == expected):
                findings.append({"number": i, "kind": kind, "file": f"{path.parent.name}/{path.name}", "used": used.path.name})
            elif i % RESUME_EVERY == 0:
                with contextlib.redirect_stderr(told):
                    stop_after(cfg, 1)
                resumed += newest(run / "checkpoints").counters["updates"] >= used.counters["updates"]
    return {"damages": n, "seed": seed, "detected": detected, "other_checkpoint_used": other_used, "resumed": resumed,
            "resumes_tried": len(range(0, n, RESUME_EVERY)), "kinds": dict(kinds), "findings": findings}


def stop_after(cfg: Config, segments: int) -> None:
    """Train, or go on, until so many segments are made, and stop in order: with a checkpoint."""
    with contextlib.suppress(Stopped):
        train(cfg, segment_hook=counting(segments))


def counting(segments: int) -> SegmentHook:
    made = 0

    def hook(segment: Any) -> Any:
        nonlocal made
        made += 1
        if made >= segments:
            raise Stopped
        return segment
    return hook


def damage(rng: random.Random, path: Path) -> str:
    """Flip one byte, cut the file, or delete it; which of them it was."""
    kind, size = rng.choice(["flip", "flip", "flip", "cut", "deleted"]), path.stat().st_size
    if kind == "deleted":
        path.unlink()
        return kind
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[rng.randrange(size)] ^= rng.randrange(1, 256)
    else:
        del data[rng.randrange(size):]
    path.unlink()                                                                   # other folders may have the same file by a link
    path.write_bytes(data)
    return kind


def refused(folder: Path) -> bool:
    try:
        verified(folder)
    except CheckpointError:
        return True
    return False


if __name__ == "__main__":
    top = argparse.ArgumentParser(description=__doc__)
    top.add_argument("n", type=int, nargs="?", default=100)
    top.add_argument("--seed", type=int, default=0)
    print(json.dumps(check_damage(**vars(top.parse_args())), indent=1))
