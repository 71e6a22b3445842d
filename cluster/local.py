"""A Ray cluster of several nodes on this machine, without Docker: `python cluster/local.py up | status | down`.

Every node is a set of processes of its own (cluster/nodes.py), listens on the loopback interface only and asks for the token that `up` writes into
the state folder. The head carries the custom resource `trainer`, the others `rollout`, so configs/cluster.yaml places the roles as on real machines.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))                # as a script: `cluster` is a folder of the checkout

from cluster.nodes import HEAD_TYPE, HOST, Node, kill_session, node_file, nodes_of, start_node, stop_node  # noqa: E402

DEFAULT_STATE = Path("/tmp") / f"modip_cluster_{os.getuid()}"               # Ray's sockets need a short path
WORKER_TYPE = "worker"
WORKER_RESOURCES = {"CPU": 1.0, "rollout": 1.0}
START_S = 240.0


class ClusterError(RuntimeError):
    """The cluster cannot be started or found; the message says what to do."""


class LocalCluster:
    """Nodes of one state folder.

    >>> with LocalCluster(Path("/tmp/c1")).up(head={"CPU": 2, "trainer": 1}, workers=1) as cluster:      # doctest: +SKIP
    ...     os.environ.update(cluster.client_environment())
    """

    def __init__(self, state: Path = DEFAULT_STATE):
        self.state = state

    # ---- up and down -------------------------------------------------------------------------------------------------------------------------

    def up(self, head: Mapping[str, float] | None = None, worker: Mapping[str, float] = WORKER_RESOURCES, workers: int = 0,
           autoscale: tuple[int, int] | None = None, dashboard_port: int | None = None, idle_minutes: float = 5.0) -> LocalCluster:
        """Start the head and `workers` nodes, or the autoscaler with between `autoscale[0]` and `autoscale[1]` nodes; waits until all have joined."""
        if self.nodes():
            raise ClusterError(f"{self.state}: a cluster runs there already; 'down' stops it, --dir starts another")
        shutil.rmtree(self.state, ignore_errors=True)
        for folder in (self.state, self.state / "nodes", self.state / "logs"):
            folder.mkdir(mode=0o700, parents=True)
        descriptor = os.open(self.state / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        gcs, dashboard, client = free_port(), free_port(dashboard_port), free_port()
        self.write_facts({"gcs": f"{HOST}:{gcs}", "address": f"http://{HOST}:{dashboard}", "autoscale": autoscale, "worker": dict(worker)})
        arguments = ["--head", f"--port={gcs}", f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}",
                     f"--ray-client-server-port={client}"]
        if autoscale is not None:
            (self.state / "autoscaling.json").write_text(json.dumps(self.autoscaling_config(head or head_resources(), worker, autoscale, idle_minutes)))
            arguments.append(f"--autoscaling-config={self.state / 'autoscaling.json'}")
        try:
            start_node(self.state, HEAD_TYPE, head or head_resources(), arguments)
            self.wait("the head's dashboard to answer", self.answers)
            for _ in range(workers):
                self.add_node(worker)
            expected = 1 + (autoscale[0] if autoscale is not None else workers)
            self.wait(f"{expected} node(s) to join", lambda: len(self.joined()) >= expected)
        except BaseException:
            self.down()
            raise
        return self

    def autoscaling_config(self, head: Mapping[str, float], worker: Mapping[str, float], limits: tuple[int, int], idle_minutes: float) -> dict[str, Any]:
        """A cluster file as `ray up` takes one, with our provider; ray.cluster_utils.AutoscalingCluster writes the same for its fake provider."""
        nothing = dict.fromkeys(("cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
                                 "head_start_ray_commands", "worker_start_ray_commands"), [])
        provider = {"type": "external", "module": "cluster.nodes.LocalNodeProvider", "state": str(self.state), "gcs_address": self.facts()["gcs"],
                    "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
        types = {HEAD_TYPE: {"resources": dict(head), "node_config": {}, "min_workers": 0, "max_workers": 0},
                 WORKER_TYPE: {"resources": dict(worker), "node_config": {}, "min_workers": limits[0], "max_workers": limits[1]}}
        return {"cluster_name": "local", "provider": provider, "available_node_types": types, "head_node_type": HEAD_TYPE, "max_workers": limits[1],
                "upscaling_speed": 1.0, "idle_timeout_minutes": idle_minutes, "auth": {}, "file_mounts": {}, "file_mounts_sync_continuously": False, **nothing}

    def down(self) -> int:
        """Stop every node, the head (and with it the autoscaler) first; returns how many there were. The state folder goes too."""
        nodes = self.nodes()
        for node in nodes:
            stop_node(node)
        late = self.nodes()                                                  # what the autoscaler started while its head was going
        for node in late:
            kill_session(node)
        shutil.rmtree(self.state, ignore_errors=True)
        return len(nodes) + len(late)

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.down()

    # ---- nodes -------------------------------------------------------------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        return nodes_of(self.state)

    def workers(self) -> list[Node]:
        return [node for node in self.nodes() if node.kind != HEAD_TYPE]

    def add_node(self, resources: Mapping[str, float] | None = None) -> Node:
        """One more worker node; it joins within seconds (`wait_for_workers`)."""
        facts = self.facts()
        return start_node(self.state, WORKER_TYPE, resources or facts["worker"], [f"--address={facts['gcs']}"])

    def kill_node(self, node: Node | None = None) -> Node:
        """SIGKILL for all processes of a worker node (the oldest by default), as when its machine is taken away. An autoscaler replaces it."""
        node = node or next(iter(self.workers()), None)
        if node is None:
            raise ClusterError(f"{self.state}: has no worker node to kill")
        kill_session(node)
        node_file(self.state, node.id).unlink(missing_ok=True)
        return node

    def joined(self) -> list[dict[str, Any]]:
        """Nodes that Ray itself calls alive."""
        found = self.ask("/nodes?view=summary")["data"]["summary"]
        return [node for node in found if node["raylet"].get("state") == "ALIVE"]

    def wait_for_workers(self, count: int, timeout_s: float = START_S) -> None:
        self.wait(f"{count} worker node(s)", lambda: len(self.joined()) - 1 == count, timeout_s)

    # ---- what the clients need ---------------------------------------------------------------------------------------------------------------

    def client_environment(self) -> dict[str, str]:
        return {"RAY_API_SERVER_ADDRESS": self.facts()["address"], "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.state / "token")}

    def facts(self) -> dict[str, Any]:
        try:
            return json.loads((self.state / "cluster.json").read_text())
        except FileNotFoundError as error:
            raise ClusterError(f"{self.state}: no cluster there; 'up' starts one (--dir names another folder)") from error

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        (self.state / "cluster.json").write_text(json.dumps(facts))

    def ask(self, path: str) -> dict[str, Any]:
        """A question to the dashboard, with the token."""
        request = Request(self.facts()["address"] + path, headers={"Authorization": f"Bearer {(self.state / 'token').read_text()}"})
        with urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def answers(self) -> bool:
        if not self.nodes():
            raise ClusterError(f"the head ended at once: {last_line(self.state / 'logs')}")
        return bool(self.ask("/api/version"))

    def wait(self, what: str, ready: Callable[[], bool], timeout_s: float = START_S) -> None:
        """A dashboard that does not answer, or not in time, as a busy machine's, is asked again."""
        deadline, why = time.monotonic() + timeout_s, ""
        while True:
            try:
                if ready():
                    return
            except (URLError, TimeoutError, ConnectionError) as error:
                why = f" (the dashboard: {error})"
            if time.monotonic() > deadline:
                raise ClusterError(f"{self.state}: waited {timeout_s:g} s for {what}{why}; its logs are in {self.state / 'logs'}")
            time.sleep(0.25)


