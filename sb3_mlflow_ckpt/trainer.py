"""Owns `train(config)`: the one place that composes everything. `python -m sb3_mlflow_ckpt.trainer --flags` runs it.

Importing it imports no torch, so that `--help` answers at once.
"""

from __future__ import annotations

from sb3_mlflow_ckpt import launch
from sb3_mlflow_ckpt.interruption import CommandGuard

if __name__ == "__main__":
    # Before anything slow is imported: what is on the command line is seen by everybody, and a signal may come.
    launch.conceal()
    CommandGuard().install()
    launch.listening()

import contextlib
import logging
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sb3_mlflow_ckpt.algorithms import (
    algorithm_class,
    algorithm_name,
    build_model,
    check_hyperparameters,
    default_learning_rate,
)
from sb3_mlflow_ckpt.config import TrainingConfig, differences
from sb3_mlflow_ckpt.dead_writers import sweep_dead_writers
from sb3_mlflow_ckpt.environments import close_env, make_env
from sb3_mlflow_ckpt.errors import (
    CheckpointSaveError,
    ConfigError,
    IncompatibleCheckpointError,
    TrainingInterrupted,
)
from sb3_mlflow_ckpt.metadata import CheckpointMetadata
from sb3_mlflow_ckpt.mirrors.mlflow import MLflowMirror
from sb3_mlflow_ckpt.origins import note_origin
from sb3_mlflow_ckpt.replication import Mirror
from sb3_mlflow_ckpt.resume import ResumeSource, check_spaces, newest_of_run, resolve_checkpoint
from sb3_mlflow_ckpt.runs.document import plain

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecEnv

    from sb3_mlflow_ckpt.callback import EpisodeCheckpointCallback

logger = logging.getLogger(__name__)

SMOKE_TIMESTEPS = 2_048
SMOKE_SECONDS = 30.0
# What makes it another training where it is given and differs.
_IDENTITY = ("env_id", "seed")
_INITIAL_ONLY = frozenset({"policy_kwargs.log_std_init", "policy_kwargs.ortho_init", "zero_policy"})


