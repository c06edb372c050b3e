"""Owns what Ray Tune is told of a sweep: its search, scheduler, storage; and whether what it kept is whole."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_mlflow_ckpt.errors import ConfigError
from sb3_mlflow_ckpt.redaction import redact
from sb3_mlflow_ckpt.scale.search_space import PERTURBATION_FACTORS
from sb3_mlflow_ckpt.scale.sweep_config import SweepConfig
from sb3_mlflow_ckpt.scale.trial import TrialPlan, run_trial
from sb3_mlflow_ckpt.scale.trial_start import EXPLOIT

if TYPE_CHECKING:
    from ray.tune import Callback, Tuner

logger = logging.getLogger(__name__)

# Of each trial: the newest, and one more while it is handed over.
_TUNE_CHECKPOINTS = 2
_SNAPSHOT_SECONDS = "2"


@dataclass(frozen=True)
class Storage:
    """Where Ray Tune keeps what every node must reach.

    Attributes:
        path: The folder, or the path in a store.
        filesystem: The store, as pyarrow reaches it; None for a folder.
    """

    path: str
    filesystem: Any = None

    @classmethod
    def of(cls, sweep: SweepConfig, folder: Path) -> Storage:
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


def tuner(plan: TrialPlan, storage: Storage, callbacks: list[Callback], seed: int) -> Tuner:
    """Return Tune's own driver: restored where it has a snapshot, else anew; trials look for what is theirs.

    Args:
        plan: The sweep.
        storage: Where Tune keeps its state.
        callbacks: What is told of trials.
        seed: What values are drawn with.
    """
    from ray import tune
    from ray.tune.search.basic_variant import BasicVariantGenerator

    # Tune itself writes it seldom; what it does not know is made good by the trials.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", _SNAPSHOT_SECONDS)
    # It would ask for fewer reports, since it writes its snapshot for each that takes another's place.
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    # A failure is told in one line, which says where the whole trace is.
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    # A signal is passed on to it once the trials have saved.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    sweep, folder = plan.sweep, plan.folder
    resources = {"cpu": sweep.resources.cpu, "gpu": sweep.resources.gpu}
    trainable = tune.with_resources(tune.with_parameters(run_trial, plan=plan), resources)
    before, filesystem = f"{storage.path}/{folder.sweep_id}", storage.filesystem
    if tune.Tuner.can_restore(before, storage_filesystem=filesystem) and _is_whole(before, filesystem):
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
            callbacks=callbacks,
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


def _is_whole(path: str, filesystem: Any) -> bool:
    """Tell whether Tune's snapshot can be read: a driver that is killed may leave the half of one.

    Tune itself would begin an experiment of one trial, or end with an error; anew, each trial finds what is its own.
    """
    from pyarrow.fs import FileSelector, LocalFileSystem
    from ray import cloudpickle

    storage = filesystem or LocalFileSystem()
    try:
        names = {info.base_name: info.path for info in storage.get_file_info(FileSelector(path))}
        newest = max((name for name in names if name.startswith("experiment_state")), default=None)
        if newest is None:
            return False
        for name, read in (("tuner.pkl", cloudpickle.loads), (newest, json.loads)):
            with storage.open_input_stream(names[name]) as stream:
                read(stream.readall())
    except Exception as error:
        # Whatever half a pickle raises.
        logger.warning("What Ray Tune kept of the sweep cannot be read, and is begun anew: %s", redact(str(error)))
        return False
    return True
