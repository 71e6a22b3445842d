"""Ray nodes of this machine as processes that can be counted, stopped and hard-killed one by one, and the autoscaler's view of them.

A node is one `ray start --block` in a session of its own: all that it starts (raylet, agents, workers) stays in that session, so a node's processes
are known exactly, and nothing else on the machine is ever touched (`ray stop` kills by name). Each node has a small JSON file in the state folder,
which the command line, the tests and the autoscaler's provider share; a node whose `ray start` is gone is gone.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import psutil
from ray.autoscaler import tags
from ray.autoscaler.node_provider import NodeProvider

HEAD_TYPE = "head"
HOST = "127.0.0.2"                          # loopback as well; Ray would turn 127.0.0.1 into the address of the network card
STORE_BYTES = 300_000_000
GRACE_S = 15.0


@dataclass(frozen=True)
class Node:
    """`session`: id of the first process and of its session; `created`: when that process began (ids are used again by the system)."""

    id: str
    kind: str
    session: int
    created: float
    resources: dict[str, float]

    def alive(self) -> bool:
        try:
            process = psutil.Process(self.session)
            return abs(process.create_time() - self.created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def start_node(state: Path, kind: str, resources: Mapping[str, float], arguments: list[str], node_id: str | None = None) -> Node:
    """Run `ray start ARGUMENTS` for a node with these resources; returns once its process runs, before the node has joined."""
    node_id = node_id or secrets.token_hex(28)
    custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    address = HOST if kind == HEAD_TYPE else f"127.0.{1 + int(node_id[:2], 16) % 250}.{2 + int(node_id[2:4], 16) % 250}"      # one each, as on real machines
    command = [str(Path(sys.executable).parent / "ray"), "start", *arguments, "--block", "--disable-usage-stats", f"--node-ip-address={address}",
               f"--temp-dir={state / 'ray' / node_id[:6]}",                        # ... and a disk: a job's files are unpacked, and removed, on every node
               f"--num-cpus={resources.get('CPU', 0):g}", f"--num-gpus={resources.get('GPU', 0):g}", f"--resources={json.dumps(custom)}",
               "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0", f"--object-store-memory={STORE_BYTES}"]
    with open(state / "logs" / f"{kind}-{node_id[:8]}.log", "w") as log:
        process = subprocess.Popen(command, env=node_environment(state) | {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id}, stdin=subprocess.DEVNULL,
                                   stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    node = Node(node_id, kind, process.pid, psutil.Process(process.pid).create_time(), dict(resources))
    path = node_file(state, node_id)
    path.with_suffix(".part").write_text(json.dumps(asdict(node)))
    path.with_suffix(".part").replace(path)
    return node


def node_environment(state: Path) -> dict[str, str]:
    """What every process of the cluster inherits: `python` is this interpreter, one thread each, no niceness, the cluster's token."""
    bin_folder, root = Path(sys.executable).parent, Path(__file__).resolve().parents[1]
    mine = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN")}
    mine["PATH"] = f"{bin_folder}{os.pathsep}{mine.get('PATH', os.defpath)}"
    mine["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), mine.get("PYTHONPATH")]))                # the autoscaler imports the class below
    return mine | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAY_worker_niceness": "0", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                   "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(state / "token")}


def node_file(state: Path, node_id: str) -> Path:
    return state / "nodes" / f"{node_id}.json"


def nodes_of(state: Path) -> list[Node]:
    """Nodes whose process lives, the head first; files of the others are removed."""
    found = []
    for path in (state / "nodes").glob("*.json"):
        try:
            node = Node(**json.loads(path.read_text()))
        except FileNotFoundError:                                                                          # another process was faster
            continue
        if node.alive():
            found.append(node)
        else:
            kill_session(node)                                                                             # what outlived its first process
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda node: (node.kind != HEAD_TYPE, node.created))


def session_processes(node: Node) -> list[psutil.Process]:
    """Every process of the node's session that began after the node did."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == node.session and process.create_time() >= node.created - 1.0:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def kill_session(node: Node) -> None:
    """SIGKILL for the whole node, as when a machine loses power."""
    for process in session_processes(node):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def stop_node(node: Node, grace_s: float = GRACE_S) -> None:
    """SIGTERM lets `ray start` stop its children and drivers; SIGKILL for whatever is left then."""
    try:
        process = psutil.Process(node.session)
        if node.alive():
            process.send_signal(signal.SIGTERM)
            process.wait(grace_s)
    except (psutil.NoSuchProcess, psutil.TimeoutExpired):
        pass
    kill_session(node)


class LocalNodeProvider(NodeProvider):
    """Ray's autoscaler asks this class for nodes ("external" provider). As with spot machines, a killed node is simply no longer there."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str):
        super().__init__(provider_config, cluster_name)
        self.state, self.lock = Path(provider_config["state"]), RLock()

    def nodes(self) -> dict[str, Node]:
        return {node.id: node for node in nodes_of(self.state)}

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        with self.lock:
            return [node.id for node in self.nodes().values() if tag_filters.items() <= tags_of(node).items()]

    def is_running(self, node_id: str) -> bool:
        return node_id in self.nodes()

    def is_terminated(self, node_id: str) -> bool:
        return node_id not in self.nodes()

    def node_tags(self, node_id: str) -> dict[str, str]:
        return tags_of(self.nodes()[node_id])

    def internal_ip(self, node_id: str) -> str:
        return node_id                                                                                     # see use_node_id_as_ip: one machine, one address

    def external_ip(self, node_id: str) -> str:
        return node_id

    def set_node_tags(self, node_id: str, node_tags: dict[str, str]) -> None:
        """The tags that matter follow from the node's kind; a node is up to date as soon as it runs."""

    def create_node_with_resources_and_labels(self, node_config: dict, node_tags: dict[str, str], count: int, resources: dict[str, float],
                                              labels: dict) -> None:
        with self.lock:
            for _ in range(count):
                start_node(self.state, node_tags[tags.TAG_RAY_USER_NODE_TYPE], resources, [f"--address={self.provider_config['gcs_address']}"])
                time.sleep(0.1)                                                                            # one machine: not all of them at once

    def terminate_node(self, node_id: str) -> None:
        node = self.nodes().get(node_id)
        if node is not None:
            stop_node(node)
            node_file(self.state, node_id).unlink(missing_ok=True)

    @staticmethod
    def bootstrap_config(cluster_config: dict) -> dict:
        return cluster_config


def tags_of(node: Node) -> dict[str, str]:
    kind = tags.NODE_KIND_HEAD if node.kind == HEAD_TYPE else tags.NODE_KIND_WORKER
    return {tags.TAG_RAY_NODE_KIND: kind, tags.TAG_RAY_USER_NODE_TYPE: node.kind, tags.TAG_RAY_NODE_NAME: node.id,
            tags.TAG_RAY_NODE_STATUS: tags.STATUS_UP_TO_DATE}
