"""Owns the examination of what a training needs: the machine, the folder, its runs, MLflow, MongoDB. Mends nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from sb3_mlflow_ckpt.checkpoints import list_checkpoints, run_folders
from sb3_mlflow_ckpt.errors import CheckpointError, MirrorUnavailableError
from sb3_mlflow_ckpt.journal import read_record
from sb3_mlflow_ckpt.layout import TEMPORARY_PREFIX
from sb3_mlflow_ckpt.reap import reap_runs, tracking_uris
from sb3_mlflow_ckpt.repair import LEFT_ALONE, repair_runs
from sb3_mlflow_ckpt.runs.document import redact
from sb3_mlflow_ckpt.runs.folder import read_ledger
from sb3_mlflow_ckpt.verification import read_metadata

Status = Literal["ok", "warn", "FAIL"]

_DISTRIBUTION = "sb3-mlflow-ckpt"
_SLOW_FSYNC_SECONDS = 0.5
_CLOCK_SECONDS = 5.0
_FEW_INODES = 1_000
_DEFAULT_KEPT = 3
_OFFLINE = ", or train with --start-offline"
_CLOCKS = "Synchronise both clocks (NTP)"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        status: `ok`, `warn` (training works, something will bite), `FAIL` (it does not).
        what: What was found.
        remedy: What to do, or nothing.
    """

    status: Status
    what: str
    remedy: str = ""


def examine(
    checkpoint_dir: str | Path = "checkpoints",
    *,
    tracking_uri: str | None = None,
    mongo_uri: str | None = None,
    mongo_db: str = "sb3_mlflow_ckpt",
) -> Iterator[Finding]:
    """Yield what is found, in the order in which a person would look.

    Args:
        checkpoint_dir: The folder that holds agents' folders.
        tracking_uri: MLflow's tracking URI; those of the runs, else MLflow's own setting, where it is None.
        mongo_uri: The MongoDB; not looked at where it is None.
        mongo_db: Its database.
    """
    yield from versions()
    yield from folder(Path(checkpoint_dir))
    yield from runs(Path(checkpoint_dir))
    # Where the runs are tracked, if that is known: what the environment names may be another one.
    addresses: list[str | None] = [tracking_uri] if tracking_uri else [*tracking_uris(checkpoint_dir)]
    for address in addresses or [None]:
        yield from mlflow_server(address)
    if mongo_uri is not None:
        yield from mongo_server(mongo_uri, mongo_db)


def versions() -> Iterator[Finding]:
    """Compare Python and the packages with the ranges that this package declares."""
    wanted = SpecifierSet(importlib.metadata.metadata(_DISTRIBUTION)["Requires-Python"] or "")
    python = platform.python_version()
    yield _within("Python", python, wanted, "Use a Python that fits")
    for text in importlib.metadata.requires(_DISTRIBUTION) or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        remedy = f"python -m pip install '{requirement.name}{requirement.specifier}'"
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("FAIL", f"{requirement.name} is not installed", remedy)
            continue
        yield _within(requirement.name, found, requirement.specifier, remedy)


def _within(name: str, found: str, wanted: SpecifierSet, remedy: str) -> Finding:
    if wanted.contains(found, prereleases=True):
        return Finding("ok", f"{name} {found}")
    return Finding("warn", f"{name} {found} is not within {wanted}", remedy)


def folder(checkpoint_dir: Path) -> Iterator[Finding]:
    """Try in the checkpoint folder what a training does: write, sync, rename, link, lock."""
    try:
        # One that is missing is made by the first training, in what is there of its parents.
        there = next(path for path in (checkpoint_dir.absolute(), *checkpoint_dir.absolute().parents) if path.exists())
        with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=there) as place:
            yield from _try(Path(place), checkpoint_dir)
    except OSError as error:
        remedy = "Name a folder that can be written to with --checkpoint-dir"
        yield Finding("FAIL", f"{checkpoint_dir} is not usable: {error.strerror or error}", remedy)
        return
    yield from _space(checkpoint_dir, there)


