"""Owns a Ray of this machine alone, and the connection of a sweep's driver to it or to a cluster's."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sb3_mlflow_ckpt.errors import ConfigError
from sb3_mlflow_ckpt.redaction import redact

# Little is put into it; Ray takes a third of the memory where nothing is said.
_OBJECT_STORE_BYTES = 100 * 2**20
_KNOCK_SECONDS = 5.0
# They say how to restore with Tune's own API, which is not how a sweep is resumed.
_TUNE_ASIDES = ("ray.tune.tune", "ray.tune.analysis.experiment_analysis")


def start_ray(*, dashboard: bool) -> Any:
    """Start a Ray of this machine alone, which ends with this process; return what `ray.init` does."""
    import ray

    # That it has a token is as it should be; its processes find it themselves.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    with _in_groups_of_their_own():
        # Not "auto", nor nothing: a file that a dead cluster left would be believed.
        return ray.init(
            "local",
            num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Connect to Ray, and leave it at the end.

    Args:
        address: The cluster; a Ray of its own, which ends with this process, where it is None.

    Raises:
        ConfigError: Ray is not installed, or the cluster does not answer.
    """
    # Before it is imported: it reads them once.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A relative path in a setting means the same to a trial as to a plain training.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # Trials report what they do; the driver's own words are few.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    try:
        import ray
        import ray.tune
    except ImportError as error:
        hint = "Install it with: python -m pip install 'sb3-mlflow-ckpt[ray]'"
        raise ConfigError("sweep", f"needs Ray Tune, which is not installed ({error})", hint=hint) from error
    try:
        if address is None:
            start_ray(dashboard=False)
        else:
            _knock(address)
            ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError) as error:
        cause = " ".join(redact(str(error)).split())[:300]
        hint = "Start one with: ray start --head, or leave --address out"
        raise ConfigError("address", f"no Ray answers: {cause}", hint=hint) from error
    for name in _TUNE_ASIDES:
        logging.getLogger(name).setLevel(logging.ERROR)
    # A trial's own process is what lets go of its environments and its run folder.
    warnings.filterwarnings("ignore", message=".*reuse_actors.*")
    try:
        yield
    finally:
        ray.shutdown()


_apart = False


@contextmanager
def _in_groups_of_their_own() -> Iterator[None]:
    """Have what is started meanwhile hear no signal that is meant for the driver's process group.

    Ray shields its processes from Ctrl-C alone: `timeout` and others send SIGTERM to the whole group, and a driver
    whose Ray is gone hangs. It dies with the driver all the same.
    """
    global _apart
    _apart = True
    try:
        yield
    finally:
        _apart = False


def _leave_the_group() -> None:
    if _apart:
        os.setpgid(0, 0)


# Python calls it in what is started with a `preexec_fn` as well, and that is how Ray starts its own.
os.register_at_fork(after_in_child=_leave_the_group)


def _knock(address: str) -> None:
    """Raise an OSError where nobody listens: Ray itself would try for many minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()
