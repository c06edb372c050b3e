"""Owns the process in which one mirror of a run works: the other end of `mirror_process`.

Reads lines of JSON from its standard input: first what the mirror and the run are, then what changed, and answers each
with a line when the mirror has it. It ends when its input ends, which is when the training's process does, however
that ends: nothing may be sent beside an attempt that follows.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import select
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.ledger import CheckpointLedger
from sb3_mlflow_ckpt.replication import Mirror
from sb3_mlflow_ckpt.runs.document import redact

_Send = Callable[[Mapping[str, Any]], None]
# A child of the training that inherited the pipe would keep it open; the parent's id tells all the same.
_LOOK_SECONDS = 1.0
# Whoever ends the training does so by a signal to its group or to all processes of a job, and the training ends this.
_TRAINING_S_OWN = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


class JournalReplica:
    """A run as it is told by its training's process, which writes down what is noted here.

    Args:
        folder: Where the run is kept; its curve and its checkpoints are read there.
        send: Tells the training's process.
    """

    def __init__(self, folder: RunFolder, send: _Send) -> None:
        self.folder = folder
        self.ledger = CheckpointLedger()
        self._record: dict[str, Any] = {}
        self._send = send

    def take(self, change: Mapping[str, Any]) -> None:
        """Take in what changed."""
        self._record = dict(change.get("record", self._record))
        for event in change.get("events", ()):
            self.ledger.apply(event)

    @property
    def record(self) -> dict[str, Any]:
        """A copy of the record."""
        return dict(self._record)

    def update(self, **fields: Any) -> None:
        """Have fields of the record changed."""
        self._record |= fields
        self._send({"update": fields})

    def add_mirrored(self, episode: int, uri: str, sha256: str | None) -> None:
        """Note that a checkpoint lies whole in the mirror."""
        self.ledger.apply({"event": "mirrored", "episode": episode, "uri": uri, "sha256": sha256})
        self._send({"mirrored": [episode, uri, sha256]})

    def add_unmirrored(self, episode: int, sha256: str | None) -> None:
        """Note that the mirror's retention removed its copy."""
        self.ledger.apply({"event": "unmirrored", "episode": episode, "sha256": sha256})
        self._send({"unmirrored": [episode, sha256]})

    def waiting_for_mirror(self) -> set[int]:
        """Return the episodes that are on disk and were never mirrored."""
        return set(self.ledger.waiting)

    def newest_mirrored(self, *further: int) -> int | None:
        """Return the episode in the mirror, or of some further ones, that was saved last."""
        return self.ledger.newest_mirrored(*further)

    def in_mirror(self) -> CheckpointLedger:
        """Return a copy of the ledger as far as it tells of checkpoints that lie in the mirror or wait for it."""
        return self.ledger.copy_of({*self.ledger.uris, *self.ledger.waiting})

    def changed_since(self, line: int, *further: int) -> tuple[CheckpointLedger, int]:
        """Return a copy of the ledger as far as lines behind a number told of it, and the number of the last line."""
        changed, last = self.ledger.changed_since(line)
        return self.ledger.copy_of({*changed, *further}), last


class _ToTraining(logging.Handler):
    """Sends log records to the training's process, which has the user's handlers."""

    def __init__(self, send: _Send) -> None:
        super().__init__(logging.INFO)
        self._send_message = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send_message({"log": [record.name, record.levelno, redact(record.getMessage())]})


class _Answers:
    """The standard output, kept from whatever a library prints."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; where nobody is left to hear it, there is nothing left to do either."""
        try:
            with self._lock:
                self._file.write(json.dumps(message).encode() + b"\n")
                self._file.flush()
        except OSError:
            os._exit(0)


def _built(blueprint: Mapping[str, Any]) -> Mirror:
    if blueprint["kind"] == "mlflow":
        from sb3_mlflow_ckpt.mirrors.mlflow import MLflowMirror

        return MLflowMirror.from_blueprint(blueprint)
    from sb3_mlflow_ckpt.mirrors.mongo import MongoMirror

    return MongoMirror.from_blueprint(blueprint)


def _read(lines: IO[bytes], parent: int, received: queue.SimpleQueue[bytes]) -> None:
    """Receive lines until there are no more, and end the process then, whatever it does at that moment."""
    unread = b""
    while os.getppid() == parent:
        if not select.select([lines], [], [], _LOOK_SECONDS)[0]:
            continue
        content = os.read(lines.fileno(), 1 << 20)
        if not content:
            break
        *whole, unread = (unread + content).split(b"\n")
        for line in whole:
            received.put(line)
    os._exit(0)


def _reason(error: Exception) -> str:
    return redact(str(error).strip() or type(error).__name__)


def main() -> None:
    """Be the mirror until the input ends."""
    for name in _TRAINING_S_OWN:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    answers, received = _Answers(), queue.SimpleQueue[bytes]()
    threading.Thread(target=_read, args=(sys.stdin.buffer, os.getppid(), received), daemon=True).start()
    start = json.loads(received.get())
    checkpoint_dir, agent_id, run_id = start["folder"]
    logging.getLogger("sb3_mlflow_ckpt").addHandler(_ToTraining(answers.send))
    mirror = _built(start["mirror"])
    journal = JournalReplica(RunFolder(Path(checkpoint_dir), agent_id, run_id), answers.send)
    answers.send({"ready": True})
    while True:
        journal.take(json.loads(received.get()))
        try:
            mirror.replicate(journal)
        except Exception as error:
            answers.send({"failed": _reason(error)})
        else:
            answers.send({"done": True})
