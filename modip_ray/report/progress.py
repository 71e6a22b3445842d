"""One live line per phase: what runs, how far it is, how fast, how long still, and the last scores."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from modip_ray.report.scores import duration, final_table, number

__all__ = ["Progress", "final_table"]

TTY_INTERVAL_S = 0.2
PLAIN_INTERVAL_S = 10.0


class Progress:
    """Progress on `stream`: rewritten in place on a terminal (at most 5 times a second), else a line at most every 10 s.

    `window_s`: the rate is that of the last so many seconds, so that the time left follows a run that speeds up or slows down.
    """

    def __init__(self, stream: TextIO | None = None, window_s: float = 30.0, clock: Callable[[], float] = time.monotonic):
        self._stream = stream if stream is not None else sys.stderr
        self._tty = bool(getattr(self._stream, "isatty", lambda: False)())
        self._interval = TTY_INTERVAL_S if self._tty else PLAIN_INTERVAL_S
        self._window_s = window_s
        self._clock = clock
        self._phase: str | None = None
        self._scores: dict[str, float] = {}
        self._live = False  # a rewritable line is on the terminal

    def start(self, phase: str, total: int, unit: str, done: int = 0) -> None:
        """Open a phase of `total` units; `done` of them were made before (a resumed run) and do not count for the rate."""
        if self._phase is not None:
            self.finish()
        self._phase, self._total, self._unit = phase, int(total), unit
        self._first, self._done = int(done), int(done)
        self._extras: dict = {}
        self._started = self._clock()
        self._points: deque[tuple[float, int]] = deque([(self._started, self._done)])
        self._show()

    def update(self, done: int, **extras: float | str) -> None:
        """`done` units are made in all; extras are shown at the end of the line and stay until replaced or the phase ends."""
        if self._phase is None:
            raise RuntimeError("Progress.update before Progress.start: call start(phase, total, unit) first")
        now = self._clock()
        self._done = int(done)
        self._extras.update(extras)
        self._points.append((now, self._done))
        while len(self._points) > 2 and now - self._points[1][0] >= self._window_s:
            self._points.popleft()
        if len(self._points) > 2000:  # many tiny steps: a coarser window is as good
            self._points = deque(list(self._points)[::2])
        if now - self._shown >= self._interval:
            self._show()

    def scores(self, **scores: float) -> None:
        """Scores stay on the line through all later phases, e.g. scores(bc=4744.0)."""
        self._scores.update(scores)

    def say(self, text: str) -> None:
        """A lasting line of its own, above the live one."""
        self._clear()
        self._stream.write(text.rstrip("\n") + "\n")
        if self._phase is not None and self._tty:
            self._show()
        self._stream.flush()

    def finish(self, note: str = "") -> None:
        """Close the phase with a lasting line: what was done, how long it took, the mean rate."""
        if self._phase is None:
            return
        spent = self._clock() - self._started
        made = self._done - self._first
        rate = f" ({_rate(made / spent)} {self._unit}/s)" if spent > 0 and made > 0 else ""
        self._clear()
        parts = [f"{self._phase}: {self._done:,} {self._unit} in {duration(spent)}{rate}", self._shown_scores(), note]
        self._stream.write("  ".join(part for part in parts if part) + "\n")
        self._stream.flush()
        self._phase = None

    def rate(self) -> float | None:
        """Units a second over the window; None before anything was made."""
        (t0, d0), (t1, d1) = self._points[0], self._points[-1]
        return (d1 - d0) / (t1 - t0) if t1 > t0 and d1 > d0 else None

    def seconds_left(self) -> float | None:
        """Remaining units over the rate; None where unknown."""
        rate = self.rate()
        return max(0, self._total - self._done) / rate if rate else None

    def line(self) -> str:
        """The live line's text."""
        of_all = f"/{self._total:,}" if self._total > 0 else ""                      # 0: not known yet
        parts = [f"{self._phase}: {self._done:,}{of_all} {self._unit}"]
        if self._total > 0:
            parts.append(f"{100 * self._done // self._total}%")
        rate, left = self.rate(), self.seconds_left()
        if rate is not None and left is not None:
            parts += [f"{_rate(rate)}/s", f"{duration(left)} left"]
        parts += [f"{key} {_text(value)}" for key, value in self._extras.items()]
        parts.append(self._shown_scores())
        return "  ".join(part for part in parts if part)

    def _shown_scores(self) -> str:
        return "  ".join(f"{key} {_text(value)}" for key, value in self._scores.items())

    def _show(self) -> None:
        self._shown = self._clock()
        if self._tty:
            width = max(20, shutil.get_terminal_size().columns - 1)
            self._stream.write("\r" + self.line()[:width] + "\x1b[K")
            self._live = True
        else:
            self._stream.write(self.line() + "\n")
        self._stream.flush()

    def _clear(self) -> None:
        if self._live:
            self._stream.write("\r\x1b[K")
            self._live = False


def _rate(rate: float) -> str:
    return number(rate, 0 if rate >= 100 else 1 if rate >= 10 else 2)


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else number(float(value))
