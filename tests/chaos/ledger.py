"""Was anything lost? What the workers heard that the replay has (RUN/audit) against what the replay wrote before it answered (RUN/journal)."""

from __future__ import annotations

import mmap
import os
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from modip_ray.learning.journal import records
from modip_ray.learning.replay_server import RETIRED, SEGMENT
from modip_ray.learning.segment import decode
from tests.chaos.harness import POLL_S, Trial


class Audit(NamedTuple):
    acknowledged: int               # segments that some worker was told are stored
    journalled: int                 # segments in the journal
    transitions: int                # of those
    lost: list[str]                 # ids that were acknowledged and are not in the journal
    twice: list[str]                # ids that are there more than once
    late: list[str]                 # ids of worker incarnations that had been given up when they were stored
    retired: int                    # incarnations that were given up
    damage: list[str]               # stretches of the journal that hold no record, in words


class Ledger:
    """Keeps a hard link to every part of a run's journals, so that those which a checkpoint makes superfluous are counted too."""

    def __init__(self, run: Path):
        self.run, self.kept = run, run.with_name(run.name + ".ledger")
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.keep, daemon=True)

    def __enter__(self) -> Ledger:
        self.kept.mkdir(parents=True, exist_ok=True)
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        self.thread.join()

    def keep(self) -> None:
        while not self.over.wait(POLL_S):
            self.link()

    def link(self) -> None:
        for part in (self.run / "journal").glob("*/part_*"):
            with suppress(FileExistsError, FileNotFoundError):          # linked already; or superfluous and gone this very moment, as it was linked before
                os.link(part, self.kept / f"{part.parent.name}.{part.name}")

    def audit(self) -> Audit:
        """Of now; exact once nothing of the run is alive."""
        self.link()
        acknowledged = {name for path in (self.run / "audit").glob("*") for name in path.read_text().splitlines()}
        found: Counter[str] = Counter()
        transitions, late, damage = 0, [], []
        retired: dict[str, set[str]] = {}                               # by shard
        for path in sorted(self.kept.iterdir()):
            shard, _, _ = path.name.partition(".")
            given_up = retired.setdefault(shard, set())
            if not path.stat().st_size:
                continue
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                for kind, payload in records(data, damage):
                    if kind == RETIRED:
                        given_up.add(payload.decode())
                    elif kind == SEGMENT:
                        segment = decode(payload)
                        if segment.incarnation in given_up:
                            late.append(segment.id)
                        found[segment.id] += 1
                        transitions += len(segment)
        return Audit(len(acknowledged), len(found), transitions, sorted(acknowledged - found.keys()), [name for name, n in found.items() if n > 1],
                     late, len(set().union(*retired.values())), damage)

    def check(self, trial: Trial) -> Audit:
        """The audit into the trial's figures, with the demands that hold in every test."""
        found = self.audit()
        trial.figures |= {"acknowledged": found.acknowledged, "journalled": found.journalled, "lost": len(found.lost), "twice": len(found.twice)}
        trial.demand(found.acknowledged > 0, "no segment was acknowledged")
        trial.demand(not found.lost, f"{len(found.lost)} acknowledged segments lost, e.g. {found.lost[:3]}")
        trial.demand(not found.twice, f"{len(found.twice)} segments stored twice, e.g. {found.twice[:3]}")
        trial.demand(not found.late, f"{len(found.late)} segments of workers that had been given up were stored, e.g. {found.late[:3]}")
        trial.demand(not found.damage, f"journal damaged: {found.damage[:2]}")
        return found
