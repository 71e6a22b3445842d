"""What a user sees of sizes and downloads."""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """Says on stderr how far a download is: one line that changes on a terminal, else a line every 10 %."""

    def __init__(self, name: str, every_s: float = 0.2):
        self.name, self.every_s, self.terminal = name, every_s, sys.stderr.isatty()
        self.shown, self.tenth = 0.0, -1

    def __call__(self, done: int, total: int | None) -> None:
        now, finished = time.monotonic(), done == total
        tenth = 10 * done // total if total else done // 100_000_000
        if not finished and (now - self.shown < self.every_s if self.terminal else tenth == self.tenth):
            return
        self.shown, self.tenth = now, tenth
        text = f"{self.name}: {size_text(done)}" + (f" of {size_text(total)} ({100 * done // total} %)" if total else "")
        if self.terminal:
            print(f"\r{text}\033[K", end="\n" if finished else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def size_text(size: int | None) -> str:
    if size is None:
        return "?"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
