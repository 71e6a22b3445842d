"""What the pulses of all processes say together: memory, references, time spent waiting; and who waits for whom when nothing goes on. No Ray calls."""

from __future__ import annotations

from collections.abc import Mapping

from modip_ray.actors.pulse import Pulse
from modip_ray.timing import WAIT

STUCK_S = 60.0                      # without an environment step or update: say who waits for whom
AGAIN_S = 300.0                     # and again
LONG_S = 5.0                        # work that lasts longer is worth a word
Processes = Mapping[str, Mapping[str, Pulse]]       # role -> name of the process -> its pulse


class Watchdog:
    """Told how long nothing has gone on, says why: once after STUCK_S, then every AGAIN_S."""

    def __init__(self) -> None:
        self.still_s, self.due_s = 0.0, STUCK_S
        self.waited: dict[str, dict[str, float]] = {}                               # by incarnation, at the last progress

    def progressed(self, processes: Processes) -> None:
        self.__init__()
        self.waited = {pulse.incarnation: pulse.waits for role in processes.values() for pulse in role.values()}

    def look(self, elapsed_s: float, processes: Processes, away: Mapping[str, str]) -> str | None:
        """away: what happened to those that do not serve now, by name."""
        self.still_s += elapsed_s
        if self.still_s < self.due_s:
            return None
        self.due_s += AGAIN_S
        lines = [f"{name} {why}" for name, why in away.items()]
        for role in processes.values():
            lines += [line for name, pulse in role.items() if name not in away and (line := self.line(name, pulse))]
        return f"no environment step and no update for {self.still_s:.0f} s: {'; '.join(lines) or 'all processes answer, and none says that it waits'}"

    def line(self, name: str, pulse: Pulse) -> str:
        """What a process has mostly waited for in that time, or what it is busy with; "" for neither."""
        before = self.waited.get(pulse.incarnation, {})
        seconds, reason = max(((s - before.get(reason, 0.0), reason) for reason, s in pulse.waits.items()), default=(0.0, ""))
        if seconds >= self.still_s / 2:
            return f"{name} waits for {reason}, {seconds:.0f} s by now"
        seconds, what = max(((s, what) for what, s in pulse.doing.items() if not what.startswith(f"{WAIT}/")), default=(0.0, ""))
        return f"{name} is busy with {what} since {seconds:.0f} s" if seconds >= LONG_S else ""


class Usage:
    """Gauges of the processes, by role: memory, references, and shares of the time since the last call that they waited, by reason."""

    def __init__(self) -> None:
        self.before: dict[str, dict[str, float]] = {}                               # waits by incarnation
        self.at = 0.0

    def gauges(self, processes: Processes, now: float) -> dict[str, float]:
        found: dict[str, float] = {}
        elapsed, self.at = now - self.at, now
        for role, pulses in processes.items():
            found |= {f"{role}/rss_mb": sum(p.rss_mb for p in pulses.values()), f"{role}/refs": float(sum(p.refs for p in pulses.values()))}
            for pulse in pulses.values():
                known = self.before.get(pulse.incarnation)
                for reason, seconds in pulse.waits.items() if known is not None else ():
                    share = max(0.0, seconds - known.get(reason, 0.0)) / elapsed / len(pulses)
                    found[f"wait/{role}/{reason}"] = found.get(f"wait/{role}/{reason}", 0.0) + share
        self.before = {p.incarnation: p.waits for pulses in processes.values() for p in pulses.values()}
        return found
