"""Owns the state of a MuJoCo simulation: what the next step reads, and the derived quantities that environments read.

Rewards are differences to quantities of the step before (the centre of mass of Humanoid, contact forces of Ant), which
the simulator's own state does not contain, so every array of floating-point numbers comes back as it was. Integers of
the simulation are addresses and counts that C code trusts: they are never taken from a file, but computed anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from zlib import crc32

import numpy as np

from sb3_mlflow_ckpt.env_state.generators import StateRefusedError

# Attributes of a MujocoEnv that hold the simulation or show it.
SIMULATION = frozenset({"model", "data", "mujoco_renderer"})
# They stand in memory that each step lays out anew.
_TRANSIENT = ("efc_", "iefc_", "contact", "plugin")
_GREATEST = 1e10


def is_simulation(env: Any) -> bool:
    """Return whether an environment is gymnasium's MujocoEnv, and its model one whose state is known to be whole."""
    if not any(kind.__module__ == "gymnasium.envs.mujoco.mujoco_env" for kind in type(env).__mro__):
        return False
    import mujoco

    model, data = env.model, env.data
    sleeps = int(getattr(mujoco.mjtEnableBit, "mjENBL_SLEEP", 0)) & model.opt.enableflags
    return not (model.nplugin or model.nflex or sleeps or getattr(data, "history", np.empty(0)).size)


class Simulation:
    """The model and data of one environment.

    Args:
        env: A MujocoEnv that `is_simulation` found right.
    """

    def __init__(self, env: Any) -> None:
        import mujoco

        self._mujoco, self._env = mujoco, env
        # Those that have their size before a first step have it always.
        fresh = mujoco.MjData(env.model)
        self._model = self._model_checksum()
        self._fields = [
            name
            for name in dir(fresh)
            if not name.startswith(("__", *_TRANSIENT)) and _is_state(getattr(fresh, name, None))
        ]

    def get_state(self) -> dict[str, Any]:
        """Return the simulation as arrays, and a checksum of its model."""
        if self._model_checksum() != self._model:
            raise StateRefusedError("the environment changes its MuJoCo model")
        data = self._env.data
        arrays = {name: np.array(getattr(data, name)) for name in self._fields}
        return {"time": float(data.time), "model": self._model, "arrays": arrays}

    def set_state(self, state: Any) -> None:
        """Put back what `get_state` returned.

        Raises:
            StateRefusedError: It is no such state, or of another model.
        """
        arrays = self._checked(state)
        model, data = self._env.model, self._env.data
        self._mujoco.mj_resetData(model, data)
        for computed in (False, True):
            data.time = state["time"]
            for name, array in arrays.items():
                getattr(data, name)[:] = array
            if not computed:
                # Contacts and addresses, computed from checked numbers; what it overwrites is then set again.
                self._mujoco.mj_forward(model, data)

    def _checked(self, state: Any) -> Mapping[str, Any]:
        if not isinstance(state, Mapping) or not isinstance(state.get("arrays"), Mapping):
            raise StateRefusedError("the state of the simulation is missing")
        time, arrays = state.get("time"), state["arrays"]
        if state.get("model") != self._model_checksum():
            raise StateRefusedError("the MuJoCo model is not the one that the state was captured from")
        if not isinstance(time, float) or not np.isfinite(time) or set(arrays) != set(self._fields):
            raise StateRefusedError("the state of the simulation has other quantities, as of another MuJoCo version")
        for name, array in arrays.items():
            own = getattr(self._env.data, name)
            if not isinstance(array, np.ndarray) or (array.dtype, array.shape) != (own.dtype, own.shape):
                raise StateRefusedError(f"{name} of the simulation has another shape")
            if array.dtype.kind == "f" and array.size and not np.all(np.abs(array) < _GREATEST):
                raise StateRefusedError(f"{name} of the simulation is not finite")
        return dict(arrays)

    def _model_checksum(self) -> int:
        model = self._env.model
        content = np.empty(self._mujoco.mj_sizeModel(model), dtype=np.uint8)
        self._mujoco.mj_saveModel(model, None, content)
        return crc32(content.data)


def _is_state(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.size > 0 and value.dtype.kind in "fb" and value.flags.writeable