def _try(place: Path, checkpoint_dir: Path) -> Iterator[Finding]:
    one, other = place / "one", place / "other"
    local = time.time()
    with open(one, "wb") as file:
        file.write(b"x" * 4096)
        file.flush()
        began = time.perf_counter()
        os.fsync(file.fileno())
        took = time.perf_counter() - began
    drift = one.stat().st_mtime - local
    os.replace(one, other)
    there = checkpoint_dir.is_dir()
    state = "can be written to" if there else "is not there yet: the first training makes it"
    yield Finding("ok", f"{checkpoint_dir} {state}")
    slow = took > _SLOW_FSYNC_SECONDS
    remedy = "Save less often (checkpoint_interval_episodes), or use a local disk" if slow else ""
    yield Finding("warn" if slow else "ok", f"syncing a file to the disk takes {1000 * took:.1f} ms", remedy)
    try:
        os.link(other, one)
        yield Finding("ok", "hard links work: a resumed run shares its parent's replay buffer")
    except OSError as error:
        yield Finding("warn", f"no hard links ({error.strerror}): replay buffers are copied on a resume", "")
    try:
        with FileLock(place / "lock", timeout=0):
            yield Finding("ok", "locks work: no two processes write to one run")
    except (OSError, NotImplementedError) as error:
        yield Finding("FAIL", f"no locks ({error})", "Mount the file system with locks, or use a local disk")
    if abs(drift) > _CLOCK_SECONDS:
        yield Finding("warn", f"the file system's clock is {drift:+.0f} s off this machine's", _CLOCKS)
    else:
        yield Finding("ok", "the file system's clock agrees with this machine's")


