"""Owns the model: what of an algorithm is captured at a checkpoint, and how it is put into a fresh one."""

from __future__ import annotations

import copy
import json
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.save_util import recursive_getattr, recursive_setattr
from stable_baselines3.common.vec_env import unwrap_vec_normalize

from sb3_mlflow_ckpt import tree
from sb3_mlflow_ckpt.algorithms import describe_constructor
from sb3_mlflow_ckpt.spaces import encode_space
from sb3_mlflow_ckpt.state import normalization
from sb3_mlflow_ckpt.state.images import Image, ImagePool
from sb3_mlflow_ckpt.state.sb3_data import Data, DataRecorder
from sb3_mlflow_ckpt.tree import NotPlainError

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

logger = logging.getLogger(__name__)

_COUNTERS = (
    "num_timesteps",
    "_total_timesteps",
    "_episode_num",
    "_n_updates",
    "_n_calls",
    "_current_progress_remaining",
    "exploration_rate",
    "old_count",
)
VARIABLES = "pytorch_variables"
"""SB3's name for the tensors that are no parameters."""
_INFO_BUFFERS = ("ep_info_buffer", "ep_success_buffer")
# SAC and its kin: what the coefficient's own setting decides. A run that overrides the setting starts it anew.
_ENTROPY_STATE = frozenset({"ent_coef_optimizer", "log_ent_coef", "ent_coef_tensor"})


class SpacesText(NamedTuple):
    """Two spaces as they are written: a JSON document, and the arrays that it counts."""

    document: str
    arrays: bytes


@dataclass(frozen=True)
class ModelCapture:
    """A model as it stood at one moment, sharing no memory with it.

    Attributes:
        data: SB3's own JSON of everything that is no tensor; None where it was read.
        state_dicts: Parameters and optimizers by SB3's names; tensors are clones.
        variables: Other tensors (`log_ent_coef`).
        state: Counters and settings; plain JSON but for numpy's scalars and arrays, which `plain` turns into it.
        arrays: Statistics of VecNormalize; empty without one.
        spaces: The `observation` and `action` space; None where it was captured, and where they have no plain form.
        spaces_text: The same, encoded; None where it was read.
        built: What the constructor would be told to build the model again.
        exact: What makes a resume exact (`state.exact`); None where it was not captured.
        files: Returns the bytes of a `.pth`, in pieces, for each of `state_dicts` and for the variables (`VARIABLES`);
            to be called by the thread that writes, before `release`. Empty where the capture was read.
        release: Gives the tensors' memory back: to be called when they are written.
    """

    data: Data | None
    state_dicts: dict[str, Any]
    variables: dict[str, Any]
    state: dict[str, Any]
    arrays: normalization.Arrays = field(default_factory=dict)
    spaces: Mapping[str, Any] | None = None
    spaces_text: SpacesText | None = None
    built: Mapping[str, Any] = field(default_factory=dict)
    exact: dict[str, Any] | None = None
    files: Mapping[str, Callable[[], Iterator[memoryview]]] = field(default_factory=dict)
    release: Callable[[], None] = lambda: None


class ModelRecorder:
    """Captures one model again and again; what never changes about it is worked out once.

    Args:
        model: Any SB3 algorithm.
    """

    def __init__(self, model: BaseAlgorithm) -> None:
        self._model = model
        self._data = DataRecorder()
        self._images = ImagePool()
        self._spaces: tuple[tuple[Any, Any], SpacesText | None] | None = None

    @property
    def waited(self) -> float:
        """The seconds that the last `capture` waited for a capture to be released."""
        return self._images.waited

    def capture(self, attributes: Mapping[str, Any] | None = None) -> ModelCapture:
        """Return a copy of everything that a checkpoint holds of the model.

        Waits while two captures are held, until one is released.

        Args:
            attributes: Values to record in place of the model's own, for attributes that are changed for a while.
        """
        image, release = self._images.take()
        try:
            return replace(self._captured(image, attributes), release=release)
        except BaseException:
            release()
            raise

    def _captured(self, image: Image, attributes: Mapping[str, Any] | None) -> ModelCapture:
        model = self._model
        state_names, variable_names = model._get_torch_save_params()
        excluded = set(model._excluded_save_params()) | {name.split(".")[0] for name in state_names + variable_names}
        data = {key: value for key, value in vars(model).items() if key not in excluded} | dict(attributes or {})
        infos = _copied_infos(model)
        state: dict[str, Any] = {
            "counters": {key: getattr(model, key) for key in _COUNTERS if hasattr(model, key)},
            "info_buffers": {key: list(buffer or ()) for key, buffer in infos.items()},
        }
        arrays: normalization.Arrays = {}
        normalized = model.get_vec_normalize_env()
        if normalized is not None:
            state["vec_normalize"], arrays = normalization.capture(normalized)
        parts = {name: image.copy(name, value) for name, value in model.get_parameters().items()}
        variables = image.copy(VARIABLES, {name: recursive_getattr(model, name) for name in variable_names})
        image.end()
        return ModelCapture(
            data=self._data.capture(data, infos),
            state_dicts={name: part.value for name, part in parts.items()},
            variables=variables.value,
            files={**{name: part.pieces for name, part in parts.items()}, VARIABLES: variables.pieces},
            state=state,
            arrays=arrays,
            spaces_text=self._encoded_spaces(),
            built=describe_constructor(model, attributes),
        )

    def _encoded_spaces(self) -> SpacesText | None:
        spaces = self._model.observation_space, self._model.action_space
        if self._spaces is None or any(old is not new for old, new in zip(self._spaces[0], spaces, strict=True)):
            self._spaces = spaces, _encoded(*spaces)
        return self._spaces[1]


