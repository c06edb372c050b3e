"""Owns the shell command that resumes a checkpoint: what the trainer prints last, and what pages offer to copy.

Never imports torch, Stable-Baselines3 or MLflow. A record may have been edited, or be of somebody's own script, so
nothing is taken for granted of what is in it.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from sb3_mlflow_ckpt.config import ENVIRONMENT_PREFIX, TrainingConfig, hidden_settings, inheritable_fields
from sb3_mlflow_ckpt.redaction import hidden_in
from sb3_mlflow_ckpt.trust import Refusal, not_taken_over, refusals

Program = Literal["trainer", "mlflow"]
Source = Literal["path", "uri"]

_TRAINER = ("python", "-m", "sb3_mlflow_ckpt.trainer")
_MLFLOW_RUN = ("mlflow", "run", ".", "--env-manager", "local")
_ADDRESSES = ("tracking_uri", "mongo_uri")
_DEFAULT_EXPERIMENT = "Default"


def resume_command(
    record: Mapping[str, Any], item: Mapping[str, Any], *, program: Program, source: Source
) -> str | None:
    """Return the shell command that resumes a checkpoint, without credentials.

    It repeats what a new launch would not take from the checkpoint by itself, and names a greater target where the
    checkpoint has reached its own.

    Args:
        record: The run's record.
        item: The checkpoint, as `checkpoint_paths` has it.
        program: `trainer` for the trainer itself, `mlflow` for `mlflow run` in the project's folder.
        source: `path` for the file on this machine, `uri` for the copy in MLflow.

    Returns:
        One line; None where there is no such way: the file is gone, MLflow has no copy, or nothing tells in which
        environment the run was trained.
    """
    checkpoint = _reference(item, source)
    if checkpoint is None or not _environment(record):
        return None
    settings: dict[str, Any] = {"resume_from_checkpoint": checkpoint}
    settings |= {key: value for key, value in _launch(record, item, source).items() if value is not None}
    words = _trainer_words if program == "trainer" else _mlflow_words
    return " ".join(words(settings, list(_not_inherited(_config(record)))))


def given_again(record: Mapping[str, Any], *, program: Program = "trainer") -> list[str]:
    """Return what a resume needs beside the command, since no record holds it: a sentence a credential."""
    config = _config(record)
    addresses = {"tracking_uri": _tracking_uri(record), "mongo_uri": _mongo(record).get("uri")}
    lines = []
    for key, address in addresses.items():
        if hidden_in(address):
            own = program == "trainer" or key != "tracking_uri"
            variable = f"{ENVIRONMENT_PREFIX}{key.upper()}" if own else "MLFLOW_TRACKING_URI"
            lines.append(f"{key} holds a password: give it again, as {variable}")
    for name in hidden_settings({key: config[key] for key in inheritable_fields() if key in config}):
        lines.append(f"{name} looks like a credential and is not recorded: give it again")
    return lines


def _reference(item: Mapping[str, Any], source: Source) -> str | None:
    if item.get("state") == "pruned":
        return None
    if source == "uri":
        uri = item.get("uri")
        return uri if isinstance(uri, str) and uri.startswith("runs:/") else None
    path = item.get("path")
    is_there = item.get("on_disk") is True and isinstance(path, str) and path
    return str(Path(path).absolute()) if is_there and isinstance(path, str) else None


def _environment(record: Mapping[str, Any]) -> str | None:
    """Return the environment that the checkpoint names: a resume needs it."""
    found = _config(record).get("env_id") if isinstance(record.get("config"), Mapping) else record.get("env_id")
    return _text(found)


def _launch(record: Mapping[str, Any], item: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Return the settings of a launch that the resumed run should have again; None for what is left to its default."""
    config, mlflow, mongo = _config(record), _mapping(record.get("mlflow")), _mongo(record)
    experiment = _text(config.get("experiment_name")) or _text(mlflow.get("experiment_name"))
    settings: dict[str, Any] = {
        "total_timesteps": _greater_target(config, item),
        "checkpoint_dir": _unless_default("checkpoint_dir", _checkpoint_dir(config, item)),
        "experiment_name": experiment if experiment != _DEFAULT_EXPERIMENT else None,
        "mongo_db": _unless_default("mongo_db", _text(mongo.get("database"))),
        "tracking_uri": _tracking_uri(record) if source == "uri" or config.get("tracking_uri") else None,
        "mongo_uri": _text(mongo.get("uri")),
        "mlflow": None if source == "uri" or _is_tracked(record) else "false",
    }
    # An address with a password is left to the environment variable that it can come from.
    return {key: None if hidden_in(value) else value for key, value in settings.items()}


def _greater_target(config: Mapping[str, Any], item: Mapping[str, Any]) -> int | None:
    done, target = _count(item.get("num_timesteps")), _count(config.get("total_timesteps"))
    target = target or TrainingConfig.model_fields["total_timesteps"].default
    if done is None or target is None or done < target:
        return None
    # A rollout that is longer than the target ends far behind it.
    return 2 * target if 2 * target > done else done + target


