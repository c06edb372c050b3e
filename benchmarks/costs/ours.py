"""Owns `EpisodeCheckpointCallback` as a way to save: it saves by itself, when an episode has ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from costs.saving import Method, Moment, Place
from costs.writing_process import WritingProcess
from sb3_mlflow_ckpt import EpisodeCheckpointCallback, MLflowMirror, latest_checkpoint, live_run, verify_checkpoint
from sb3_mlflow_ckpt.journal import RunJournal


def wait_for_processes(callback: EpisodeCheckpointCallback) -> None:
    """Wait until MLflow's mirror works in a process of its own."""
    while (live := callback._live) is not None and live.mirror_processes["MLflow"] is None:
        # It is asked whether it is ready at the next thing that it is told.
        live.note_resume({})
        time.sleep(0.05)


class Ours(Method):
    """`EpisodeCheckpointCallback` with everything on: it saves by itself, at the safe point after an episode's end."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._written = Moment()
        self._callback = _TimedCallback(
            self, 1, 3, place.folder, mirrors=[*self._mirrors(place), _Watch(self.saved)], resume_state="exact",
            mirror_process_seconds=0 if self._apart else math.inf,
        )  # fmt: skip
        self.callbacks = (self._callback,)

    _uploads = _apart = False

    def _mirrors(self, place: Place) -> list[MLflowMirror]:
        return []

    def save(self, model: Any) -> None:
        """Do nothing but forget the last one: the callback sees the end of the episode."""
        self._written.forget()
        self._count += 1

    def saved(self, journal: RunJournal) -> None:
        """Hear that the mirror has what is in the journal, whose `saved` follows a commit."""
        ledger = journal.snapshot()
        if len(ledger.saved) >= self._count and not (self._uploads and ledger.waiting):
            self._written.note()

    def taken(self, seconds: float) -> None:
        """Hear how long the training thread was held."""
        self.stall = seconds

    def wait(self) -> float:
        ended = self._written.wait()
        if self._apart:
            # The first ones warm it up: what is measured is the process at work.
            wait_for_processes(self._callback)
        if self._count == 1:
            latest = latest_checkpoint(self._folder)
            assert latest is not None and verify_checkpoint(latest).resume_state["exact"], "It must be exact"
        return ended


class OursWritingProcess(Ours):
    """The same, where a process of its own writes the files (see `writing_process`)."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        # A method has a process to itself.
        live_run.commit_checkpoint = WritingProcess().commit


class OursMLflow(Ours):
    """The same, with MLflowMirror in a process of its own."""

    _uploads = _apart = True

    def _mirrors(self, place: Place) -> list[MLflowMirror]:
        return [MLflowMirror(place.local)]


class OursMLflowServer(OursMLflow):
    """The same, to a server."""

    def _mirrors(self, place: Place) -> list[MLflowMirror]:
        return [MLflowMirror(place.server)]


class OursMLflowThread(OursMLflow):
    """With MLflowMirror in a thread of the training's process."""

    _apart = False


class OursMLflowServerThread(OursMLflowServer):
    """The same, to a server."""

    _apart = False


class _TimedCallback(EpisodeCheckpointCallback):
    def __init__(self, method: Ours, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._method = method

    def _take(self, point: Any) -> None:
        began = time.perf_counter()
        super()._take(point)
        self._method.taken(time.perf_counter() - began)


class _Watch:
    """A mirror that keeps nothing: it is told of each commit as mirrors are."""

    name, stores_checkpoints = "benchmark", False

    def __init__(self, hear: Callable[[RunJournal], None]) -> None:
        self.replicate = hear

    def open(self, record: Mapping[str, Any]) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {}

    def earlier(self) -> dict[str, Any]:
        return {}

    def tell_end(self, record: Mapping[str, Any]) -> None:
        pass

    def cancel(self, status: str) -> None:
        pass

    def close(self) -> None:
        pass