def _encoded(observation: Any, action: Any) -> SpacesText | None:
    try:
        document, arrays = tree.encode({"observation": encode_space(observation), "action": encode_space(action)})
        return SpacesText(json.dumps(document), b"".join(piece.tobytes() for piece in tree.pieces(arrays)))
    except NotPlainError as error:
        logger.debug("The checkpoint cannot be loaded without an environment: %s", error)
        return None


def _copied_infos(model: Any) -> dict[str, Any]:
    """Return copies of what SB3 keeps of the last episodes: deques, but ARS has lists."""
    buffers = {key: getattr(model, key, None) for key in _INFO_BUFFERS}
    return {
        key: deque(map(_copied_info, buffer), buffer.maxlen) if isinstance(buffer, deque) else copy.deepcopy(buffer)
        for key, buffer in buffers.items()
    }


def _copied_info(info: Any) -> Any:
    return info.copy() if type(info) is dict else copy.copy(info)


def restore_model(
    model: BaseAlgorithm,
    capture: ModelCapture,
    *,
    overridden: Collection[str] = (),
) -> None:
    """Put a captured state into a model that was built from configuration.

    Parameters, optimizers' moments, counters and VecNormalize statistics come from the capture; whatever the
    constructor decides (learning rate, schedules, optimizer options, buffer sizes) stays as the model has it.

    Args:
        model: A fresh model with its environment.
        capture: What was saved; its `data` is not looked at.
        overridden: Hyperparameters whose value differs from the saved run's.

    Raises:
        ValueError: The capture lacks a part that the model has.
        RuntimeError: A tensor is of another shape (torch's own message).
    """
    skipped = _ENTROPY_STATE if "ent_coef" in overridden else frozenset({"ent_coef_tensor"})
    other_optimizer = "policy_kwargs.optimizer_class" in overridden
    if other_optimizer:
        logger.warning("Another optimizer_class: the new optimizer starts without the checkpoint's moments")
    for name in model._get_torch_save_params()[0]:
        if name in skipped:
            continue
        if name not in capture.state_dicts:
            raise ValueError(f"it holds no {name!r}, which {type(model).__name__} needs")
        target = recursive_getattr(model, name)
        if isinstance(target, th.optim.Optimizer):
            if not other_optimizer:
                _restore_optimizer(target, capture.state_dicts[name])
        else:
            getattr(target, "_orig_mod", target).load_state_dict(capture.state_dicts[name])
    variable_names = model._get_torch_save_params()[1]
    for name, value in capture.variables.items():
        # Only what the algorithm itself would save: a name is a path to any attribute.
        if name in variable_names and name not in skipped and value is not None:
            recursive_setattr(model, f"{name}.data", value.to(model.device))
    for name, value in capture.state.get("counters", {}).items():
        if hasattr(model, name):
            setattr(model, name, value)
    for name, items in capture.state.get("info_buffers", {}).items():
        setattr(model, name, deque(items, maxlen=model._stats_window_size))
    if hasattr(model, "weights"):
        # ARS perturbs this vector and not the policy, so the policy's parameters alone would be lost.
        model.weights = th.as_tensor(model.policy.parameters_to_vector(), device=model.device)
    env = model.get_env()
    normalized = unwrap_vec_normalize(env) if env is not None else None
    if normalized is not None and capture.arrays:
        normalization.restore(normalized, capture.arrays)
    elif capture.arrays:
        logger.warning(normalization.NOT_APPLIED)
    if model.use_sde:
        model.policy.reset_noise()  # type: ignore[operator]


def all_finite(model: BaseAlgorithm) -> bool:
    """Return whether every parameter is a number: a diverged policy must not become the newest checkpoint."""
    return all(bool(th.isfinite(parameter).all()) for parameter in model.policy.parameters())


def _restore_optimizer(optimizer: th.optim.Optimizer, state: Mapping[str, Any]) -> None:
    options = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    # The moments are the checkpoint's; options such as eps are the configuration's, which may override them.
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)


def plain(value: Any) -> Any:
    """Turn numpy scalars and arrays into JSON values."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return str(value)
