"""Owns `CheckpointableEnv`, the wrapper that an environment's state is captured and restored through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium

from sb3_mlflow_ckpt.env_state import monitor_file, world
from sb3_mlflow_ckpt.env_state.generators import StateRefusedError, set_global_state
from sb3_mlflow_ckpt.env_state.layers import layers_of
from sb3_mlflow_ckpt.env_state.physics import SIMULATION, Simulation, is_simulation
from sb3_mlflow_ckpt.env_state.recording import Recording, before_reset, check_plain, process_state, replay
from sb3_mlflow_ckpt.env_state.worker import leave_ctrl_c_to_the_training

MAX_RECORDED_STEPS = 100_000


class CheckpointableEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """The outermost wrapper of an environment: it can say where the environment is, and bring one there.

    Where a layer has `get_checkpoint_state()` and `set_checkpoint_state(state)`, these are used; MuJoCo's simulations
    are copied; any other environment is brought there by its last reset and the actions since.

    Args:
        env: The environment, in all its other wrappers.
        max_recorded_steps: An episode that is longer cannot be captured by its actions.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], max_recorded_steps: int = MAX_RECORDED_STEPS) -> None:
        super().__init__(env)
        leave_ctrl_c_to_the_training()
        self._most = max_recorded_steps
        self._layers = layers_of(env)
        self._resets_inwardly: list[Any] = [layer.env for layer in self._layers if hasattr(layer.env, "was_real_done")]
        self._owner = next((at for at, layer in enumerate(self._layers) if _has_own_state(layer.env)), None)
        self._simulation: Simulation | None = None
        self._how = self._choose()
        self._recording: Recording | None = None
        self._is_fresh = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None, **others: Any
    ) -> tuple[Any, dict[str, Any]]:
        self._is_fresh = False
        arguments: dict[str, Any] = {**others, "seed": seed, "options": options}
        arguments = {name: value for name, value in arguments.items() if value is not None}
        if self._how != "replay":
            return self.env.reset(**arguments)
        recording = self._recording
        if recording is not None and any(env.was_real_done is False for env in self._resets_inwardly):
            answer = self.env.reset(**arguments)
            recording.add_reset(answer[0], arguments)
            return answer
        self._recording = None
        before = before_reset(self._layers)
        world.renew(self.unwrapped)
        answer = self.env.reset(**arguments)
        self._recording = Recording(before, arguments, self._most)
        self._recording.add_reset(answer[0])
        return answer

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        recording = self._recording
        if recording is None:
            return self.env.step(action)
        try:
            answer = self.env.step(action)
        except BaseException:
            recording.broken = "a step of the episode failed"
            raise
        recording.add(action, answer)
        return answer

    def capture_env_state(self) -> dict[str, Any]:
        """Return the state as plain values; `reason` is why it cannot be captured, or None. Never raises."""
        try:
            state = self._capture()
            problem = check_plain(state)
        except StateRefusedError as error:
            state, problem = {}, str(error)
        except Exception as error:
            state, problem = {}, f"capturing failed ({type(error).__name__}: {error})"
        if problem is None:
            return {"reason": None, **state}
        if self._how == "mujoco":
            # What a copy does not hold, a recording may: from the next reset on.
            self._how = "replay"
        return {"reason": problem, "how": None}

    def restore_env_state(self, state: Any) -> str | None:
        """Bring the environment to a captured state, and return None, or one sentence why it is not there.

        It can be reset and used either way. Never raises, and runs nothing that the state says.
        """
        kept = [layer.changed() for layer in self._layers]
        try:
            self._restore(state)
        except Exception as error:
            for layer, attributes in zip(self._layers, kept, strict=True):
                layer.apply(attributes)
            self._recording = None
            refused = isinstance(error, StateRefusedError)
            return str(error) if refused else f"restoring failed ({type(error).__name__}: {error})"
        return None

    def _choose(self) -> str:
        above = self._layers[: self._owner] if self._owner is not None else self._layers[:-1]
        if any(layer.opaque() for layer in above):
            return "replay"
        if self._owner is not None:
            return "own"
        base = self._layers[-1]
        if is_simulation(base.env):
            others = [name for name in base.opaque() if not _is_simulation_part(name)]
            if not others:
                self._simulation = Simulation(base.env)
                return "mujoco"
        return "replay"

    def _capture(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "how": self._how,
            "layers": [layer.name for layer in self._layers],
            "fresh": self._is_fresh,
            "generators": [layer.generator_states() for layer in self._layers],
            "process": process_state(),
            "monitor_files": [monitor_file.file_position(x.env) if x.is_monitor else None for x in self._layers],
        }
        if self._is_fresh:
            return {**state, "attributes": [layer.changed() for layer in self._layers]}
        if self._how == "replay":
            if self._recording is None or self._recording.broken:
                why = self._recording.broken if self._recording else "it was not recorded from its last reset on"
                raise StateRefusedError(str(why))
            return {**state, "recording": self._recording.get_state()}
        opaque = [name for layer in self._layers[: self._owner] for name in layer.opaque()]
        opaque = [name for name in opaque if self._owner is not None or not _is_simulation_part(name)]
        if opaque:
            raise StateRefusedError(f"{opaque[0]} has no plain form")
        state["attributes"] = [layer.changed() for layer in self._layers[: self._owner]]
        if self._owner is not None:
            owner: Any = self._layers[self._owner].env
            return {**state, "own": owner.get_checkpoint_state()}
        assert self._simulation is not None
        return {**state, "simulation": self._simulation.get_state()}

    def _restore(self, state: Any) -> None:
        if not isinstance(state, Mapping):
            raise StateRefusedError("there is no state of the environment")
        if state.get("reason") is not None or state.get("how") is None:
            raise StateRefusedError(f"it was not captured: {state.get('reason')}")
        if state.get("layers") != [layer.name for layer in self._layers]:
            raise StateRefusedError("it was captured in other wrappers, or of another environment")
        positions = state.get("monitor_files")
        if isinstance(positions, list) and len(positions) == len(self._layers):
            for layer, position in zip(self._layers, positions, strict=True):
                if layer.is_monitor:
                    monitor_file.cut_file(layer.env, position)
        how = state["how"]
        if state.get("fresh") is True:
            self._restore_attributes(state)
            self._recording = None
        elif how == "replay":
            self._recording = self._replay(state.get("recording"))
            self._how = "replay"
        elif how != self._how:
            raise StateRefusedError(f"it was captured as {how!r}, which this environment does not support")
        elif how == "own":
            self._restore_attributes(state)
            owner: Any = self._layers[self._owner or 0].env
            owner.set_checkpoint_state(state["own"])
        else:
            assert self._simulation is not None
            self._restore_attributes(state)
            self._simulation.set_state(state.get("simulation"))
        self._set_generators(state)
        self._is_fresh = state.get("fresh") is True

    def _restore_attributes(self, state: Mapping[str, Any]) -> None:
        layers = self._layers if state.get("fresh") is True else self._layers[: self._owner]
        attributes = state.get("attributes")
        if not isinstance(attributes, list) or len(attributes) != len(layers):
            raise StateRefusedError("the attributes of the wrappers are missing")
        for layer, stored in zip(layers, attributes, strict=True):
            layer.check(stored)
        for layer, stored in zip(layers, attributes, strict=True):
            layer.apply(stored)
        if state.get("how") == "own":
            # The owner's state may replace what it draws from.
            self._set_generators(state)

    def _set_generators(self, state: Mapping[str, Any]) -> None:
        generators = state.get("generators")
        if not isinstance(generators, list) or len(generators) != len(self._layers):
            raise StateRefusedError("the random number generators are missing")
        for layer, stored in zip(self._layers, generators, strict=True):
            layer.set_generator_states(stored)
        if state.get("process") is not None and process_state() is not None:
            set_global_state(state["process"])

    def _replay(self, recording: Any) -> Recording:
        try:
            return replay(self.env, self._layers, recording, self._most, with_attributes=True)
        except Exception:
            # Attributes without what they describe can be worse than a fresh environment's.
            for layer in self._layers:
                layer.apply({})
            return replay(self.env, self._layers, recording, self._most, with_attributes=False)


def _is_simulation_part(name: str) -> bool:
    return name.partition(" ")[0].partition(".")[2] in SIMULATION


def _has_own_state(env: gymnasium.Env[Any, Any]) -> bool:
    return all(callable(getattr(type(env), name, None)) for name in ("get_checkpoint_state", "set_checkpoint_state"))
