"""Owns the settling of runs whose process is dead: on request, never by a reader.

The folder's lock is what tells: a live process holds it. A run of another host, whose locks may not be seen here,
must have a stale heartbeat as well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from sb3_mlflow_ckpt.checkpoints import run_folders
from sb3_mlflow_ckpt.errors import CheckpointError, ConfigError, MirrorUnavailableError, RunFolderBusyError
from sb3_mlflow_ckpt.journal import RunJournal, read_record
from sb3_mlflow_ckpt.layout import RunFolder, id_spellings
from sb3_mlflow_ckpt.mirrors import naming
from sb3_mlflow_ckpt.provenance import hostname
from sb3_mlflow_ckpt.runs.document import redact
from sb3_mlflow_ckpt.runs.folder import shown
from sb3_mlflow_ckpt.sync import THE_RUNS_OWN, MirrorAddresses, mirrors_of, send

if TYPE_CHECKING:
    from mlflow.entities import Run

PROCESS_LOST = "ProcessLost"
ORPHAN_SECONDS = 120.0
"""How long an MLflow run without a folder must have been silent: the least age of a stale heartbeat."""
_PROJECT = "sb3_mlflow_ckpt"


@dataclass(frozen=True)
class Reaped:
    """What became of one run that says it is running.

    Attributes:
        run_id: The run's id.
        where: Its folder, or MLflow's address.
        action: `failed` (it is settled), `would fail` (a dry run), `alive`, `fresh` (another host's, whose heartbeat
            is not stale yet), `orphan` (an MLflow run without a folder that was left as it is), `unreadable`, or
            `unreachable` (an MLflow that could not be asked for orphans).
        detail: Who ran it, or why it was left.
        problem: What could not be done, a mirror that was not told for instance; None where all was.
    """

    run_id: str
    where: str
    action: str
    detail: str
    problem: str | None = None


def reap_runs(
    checkpoint_dir: str | Path = "checkpoints",
    addresses: MirrorAddresses = THE_RUNS_OWN,
    *,
    run_id: str | None = None,
    agent_id: str | None = None,
    dry_run: bool = False,
) -> list[Reaped]:
    """Settle the runs below a checkpoint folder whose process is dead: failed, ended at their last heartbeat.

    What was settled is sent to the mirrors that the run had, and to those that are named here.

    Args:
        checkpoint_dir: The folder that holds agents' folders.
        addresses: Where the mirrors are.
        run_id: Only this run.
        agent_id: Only this agent.
        dry_run: Change nothing.

    Returns:
        One entry for each run that says it is running.
    """
    results = []
    for folder in run_folders(checkpoint_dir, run_id, agent_id):
        try:
            if not folder.record.exists() or read_record(folder).get("status") != "running":
                continue
            # A journal would make good what a crash left of its files.
            reaped = _examine(folder) if dry_run else _reap(folder, addresses)
        except (RunFolderBusyError, Timeout):
            reaped = Reaped(folder.run_id, str(folder.path), "alive", "a process holds the folder's lock")
        except (CheckpointError, OSError) as error:
            reaped = Reaped(folder.run_id, str(folder.path), "unreadable", "", str(error))
        if reaped is not None:
            results.append(reaped)
    return results


def settle_run(
    folder: RunFolder,
    status: str,
    message: str | None = None,
    *,
    addresses: MirrorAddresses = THE_RUNS_OWN,
    patience: float = 0.0,
) -> Reaped | None:
    """Record the end of one run whose process is gone and did not come to it, and tell its mirrors.

    Args:
        folder: Its folder.
        status: How it ended: failed or interrupted.
        message: Why it failed.
        addresses: Where its mirrors are.
        patience: How long to wait for its process to let go of the folder, in seconds.

    Returns:
        What was done; None for a run that has its end already. One that was interrupted to go on later, and could
        not, has failed.

    Raises:
        RunFolderBusyError: A process still holds the folder.
        CheckpointError: The folder cannot be read.
    """
    if not _to_settle(read_record(folder), status):
        return None
    journal = RunJournal(folder, patience)
    try:
        if not _to_settle(journal.record, status):
            return None
        error = {"type": PROCESS_LOST, "message": message, "traceback": None} if message is not None else None
        journal.update(status=status, error=error, **_last_known(journal))
        return _tell(folder, journal, Reaped(folder.run_id, str(folder.path), status, message or ""), addresses)
    finally:
        journal.close()


def _to_settle(record: Mapping[str, Any], status: str) -> bool:
    return record.get("status") == "running" or (status == "failed" and record.get("status") == "interrupted")


def _examine(folder: RunFolder) -> Reaped | None:
    with FileLock(folder.lock, timeout=0):
        return _judge(folder, read_record(folder))


def _judge(folder: RunFolder, record: Mapping[str, Any]) -> Reaped | None:
    """Tell of a run whose folder's lock is held here: read again, it may have ended or begun anew meanwhile."""
    if record.get("status") != "running":
        return None
    host, pid, heartbeat = record.get("host"), record.get("pid"), record.get("heartbeat_at")
    detail = f"process {pid} on {host}, last heartbeat {heartbeat}"
    if host != hostname() and shown(folder, dict(record))["status"] != "lost":
        return Reaped(folder.run_id, str(folder.path), "fresh", f"{detail}: another host's, and not stale yet")
    return Reaped(folder.run_id, str(folder.path), "would fail", detail)


