"""The numbers of a run at Ray's Prometheus endpoint: a whole small run beside which the endpoint is read, and what the dashboard and the docs say of it."""

import importlib.util
import json
import re
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import ray

from modip_ray.actors.cluster import Cluster
from modip_ray.actors.metrics import MEANINGS, RaySink, Sample, markdown, samples
from modip_ray.report.metrics import read_metrics
from modip_ray.run import train
from tests.fakes import PointEnv, small, write_data
from tests.private_ray import private_ray

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"ray_(modip_\w+)\{(.*)\} (\S+)")
Page = dict[tuple[str, frozenset], float]


def scrape() -> Page:
    """What the node's endpoint says of modip: value by name and our labels."""
    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found: Page = {}
    for line in text.splitlines():
        if match := LINE.fullmatch(line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            ours = frozenset((k, labels[k]) for k in ("run", "task", "mode", "role", "name") if k in labels)
            found[match[1], ours] = float(match[3])
    return found


class Scraper(threading.Thread):
    """Reads the endpoint again and again, as Prometheus would; `seen` keeps the last value of each series."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen: Page = {}
        self.scrapes, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.7):
            try:
                self.seen |= scrape()
                self.scrapes += 1
            except OSError:                                                         # the agent is still starting
                continue


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run in a private Ray that reports every second, its rows, and what a scraper saw meanwhile. One evaluator: a second would start for nothing."""
    folder = tmp_path_factory.mktemp("metrics") / "watched"
    with private_ray(variables={"RAY_metrics_report_interval_ms": "1000"}), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cluster, "cpus", lambda self: 1)
        scraper = Scraper()
        scraper.start()
        try:
            cfg = small(folder, write_data(folder.parent / "data.hdf5"), online__env_steps=900, eval__every_steps=300, log__checkpoint_every_s=1.0)
            train(cfg, PointEnv)
        finally:
            scraper.over.set()
            scraper.join(15)
    return read_metrics(folder), scraper


def series(rows: list[dict]) -> set[tuple[str, frozenset]]:
    """Names and labels of all samples of the rows, as the endpoint shows them (counters appear once they are above 0)."""
    ours = (("run", "watched"), ("task", "point"))
    return {(s.metric + ("_total" if s.cumulative else ""), frozenset([*s.labels.items(), *ours])) for row in rows for s in samples(row)
            if not s.cumulative or s.value > 0}


@pytest.mark.ray
def test_the_endpoint_shows_every_number_of_the_run(watched):
    rows, scraper = watched
    assert scraper.scrapes > 3
    asked = max(i for i, row in enumerate(rows) if row["kind"] == "eval" and row["env_steps"] < 900)
    expected = series(rows[:asked])                                                 # later rows may come too near the end to be read
    missing = expected - scraper.seen.keys()
    assert not missing and len(expected) > 40, sorted(map(str, missing))
    assert {dict(labels)["mode"] for name, labels in scraper.seen if name == "modip_score_mean"} >= {"policy", "mpc"}
    ours = frozenset({("run", "watched"), ("task", "point")})
    for shown, metric in (("modip_env_steps_total", "modip_env_steps"), ("modip_rollout_workers", "modip_rollout_workers")):
        assert scraper.seen[shown, ours] in {s.value for row in rows for s in samples(row) if s.metric == metric and s.value > 0}


@pytest.mark.ray
def test_every_number_of_a_run_has_a_meaning(watched):
    rows, _ = watched
    unknown = {s.key for row in rows for s in samples(row)} - MEANINGS.keys()
    assert not unknown, f"add to modip_ray/report/names.py, and make docs/observe.md's table anew: {sorted(unknown)}"


