"""Owns the driver of a sweep: `tune.Tuner` with our trials, the MLflow run above them, and the end of it all."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from sb3_mlflow_ckpt import atomic, strict_json
from sb3_mlflow_ckpt.config import TrainingConfig, flatten, inheritable_fields
from sb3_mlflow_ckpt.errors import ConfigError
from sb3_mlflow_ckpt.layout import SweepFolder
from sb3_mlflow_ckpt.redaction import redact
from sb3_mlflow_ckpt.runs.document import redact_all
from sb3_mlflow_ckpt.scale.local_ray import ray_session
from sb3_mlflow_ckpt.scale.sweep_check import check_trials
from sb3_mlflow_ckpt.scale.sweep_closing import TrialCloser, noting
from sb3_mlflow_ckpt.scale.sweep_config import SweepConfig
from sb3_mlflow_ckpt.scale.sweep_run import SweepRun
from sb3_mlflow_ckpt.scale.sweep_signals import SweepSignals, passing_on
from sb3_mlflow_ckpt.scale.sweep_stop import sweep_flag
from sb3_mlflow_ckpt.scale.trial import TrialPlan
from sb3_mlflow_ckpt.scale.tune_driver import Storage, tuner

logger = logging.getLogger(__name__)

# How trials are run, and not what they come to. Tune does not take another concurrency from where it has a snapshot.
_MAY_CHANGE = ("max_failures", "resources")
# Of a key that the version did not have which started the sweep.
_DEFAULTS = SweepConfig.model_validate({}).model_dump(mode="json")


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended.

    Attributes:
        plan: What was swept.
        status: completed, failed or interrupted.
        trials: Of each run, in their order: `status` and `hyperparameters`, for one that has left no record.
        mlflow_run_id: The MLflow run above them.
        signum: The signal that ended it, if one did.
    """

    plan: TrialPlan
    status: str
    trials: Mapping[str, Mapping[str, Any]]
    mlflow_run_id: str | None
    signum: int | None = None


def run_sweep(
    sweep: SweepConfig,
    *,
    resume: Literal["no", "yes", "auto"] = "no",
    address: str | None = None,
    starting: Callable[[TrialPlan], None] = lambda plan: None,
    tell: Callable[[str], None] = lambda line: None,
    ending: Callable[[SweepResult], Mapping[str, Path]] = lambda result: {},
) -> SweepResult:
    """Train every trial of a sweep; on return each has its end in its record and in MLflow, the sweep's run last.

    Args:
        sweep: The sweep.
        resume: `yes` goes on with the newest sweep of this name, `auto` does if there is one.
        address: The cluster; a Ray of its own on this machine where it is None.
        starting: Is called when the sweep has its id.
        tell: Is given a line when a trial starts, goes on or ends.
        ending: Is called when every trial has its end; returns files to keep beside the sweep's run in MLflow.

    Raises:
        ConfigError: It cannot be used, there is nothing to resume, or Ray is not there.
        MirrorUnavailableError: MLflow does not answer at the start.
    """
    check_trials(sweep, elsewhere=address is not None)
    here = Path(sweep.folder).expanduser().absolute()
    folder = _newest(here, sweep) if resume != "no" else None
    if folder is None:
        if resume == "yes":
            raise ConfigError("resume", f"{here} holds no sweep named {sweep.name!r}", hint="Start it without --resume")
        folder = SweepFolder(here, _new_id(sweep.name))
    storage = Storage.of(sweep, here)
    with ray_session(address):
        folder.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder.lock, timeout=0):
                return _run(sweep, folder, storage, address is None, starting, tell, ending)
        except Timeout as error:
            problem = f"the sweep {folder.sweep_id} is under way"
            raise ConfigError("resume", problem, hint="Wait for its end, or stop it") from error


