"""Owns how the Training History is served: what may be read, by whom, under which names. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
"""The names under which everybody reaches a server on the own machine."""


@dataclass(frozen=True)
class WebSettings:
    """How the Training History is served.

    Attributes:
        checkpoint_dir: The folder of `<agent_id>/<run_id>` folders: checkpoints are downloaded and verified from it.
        token: What everybody must know who asks for anything; nobody is asked where it is None.
        allowed_hosts: Further names of the server that a `Host` header may hold, without ports.
        mlflow_ui_url: Where MLflow's pages are; a run's own tracking server where it is None.
        root_path: Where a reverse proxy has put the pages, such as `/history`; empty for its root.
    """

    checkpoint_dir: Path
    token: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    mlflow_ui_url: str | None = None
    root_path: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoint_dir", Path(self.checkpoint_dir).absolute())
        object.__setattr__(self, "root_path", self.root_path.rstrip("/"))

    def admits_host(self, host: str) -> bool:
        """Return whether a `Host` header, with or without a port, names this server."""
        name, colon, port = host.rpartition(":")
        if not colon or not port.isdigit():
            name = host
        return name.lower() in {*LOOPBACK_HOSTS, *(allowed.lower() for allowed in self.allowed_hosts)}
