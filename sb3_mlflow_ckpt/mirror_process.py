"""Owns where a mirror does its work: first in a thread of the training's process, later in a process of its own.

MLflow's and MongoDB's clients are Python: each millisecond that they work in a thread is one that the training waits
for the interpreter. A process of its own takes a second or two to start, so it is worth it for a run that lasts. The
thread does the work until the process is there, and again if it dies or fails again and again.

The process knows of the run what it is told: the record and the ledger's lines, as they change. It answers with what
became of the copies, and the training's journal writes that down: a run folder has one writer. `mirrors.process` is
the other end.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from sb3_mlflow_ckpt.child_process import ChildProcess, ProcessDiedError
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.replication import Mirror

logger = logging.getLogger(__name__)

DEFAULT_AFTER_SECONDS = 20.0
# It finds this package where this process found it, whatever the script has done to the path.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from sb3_mlflow_ckpt.mirrors.process import main; main()"
)
_MOST_DEATHS = 3
_MOST_FAILURES = 4
_LASTING_SECONDS = 600.0
_LONGEST_WAIT_SECONDS = 1200.0


@runtime_checkable
class Relocatable(Protocol):
    """A mirror that another process can be told to be."""

    def blueprint(self) -> dict[str, Any] | None:
        """Return what makes the same mirror elsewhere, as JSON; None where there is no such thing, or not yet."""
        ...

    def take_back(self) -> None:
        """Forget what was sent from here: another process has sent since."""
        ...


class MirrorFailedError(Exception):
    """What the mirror raised in its process: an outage, as a rule."""


class MirrorPlace:
    """Brings one mirror up to date, in this process or in one of its own.

    Args:
        mirror: The mirror, opened.
        journal: The run.
        after_seconds: When a process of its own is started, counted from now; infinity never.
    """

    def __init__(self, mirror: Mirror, journal: RunJournal, after_seconds: float = DEFAULT_AFTER_SECONDS) -> None:
        self._mirror = mirror
        self._journal = journal
        # Elsewhere pipes cannot be asked whether something is in them.
        possible = os.name == "posix" and isinstance(mirror, Relocatable)
        self._due = time.monotonic() + after_seconds if possible else math.inf
        self._process: MirrorProcess | None = None
        self._deaths = 0
        self._failures = 0
        self._started = 0.0
        self._wait = DEFAULT_AFTER_SECONDS
        self._closed = False

    @property
    def process_id(self) -> int | None:
        """The id of the process that does the work; None while it is a thread of this one."""
        process = self._process
        return process.id if process is not None and process.ready else None

    def replicate(self) -> None:
        """Send everything that the journal has and the mirror has not; raises on an outage, as the mirror does."""
        if self._process is not None:
            try:
                if self._process.is_ready():
                    self._process.replicate()
                    self._failures = 0
                    return
            except ProcessDiedError as error:
                self._bury(error)
            except MirrorFailedError as error:
                self._failures += 1
                if self._failures < _MOST_FAILURES:
                    raise
                self._set_aside(error)
            if self._closed:
                return
        self._mirror.replicate(self._journal)
        # Only now: what the mirror is to be told elsewhere, such as its run's id, is known since.
        if self._process is None and time.monotonic() >= self._due:
            self._start()

    def close(self) -> None:
        """End the process, whatever it does at this moment. Callable from any thread."""
        self._closed = True
        # The replicator's thread may bury it at this moment.
        process = self._process
        if process is not None:
            process.kill()

    def _start(self) -> None:
        assert isinstance(self._mirror, Relocatable)
        try:
            blueprint = self._mirror.blueprint()
            if blueprint is None or self._closed:
                return
            self._process = MirrorProcess(blueprint, self._journal)
            self._started = time.monotonic()
        except Exception as error:
            # Whatever it is, the mirror is not behind: the thread has just sent everything.
            self._bury(error)
        else:
            if self._closed:
                # Meanwhile: nobody else knows of it yet.
                self._process.kill()

    def _bury(self, error: Exception) -> None:
        """Have this process do the work again; after a while, or never if it happens again and again."""
        self._deaths += 1
        self._leave_process()
        self._due = time.monotonic() + DEFAULT_AFTER_SECONDS if self._deaths < _MOST_DEATHS else math.inf
        if not self._closed:
            logger.info("The process that sends to %s is gone, this one goes on (%s)", self._mirror.name, error)

    def _set_aside(self, error: MirrorFailedError) -> None:
        """Have this process do the work, whose environment may hold what the other's lacks: a token that was renewed.

        The next process inherits what the environment is then. It is started when the thread has sent everything: in
        an outage, which fails here as there, none is, however often it is tried. Where the thread succeeds and the
        processes fail, each that does not last doubles the wait for the next one, up to a limit.
        """
        lasted = time.monotonic() - self._started >= _LASTING_SECONDS
        self._wait = DEFAULT_AFTER_SECONDS if lasted else min(2 * self._wait, _LONGEST_WAIT_SECONDS)
        self._leave_process()
        self._due = time.monotonic() + self._wait
        logger.debug("%s is sent to from the training's own process for a while (%s)", self._mirror.name, error)

    def _leave_process(self) -> None:
        self._failures = 0
        if self._process is not None:
            self._process.kill()
            self._process = None
            if isinstance(self._mirror, Relocatable):
                self._mirror.take_back()


class MirrorProcess:
    """The process, from this side. One thread tells it and asks it; any thread ends it.

    Args:
        blueprint: What the mirror is made from.
        journal: The run.

    Attributes:
        ready: Whether it has said that it can be told to work.

    Raises:
        OSError: It cannot be started.
        ProcessDiedError: It died at once, or there is no Python to start.
    """

    def __init__(self, blueprint: Mapping[str, Any], journal: RunJournal) -> None:
        self._journal = journal
        self._sent_record: dict[str, Any] | None = None
        self.ready = False
        if not sys.executable:
            raise ProcessDiedError("it is not known which program this Python is")
        # A script may have put anything there; Python itself passes over what is not a string.
        path = [entry for entry in sys.path if isinstance(entry, str)]
        self._child = ChildProcess([sys.executable, "-c", _START, json.dumps(path)])
        self._feed = journal.feed()
        folder = journal.folder
        place = [str(folder.checkpoint_dir.absolute()), folder.agent_id, folder.run_id]
        try:
            self._child.tell({"mirror": dict(blueprint), "folder": place})
        except BaseException:
            self.kill()
            raise

    @property
    def id(self) -> int:
        """The process's id."""
        return self._child.id

    def is_ready(self) -> bool:
        """Return whether it can be told to work. Does not wait.

        Raises:
            ProcessDiedError: It died before it was.
        """
        while not self.ready and (said := self._child.heard()) is not None:
            if "ready" in said:
                self.ready = True
            else:
                self._take(said)
        return self.ready

    def replicate(self) -> None:
        """Tell what changed, and wait until the mirror has it.

        Raises:
            MirrorFailedError: The mirror raised something; it is tried again with the next call.
            ProcessDiedError: It died.
        """
        record, events = self._journal.record, self._feed.take()
        changed = {} if record == self._sent_record else {"record": record}
        self._child.tell({**changed, "events": events})
        self._sent_record = record
        while True:
            answer = self._child.hear()
            if "failed" in answer:
                raise MirrorFailedError(str(answer["failed"]))
            if "done" in answer:
                return
            self._take(answer)

    def kill(self) -> None:
        """End it."""
        self._journal.unfeed(self._feed)
        self._child.kill()

    def _take(self, answer: Mapping[str, Any]) -> None:
        """Write down what it says.

        Raises:
            ProcessDiedError: That cannot be done. Its next answers would be taken for those to later questions.
        """
        journal = self._journal
        try:
            if "mirrored" in answer:
                journal.add_mirrored(*answer["mirrored"])
            elif "unmirrored" in answer:
                journal.add_unmirrored(*answer["unmirrored"])
            elif "update" in answer:
                journal.update(**answer["update"])
            elif "log" in answer:
                name, level, message = answer["log"]
                logging.getLogger(name).log(level, "%s", message)
        except Exception as error:
            raise ProcessDiedError(f"what it said was not taken: {error}") from error
