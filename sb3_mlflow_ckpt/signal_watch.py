"""Owns the process's signal handlers: who is told of a signal, in the main thread and in one that hears it at once.

Python calls handlers in the main thread, and only between two of its instructions: one that is in a call into C does
not hear. So a thread reads what the C level notes of each signal, and can act whatever the main thread does.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from types import FrameType
from typing import Any, Protocol

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
"""What ends a training: SIGUSR1 is what SLURM can be told to send some time before it kills."""


_TOGETHER_SECONDS = 0.01


class Listener(Protocol):
    """Is told of signals."""

    def heard(self, signum: int) -> None:
        """Take note of a signal, in whichever thread; more than once for each."""
        ...

    def interrupt(self, signum: int, frame: FrameType | None) -> None:
        """Act on a signal in the main thread, which stands at `frame`; what is raised leaves it there."""
        ...


class SignalWatch:
    """Holds the handlers while there is anybody to be told."""

    def __init__(self) -> None:
        self._listeners: tuple[Listener, ...] = ()
        self._before: dict[int, Any] = {}
        self._wake: tuple[int, int] | None = None
        os.register_at_fork(after_in_child=self._forget)

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """Who is told, the last one first."""
        return self._listeners

    def add(self, listener: Listener) -> bool:
        """Tell a listener from now on; return whether that is possible: only the main thread can set handlers."""
        if threading.current_thread() is not threading.main_thread():
            return False
        if listener not in self._listeners:
            # Whoever comes first is told before there is a handler: no signal falls between.
            self._listeners = (listener, *self._listeners)
            self._install()
        return True

    def discard(self, listener: Listener) -> None:
        """Tell a listener no more; with the last one, the handlers are given back."""
        self._listeners = tuple(other for other in self._listeners if other is not listener)
        if not self._listeners and threading.current_thread() is threading.main_thread():
            self._restore()

    def ignore(self) -> None:
        """Have signals ignored for the rest of the process: they cannot cut its exit short."""
        for signum in self._before:
            # Python itself would take its handlers away some time before the process is gone.
            signal.signal(signum, signal.SIG_IGN)

    def _install(self) -> None:
        if self._before:
            return
        self._start_thread()
        for signum in SIGNALS:
            handler = signal.getsignal(signum)
            # Whoever uses SIGUSR1 for something of his own goes on doing so.
            if signum in (signal.SIGTERM, signal.SIGINT) or handler == signal.SIG_DFL:
                self._before[signum] = signal.signal(signum, self._handle)

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            # Somebody may have set a handler after ours. None is one that was not set from Python.
            if signal.getsignal(signum) == self._handle:
                signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()
        wake, self._wake = self._wake, None
        if wake is not None:
            taken = signal.set_wakeup_fd(-1)
            if taken != wake[1]:
                signal.set_wakeup_fd(taken)
            os.close(wake[1])

    def _start_thread(self) -> None:
        ours = os.pipe()
        os.set_blocking(ours[1], False)
        other = signal.set_wakeup_fd(ours[1], warn_on_full_buffer=False)
        if other != -1:
            # An event loop's: then the main thread alone hears.
            signal.set_wakeup_fd(other)
            for end in ours:
                os.close(end)
            return
        self._wake = ours
        threading.Thread(target=self._listen, args=(ours[0],), name="signals", daemon=True).start()

    def _listen(self, read_end: int) -> None:
        with open(read_end, "rb", buffering=0) as pipe:
            while noted := pipe.read(64):
                # Of two that come together, the system notes the later one first.
                if select.select([pipe], [], [], _TOGETHER_SECONDS)[0]:
                    noted += pipe.read(64)
                for signum in sorted(noted):
                    if signum in self._before:
                        for listener in self._listeners:
                            listener.heard(signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        listeners = self._listeners
        for listener in listeners:
            listener.heard(signum)
        for listener in listeners:
            listener.interrupt(signum, frame)

    def _forget(self) -> None:
        """Give signals back in a process that was forked: the pipe is the parent's."""
        if not self._before:
            return
        self._listeners = ()
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
            self._restore()


watch = SignalWatch()
"""The process's own."""