def _reap(folder: RunFolder, addresses: MirrorAddresses) -> Reaped | None:
    # Before anything is swept or noted: the lock of another host's live process may not be seen here.
    found = _examine(folder)
    if found is None or found.action != "would fail":
        return found
    journal = RunJournal(folder)
    try:
        record = journal.record
        found = _judge(folder, record)
        if found is None or found.action != "would fail":
            return found
        message = f"The process died without a word: {found.detail}"
        error = {"type": PROCESS_LOST, "message": message, "traceback": None}
        journal.update(status="failed", error=error, **_last_known(journal))
        return _tell(folder, journal, replace(found, action="failed"), addresses)
    finally:
        journal.close()


def _last_known(journal: RunJournal) -> dict[str, Any]:
    """Return how far a run came that died: its last checkpoint may be younger than its last heartbeat."""
    record, saved = journal.record, journal.snapshot().saved.values()
    progress = dict(record.get("progress") or {})
    ended = str(record.get("heartbeat_at") or record.get("started_at"))
    last = max(saved, key=lambda facts: facts.get("num_timesteps") or 0, default=None)
    if last is not None and (last.get("num_timesteps") or 0) > (progress.get("num_timesteps") or 0):
        progress |= {"num_timesteps": last["num_timesteps"], "episode": last["episode"]}
        ended = max(ended, str(last.get("timestamp") or ""))
    return {"ended_at": ended, "progress": progress}


def _tell(folder: RunFolder, journal: RunJournal, reaped: Reaped, addresses: MirrorAddresses) -> Reaped:
    try:
        sent = [send(folder, journal, m) for m in mirrors_of(journal.record, addresses)]
        missed = [f"{result.mirror}: {result.error}" for result in sent if result.error]
    except ConfigError as error:
        missed = [str(error)]
    if not missed:
        return reaped
    problem = f"{'; '.join(missed)}; send it later with: sb3-mlflow-ckpt checkpoints sync"
    return replace(reaped, problem=problem)


def tracking_uris(checkpoint_dir: str | Path) -> list[str]:
    """Return where the runs below a checkpoint folder are tracked, as far as their records say it in full."""
    found: dict[str, None] = {}
    for folder in run_folders(checkpoint_dir):
        with suppress(CheckpointError, OSError, AttributeError):
            address = (read_record(folder).get("mlflow") or {}).get("tracking_uri")
            if address and "***" not in address:
                found[address] = None
    return list(found)


