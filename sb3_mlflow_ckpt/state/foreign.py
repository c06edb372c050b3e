"""Owns what can be had of a zip that SB3's own `save` wrote, without unpickling any of it.

SB3 writes its `data` as JSON. What JSON cannot hold stands there as a pickle with readable texts beside it. The pickles
are never decoded; the texts are, where they say exactly what the object was: a class, or a constant or linear schedule.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.errors import CheckpointCorruptError, CheckpointLoadError, ForeignCheckpointError
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, FileEntry, timestamp_now
from sb3_mlflow_ckpt.state.container import READ_ERRORS, Container, open_container
from sb3_mlflow_ckpt.state.embedded import STATE_MEMBER

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

    from sb3_mlflow_ckpt.state.model import ModelCapture

_PICKLE = ":serialized:"
_TYPE = ":type:"
_LARGEST_DATA = 512 * 2**20
_CLASS = re.compile(r"<class '(?P<module>[A-Za-z_][\w.]*)\.(?P<name>[A-Za-z_]\w*)'>")
_METHOD = re.compile(r"<function (?P<name>[A-Za-z_]\w*)\.\w+ at 0x[0-9a-f]+>")
_CONSTANT = re.compile(r"ConstantSchedule\(val=(?P<value>[-+.\deE]+)\)")
_LINEAR = re.compile(r"LinearSchedule\(start=(?P<value>[.\deE+-]+), end=0(?:\.0)?, end_fraction=1(?:\.0)?\)")
_NOT_TAKEN = frozenset({"policy", "env", "device", "verbose", "tensorboard_log", "_init_setup_model"})
_VARIABLES = ("pytorch_variables", "tensors")
_COMPARED = ("_shape", "dtype", "n", "start", "nvec")
_BOUNDS = ("low", "high")


def describe_foreign(path: Path, algo: str | None) -> CheckpointMetadata:
    """Return what a foreign zip says of itself in the form of a checkpoint's metadata.

    Its `config` holds the constructor's arguments that are plain, and `undescribed` names the others; `readable`
    beside it quotes what stands next to their pickles. Episode 0 begins here: SB3 does not count episodes.

    Args:
        path: The zip.
        algo: The algorithm, which such a zip does not name.

    Raises:
        ForeignCheckpointError: The algorithm is not given.
        CheckpointCorruptError: The zip cannot be read.
    """
    try:
        with open(path, "rb") as file:
            sha256 = atomic.digest(file)
            with open_container(file, path) as container:
                data, size = _read_data(container), container.size
                names = set(container.names)
    except CheckpointLoadError:
        raise
    except READ_ERRORS as error:
        raise CheckpointCorruptError(path, f"its zip cannot be read ({error})") from error
    if algo is None:
        raise ForeignCheckpointError(path, _candidates(names, data))
    from sb3_mlflow_ckpt.algorithms import algorithm_class, algorithm_name

    model_class = algorithm_class(algo)
    config, readable = _config(data, model_class)
    counters = {key: data.get(key) for key in ("num_timesteps", "_n_updates")}
    steps, updates = (v if isinstance(v, int) and 0 <= v < 2**63 else 0 for v in counters.values())
    name = algorithm_name(model_class)
    return CheckpointMetadata.model_validate(
        {
            "episode": 0,
            # No run of ours: a resumed run is the first of its chain.
            "run_id": "",
            "config": {"algo": name, **config},
            "timestamp": timestamp_now(),
            "agent_id": f"{name.rpartition(':')[2].lower()}_agent",
            "algo": name,
            "num_timesteps": steps,
            "n_updates": updates,
            "trigger": "foreign",
            "files": [FileEntry(name=path.name, bytes=size, sha256=sha256).model_dump()],
            "resume_state": {
                "restored": ["parameters", "optimizers", "counters"],
                "exact": False,
                "reason": "it was written by SB3's own save",
            },
            "readable": readable,
            "foreign": True,
        }
    )


def is_foreign(metadata: CheckpointMetadata) -> bool:
    """Return whether metadata was made by `describe_foreign`."""
    return bool((metadata.model_extra or {}).get("foreign"))


def read_foreign(path: Path, device: Any, *, sha256: str | None = None) -> ModelCapture:
    """Return the model in a foreign zip: tensors and counters.

    Raises:
        CheckpointCorruptError: It cannot be read.
    """
    from sb3_mlflow_ckpt.state import checked
    from sb3_mlflow_ckpt.state.archive import check_content, read_tensors
    from sb3_mlflow_ckpt.state.model import ModelCapture

    try:
        with open(path, "rb") as file:
            check_content(file, path, sha256)
            with open_container(file, path) as container:
                data = _read_data(container)
                tensors = read_tensors(container, device)
    except CheckpointLoadError:
        raise
    except READ_ERRORS as error:
        raise CheckpointCorruptError(path, f"its zip cannot be read ({checked.reason(error)})") from error
    variables = [tensors.pop(name) for name in _VARIABLES if name in tensors]
    return ModelCapture(
        data=None,
        state_dicts=tensors,
        variables=checked.variables(variables[0] if variables else {}, path),
        state={"counters": checked.counters(data, path), "info_buffers": {}},
        spaces={key: data.get(f"{key}_space") for key in ("observation", "action")},
    )


def fit_older(capture: ModelCapture, model: BaseAlgorithm) -> None:
    """Change what older versions of SB3 saved into what this one loads, as its own `load` does."""
    policy, expected = capture.state_dicts.get("policy"), model.policy.state_dict()
    if isinstance(policy, dict):
        # Before 1.7 a shared features extractor was saved once.
        for key in expected:
            shared = f"features_extractor.{key.partition('.')[2]}"
            if key not in policy and key.split("_")[0] in ("pi", "vf") and shared in policy:
                policy[key] = policy[shared]
    optimizer = capture.state_dicts.get("policy.optimizer")
    own = getattr(model.policy, "optimizer", None)
    if isinstance(optimizer, dict) and own is not None:
        groups = optimizer.get("param_groups")
        group = groups[0] if isinstance(groups, list) and groups and isinstance(groups[0], dict) else {}
        parameters = group.get("params")
        count = len(own.param_groups[0]["params"])
        if isinstance(parameters, list) and len(parameters) == 2 * count:
            # Before 2.4 DQN's optimizer also held the target network, which it never changed.
            group["params"] = parameters[:count]
            optimizer["state"] = {k: v for k, v in dict(optimizer.get("state", {})).items() if k in parameters[:count]}


def space_difference(texts: Any, space: Any, *, bounds: bool) -> str:
    """Return how a space differs from the readable part of a pickled one, or an empty text.

    Args:
        texts: What stands in `data`.
        space: The environment's.
        bounds: Whether the bounds count: actions are scaled by them.
    """
    if not isinstance(texts, Mapping):
        return ""
    here = {name: getattr(space, name, None) for name in (*_COMPARED, *(_BOUNDS if bounds else ()))}
    here["_shape"] = list(space.shape) if space.shape is not None else None
    for name, value in here.items():
        saved = texts.get(name)
        if saved is None or value is None or (name == "_shape" and "spaces" in texts):
            continue
        if " ".join(str(saved).split()) != " ".join(str(value).split()):
            return f"{name.strip('_')} {str(saved)[:80]} in the zip, {str(value)[:80]} here"
    return ""


def _read_data(container: Container) -> dict[str, Any]:
    if STATE_MEMBER in container:
        raise CheckpointCorruptError(container.where, "it is a checkpoint of sb3_mlflow_ckpt that does not verify")
    if "data" not in container:
        raise CheckpointCorruptError(container.where, "it holds no 'data', so SB3 did not write it")
    try:
        data = container.read_json("data", _LARGEST_DATA)
    except READ_ERRORS as error:
        raise CheckpointCorruptError(container.where, f"its 'data' cannot be read ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointCorruptError(container.where, "its 'data' is not a JSON object")
    return data


def _config(data: Mapping[str, Any], model_class: type) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the plain settings in `data`, with the names of the others, and what is readable of these."""
    hyperparameters: dict[str, Any] = {}
    readable: dict[str, str] = {}
    for name in inspect.signature(model_class).parameters:
        value = data.get(name)
        if name in _NOT_TAKEN or (value is None and name != "policy_kwargs"):
            continue
        if not (isinstance(value, Mapping) and _PICKLE in value) and value is not None:
            hyperparameters[name] = value
            continue
        understood = _read_text(name, value or {})
        if understood is None:
            readable[name] = _quoted(value or {})
        else:
            hyperparameters[name] = understood
    arch = hyperparameters.get("policy_kwargs", {})
    if isinstance(arch, dict) and isinstance(arch.get("net_arch"), list) and arch["net_arch"][:1]:
        first = arch["net_arch"][0]
        if isinstance(first, dict):
            # The form before 1.8.
            hyperparameters["policy_kwargs"] = {**arch, "net_arch": first}
    if str(hyperparameters.get("replay_buffer_class")).endswith(":NStepReplayBuffer"):
        for name in ("replay_buffer_class", "replay_buffer_kwargs"):
            hyperparameters.pop(name, None)
    policy = data.get("policy_class")
    policy_name = _class_name(policy) if isinstance(policy, Mapping) else None
    if policy_name is None:
        readable["policy"] = _quoted(policy if isinstance(policy, Mapping) else {})
    config = {
        "policy": policy_name,
        "learning_rate": hyperparameters.pop("learning_rate", None),
        "seed": hyperparameters.pop("seed", None),
        "hyperparameters": hyperparameters,
        "undescribed": list(readable),
    }
    return config, readable