def _checkpoint_dir(config: Mapping[str, Any], item: Mapping[str, Any]) -> str | None:
    if "checkpoint_dir" in config:
        return _text(config["checkpoint_dir"])
    # Of a script's own run, the file tells: <checkpoint_dir>/<agent>/<run>/<file>.
    path = Path(str(item.get("path")))
    return str(path.parents[2]) if path.is_absolute() and len(path.parents) > 3 else None


def _tracking_uri(record: Mapping[str, Any]) -> str | None:
    """Return where the run was tracked: what the record of a started run says is absolute."""
    given = _config(record).get("tracking_uri")
    return _text(_mapping(record.get("mlflow")).get("tracking_uri")) or _text(given)


def _mongo(record: Mapping[str, Any]) -> dict[str, Any]:
    config, mongo = _config(record), _mapping(record.get("mongo"))
    return {
        "uri": config["mongo_uri"] if "mongo_uri" in config else mongo.get("uri"),
        "database": config["mongo_db"] if "mongo_db" in config else mongo.get("database"),
    }


def _is_tracked(record: Mapping[str, Any]) -> bool:
    config, mirrors = _config(record), record.get("mirrors")
    if "mlflow" in config or not isinstance(mirrors, list):
        return config.get("mlflow") is not False
    return bool(record.get("mlflow")) or "MLflow" in mirrors


def _not_inherited(config: Mapping[str, Any]) -> Iterator[Refusal]:
    """Yield what a resume in a new process would not take from the checkpoint by itself, once each."""
    inherited = {key: config[key] for key in inheritable_fields() if config.get(key) is not None}
    found = {refusal.setting: refusal for refusal in refusals(inherited)}
    hyperparameters = _mapping(config.get("hyperparameters"))
    kept = _mapping(not_taken_over(config).get("hyperparameters"))
    for key, value in hyperparameters.items():
        if key not in kept and value is not None:
            found[f"hyperparameters.{key}"] = Refusal(f"hyperparameters.{key}", value, "")
    # What holds `***` is told beside the command: given as it is, it would be taken at its word.
    return (refusal for refusal in found.values() if not hidden_in(refusal.value))


def _trainer_words(settings: Mapping[str, Any], again: list[Refusal]) -> Iterator[str]:
    yield from _TRAINER
    late = (*_ADDRESSES, "mlflow")
    for key in [key for key in settings if key not in late]:
        yield from _option(key, settings[key])
    for refusal in again:
        yield from map(shell_word, refusal.words)
    for key in [key for key in late if key in settings]:
        yield from _option(key, settings[key])


def _option(key: str, value: Any) -> tuple[str, str]:
    return f"--{key.replace('_', '-')}", shell_word(str(value))


def _mlflow_words(settings: Mapping[str, Any], again: list[Refusal]) -> Iterator[str]:
    # `mlflow run` decides where and as what it tracks; a parameter cannot.
    parameters = {key: value for key, value in settings.items() if key != "mlflow"}
    tracking_uri, experiment = parameters.pop("tracking_uri", None), parameters.pop("experiment_name", None)
    if tracking_uri is not None:
        yield f"MLFLOW_TRACKING_URI={shell_word(tracking_uri)}"
    yield from _MLFLOW_RUN
    if experiment is not None:
        yield from _option("experiment_name", experiment)
    for refusal in again:
        name, _, key = refusal.setting.partition(".")
        if key:
            # A parameter is given once: a mapping as a whole.
            parameters[name] = {**parameters.get(name, {}), key: refusal.value}
        else:
            parameters[name] = refusal.value
    for name, value in parameters.items():
        text = value if isinstance(value, str) else json.dumps(value)
        yield from ("-P", shell_word(f"{name}={text}"))


def shell_word(word: str) -> str:
    r"""Return a word as a shell reads it back: one that cannot be seen or pasted as it is, as `$'...\x1b...'`."""
    if word.isprintable():
        return shlex.quote(word)
    shown = []
    for character in word:
        if character in "\\'":
            shown.append(f"\\{character}")
        elif character.isprintable():
            shown.append(character)
        else:
            # Octal, since it ends by itself: a digit that follows belongs to the text.
            shown += [f"\\{byte:03o}" for byte in _as_bytes(character)]
    return f"$'{''.join(shown)}'"


def _as_bytes(character: str) -> bytes:
    try:
        return os.fsencode(character)
    except UnicodeEncodeError:
        return character.encode("utf-8", "surrogatepass")  # No file has it in its name: somebody edited the record.


def _config(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return _mapping(record.get("config"))


def _unless_default(key: str, value: str | None) -> str | None:
    return None if value == TrainingConfig.model_fields[key].default else value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
