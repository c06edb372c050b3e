"""Owns the driver of a sweep: `tune.Tuner` with our trials, the MLflow run above them, and the end of it all."""

from __future__ import annotations

import inspect
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from sb3_mlflow_ckpt import atomic, strict_json
from sb3_mlflow_ckpt.algorithms import algorithm_class, check_hyperparameters
from sb3_mlflow_ckpt.errors import ConfigError
from sb3_mlflow_ckpt.layout import SweepFolder
from sb3_mlflow_ckpt.redaction import redact
from sb3_mlflow_ckpt.runs.document import redact_all
from sb3_mlflow_ckpt.scale.local_ray import ray_session
from sb3_mlflow_ckpt.scale.search_space import PERTURBATION_FACTORS
from sb3_mlflow_ckpt.scale.sweep_closing import TrialCloser, noting
from sb3_mlflow_ckpt.scale.sweep_config import SweepConfig
from sb3_mlflow_ckpt.scale.sweep_run import SweepRun
from sb3_mlflow_ckpt.scale.sweep_signals import SweepSignals, passing_on
from sb3_mlflow_ckpt.scale.trial import TrialPlan, run_trial
from sb3_mlflow_ckpt.scale.trial_start import EXPLOIT

if TYPE_CHECKING:
    from ray.tune import Tuner

logger = logging.getLogger(__name__)

# Of each trial: the newest, and one more while it is handed over.
_TUNE_CHECKPOINTS = 2
_SNAPSHOT_SECONDS = "2"


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended.

    Attributes:
        plan: What was swept.
        status: completed, failed or interrupted.
        trials: The ids of its runs, in their order.
        mlflow_run_id: The MLflow run above them.
        signum: The signal that ended it, if one did.
    """

    plan: TrialPlan
    status: str
    trials: tuple[str, ...]
    mlflow_run_id: str | None
    signum: int | None = None


def run_sweep(
    sweep: SweepConfig,
    *,
    resume: bool = False,
    address: str | None = None,
    starting: Callable[[TrialPlan], None] = lambda plan: None,
    tell: Callable[[str], None] = lambda line: None,
    ending: Callable[[SweepResult], Mapping[str, Path]] = lambda result: {},
) -> SweepResult:
    """Train every trial of a sweep; on return each has its end in its record and in MLflow, the sweep's run last.

    Args:
        sweep: The sweep.
        resume: Go on with the newest sweep of this name whose driver died or was stopped.
        address: The cluster; a Ray of its own on this machine where it is None.
        starting: Is called when the sweep has its id.
        tell: Is given a line when a trial starts, goes on or ends.
        ending: Is called when every trial has its end; returns files to keep beside the sweep's run in MLflow.

    Raises:
        ConfigError: It cannot be used, there is nothing to resume, or Ray is not there.
        MirrorUnavailableError: MLflow does not answer at the start.
    """
    _check_algorithm(sweep)
    here = Path(sweep.folder).expanduser().absolute()
    folder = _newest(here, sweep) if resume else SweepFolder(here, _new_id(sweep.name))
    storage = _Storage.of(sweep, here)
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
    storage: _Storage,
    one_machine: bool,
    starting: Callable[[TrialPlan], None],
    tell: Callable[[str], None],
    ending: Callable[[SweepResult], Mapping[str, Path]],
) -> SweepResult:
    known = strict_json.loads(atomic.read_bytes(folder.record)) if folder.record.exists() else {}
    seed = known.get("seed", secrets.randbelow(2**31))
    with SweepSignals(tell) as signals, SweepRun(sweep, folder.sweep_id, known) as run:
        plan = TrialPlan(
            sweep=sweep,
            sweep_id=folder.sweep_id,
            storage_path=str(folder.storage_path),
            checkpoint_dir=str(Path(sweep.trial_config({}).checkpoint_dir).absolute()),
            tracking_uri=run.tracking_uri,
            mlflow_parent=run.run_id,
            one_machine=one_machine,
        )
        record = {"id": folder.sweep_id, "name": sweep.name, "seed": seed, "mlflow_run_id": run.run_id}
        record["config"] = redact_all(sweep.model_dump(mode="json"))
        atomic.write_bytes(folder.record, atomic.dump_json(record))
        starting(plan)
        closer = TrialCloser(plan, tell)
        failed: BaseException | None = None
        try:
            _tuner(plan, storage, closer, seed).fit()
        except Exception as error:
            failed = error
        finally:
            closer.close_all()
        interrupted = signals.received is not None
        status = "interrupted" if interrupted else "failed" if failed is not None or closer.failed else "completed"
        result = SweepResult(plan, status, closer.run_ids, run.run_id, signals.received)
        run.end(status, ending(result), trials=len(closer.run_ids))
        if failed is not None and not interrupted:
            raise failed
        return result


def _tuner(plan: TrialPlan, storage: _Storage, closer: TrialCloser, seed: int) -> Tuner:
    """Return Tune's own driver: restored where it has a snapshot, else anew; trials look for what is theirs."""
    from ray import tune
    from ray.tune.search.basic_variant import BasicVariantGenerator

    # Tune itself writes it seldom; what it does not know is made good by the trials.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", _SNAPSHOT_SECONDS)
    # It would ask for fewer reports, since it writes its snapshot for each that takes another's place.
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    sweep, folder = plan.sweep, plan.folder
    callback = noting(closer)
    resources = {"cpu": sweep.resources.cpu, "gpu": sweep.resources.gpu}
    trainable = tune.with_resources(tune.with_parameters(run_trial, plan=plan), resources)
    before, filesystem = f"{storage.path}/{folder.sweep_id}", storage.filesystem
    if tune.Tuner.can_restore(before, storage_filesystem=filesystem):
        return tune.Tuner.restore(
            before, trainable, resume_unfinished=True, resume_errored=True, storage_filesystem=filesystem
        )
    # The other values are drawn first and stay the same for each seed: seeds of one setting can be compared.
    search = BasicVariantGenerator(constant_grid_search=True, random_state=seed, max_concurrent=sweep.concurrency or 0)
    space = {key: distribution.domain() for key, distribution in sweep.space.items()}
    return tune.Tuner(
        trainable,
        param_space={"seed": tune.grid_search([*sweep.seeds]), **space},
        tune_config=tune.TuneConfig(
            metric=sweep.metric,
            mode=sweep.goal,
            num_samples=sweep.samples,
            search_alg=search,
            scheduler=_scheduler(sweep),
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(
            name=folder.sweep_id,
            storage_path=storage.path,
            storage_filesystem=filesystem,
            # A clone that waits for its turn reads what its donor reported long ago: see `tune_copies`.
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=None if sweep.scheduler == "pbt" else _TUNE_CHECKPOINTS
            ),
            failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
            callbacks=[callback, passing_on()],
            verbose=0,
        ),
    )