def _read_text(name: str, value: Mapping[str, Any]) -> Any:
    """Return what the texts beside a pickle say exactly, or None."""
    schedule = str(value.get("value_schedule"))
    if match := _CONSTANT.fullmatch(schedule):
        return _float(match["value"])
    if match := _LINEAR.fullmatch(schedule):
        return f"lin_{match['value']}"
    if name == "policy_kwargs" and value.get(_TYPE) == "<class 'dict'>":
        items = {key: _read_item(item) for key, item in value.items() if key not in (_TYPE, _PICKLE)}
        return None if any(item is NotImplemented for item in items.values()) else items
    return _class_name(value)


def _read_item(item: Any) -> Any:
    if not isinstance(item, str):
        return item
    match = _CLASS.fullmatch(item)
    # Any other text may be a text, or how some object is printed: nobody can tell.
    return f"{match['module']}:{match['name']}" if match else NotImplemented


def _class_name(value: Mapping[str, Any]) -> str | None:
    """Return `module:Name` of a class that was pickled, by its module and the names of its methods."""
    if "ABCMeta" not in str(value.get(_TYPE)) and str(value.get(_TYPE)) != "<class 'type'>":
        return None
    names = {match["name"] for item in value.values() if (match := _METHOD.fullmatch(str(item)))}
    module = value.get("__module__")
    if len(names) != 1 or not isinstance(module, str) or not re.fullmatch(r"[A-Za-z_][\w.]*", module):
        return None
    return f"{module}:{names.pop()}"


def _quoted(value: Mapping[str, Any]) -> str:
    texts = {key: item for key, item in value.items() if key not in (_PICKLE, "__doc__") and item is not None}
    shown = ", ".join(f"{key} {item}" for key, item in texts.items())
    return " ".join(shown.split())[:300]


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _candidates(names: set[str], data: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the algorithms that a zip's members and plain values fit."""
    if "n_delta" in data:
        return ("ars",)
    if "actor.optimizer.pth" in names:
        if "policy_delay" in data and "ent_coef" not in data:
            return ("td3", "ddpg")
        if "top_quantiles_to_drop_per_net" in data:
            return ("tqc",)
        return ("sac", "crossq")
    if "exploration_fraction" in data:
        return ("qrdqn",) if "n_quantiles" in str(data.get("policy_kwargs")) else ("dqn", "qrdqn")
    if "cg_max_steps" in data:
        return ("trpo",)
    if "clip_range" in data:
        return ("ppo", "maskable_ppo", "recurrent_ppo")
    return ("a2c",) if "gae_lambda" in data else ()
