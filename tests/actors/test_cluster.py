"""Joining a cluster: what is no address of one is said at once. (What a cluster lacks: test_elastic.py.)"""

import socket
import time

import pytest

from modip_ray.config import ConfigError
from tests.fakes import small

pytest.importorskip("ray")


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
