"""Owns the way from a checkpoint to a model: built anew from settings that were checked, then filled with its tensors.

Nothing that is pickled in a checkpoint is opened here unless the caller says that the file is trusted.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_mlflow_ckpt import trust
from sb3_mlflow_ckpt.config import Layer, TrainingConfig, build_config, inheritable_fields
from sb3_mlflow_ckpt.errors import (
    CheckpointLoadError,
    ForeignCheckpointError,
    IncompatibleCheckpointError,
    UntrustedCheckpointError,
)
from sb3_mlflow_ckpt.layout import model_path
from sb3_mlflow_ckpt.metadata import CheckpointMetadata
from sb3_mlflow_ckpt.provenance import version_differences
from sb3_mlflow_ckpt.state.embedded import read_part
from sb3_mlflow_ckpt.state.foreign import describe_foreign, is_foreign
from sb3_mlflow_ckpt.verification import verify_checkpoint

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

    from sb3_mlflow_ckpt.state.model import ModelCapture

logger = logging.getLogger(__name__)

# What decides what a policy computes: a default in its place would be silently wrong.
_DECISIVE = ("policy", "policy_kwargs")
_BUILT = ("policy", "learning_rate", "seed", "hyperparameters", "undescribed")
_PICKLED_STATISTICS = (
    "Statistics of VecNormalize in a file beside the zip (vecnormalize.pkl) are a pickle and are not read: if you "
    "trust it, put them in with VecNormalize.load; until then they start anew"
)


def read_source(path: str | Path, algo: str | None = None) -> CheckpointMetadata:
    """Return the verified metadata of a checkpoint, or what a zip of SB3's own says of itself.

    Args:
        path: The zip, or its metadata file.
        algo: The algorithm of a zip that SB3's own `save` wrote.

    Raises:
        CheckpointNotFoundError: There is no such file.
        ForeignCheckpointError: SB3 wrote it and the algorithm is not given.
        CheckpointLoadError: It does not verify.
    """
    try:
        return verify_checkpoint(path)
    except ForeignCheckpointError:
        return describe_foreign(model_path(Path(path)), algo)


def inherited_settings(
    path: Path, where: object, metadata: CheckpointMetadata, own: Mapping[str, Any], *, trusted: bool = False
) -> dict[str, Any]:
    """Return the configuration that a launch inherits from a checkpoint, checked.

    Args:
        path: The zip.
        where: Its path or URI, for an error.
        metadata: Its metadata.
        own: The settings that this launch gives itself.
        trusted: Whether names, numbers and pickles are believed.

    Raises:
        UntrustedCheckpointError: It asks for something that could run code, or write, read or fill something.
        CheckpointLoadError: It does not say what decides the policy.
    """
    config = dict(metadata.config)
    if not ({"algo", "hyperparameters"} <= config.keys()):
        # Whoever saved it wrote a configuration of their own: the model itself says how it was built.
        config |= {
            key: value for key, value in (read_part(path, "built") or {}).items() if key in _BUILT and value is not None
        }
    config |= {"algo": metadata.algo, "agent_id": metadata.agent_id}
    return _checked(config, path, where, metadata, own, inheritable_fields(), trusted=trusted)


def load(
    path: str | Path,
    env: Any = None,
    *,
    device: str = "auto",
    algo: str | None = None,
    policy: str | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    trusted: bool = False,
) -> tuple[BaseAlgorithm, CheckpointMetadata, Path, Sequence[str]]:
    """Return the model of a checkpoint, its metadata, its zip, and the arguments that nobody knows any more.

    See `checkpoints.load_checkpoint`.
    """
    from sb3_mlflow_ckpt.algorithms import algorithm_class, algorithm_name

    given = None if algo is None else algorithm_name(algorithm_class(algo))
    zip_path = model_path(Path(path))
    metadata = read_source(path, given)
    if given is not None and given != metadata.algo:
        raise IncompatibleCheckpointError(
            zip_path, f"it was trained with {metadata.algo!r}, not with {given!r}", "Leave algo out"
        )
    arguments = dict(hyperparameters or {})
    # The one constructor's argument that is a setting of its own.
    rate = arguments.pop("learning_rate", None)
    own = {"algo": given, "policy": policy, "learning_rate": rate, "hyperparameters": arguments or None}
    own = {key: value for key, value in own.items() if value is not None}
    try:
        if trusted:
            model = _load_trusted(zip_path, env, device, metadata)
            lacking: Sequence[str] = ()
        else:
            model, lacking = _load_checked(zip_path, env, device, metadata, own)
    except CheckpointLoadError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointLoadError(zip_path, reason[:400], version_differences(metadata.versions)) from error
    return model, metadata, zip_path, lacking


def restore(
    model: BaseAlgorithm,
    path: Path,
    where: object,
    metadata: CheckpointMetadata,
    *,
    overridden: Collection[str] = (),
    trusted: bool = False,
    capture: ModelCapture | None = None,
) -> None:
    """Put a checkpoint's tensors and counters into a model that was built for them.

    Args:
        model: A fresh model with its environment.
        path: The zip.
        where: Its path or URI, for an error.
        metadata: Its verified metadata; the content must still have its hash.
        overridden: Hyperparameters whose value differs from the saved run's.
        trusted: Whether sizes are believed.
        capture: What was read of it already.

    Raises:
        CheckpointLoadError: It is not what was verified, or does not fit the model.
    """
    from sb3_mlflow_ckpt.state.foreign import fit_older
    from sb3_mlflow_ckpt.state.model import restore_model

    capture = capture or _read(path, metadata, model.device, trusted=trusted)
    try:
        if is_foreign(metadata):
            fit_older(capture, model)
            if model.get_vec_normalize_env() is not None:
                logger.warning(_PICKLED_STATISTICS)
        restore_model(model, capture, overridden=overridden)
    except CheckpointLoadError:
        raise
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, MemoryError) as error:
        reason = " ".join(str(error).split())[:400]
        raise CheckpointLoadError(where, reason, version_differences(metadata.versions)) from error


def check_foreign_spaces(path: Path, where: object, metadata: CheckpointMetadata, env: Any) -> None:
    """Raise an IncompatibleCheckpointError where a zip of SB3's own is readably of other spaces than `env`'s."""
    if is_foreign(metadata):
        _check_spaces(where, metadata, _read(path, metadata, "cpu"), env)


def _read(path: Path, metadata: CheckpointMetadata, device: Any, *, trusted: bool = False) -> ModelCapture:
    sha256 = metadata.files[0].sha256 if metadata.files else None
    if is_foreign(metadata):
        from sb3_mlflow_ckpt.state.foreign import read_foreign

        return read_foreign(path, device, sha256=sha256)
    from sb3_mlflow_ckpt.state.archive import read_archive

    return read_archive(path, device, sha256=sha256, trusted=trusted)


def _checked(
    config: Mapping[str, Any],
    path: Path,
    where: object,
    metadata: CheckpointMetadata,
    own: Mapping[str, Any],
    names: Collection[str],
    *,
    trusted: bool = False,
) -> dict[str, Any]:
    config = dict(config)
    own_arguments = own.get("hyperparameters") or {}
    undescribed = config.get("undescribed")
    lacking = [name for name in undescribed or () if name not in own_arguments and own.get(name) is None]
    if trusted:
        from sb3_mlflow_ckpt.state.pickled import unpickled_arguments

        found = unpickled_arguments(path, where, lacking)
        if "policy" in found:
            config["policy"] = found.pop("policy")
            lacking.remove("policy")
        config["hyperparameters"] = {**config.get("hyperparameters", {}), **found}
        lacking = [name for name in lacking if name not in found]
    readable = (metadata.model_extra or {}).get("readable", {})
    for name in [name for name in _DECISIVE if name in lacking]:
        text = f" ({readable[name]})" if readable.get(name) else ""
        flag = "--policy module:Class" if name == "policy" else "--hyperparameters '{policy_kwargs: {...}}'"
        raise UntrustedCheckpointError(
            where,
            f"its {name} is known only as a pickle{text}, and another one would change what the policy computes",
            f"Give it again ({flag}; load_checkpoint takes policy= and hyperparameters=), or trust the file with all "
            "that it may run: --trust-checkpoint, or load_checkpoint(..., trusted=True)",
        )
    if lacking:
        logger.warning(
            "The checkpoint does not say what %s was: give it again, or the default is taken", ", ".join(lacking)
        )
    config["undescribed"] = lacking
    if trusted:
        return config
    kept = trust.not_taken_over(config)
    if kept.get("hyperparameters") != config.get("hyperparameters") and "tensorboard_log" not in own_arguments:
        logger.warning("tensorboard_log is not taken over from the checkpoint: give it again to write there")
    trust.check_settings(trust.stranger_settings(kept, own, names), where)
    return kept


def _load_trusted(path: Path, env: Any, device: str, metadata: CheckpointMetadata) -> BaseAlgorithm:
    """Load as SB3 does, with everything that is pickled."""
    from stable_baselines3.common.vec_env import unwrap_vec_normalize

    from sb3_mlflow_ckpt.algorithms import algorithm_class
    from sb3_mlflow_ckpt.state import normalization

    model = algorithm_class(metadata.algo).load(path, env=env, device=device)
    if is_foreign(metadata):
        return model
    vec_env = model.get_env()
    normalized = unwrap_vec_normalize(vec_env) if vec_env is not None else None
    arrays = _read(path, metadata, "cpu", trusted=True).arrays
    if normalized is not None and arrays:
        normalization.restore(normalized, arrays)
    elif env is not None and arrays:
        logger.warning(normalization.NOT_APPLIED)
    return model


def _load_checked(
    path: Path, env: Any, device: str, metadata: CheckpointMetadata, own: Mapping[str, Any]
) -> tuple[BaseAlgorithm, Sequence[str]]:
    from stable_baselines3.common.utils import get_device

    from sb3_mlflow_ckpt.algorithms import Spaces, algorithm_class, build_model
    from sb3_mlflow_ckpt.state.allocation import bounded

    capture = _read(path, metadata, get_device(device))
    config = _model_settings(capture, metadata)
    config = _checked(config, path, path, metadata, own, ("algo", *_BUILT[:4]))
    model_class = algorithm_class(metadata.algo)
    # Actions are scaled by the bounds, images turned by the kind: the spaces decide as much as the weights do.
    if env is not None:
        where_to_act: Any = model_class._wrap_env(env, 0)
        _check_spaces(path, metadata, capture, where_to_act)
    elif capture.spaces is None or is_foreign(metadata):
        raise CheckpointLoadError(path, "its spaces are not in it in a form that can be read", "Give env=...")
    else:
        where_to_act = Spaces(capture.spaces["observation"], capture.spaces["action"])
    # `tensorboard_log` and the like are this launch's; what it gives wins.
    merged = {**config, **own, "hyperparameters": {**config["hyperparameters"], **own.get("hyperparameters", {})}}
    values = {key: merged[key] for key in ("algo", *_BUILT[:4]) if merged.get(key) is not None}
    # A function is no setting of a configuration: only a script can give one.
    schedule: Any = values.pop("learning_rate") if callable(values.get("learning_rate")) else None
    training = build_config([Layer("the checkpoint's config", {**values, "device": device})])
    with bounded(path.stat().st_size):
        model = build_model(training, where_to_act, seed=_continued_seed(training, metadata))
    model.seed = training.seed
    if schedule is not None:
        model.learning_rate = schedule
        model._setup_lr_schedule()
    restore(model, path, path, metadata, capture=capture)
    return model, config["undescribed"]


def _model_settings(capture: ModelCapture, metadata: CheckpointMetadata) -> dict[str, Any]:
    """Return the settings that the model itself described; what has no plain form there may have one in the config."""
    config = metadata.config
    saved = config.get("hyperparameters")
    saved = saved if isinstance(saved, Mapping) else {}
    built = {key: capture.built[key] for key in _BUILT if capture.built.get(key) is not None}
    undescribed = [str(name) for name in built.get("undescribed", config.get("undescribed")) or ()]
    arguments = built.get("hyperparameters", saved)
    arguments = arguments if isinstance(arguments, Mapping) else {}
    arguments = {**arguments, **{name: saved[name] for name in undescribed if name in saved}}
    lacking = [name for name in undescribed if name not in arguments]
    if "learning_rate" in lacking and config.get("learning_rate") is not None:
        lacking.remove("learning_rate")
    if not built and "hyperparameters" not in config:
        # An early checkpoint whose configuration somebody wrote by hand.
        lacking.append("policy_kwargs")
    settings = {key: config.get(key) for key in ("policy", "learning_rate", "seed")} | built
    return {**settings, "algo": metadata.algo, "hyperparameters": arguments, "undescribed": lacking}


def _check_spaces(where: object, metadata: CheckpointMetadata, capture: ModelCapture, env: Any) -> None:
    from stable_baselines3.common.utils import check_for_correct_spaces

    from sb3_mlflow_ckpt.environments import describe_space
    from sb3_mlflow_ckpt.state.foreign import space_difference

    try:
        if not is_foreign(metadata) and capture.spaces is not None:
            check_for_correct_spaces(env, capture.spaces["observation"], capture.spaces["action"])
            return
    except ValueError as error:
        raise IncompatibleCheckpointError(where, str(error), "Give the environment that it was trained in") from error
    for kind, space in (("observation", env.observation_space), ("action", env.action_space)):
        if is_foreign(metadata):
            texts = (capture.spaces or {}).get(kind)
            difference = space_difference(texts, space, bounds=kind == "action")
        else:
            saved, here = metadata.spaces.get(kind), describe_space(space)
            difference = f"{saved} in the checkpoint, {here} here" if saved not in (None, here) else ""
        if difference:
            raise IncompatibleCheckpointError(
                where,
                f"{kind.capitalize()} spaces do not match: {difference}",
                "Give the environment that it was trained in",
            )


def _continued_seed(config: TrainingConfig, metadata: CheckpointMetadata) -> int | None:
    """Return what seeds a model that goes on: it must not replay the randomness that it has used already."""
    import numpy as np

    if config.seed is None or metadata.num_timesteps == 0:
        return config.seed
    return int(np.random.SeedSequence([config.seed, metadata.num_timesteps]).generate_state(1)[0])