def _space(checkpoint_dir: Path, there: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(there).free
    size, kept = _newest_size(checkpoint_dir)
    need = size * (kept + 1)
    what = f"{free / 2**20:,.0f} MiB are free; {kept} checkpoints and one in the making need {need / 2**20:,.1f} MiB"
    remedy = "Free space, keep fewer (keep_last_n_checkpoints), or name another --checkpoint-dir"
    yield Finding("FAIL", what, remedy) if free < need else Finding("ok", what)
    if not hasattr(os, "statvfs"):
        return
    inodes = os.statvfs(there)
    # Some file systems have no fixed number of them, and say 0.
    if inodes.f_files and inodes.f_favail < _FEW_INODES:
        yield Finding("warn", f"only {inodes.f_favail} inodes are free", "Remove small files that nobody needs")
    else:
        yield Finding("ok", "inodes are free")


def _newest_size(checkpoint_dir: Path) -> tuple[int, int]:
    """Return how many bytes the newest checkpoint has, and how many of them its run keeps."""
    newest = None
    for path in list_checkpoints(checkpoint_dir):
        try:
            metadata = read_metadata(path, settle=False)
        except (CheckpointError, OSError):
            continue
        newest = max(newest, metadata, key=lambda m: m.timestamp) if newest is not None else metadata
    if newest is None:
        return 0, _DEFAULT_KEPT
    kept = newest.config.get("keep_last_n_checkpoints")
    return sum(entry.bytes for entry in newest.files), kept if isinstance(kept, int) and kept > 0 else _DEFAULT_KEPT


def runs(checkpoint_dir: Path) -> Iterator[Finding]:
    """Look for what is damaged, lost, or not yet sent."""
    folders = [*run_folders(checkpoint_dir)]
    found = [*repair_runs(folders, dry_run=True)]
    damaged = [repair for repair in found if repair.action != LEFT_ALONE]
    in_use = len(found) - len(damaged)
    if damaged:
        first = damaged[0]
        what = f"{len(damaged)} defects in run folders, the first: {first.folder}: {first.defect}"
        yield Finding("FAIL", what, f"sb3-mlflow-ckpt checkpoints repair --checkpoint-dir {checkpoint_dir}")
    else:
        used = f"; {in_use} are in use and were not looked at" if in_use else ""
        yield Finding("ok", f"{len(folders) - in_use} run folders are whole{used}")
    lost = [reaped for reaped in reap_runs(checkpoint_dir, dry_run=True) if reaped.action == "would fail"]
    if lost:
        what = f"{len(lost)} runs say that they are running and are dead, the first: {lost[0].run_id}"
        yield Finding("warn", what, f"sb3-mlflow-ckpt runs reap --checkpoint-dir {checkpoint_dir}")
    else:
        yield Finding("ok", "no run is lost")
    behind = [run.run_id for run in folders if _waits(run)]
    if behind:
        what = f"{len(behind)} runs have checkpoints that MLflow lacks, the first: {behind[0]}"
        yield Finding("warn", what, f"sb3-mlflow-ckpt checkpoints sync --checkpoint-dir {checkpoint_dir}")
    else:
        yield Finding("ok", "MLflow has all checkpoints of the runs that it tracks")


def _waits(run: Any) -> bool:
    try:
        return "MLflow" in (read_record(run).get("mirrors") or ()) and bool(read_ledger(run).waiting)
    except (CheckpointError, OSError):
        return False  # It is damaged, and was told of.


def mlflow_server(tracking_uri: str | None) -> Iterator[Finding]:
    """Ask MLflow for its experiments, its version, and its artifacts."""
    import mlflow
    from mlflow import MlflowClient

    from sb3_mlflow_ckpt.mirrors.patience import is_there, quick_requests, unavailable

    address = tracking_uri or mlflow.get_tracking_uri()
    shown = redact(address)
    if not is_there(address):
        yield Finding("ok", f"MLflow's {shown} is not there yet: the first training makes it")
        return
    try:
        with quick_requests():
            began = time.monotonic()
            client = MlflowClient(tracking_uri=address)
            client.search_experiments(max_results=1)
            yield Finding("ok", f"MLflow at {shown} answers within {time.monotonic() - began:.1f} s")
            yield from _mlflow_version(address, shown)
            found = client.search_runs(["0"], max_results=1)
            if found:
                client.list_artifacts(found[0].info.run_id)
                yield Finding("ok", "MLflow's artifacts can be reached")
    except Exception as error:
        # mlflow raises its own, requests' and OS errors alike; their messages may quote the address.
        problem = unavailable(error, address)
        yield Finding(
            "FAIL",
            str(problem).partition(". Start it")[0],
            f"Start it, correct --tracking-uri{_OFFLINE}",
        )


def _mlflow_version(address: str, shown: str) -> Iterator[Finding]:
    import mlflow

    if not address.startswith(("http://", "https://")):
        return
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    answer = http_request(get_default_host_creds(address), "/version", "GET")  # type: ignore[no-untyped-call]
    theirs, ours = answer.text.strip(), mlflow.__version__
    if answer.status_code != 200 or theirs.split(".")[:2] == ours.split(".")[:2]:
        yield Finding("ok", f"MLflow is {theirs if answer.status_code == 200 else 'unknown'} there, {ours} here")
    else:
        yield Finding("warn", f"MLflow is {theirs} at {shown}, {ours} here", f"python -m pip install mlflow=={theirs}")


def mongo_server(uri: str, database: str) -> Iterator[Finding]:
    """Ask MongoDB for an answer, its indexes and its clock."""
    from sb3_mlflow_ckpt.runs.mongo_database import answering, connect, missing_indexes, redacted

    shown = redacted(uri)
    try:
        opened = connect(uri, database)
        try:
            with answering(uri):
                began = time.monotonic()
                opened.command("ping")
                yield Finding("ok", f"MongoDB at {shown} answers within {time.monotonic() - began:.1f} s")
                missing = missing_indexes(opened)
                clock = opened.command("hello").get("localTime")
        finally:
            opened.client.close()
    except MirrorUnavailableError as error:
        yield Finding(
            "FAIL",
            str(error).partition(". Start it")[0],
            f"Start it, correct --mongo-uri{_OFFLINE}",
        )
        return
    if missing:
        yield Finding("warn", f"MongoDB lacks indexes: {', '.join(missing)}", "The next training makes them")
    else:
        yield Finding("ok", "MongoDB's indexes are there")
    if isinstance(clock, datetime):
        clock = clock if clock.tzinfo else clock.replace(tzinfo=timezone.utc)
        drift = (clock - datetime.now(timezone.utc)).total_seconds()
        if abs(drift) > _CLOCK_SECONDS:
            yield Finding(
                "warn", f"MongoDB's clock is {drift:+.0f} s off this machine's", "Synchronise both clocks (NTP)"
            )
        else:
            yield Finding("ok", "MongoDB's clock agrees with this machine's")
