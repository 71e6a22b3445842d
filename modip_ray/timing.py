"""Where the time goes: a cheap timer whose names form a tree (`plan`, `plan/ddim`, `wait/replay`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Snapshot = dict[str, dict]  # {"seconds": {name: float}, "counts": {name: int}}

WAIT = "wait"


class _Span:
    """One timed block; a fresh object per block, so blocks may overlap between threads and coroutines. `name` may change before its end."""

    __slots__ = ("name", "start", "_timer")

    def __init__(self, timer: Timer, name: str):
        self._timer = timer
        self.name = name

    def __enter__(self) -> _Span:
        self.start = time.perf_counter()
        self._timer.open.add(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self._timer.open.discard(self)
        self._timer.add(self.name, time.perf_counter() - self.start)


class Timer:
    """Accumulates seconds and counts per name; about 1 us a block and safe between threads.

    Usage: `with timer("plan/ddim"): ...`. Waits are named `wait/<reason>`. A parent's own time includes its children's when both are timed.
    """

    def __init__(self) -> None:
        self._cells: dict[str, list] = {}  # name -> [seconds, count]
        self._lock = threading.Lock()
        self.open: set[_Span] = set()  # blocks that are going on; adding and taking away are atomic

    def __call__(self, name: str) -> _Span:
        return _Span(self, name)

    def add(self, name: str, seconds: float, count: int = 1) -> None:
        """Add time measured elsewhere. Raises ValueError for a name that is no path such as 'plan/ddim'."""
        with self._lock:
            cell = self._cells.get(name)
            if cell is None:
                if not name or any(not part for part in name.split("/")):
                    raise ValueError(f"timer name: got {name!r}, expected words joined by single slashes such as 'plan/ddim' or 'wait/replay'")
                cell = self._cells[name] = [0.0, 0]
            cell[0] += seconds
            cell[1] += count

    def snapshot(self) -> Snapshot:
        """Totals since the start: {"seconds": {name: s}, "counts": {name: n}}."""
        with self._lock:
            return {"seconds": {k: c[0] for k, c in self._cells.items()}, "counts": {k: c[1] for k, c in self._cells.items()}}

    def going_on(self) -> dict[str, float]:
        """Blocks that have begun and not ended: how long each has lasted by now, the longest of a name."""
        now, found = time.perf_counter(), {}
        for span in self.open.copy():
            found[span.name] = max(found.get(span.name, 0.0), now - span.start)
        return found

    def merge(self, snapshot: Mapping[str, Mapping]) -> None:
        """Add another timer's snapshot (of another worker of the same role, say) to this one."""
        for name, seconds in snapshot["seconds"].items():
            self.add(name, seconds, snapshot["counts"].get(name, 0))


def merge_snapshots(snapshots: Iterable[Mapping[str, Mapping]]) -> Snapshot:
    """Sum of several snapshots."""
    total = Timer()
    for snapshot in snapshots:
        total.merge(snapshot)
    return total.snapshot()


@dataclass
class Node:
    """One line of the timing tree; `seconds` is the node's own time, or the sum of its children where it was not timed itself."""

    name: str
    path: str
    seconds: float
    count: int
    children: list[Node] = field(default_factory=list)

    @property
    def is_wait(self) -> bool:
        return self.path == WAIT or self.path.startswith(WAIT + "/")


def build_tree(snapshot: Mapping[str, Mapping]) -> list[Node]:
    """Top-level nodes, each level sorted by time, longest first."""
    seconds, counts = snapshot["seconds"], snapshot["counts"]
    nodes: dict[str, Node] = {}
    roots: list[Node] = []
    paths = {"/".join(parts[:i]) for parts in (name.split("/") for name in seconds) for i in range(1, len(parts) + 1)}
    for path in sorted(paths):  # parents sort before their children
        parent, _, name = path.rpartition("/")
        nodes[path] = Node(name, path, float(seconds.get(path, 0.0)), int(counts.get(path, 0)))
        (nodes[parent].children if parent else roots).append(nodes[path])
    for path in sorted(paths, reverse=True):  # children before their parents
        node = nodes[path]
        node.children.sort(key=lambda child: -child.seconds)
        if path not in seconds:
            node.seconds = sum(child.seconds for child in node.children)
    return sorted(roots, key=lambda node: -node.seconds)


def walk(nodes: Iterable[Node], depth: int = 0) -> Iterable[tuple[int, Node]]:
    """(depth, node) in reading order."""
    for node in nodes:
        yield depth, node
        yield from walk(node.children, depth + 1)


def format_tree(snapshot: Mapping[str, Mapping], total: float) -> str:
    """The tree as text: share of `total` seconds, seconds, blocks and milliseconds a block; the rest is 'not timed'."""
    roots = build_tree(snapshot)
    lines = [f"{'':<34}{'share':>7}{'seconds':>11}{'blocks':>10}{'ms each':>10}"]
    for depth, node in walk(roots):
        label = "  " * depth + node.name
        each = f"{1e3 * node.seconds / node.count:.3f}" if node.count else ""
        share = f"{100 * node.seconds / total:.1f}%" if total > 0 else ""
        lines.append(f"{label:<34}{share:>7}{node.seconds:>11.2f}{node.count or '':>10}{each:>10}")
    rest = total - sum(node.seconds for node in roots)
    if rest > 0.005 * total:
        lines.append(f"{'not timed':<34}{100 * rest / total:>6.1f}%{rest:>11.2f}{'':>10}{'':>10}")
    return "\n".join(line.rstrip() for line in lines)
