"""Owns a Ray cluster of two nodes that share no checkpoint folder, one of which a test takes away."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from ports import free_port
from processes import wait_for

CHECKPOINT_DIR = "SB3_MLFLOW_CKPT_CHECKPOINT_DIR"
_MEMORY = {"object_store_memory": 100 * 2**20}


def agent() -> dict[str, int]:
    """Return a port of a node's own for what submits jobs: all nodes are on one machine, and so may be other clusters."""
    return {"dashboard_agent_listen_port": free_port()}


class TwoNodes:
    """A cluster: a head that trains nothing, and two nodes with a checkpoint folder each.

    Attributes:
        address: Of its dashboard.
        gcs: Where a driver connects.
        folders: The checkpoint folder of each node, by its name.
    """

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        port, own = free_port(), agent()
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port, **own, **_MEMORY}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: dict[str, Any] = {}
        self.address = f"http://127.0.0.1:{port}"
        self.gcs = str(self._cluster.address)
        self.folders = {name: folder / name for name in ("one", "other")}
        self.complete()
        # Whoever submits a job waits ten seconds for it, and no longer.
        [listens] = own.values()
        wait_for(lambda: _accepts(listens), "the head's agent")

    def complete(self) -> None:
        """Put a new node where one was taken away."""
        for name in self.folders.keys() - self._nodes.keys():
            place = {CHECKPOINT_DIR: str(self.folders[name])}
            self._nodes[name] = self._cluster.add_node(num_cpus=1, env_vars=place, **agent(), **_MEMORY)

    def nodes_of(self, run_id: str) -> list[str]:
        """Return the names of the nodes where a run has a record."""
        return [name for name, folder in self.folders.items() if any(folder.glob(f"*/{run_id}/run.json"))]

    def kill(self, name: str) -> None:
        """Take a node away, as a power cut does."""
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()


def _accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False
