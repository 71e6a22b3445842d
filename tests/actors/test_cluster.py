"""Joining a cluster: what is no address of one is said at once; a private Ray starts and cleans up. (What a cluster lacks: test_elastic.py.)"""

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
import ray

from modip_ray.config import ConfigError
from tests.fakes import small


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("address, words", [("127.0.0.1:{port}", "nothing answers at '127.0.0.1:"), ("ray://127.0.0.1:10001", "modip submit")])
def test_a_wrong_address_is_an_error_at_once(address, words):
    from modip_ray.actors.cluster import Cluster
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="resources.ray_address: .*" + words):
        Cluster(small(resources__ray_address=address.format(port=free_port())))
    assert time.monotonic() - begun < 10


def test_a_ray_that_starts_too_slowly_is_tried_once_more(monkeypatch, capsys):
    from modip_ray.actors import cluster
    from modip_ray.runfolder import RunError
    folders, failures = [], 1

    def slow(**settings):
        folders.append(Path(settings["_temp_dir"]))
        if len(folders) <= failures:
            raise Exception("The current node timed out during startup. This could happen because some of the raylet failed to startup")
    monkeypatch.setattr(cluster.ray, "init", slow)
    with cluster.private_ray({}):
        assert len(folders) == 2 and not folders[0].exists() and folders[1].is_dir() and "trying once more" in capsys.readouterr().err
    assert not folders[1].exists()
    folders.clear()
    failures = 2
    with pytest.raises(RunError, match="did not start within its own limit of 30 s, twice"), cluster.private_ray({}):
        pass
    assert len(folders) == 2 and not any(folder.exists() for folder in folders)


def test_folders_of_drivers_that_are_gone_are_removed_and_others_stay():
    from modip_ray.actors import cluster
    gone = subprocess.Popen(["true"])
    gone.wait()
    folders = [Path(f"/tmp/{cluster.PREFIX}{pid}_test") for pid in (gone.pid, os.getpid())]
    for folder in folders:
        folder.mkdir()
    cluster.remove_stale()
    assert [folder.exists() for folder in folders] == [False, True]
    folders[1].rmdir()


@pytest.mark.ray
def test_nothing_of_a_private_ray_listens_beyond_this_machine():
    import psutil

    from modip_ray.actors.cluster import Cluster
    cluster = Cluster(small(resources__placement={}))
    try:
        assert ray.get(ray.remote(lambda: 1).remote()) == 1
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        listening = {c.laddr.ip.removeprefix("::ffff:") for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    finally:
        cluster.close()
    assert len(processes) > 5 and listening == {"127.0.0.1"}