def _scheduler(sweep: SweepConfig) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining

    if sweep.scheduler == "asha":
        return ASHAScheduler(
            time_attr="num_timesteps",
            max_t=sweep.trial_config({}).total_timesteps,
            grace_period=sweep.grace_period,
            reduction_factor=sweep.asha.reduction_factor,
        )
    if sweep.scheduler == "pbt":
        perturbed = {key: d for key, d in sweep.space.items() if d.kind != "grid"}
        return PopulationBasedTraining(
            time_attr="num_timesteps",
            perturbation_interval=sweep.perturbation_interval,
            hyperparam_mutations={key: distribution.mutation() for key, distribution in perturbed.items()},
            quantile_fraction=sweep.pbt.quantile_fraction,
            resample_probability=sweep.pbt.resample_probability,
            perturbation_factors=PERTURBATION_FACTORS,
            custom_explore_fn=partial(_explored, space=perturbed),
        )
    return FIFOScheduler()  # type: ignore[no-untyped-call]


def _explored(config: dict[str, Any], space: Mapping[str, Any]) -> dict[str, Any]:
    """Return a perturbed configuration within its bounds, which a multiplication may leave, under a name of its own."""
    within = {key: distribution.within(config[key]) for key, distribution in space.items()}
    return {**config, **within, EXPLOIT: secrets.token_hex(8)}


def _check_algorithm(sweep: SweepConfig) -> None:
    """Raise a ConfigError for arguments that an algorithm does not take, or takes as whole numbers only."""
    searched = {key.partition(".")[2]: d for key, d in sweep.space.items() if key.startswith("hyperparameters.")}
    algos = sweep.space["algo"].values if "algo" in sweep.space else [sweep.trial_config({}).algo]
    for algo in algos:
        model_class = algorithm_class(algo)
        check_hyperparameters(model_class, {**sweep.trial_config({"algo": algo}).hyperparameters, **searched})
        types = {name: p.annotation for name, p in inspect.signature(model_class).parameters.items()}
        for name, distribution in searched.items():
            if distribution.is_continuous and types.get(name) in (int, "int"):
                problem = f"{distribution.kind} draws fractions, and {algo} takes whole numbers"
                raise ConfigError(f"search.hyperparameters.{name}", problem, hint="Write randint: [low, high]")


@dataclass(frozen=True)
class _Storage:
    """Where Ray Tune keeps what every node must reach.

    Attributes:
        path: The folder, or the path in a store.
        filesystem: The store, as pyarrow reaches it; None for a folder.
    """

    path: str
    filesystem: Any = None

    @classmethod
    def of(cls, sweep: SweepConfig, folder: Path) -> _Storage:
        """Return the storage of a sweep; raise a ConfigError for an address that cannot be written to."""
        if "://" not in sweep.storage_path:
            return cls(str(folder))
        from pyarrow.fs import FileSystem

        try:
            filesystem, path = FileSystem.from_uri(sweep.storage_path)
            filesystem.create_dir(path, recursive=True)
        except Exception as error:
            # Each kind of store raises its own.
            cause = " ".join(redact(str(error)).split())[:300]
            problem = f"{redact(sweep.storage_path)} cannot be used: {cause}"
            hint = (
                "Give a folder, or a store's address such as s3://bucket/sweeps, and its credentials as it takes them"
            )
            raise ConfigError("storage_path", problem, hint=hint) from error
        return cls(path.rstrip("/"), filesystem)


def _new_id(name: str) -> str:
    return f"{name}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _newest(storage: Path, sweep: SweepConfig) -> SweepFolder:
    """Return the newest sweep of this name.

    Raises:
        ConfigError: There is none, or it was of another sweep.yaml.
    """
    found = []
    for name in sorted(os.listdir(storage)) if storage.is_dir() else []:
        if name.startswith(f"{sweep.name}-") and SweepFolder(storage, name).record.is_file():
            folder = SweepFolder(storage, name)
            record = strict_json.loads(atomic.read_bytes(folder.record))
            if record.get("name") == sweep.name:
                found.append((folder, record))
    if not found:
        raise ConfigError("resume", f"{storage} holds no sweep named {sweep.name!r}", hint="Start it without --resume")
    folder, record = found[-1]
    before, now = record.get("config") or {}, redact_all(sweep.model_dump(mode="json"))
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        problem = f"{changed[0]} is not what {folder.sweep_id} was started with"
        raise ConfigError("resume", problem, hint="Put it back, or start a new sweep without --resume")
    return folder