@dataclass(frozen=True)
class ResolvedTraining:
    """What a configuration comes to, before anything is trained.

    Attributes:
        config: The whole configuration, with what was inherited from the checkpoint.
        source: The checkpoint that it resumes, or None.
        differences: What it changes of the checkpoint's configuration.
        lacking: Arguments of the model that the checkpoint does not say and that nobody gave again.
    """

    config: TrainingConfig
    source: ResumeSource | None
    differences: dict[str, dict[str, Any]]
    lacking: tuple[str, ...] = ()

    @property
    def num_timesteps(self) -> int:
        """Environment steps that are behind it."""
        return self.source.metadata.num_timesteps if self.source is not None else 0


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended.

    Attributes:
        resolved: What was trained.
        num_timesteps: Environment steps of the whole training.
        episode: Finished episodes of the whole training.
        run_folder: Where its record and checkpoints are; None where there was nothing left to train.
        checkpoint: The newest checkpoint.
        mlflow_run_id: The MLflow run, if it is tracked.
        behind: Names of mirrors that still miss something.
    """

    resolved: ResolvedTraining
    num_timesteps: int
    episode: int
    run_folder: Path | None
    checkpoint: Path | None
    mlflow_run_id: str | None
    behind: list[str]


@dataclass(frozen=True)
class SweepPlace:
    """Where a training stands in a sweep.

    Attributes:
        facts: The field `sweep` of its record: `id`, `trial`, `generation`, `hyperparameters`, ...
        mlflow_parent: The MLflow run of the sweep, below which its own is made.
        source: The checkpoint that it goes on from, whatever its configuration names; None for the beginning.
    """

    facts: Mapping[str, Any]
    mlflow_parent: str | None = None
    source: ResumeSource | None = None


class Reporter(Protocol):
    """Shows a person how training goes. The library itself prints nothing."""

    def starting(self, resolved: ResolvedTraining) -> None:
        """Show what is about to be trained."""
        ...

    def callback(self, resolved: ResolvedTraining, checkpoints: EpisodeCheckpointCallback) -> BaseCallback:
        """Return a callback that shows the progress."""
        ...


def resolve_config(config: TrainingConfig, source: ResumeSource | None = None) -> ResolvedTraining:
    """Return what a configuration comes to: checkpoint resolved, settings inherited, seed drawn.

    Args:
        config: The settings.
        source: The checkpoint that is resumed; the one that the settings name where it is None.

    Raises:
        ConfigError: A setting cannot be used.
        CheckpointError: The checkpoint that it resumes is missing, corrupt, or of another algorithm.
        MirrorUnavailableError: The checkpoint is on an MLflow that does not answer.
    """
    if source is None and config.resume_own_run and config.own_run_id is not None:
        source = newest_of_run(
            config.own_run_id,
            checkpoint_dir=config.checkpoint_dir,
            tracked=config.mlflow,
            tracking_uri=config.tracking_uri,
            offline=config.start_offline,
        )
    if source is None and config.resume_from_checkpoint is not None:
        others: list[str] = []
        source = resolve_checkpoint(
            config.resume_from_checkpoint,
            checkpoint_dir=config.checkpoint_dir,
            agent_id=config.agent,
            tracking_uri=config.tracking_uri,
            accept=_accepted(config, others),
            algo=config.algo if "algo" in config.model_fields_set else None,
        )
        if source is None and others:
            logger.warning("auto begins a new training: %s. To go on from it, name its checkpoint", others[0])
    saved: dict[str, Any] = {}
    if source is not None:
        config, saved = _inherit(config, source)
    model_class = algorithm_class(config.algo)
    check_hyperparameters(model_class, config.hyperparameters)
    resolved = config.model_copy(
        update={
            "algo": config.algo if ":" in config.algo else config.algo.lower(),
            "agent_id": config.agent,
            "learning_rate": config.learning_rate
            if config.learning_rate is not None
            else default_learning_rate(model_class),
            "seed": config.seed if config.seed is not None else secrets.randbelow(2**31),
        }
    )
    changed = differences(plain(saved), resolved.to_json()) if source is not None else {}
    return ResolvedTraining(resolved, source, changed, tuple(saved.get("undescribed") or ()))


def _accepted(config: TrainingConfig, others: list[str]) -> Callable[[CheckpointMetadata], bool]:
    """Return which checkpoints `latest` and `auto` may take; what is of another training is added to `others`."""
    given = {key: getattr(config, key) for key in _IDENTITY if key in config.model_fields_set}

    def accept(metadata: CheckpointMetadata) -> bool:
        saved = metadata.config
        if config.mode != "smoke" and saved.get("mode") == "smoke":
            return False  # A trial must not become what the real training starts from.
        # The same command on every restart is one training. Another seed is another one; `latest` and a path override.
        other = [key for key in given if saved.get(key, given[key]) != given[key]]
        if config.resume_from_checkpoint != "auto" or not other:
            return True
        differences = ", ".join(f"{key} {saved[key]!r} and not {given[key]!r}" for key in other)
        others.append(f"run {metadata.run_id} has {differences}")
        return False

    return accept


def train(
    config: TrainingConfig, *, reporter: Reporter | None = None, sweep: SweepPlace | None = None
) -> TrainingResult:
    """Train an agent as the configuration says; on return its last checkpoint is committed.

    Args:
        config: What to train. Settings that were not given explicitly come from the checkpoint on a resume.
        reporter: Shows the progress.
        sweep: Where it stands in a sweep. Its thread need not be the main one, and hears no signals.

    Raises:
        ConfigError: A setting cannot be used.
        CheckpointError: A checkpoint cannot be resumed or written.
        MirrorUnavailableError: MLflow or MongoDB does not answer at the start.
        TrainingInterrupted: A signal ended it, after a checkpoint.
    """
    resolved = resolve_config(config, sweep.source if sweep is not None else None)
    _check_device(resolved.config.device)
    if reporter is not None:
        reporter.starting(resolved)
    if resolved.num_timesteps >= resolved.config.total_timesteps:
        metadata = resolved.source.metadata if resolved.source is not None else None
        episode = metadata.episode if metadata is not None else 0
        _release(resolved)
        # A process may have died over its last files, and no run begins here that would take them away.
        sweep_dead_writers(Path(resolved.config.checkpoint_dir) / resolved.config.agent)
        return TrainingResult(resolved, resolved.num_timesteps, episode, None, None, None, [])
    seed = _seed(resolved)
    env = make_env(resolved.config, seed=seed)
    try:
        model = _model(resolved, env, seed)
        return _learn(resolved, model, reporter, sweep)
    finally:
        _release(resolved)
        # A worker that was killed cannot be closed any more; the training's own error is what counts.
        with contextlib.suppress(OSError, EOFError):
            close_env(env, in_a_step=isinstance(sys.exc_info()[1], TrainingInterrupted))


def _check_device(device: str) -> None:
    """Raise a ConfigError where SB3 would train on the processor without a word."""
    import torch as th

    if device.partition(":")[0] == "cuda" and not th.cuda.is_available():
        raise ConfigError(
            "device",
            f"{device!r} is not there: torch {th.__version__} finds no GPU",
            hint="`auto` takes one where there is one, `cpu` trains without",
        )


def _learn(
    resolved: ResolvedTraining, model: BaseAlgorithm, reporter: Reporter | None, sweep: SweepPlace | None
) -> TrainingResult:
    from stable_baselines3.common.callbacks import CallbackList

    from sb3_mlflow_ckpt.callback import EpisodeCheckpointCallback
    from sb3_mlflow_ckpt.time_limit import TimeLimit

    config = resolved.config
    mlflow_mirror = MLflowMirror(
        config.tracking_uri,
        config.experiment_name,
        keep_last_n=config.mlflow_keep_last_n_checkpoints,
        keep_best_n=config.keep_best_n,
        keep_every_n_episodes=config.keep_every_n_episodes,
        parent_run_id=sweep.mlflow_parent if sweep is not None else None,
    )
    mirrors: list[Mirror] = [mlflow_mirror] if config.mlflow else []
    if config.mongo_uri is not None:
        from sb3_mlflow_ckpt.mirrors.mongo import MongoMirror

        mirrors.append(MongoMirror(config.mongo_uri, config.mongo_db))
    checkpoints = EpisodeCheckpointCallback(
        config.checkpoint_interval_episodes,
        config.keep_last_n_checkpoints,
        config.checkpoint_dir,
        keep_best_n=config.keep_best_n,
        keep_every_n_episodes=config.keep_every_n_episodes,
        agent_id=config.agent,
        run_id=config.run_id,
        run_name=config.run_name or f"{config.algo} {config.env_id}",
        config=config.to_json(),
        overrides=resolved.differences,
        sweep=sweep.facts if sweep is not None else None,
        handle_signals=sweep is None,
        mirrors=mirrors,
        start_offline=config.start_offline,
        on_save_failure=config.on_save_failure,
        resume_state=config.resume_state,
        save_replay_buffer=config.save_replay_buffer,
        heartbeat_seconds=config.heartbeat_seconds,
        sync_timeout_seconds=config.sync_timeout_seconds,
        grace_seconds=config.grace_seconds,
        max_unmirrored_checkpoints=config.max_unmirrored_checkpoints,
    )
    callbacks: list[BaseCallback] = [checkpoints]
    if config.mode == "smoke":
        callbacks.append(TimeLimit(SMOKE_TIMESTEPS, SMOKE_SECONDS))
    if reporter is not None:
        callbacks.append(reporter.callback(resolved, checkpoints))
    try:
        with checkpoints:
            model.learn(
                config.total_timesteps - model.num_timesteps,
                callback=CallbackList(callbacks),
                reset_num_timesteps=resolved.source is None,
                **_learn_options(model),
            )
    except (OSError, EOFError) as error:
        # Ctrl-C can break a worker's pipe before the training loop looks at the signal.
        if checkpoints.interrupted_by is not None and not isinstance(error, CheckpointSaveError):
            raise TrainingInterrupted(checkpoints.interrupted_by, checkpoints.latest_checkpoint) from error
        raise
    folder = checkpoints.folder
    return TrainingResult(
        resolved=resolved,
        num_timesteps=model.num_timesteps,
        episode=checkpoints.episode,
        run_folder=folder.path.absolute() if folder is not None else None,
        checkpoint=checkpoints.latest_checkpoint,
        mlflow_run_id=mlflow_mirror.run_id if config.mlflow else None,
        behind=checkpoints.behind,
    )


def _model(resolved: ResolvedTraining, env: VecEnv, seed: int) -> BaseAlgorithm:
    source = resolved.source
    if source is None:
        return build_model(resolved.config, env, seed=seed)
    from sb3_mlflow_ckpt.loading import check_foreign_spaces, restore
    from sb3_mlflow_ckpt.state.allocation import bounded

    trusted = resolved.config.trust_checkpoint
    # As the model will see it: SB3 turns images channel first, and the checkpoint's spaces are the model's.
    env = algorithm_class(resolved.config.algo)._wrap_env(env, verbose=0)
    check_spaces(source, env)
    check_foreign_spaces(source.path, source.uri, source.metadata, env)
    with bounded(None if trusted else source.path.stat().st_size):
        model = build_model(resolved.config, env, seed=seed)
    overridden = {key.partition(".")[2] for key in resolved.differences if key.startswith("hyperparameters.")}
    for name in sorted(overridden & _INITIAL_ONLY):
        logger.warning("%s has no effect: it sets initial parameters, and they come from the checkpoint", name)
    restore(model, source.path, source.uri, source.metadata, overridden=overridden, trusted=trusted)
    note_origin(model, source.uri, source.metadata, source.path, resolved.lacking, source.lease)
    return model


def _release(resolved: ResolvedTraining) -> None:
    if resolved.source is not None and resolved.source.lease is not None:
        resolved.source.lease.release()


def _inherit(config: TrainingConfig, source: ResumeSource) -> tuple[TrainingConfig, dict[str, Any]]:
    """Return the configuration with what it inherits, and the checkpoint's own."""
    from sb3_mlflow_ckpt.loading import inherited_settings

    given = config.model_fields_set
    saved = source.metadata.algo
    # The names are compared: the class of a stranger's name is not imported for that.
    if "algo" in given and algorithm_name(algorithm_class(config.algo)) != saved:
        raise IncompatibleCheckpointError(
            source.uri, f"it was trained with {saved!r}, this run asks for {config.algo!r}", f"Use --algo {saved}"
        )
    if "env_id" not in given and not source.metadata.config.get("env_id"):
        raise ConfigError("env_id", "is needed: the checkpoint does not say which environment it was trained in")
    own = {key: getattr(config, key) for key in given}
    parent = inherited_settings(source.path, source.uri, source.metadata, own, trusted=config.trust_checkpoint)
    return config.inherit(parent), parent


def _seed(resolved: ResolvedTraining) -> int:
    """Return the seed of this process: a resumed run must not replay the randomness that it has used already."""
    import numpy as np

    assert resolved.config.seed is not None
    if resolved.source is None:
        return resolved.config.seed
    return int(np.random.SeedSequence([resolved.config.seed, resolved.num_timesteps]).generate_state(1)[0])


def _learn_options(model: BaseAlgorithm) -> Mapping[str, Any]:
    if type(model).__name__ != "MaskablePPO":
        return {}
    from sb3_contrib.common.maskable.utils import is_masking_supported

    env = model.get_env()
    return {"use_masking": env is not None and is_masking_supported(env)}


if __name__ == "__main__":
    from sb3_mlflow_ckpt.cli import train_command

    train_command()