@pytest.mark.ray
def test_every_query_of_the_dashboard_finds_its_numbers(watched):
    rows, _ = watched
    exported = {name: set().union(*(dict(labels) for n, labels in series(rows) if n == name)) for name, _ in series(rows)}
    dashboard = json.loads((ROOT / "cluster/grafana/modip.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    for query in queries:
        names = re.findall(r"ray_(modip_\w+)", query)
        assert names and set(names) <= exported.keys(), query
        used = set(re.findall(r"(\w+)(?:=~|!~|=)\"", query)) | {k.strip() for group in re.findall(r"(?:by|on) \(([^)]*)\)", query) for k in group.split(",")}
        assert used <= set().union(*(exported[name] for name in names)), query


def test_the_dashboard_is_what_grafana_loads():
    spec = importlib.util.spec_from_file_location("dashboard", ROOT / "cluster/grafana/dashboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.FILE.read_text() == module.text(), "run python cluster/grafana/dashboard.py"
    d = json.loads(module.text())
    assert re.fullmatch(r"[\w-]{1,40}", d["uid"]) and d["title"] and d["schemaVersion"] >= 36 and "id" not in d
    assert len({p["id"] for p in d["panels"]}) == len(d["panels"]) == len({p["title"] for p in d["panels"]})
    taken = [(x, y) for p in d["panels"] for g in [p["gridPos"]] for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])]
    assert len(set(taken)) == len(taken) and all(0 <= x < 24 and y >= 0 for x, y in taken)
    variables = {v["name"] for v in d["templating"]["list"]}
    assert variables == {"datasource", "run", "window"}
    for p in d["panels"]:
        assert p["type"] in ("stat", "timeseries") and p["fieldConfig"]["defaults"]["unit"] and p["datasource"] == module.SOURCE
        assert len({t["refId"] for t in p["targets"]}) == len(p["targets"]) > 0
        for t in p["targets"]:
            assert all(t["expr"].count(a) == t["expr"].count(b) for a, b in ("()", "{}", "[]")) and t["expr"].count('"') % 2 == 0 and t["legendFormat"]
            assert set(re.findall(r"\$(\w+)", t["expr"])) <= variables and 'run=~"$run"' in t["expr"]


def test_the_tables_of_the_docs_are_those_of_the_code():
    text = (ROOT / "docs/observe.md").read_text()
    assert text.partition("<!-- names:begin -->\n")[2].partition("<!-- names:end -->")[0] == markdown(), "python -m modip_ray.actors.metrics"


def test_samples_of_each_kind_of_row():
    def of(**row):
        return {(s.metric, *s.labels.values()): (s.value, s.cumulative) for s in samples(row)}
    train_row = of(kind="train", phase="online", env_steps=5, updates=2, policy_updates=3, wall_s=9.0, note=None, **{"loss/value": 0.5, "distill/share": 1})
    assert train_row == {("modip_env_steps",): (5.0, True), ("modip_updates",): (2.0, True), ("modip_policy_updates",): (3.0, True),
                         ("modip_loss", "value"): (0.5, False), ("modip_distill_share",): (1.0, False)}
    assert of(kind="eval", mode="mpc", env_steps=4, updates=1, mean=3.0, ci95=[2.0, 4.0], normalized=None, returns=[3.0], episodes=1) == {
        ("modip_score_mean", "mpc"): (3.0, False), ("modip_score_ci95_low", "mpc"): (2.0, False), ("modip_score_ci95_high", "mpc"): (4.0, False)}
    assert of(kind="eval", mode="mpc", mean=3.0, ci95=None) == {("modip_score_mean", "mpc"): (3.0, False)}
    timing = of(kind="timing", role="planner", workers=2, seconds={"plan": 3.0, "plan/mppi": 2.0, "wait/x": 1.0}, counts={}, wall_s=8.0)
    assert timing == {("modip_role_processes", "planner"): (2.0, False), ("modip_role_seconds", "planner", "plan"): (3.0, True),
                      ("modip_role_seconds", "planner", "wait/x"): (1.0, True)}
    assert of(kind="incident", text="x") == of(kind="data", mean=1.0) == of(kind="phase", phase="online", env_steps=3) == {}
    assert re.fullmatch(r"[a-z_][a-z0-9_]*", Sample("a-b/c.d", 1.0).metric), "a name that Prometheus takes, whatever the key"


class Recorded:
    """In a metric's place: what was set or added."""

    def __init__(self):
        self.calls = []

    def set(self, value, tags):
        self.calls.append(value)

    inc = set


def test_gauges_are_set_again_at_every_row_and_counters_get_what_is_new():
    sink = RaySink("r", "t")
    sink.write({"kind": "system", "env_steps": 10, "rollout/workers": 2})
    for name in ("modip_env_steps", "modip_rollout_workers"):
        sink.metrics[name] = Recorded()
    sink.write({"kind": "system", "env_steps": 14})
    sink.write({"kind": "incident", "text": "x"})
    sink.write({"kind": "system", "env_steps": 3, "rollout/workers": 1})            # began anew
    assert sink.metrics["modip_env_steps"].calls == [4, 3]
    assert sink.metrics["modip_rollout_workers"].calls == [2, 2, 1]


@pytest.mark.ray
def test_without_metrics_or_without_ray_nothing_happens_and_nothing_is_said():
    code = """
import ray
from modip_ray.actors.metrics import RaySink
row = {"kind": "system", "env_steps": 1, "rollout/workers": 2}
RaySink("r", "t").write(row)                                                        # no Ray at all
ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", _system_config={"enable_metrics_collection": False})
RaySink("r", "t").write(row)
ray.shutdown()
RaySink("r", "t").write(row)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stdout + done.stderr