def reap_mlflow_orphans(
    tracking_uri: str | None, checkpoint_dir: str | Path = "checkpoints", *, fail: bool = False
) -> list[Reaped]:
    """Look for MLflow runs of this package that are RUNNING, have no folder here, and have been silent for long.

    A killed `mlflow run` whose child died before it made a folder leaves one, and so does the driver of a sweep.

    Args:
        tracking_uri: MLflow's tracking URI; MLflow's own setting where it is None.
        checkpoint_dir: Where the folders of runs that are known here lie.
        fail: Set them FAILED, ended when they were last heard of.

    Raises:
        MirrorUnavailableError: MLflow does not answer.
    """
    import mlflow
    from mlflow import MlflowClient

    from sb3_mlflow_ckpt.mirrors.patience import is_there, quick_requests, unavailable

    address = tracking_uri or mlflow.get_tracking_uri()
    results: list[Reaped] = []
    if not is_there(address):
        return results
    try:
        with quick_requests():
            client = MlflowClient(tracking_uri=address)
            for run in _running(client):
                if naming.SWEEP_TAG in run.data.tags:
                    if not _is_dead_sweep(run):
                        continue
                elif not _is_ours(run) or _has_folder(run.info.run_id, checkpoint_dir):
                    continue
                heard = _last_heard(run)
                age = time.time() - heard / 1000
                if age <= ORPHAN_SECONDS:
                    continue
                if fail:
                    client.set_terminated(run.info.run_id, "FAILED", end_time=heard)
                detail = f"without a folder here, silent for {age:.0f} s"
                action = "failed" if fail else "orphan"
                results.append(Reaped(run.info.run_id, redact(address), action, detail))
    except MirrorUnavailableError:
        raise
    except Exception as error:
        # mlflow raises its own, requests' and OS errors alike.
        raise unavailable(error, address) from None
    return results


def _running(client: Any) -> Iterator[Run]:
    experiments = [experiment.experiment_id for experiment in _pages(client.search_experiments)]
    for start in range(0, len(experiments), 100):
        chunk = experiments[start : start + 100]
        yield from _pages(client.search_runs, experiment_ids=chunk, filter_string="attributes.status = 'RUNNING'")


def _pages(search: Any, **arguments: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _is_ours(run: Run) -> bool:
    tags: Mapping[str, str] = run.data.tags
    if any(key.startswith(naming.TAG_PREFIX) for key in tags):
        return True
    return "mlflow.project.entryPoint" in tags and _is_our_project(tags.get("mlflow.source.name", ""))


def _is_dead_sweep(run: Run) -> bool:
    """Return whether the driver of a sweep ran on this machine, and does no more."""
    host, pid = (run.data.tags.get(tag, "") for tag in (naming.SWEEP_HOST_TAG, naming.SWEEP_PID_TAG))
    if host != hostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass  # It is somebody else's.
    return False


def _is_our_project(source: str) -> bool:
    """Return whether what `mlflow run` was given is this project: a folder with its MLproject, or its repository."""
    local = Path(source.removeprefix("file://").partition("#")[0])
    with suppress(OSError, ValueError, yaml.YAMLError, AttributeError):
        return bool(yaml.safe_load((local / "MLproject").read_text()).get("name") == _PROJECT)
    return local.name.removesuffix(".git").replace("-", "_") == _PROJECT


def _has_folder(run_id: str, checkpoint_dir: str | Path) -> bool:
    return any(True for spelling in id_spellings(run_id) for _ in run_folders(checkpoint_dir, spelling))


def _last_heard(run: Run) -> int:
    """Return when a run was last heard of, in milliseconds."""
    # Only the latest value of each metric is there, and with it its time.
    metrics: Iterable[Any] = run.data._metric_objs
    return int(max([run.info.start_time or 0, *(metric.timestamp for metric in metrics)]))
