"""The local cluster with its autoscaler: a node that is killed is replaced, and nothing is left behind."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil
import pytest

from cluster.local import WORKER_RESOURCES, ClusterError, LocalCluster, parser
from cluster.nodes import session_processes

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
HEAD, WORKER = {"CPU": 2.0, "trainer": 1.0}, WORKER_RESOURCES


def local(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "cluster/local.py", *args], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_autoscaled_kill_replace_down():
    """One cluster for all of it: up, token, a killed node, its replacement, down."""
    state = Path(tempfile.mkdtemp(prefix="mc", dir="/tmp"))                        # sockets need a short path
    cluster = LocalCluster(state)
    try:
        cluster.up(head=HEAD, worker=WORKER, autoscale=(1, 2))
        assert (state / "token").stat().st_mode & 0o777 == 0o600
        with pytest.raises(HTTPError, match="401"):
            urlopen(f"{cluster.facts()['address']}/api/jobs/", timeout=60)
        with pytest.raises(ClusterError, match="runs there already"):
            LocalCluster(state).up(head=HEAD)
        sessions = [node.session for node in cluster.nodes()]
        told = local("status", "--dir", str(state))
        assert told.returncode == 0 and "trainer 1" in told.stdout and "rollout 1" in told.stdout and told.stdout.count("joined") == 2

        (before,) = cluster.workers()
        processes = session_processes(before)
        assert any("raylet" in p.name() for p in processes)
        cluster.kill_node(before)
        psutil.wait_procs(processes, timeout=60)
        assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)
        cluster.wait("another node, by the autoscaler",
                     lambda: bool(cluster.workers()) and cluster.workers()[0].id in {n["raylet"]["nodeId"] for n in cluster.joined()})
        assert cluster.workers()[0].id != before.id
        sessions += [node.session for node in cluster.workers()]
    finally:
        cluster.down()
    assert not state.exists()
    deadline = time.monotonic() + 60                                               # a killed process takes a moment
    while left := [p for p in psutil.process_iter() if sid(p.pid) in sessions and status(p) != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    told = local("down", "--dir", str(state))
    assert told.returncode == 2 and told.stderr.startswith("cluster/local.py down: ") and "no cluster there" in told.stderr


def status(process: psutil.Process) -> str:
    try:
        return process.status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE


def sid(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.parametrize(("words", "told"), [(["--autoscale", "3:1"], "MIN:MAX"), (["--autoscale", "2"], "MIN:MAX"), (["--node-resources", "CPU=1"], "JSON"),
                                             (["--nodes", "2", "--autoscale", "1:2"], "not allowed with")])
def test_mistakes_on_the_command_line(words, told, capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["up", *words])
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_a_port_in_use_is_named(tmp_path):
    import socket

    from cluster.nodes import HOST
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        with pytest.raises(ClusterError, match="--dashboard-port"):
            LocalCluster(tmp_path / "s").up(head=HEAD, dashboard_port=taken.getsockname()[1])
