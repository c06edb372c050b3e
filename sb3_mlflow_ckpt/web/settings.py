"""Owns how the Training History is served: what may be read, by whom, under which names. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from sb3_mlflow_ckpt.errors import ConfigError

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
"""The names under which everybody reaches a server on the own machine."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Where a server listens that nobody reaches from another machine."""
SHORTEST_TOKEN = 16


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


def check_token(token: str) -> None:
    """Raise ConfigError for a token that is easily guessed, or that no header can hold."""
    if len(token) < SHORTEST_TOKEN or not all("!" <= character <= "~" for character in token):
        problem = f"it has fewer than {SHORTEST_TOKEN} characters, or others than ASCII's letters, digits and signs"
        raise ConfigError("token", problem, "--token", "Have one made: --token auto")


def check_names(settings: WebSettings, trusted_proxies: Sequence[str]) -> None:
    """Raise ConfigError for a name or an address that cannot be meant."""
    for name in settings.allowed_hosts:
        if not name or any(character in name for character in "/@?#, \t") or name.rpartition(":")[2].isdigit():
            problem, hint = f"{name!r} is not a name alone", "Type it without http:// and port"
            raise ConfigError("allowed_host", problem, "--allowed-host", hint)
    root = settings.root_path
    if root and (not root.startswith("/") or "//" in root or any(character in root for character in "?#\\ ;,\"'")):
        raise ConfigError("root_path", f"{root!r} is no path", "--root-path", "Type it as /history")
    url = settings.mlflow_ui_url
    if (url is not None and not url.startswith(("http://", "https://"))) or (url and not urlsplit(url).netloc):
        raise ConfigError("mlflow_ui_url", f"{url!r} is no address", "--mlflow-ui-url", "Type it as http://host:5000")
    for proxy in trusted_proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError as error:
            hint = "Type it as 10.0.0.5 or 10.0.0.0/24"
            raise ConfigError("trusted_proxy", f"{proxy!r} is no address", "--trusted-proxy", hint) from error


def check_exposure(host: str, settings: WebSettings) -> None:
    """Raise ConfigError where others could see everything."""
    needed = (("--token auto", settings.token), ("--allowed-host NAME", settings.allowed_hosts))
    missing = [flag for flag, given in needed if not given]
    if host not in LOOPBACK and missing:
        hint = f"Add {' and '.join(missing)}, or leave out --host and use an ssh tunnel"
        raise ConfigError("host", f"{host} can be reached by others, who would see everything", "--host", hint)
