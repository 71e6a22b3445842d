"""Data-parallel updates: several processes make the same updates, each on its own rows of every batch. torch.distributed, no Ray.

Every process is given the whole batch and draws all random numbers for it, so the result is that of one process, whatever their number, within float32's
rounding: sums are divided by the whole batch's weights, and gradients, loss and metrics travel in one all-reduce, after which all processes hold the same
numbers bit for bit. So they clip alike, and the guard judges alike, with nothing more said between them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from modip_ray.oneline import first_line

LOOPBACK = "127.0.0.1"


class ReplicaLost(RuntimeError):
    """Another of the processes is gone, or does not answer; this one cannot go on."""


class Place(NamedTuple):
    """Where a process computes."""

    address: str
    device: str                         # "cpu", or what tells this GPU from all others


class Meeting(NamedTuple):
    """Where the processes find each other, and how their gradients travel."""

    host: str
    port: int
    backend: str                        # gloo or nccl
    timeout_s: float


class Replicas:
    """Process `rank` of `size`; rank 0 publishes and saves."""

    def __init__(self, rank: int = 0, size: int = 1, lost: Callable[[str], NoReturn] | None = None):
        """lost: what to do, with one line that says why, where another process is gone (None: raise ReplicaLost)."""
        self.rank, self.size, self.lost = rank, size, lost

    def own(self, whole: Tensor) -> Tensor:
        """This process's rows of a batch: every size-th, so that each has its share of offline and of online rows."""
        return whole[self.rank::self.size] if self.size > 1 else whole

    def own_rows(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: self.own(v) for k, v in batch.items()}

    def share(self, total: Tensor) -> Tensor:
        """What a process divides its sum by, so that the mean over the processes is the whole sum divided by `total`."""
        return total / self.size

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """The mean over all processes, in place: one call, and the same numbers everywhere."""
        if self.size == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        try:
            dist.all_reduce(flat)
        except RuntimeError as error:
            reason = f"process {self.rank} of {self.size} lost the others: {first_line(error)}"
            if self.lost is not None:
                self.lost(reason)
            raise ReplicaLost(reason) from error
        parts = (flat / self.size).split([t.numel() for t in tensors])
        torch._foreach_copy_(list(tensors), [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])


ALONE = Replicas()


def meeting(places: Sequence[Place], timeout_s: float) -> tuple[Meeting, dist.TCPStore]:
    """Rank 0 opens it; it lasts as long as the store is kept. places: of all processes, rank 0's first.

    On one machine nothing listens beyond it. Gradients go by NCCL where each process has a GPU of its own, else by gloo.
    """
    host = LOOPBACK if len({place.address for place in places}) == 1 else places[0].address
    own_gpus = "cpu" not in {place.device for place in places} and len(set(places)) == len(places)
    listening = socket.create_server((host, 0))
    port = listening.getsockname()[1]
    store = dist.TCPStore(host, port, len(places), True, timedelta(seconds=timeout_s), wait_for_workers=False, master_listen_fd=listening.detach())
    return Meeting(host, port, "nccl" if own_gpus else "gloo", timeout_s), store


def join(where: Meeting, rank: int, size: int, store: dist.TCPStore | None = None, lost: Callable[[str], NoReturn] | None = None) -> Replicas:
    """Take part, once a process; returns when all are there. store: rank 0's own."""
    patience = timedelta(seconds=where.timeout_s)
    if where.host == LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = store or dist.TCPStore(where.host, where.port, size, False, patience, wait_for_workers=False)
    dist.init_process_group(where.backend, store=store, rank=rank, world_size=size, timeout=patience)
    return Replicas(rank, size, lost)


def place_of(address: str, device: torch.device) -> Place:
    if device.type == "cpu":
        return Place(address, "cpu")
    return Place(address, str(torch.cuda.get_device_properties(device).uuid))