def head_resources() -> dict[str, float]:
    return {"CPU": float(os.cpu_count() or 1), "trainer": 1.0}


def free_port(wanted: int | None = None) -> int:
    """A port of the loopback interface that is free now: the wanted one or any."""
    with socket.socket() as probe:
        try:
            probe.bind((HOST, wanted or 0))
        except OSError as error:
            raise ClusterError(f"port {wanted} is not free ({error.strerror}); --dashboard-port chooses another") from error
        return probe.getsockname()[1]


def last_line(logs: Path) -> str:
    lines = [line for path in sorted(logs.glob("*.log")) for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it wrote no log"


# ---- command line ----------------------------------------------------------------------------------------------------------------------------


def main() -> None:
    args = parser().parse_args()
    try:
        args.run(args, LocalCluster(args.dir.resolve()))
    except ClusterError as error:
        print(f"cluster/local.py {args.command}: {error}", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="cluster/local.py", description="A Ray cluster of several nodes on this machine.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="start the cluster")
    size = up.add_mutually_exclusive_group()
    size.add_argument("--nodes", type=int, default=1, metavar="N", help="worker nodes beside the head (default 1)")
    size.add_argument("--autoscale", type=limits, metavar="MIN:MAX", help="let Ray's autoscaler start and stop worker nodes")
    up.add_argument("--node-resources", type=resources, default=WORKER_RESOURCES, metavar="JSON", help='of each worker node, default {"CPU": 1, "rollout": 1}')
    up.add_argument("--head-cpus", type=float, default=float(os.cpu_count() or 1), help="default: those of this machine")
    up.add_argument("--dashboard-port", type=int, help="default: any free one")
    up.add_argument("--idle-minutes", type=float, default=5.0, help="after which the autoscaler stops a node that has nothing to do (default 5)")
    up.set_defaults(run=run_up)
    commands.add_parser("status", help="nodes and the address").set_defaults(run=run_status)
    commands.add_parser("down", help="stop all of it").set_defaults(run=run_down)
    for p in commands.choices.values():
        p.add_argument("--dir", type=Path, default=DEFAULT_STATE, metavar="STATE", help=f"state folder, a short path (default {DEFAULT_STATE})")
    return top


def limits(text: str) -> tuple[int, int]:
    low, sep, high = text.partition(":")
    if not sep or not low.isdigit() or not high.isdigit() or int(low) > int(high):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected MIN:MAX with MIN at most MAX, e.g. 1:4")
    return int(low), int(high)


def resources(text: str) -> dict[str, float]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(v, int | float) for v in found.values()):
        raise argparse.ArgumentTypeError(f"""got {text!r}, expected JSON such as '{{"CPU": 1, "rollout": 1}}'""")
    return {name: float(amount) for name, amount in found.items()}


def run_up(args: argparse.Namespace, cluster: LocalCluster) -> None:
    cluster.up({"CPU": args.head_cpus, "trainer": 1.0}, args.node_resources, 0 if args.autoscale else args.nodes, args.autoscale, args.dashboard_port,
               args.idle_minutes)
    print("".join(f"export {name}={shlex.quote(value)}\n" for name, value in cluster.client_environment().items()), end="")
    run_status(args, cluster, file=sys.stderr)


def run_status(args: argparse.Namespace, cluster: LocalCluster, file=None) -> None:
    address = cluster.facts()["address"]
    alive = {node["raylet"]["nodeId"] for node in cluster.joined()} if cluster.nodes() else set()
    for node in cluster.nodes():
        has = ", ".join(f"{name} {amount:g}" for name, amount in node.resources.items())
        print(f"{node.kind:<7} {node.id[:8]}  {'joined ' if node.id in alive else 'joining'}  {has}", file=file)
    print(f"{address}  (token: {cluster.state / 'token'})", file=file)


def run_down(args: argparse.Namespace, cluster: LocalCluster) -> None:
    cluster.facts()
    print(f"{cluster.down()} node(s) stopped")


if __name__ == "__main__":
    main()
