"""A run's numbers as Ray metrics: whatever scrapes Ray's Prometheus endpoints sees them, as ray_modip_* with the run and its task as labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ray.util.metrics import Counter, Gauge

from modip_ray.report.names import COUNTERS, DIAGNOSTICS, SCORE, SYSTEM, TRAIN, Measure
from modip_ray.report.sinks import is_number

MEANINGS = {**TRAIN, **SYSTEM, **{f"diagnostics/{k}": m for k, m in DIAGNOSTICS.items()}, **{f"score/{k}": m for k, m in SCORE.items()}, **COUNTERS,
            "loss": Measure("", "training loss, by name"), "role/processes": Measure("", "processes of a role"),
            "role/seconds": Measure("s", "time of a role's processes together, by what it went into; wait/... is time with nothing to do")}


@dataclass(frozen=True)
class Sample:
    """A number of a row: `key` as in MEANINGS, labels beside run and task, and whether it only ever grows."""

    key: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)
    cumulative: bool = False

    @property
    def metric(self) -> str:
        """Name for Ray, which puts ray_ before it, and _total behind a Counter's."""
        return "modip_" + re.sub(r"[^a-zA-Z0-9_]", "_", self.key)


def samples(row: Mapping) -> Iterator[Sample]:
    """What of a row goes to Ray. Labels are losses, modes, roles and spans: sets that the code fixes, not the run's length."""
    kind, numbers = row.get("kind"), {k: float(v) for k, v in row.items() if is_number(v)}
    if kind in ("train", "system"):
        for key, value in numbers.items():
            if key in COUNTERS:
                yield Sample(key, value, cumulative=True)
            elif key.startswith("loss/"):
                yield Sample("loss", value, {"name": key.removeprefix("loss/")})
            elif key != "wall_s":
                yield Sample(key, value)
    elif kind == "eval":
        low, high = row.get("ci95") or (None, None)
        for key, value in {**row, "ci95_low": low, "ci95_high": high}.items():
            if key in SCORE and is_number(value):
                yield Sample(f"score/{key}", float(value), {"mode": str(row["mode"])})
    elif kind == "diagnostics":
        yield from (Sample(f"diagnostics/{k}", v) for k, v in numbers.items() if k not in COUNTERS and k != "wall_s")
    elif kind == "timing":
        yield Sample("role/processes", float(row.get("workers") or 1), {"role": str(row["role"])})
        spans = row["seconds"]
        for name, seconds in spans.items():
            if not any(name.startswith(f"{other}/") for other in spans):            # those are within another's time
                yield Sample("role/seconds", float(seconds), {"role": str(row["role"]), "name": name}, cumulative=True)


class RaySink:
    """Sets gauges and adds to counters, row by row.

    Ray forgets a gauge that is not set again within two of its report intervals (20 s), so every row sets all that are known again: about 2 us each.
    Where Ray runs without metrics (enable_metrics_collection=false) or does not run at all, the numbers go nowhere and nothing is said.
    """

    def __init__(self, run: str, task: str):
        self.tags = {"run": run, "task": task}
        self.metrics: dict[str, Gauge | Counter] = {}
        self.gauges: dict[tuple[str, tuple], float] = {}
        self.counted: dict[tuple[str, tuple], float] = {}

    def write(self, row: Mapping) -> None:
        for sample in samples(row):
            series = (sample.metric, tuple(sorted(sample.labels.items())))
            if series[0] not in self.metrics:
                about = MEANINGS.get(sample.key, Measure("", sample.key))
                kind = Counter if sample.cumulative else Gauge
                text = about.meaning + (f" [{about.unit}]" if about.unit else "")
                self.metrics[series[0]] = kind(series[0], text, (*self.tags, *sample.labels)).set_default_tags(self.tags)
            if sample.cumulative:
                self.count(series, sample.value)
            else:
                self.gauges[series] = sample.value
        for (name, labels), value in self.gauges.items():
            self.metrics[name].set(value, dict(labels))

    def count(self, series: tuple[str, tuple], total: float) -> None:
        """Add what is new; a total that fell began anew (a restarted actor's times)."""
        before = self.counted.get(series, 0.0)
        new = total - before if total >= before else total
        self.counted[series] = total
        if new > 0:
            self.metrics[series[0]].inc(new, dict(series[1]))

    def flush(self) -> None:
        """Ray sends by itself."""

    def close(self) -> None:
        """The gauges end when Ray forgets them; counters stay with the node."""


# ---- documentation ---------------------------------------------------------------------------------------------------------------------------

TABLES = (
    ("`train` and `system` rows, counted", "", COUNTERS, lambda key: Sample(key, 0.0, cumulative=True)),
    ("`train` rows: means since the row before", "", TRAIN, lambda key: next(samples({"kind": "train", key: 0.0}))),
    ("`system` rows: numbers of now", "system/", SYSTEM, lambda key: Sample(key, 0.0)),
    ("`eval` rows", "eval/MODE/", SCORE, lambda key: Sample(f"score/{key}", 0.0, {"mode": "MODE"})),
    ("`diagnostics` rows: how good world model and planner are", "diagnostics/", DIAGNOSTICS, lambda key: Sample(f"diagnostics/{key}", 0.0)),
)
AXES = {"env_steps": "axis of online rows", "updates": "axis of pretrain rows"}


def markdown() -> str:
    """The tables of docs/observe.md: python -m modip_ray.actors.metrics"""
    lines = []
    for title, prefix, measures, sample in TABLES:
        lines += [f"**{title}**", "", "| in metrics.jsonl | TensorBoard, wandb | Ray, Prometheus | unit | |", "|---|---|---|---|---|"]
        for key, about in measures.items():
            s = sample(key)
            labels = "{" + ", ".join(f'{k}="{v}"' for k, v in s.labels.items()) + "}" if s.labels else ""
            tag = f"`{prefix}{key}`" if measures is not COUNTERS else AXES.get(key, "")
            lines.append(f"| `{key}` | {tag} | `ray_{s.metric}{'_total' if s.cumulative else ''}{labels}` | {about.unit} | {about.meaning} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