def _run(
    sweep: SweepConfig,
    folder: SweepFolder,
    storage: Storage,
    one_machine: bool,
    starting: Callable[[TrialPlan], None],
    tell: Callable[[str], None],
    ending: Callable[[SweepResult], Mapping[str, Path]],
) -> SweepResult:
    known = strict_json.loads(atomic.read_bytes(folder.record)) if folder.record.exists() else {}
    seed = known.get("seed", secrets.randbelow(2**31))
    with (
        SweepSignals(tell, sweep.trial_config({}).grace_seconds) as signals,
        SweepRun(sweep, folder.sweep_id, known) as run,
    ):
        plan = TrialPlan(
            sweep=sweep,
            sweep_id=folder.sweep_id,
            storage_path=str(folder.storage_path),
            checkpoint_dir=known.get("checkpoint_dir") or str(Path(sweep.trial_config({}).checkpoint_dir).absolute()),
            tracking_uri=run.tracking_uri,
            mlflow_parent=run.run_id,
            one_machine=one_machine,
            flag=sweep_flag(),
        )
        signals.flag = plan.flag
        record = {
            "id": folder.sweep_id,
            "name": sweep.name,
            "seed": seed,
            "mlflow_run_id": run.run_id,
            # A resume may stand in another folder.
            "checkpoint_dir": plan.checkpoint_dir,
            "tracking_uri": redact(run.tracking_uri) if run.tracking_uri is not None else None,
            "config": redact_all(sweep.model_dump(mode="json")),
        }
        atomic.write_bytes(folder.record, atomic.dump_json(record))
        starting(plan)
        closer = TrialCloser(plan, tell)
        failed: BaseException | None = None
        try:
            tuner(plan, storage, [noting(closer), passing_on()], seed).fit()
        except Exception as error:
            failed = error
        finally:
            closer.close_all()
        interrupted = signals.received is not None
        lost = not interrupted and failed is None and len(closer.trials) < sweep.trials
        if lost:
            tell(f"Ray Tune knew of {len(closer.trials)} of {sweep.trials} trials only; go on with --resume")
        status = (
            "interrupted" if interrupted else "failed" if failed is not None or closer.failed or lost else "completed"
        )
        result = SweepResult(plan, status, closer.trials, run.run_id, signals.received)
        run.end(status, ending(result), trials=len(closer.trials))
        if failed is not None and not interrupted:
            raise failed
        return result


def _new_id(name: str) -> str:
    return f"{name}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _newest(storage: Path, sweep: SweepConfig) -> SweepFolder | None:
    """Return the newest sweep of this name; None where there is none.

    Raises:
        ConfigError: It was of another sweep.yaml.
    """
    found = []
    for name in sorted(os.listdir(storage)) if storage.is_dir() else []:
        if name.startswith(f"{sweep.name}-") and SweepFolder(storage, name).record.is_file():
            folder = SweepFolder(storage, name)
            record = strict_json.loads(atomic.read_bytes(folder.record))
            if record.get("name") == sweep.name:
                found.append((folder, record))
    if not found:
        return None
    folder, record = found[-1]
    before, now = (
        _defining(config) for config in (record.get("config") or {}, redact_all(sweep.model_dump(mode="json")))
    )
    changed = {key: (before.get(key), now.get(key)) for key in {**now, **before} if before.get(key) != now.get(key)}
    if changed:
        told = ", ".join(f"{key}: {_short(old)} -> {_short(new)}" for key, (old, new) in changed.items())
        problem = f"{folder.sweep_id} was started with other settings: {told}"
        raise ConfigError("resume", problem, hint="Put them back, or start a new sweep without --resume")
    return folder


def _defining(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a sweep's configuration decides its trials, by dotted keys, and not how they are run."""
    launched = [key for key in TrainingConfig.model_fields if key not in inheritable_fields()]
    training = {key: value for key, value in (config.get("training") or {}).items() if key not in launched}
    known = {**_DEFAULTS, **config, "training": training}
    return flatten({key: value for key, value in known.items() if key not in _MAY_CHANGE})


def _short(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)[:80]
