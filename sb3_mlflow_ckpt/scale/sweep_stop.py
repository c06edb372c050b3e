"""Owns how trials save before their sweep is stopped: Ray Tune would end their processes in the middle of a step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from sb3_mlflow_ckpt.scale.ray_task import StopFlag, is_raised

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_ANSWER_SECONDS = 5.0


class SweepFlag(StopFlag):
    """Tells trials that their sweep is stopped, and its driver which of them have saved: an actor beside the driver."""

    def __init__(self) -> None:
        super().__init__()
        self._saved: set[str] = set()

    def note(self, trial_id: str) -> None:
        """Take note of a trial that has saved."""
        self._saved.add(trial_id)

    def saved(self) -> set[str]:
        """Return the ids of the trials that have saved."""
        return self._saved


def sweep_flag() -> Any:
    """Start the flag of a sweep beside its driver, whichever nodes go; return its handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(SweepFlag).options(num_cpus=0, scheduling_strategy=here).remote()


def have_saved(flag: Any, trials: Sequence[Any]) -> bool:
    """Tell whether all of Tune's trials that train have saved; True where that cannot be known."""
    import ray
    from ray.exceptions import RayError

    running = {str(trial.trial_id) for trial in trials if trial.status == "RUNNING"}
    try:
        return running <= set(ray.get(flag.saved.remote(), timeout=_ANSWER_SECONDS))
    except RayError as error:
        logger.warning("The trials do not answer, and are ended as they are: %s", error)
        return True


class TrialStop:
    """Knows in a trial's process whether the sweep is stopped.

    Args:
        flag: The sweep's flag.
        trial_id: Tune's id of the trial.
    """

    def __init__(self, flag: Any, trial_id: str) -> None:
        self._flag = flag
        self._trial_id = trial_id
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="sweep-stop", daemon=True).start()

    def _watch(self) -> None:
        while not is_raised(self._flag):
            if self._stopped.wait(_POLL_SECONDS):
                return
        self._stopped.set()

    def is_set(self) -> bool:
        """Return whether the sweep is stopped."""
        return self._stopped.is_set()

    def wait_for_the_end(self) -> NoReturn:
        """Say that the trial has saved, and wait to be ended: one that returned would be taken for complete."""
        self._flag.note.remote(self._trial_id)
        while True:
            threading.Event().wait()
